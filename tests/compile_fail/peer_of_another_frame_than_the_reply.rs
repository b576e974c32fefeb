//! Takes a peer of `BytesMut`, and answers with `Bytes`.

use std::convert::Infallible;

use bytes::BytesMut;
use tokio_util::codec::BytesCodec;
use tower::service_fn;
use tower_tcp::BoxError;
use tower_tcp::Peer;
use tower_tcp::Pipeline;
use tower_tcp::Server;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let make = service_fn(|peer: Peer<BytesMut>| async move {
        peer.send("220 ready".into()).await?;
        Ok::<_, BoxError>(service_fn(|bytes: BytesMut| async move {
            Ok::<_, Infallible>(vec![bytes.freeze()])
        }))
    });
    let pipeline = Pipeline::new(BytesCodec::new).make_service(make);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
