//! Greets a peer by a function that does not end with `Ok(())`.

use std::convert::Infallible;

use bytes::Bytes;
use tower::ServiceBuilder;
use tower::make::Shared;
use tower::service_fn;
use tower_tcp::BoxError;
use tower_tcp::Peer;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::OnConnectLayer;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let greet = OnConnectLayer::new(|peer: Peer<Bytes>| async move {
        peer.send("220 ready".into()).await?;
        Ok::<_, BoxError>(peer)
    });
    let make = ServiceBuilder::new()
        .layer(greet)
        .service(Shared::new(echo));
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
