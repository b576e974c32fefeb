//! Takes `Bytes` from a codec that decodes `BytesMut`.

use std::convert::Infallible;

use bytes::Bytes;
use tokio_util::codec::LengthDelimitedCodec;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let pipeline = Pipeline::new(LengthDelimitedCodec::new).service(echo);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
