//! Takes a peer of text from a codec of bytes.

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
    let make = service_fn(|peer: Peer<String>| async move {
        peer.send("220 ready".to_owned()).await?;
        Ok::<_, BoxError>(service_fn(|_: Bytes| async move {
            Ok::<_, Infallible>("250 ok".to_owned())
        }))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
