//! Gives a make-service where a service of requests belongs.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::BoxError;
use tower_tcp::Peer;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        peer.send("220 ready".into()).await?;
        Ok::<_, BoxError>(service_fn(|line: Bytes| async move {
            Ok::<_, Infallible>(line)
        }))
    });
    let pipeline = Pipeline::new(Lines::default).service(make);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
