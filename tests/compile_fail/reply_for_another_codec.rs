//! Sends a `Reply` of text through a codec of bytes.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Reply;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let bye =
        service_fn(
            |_: Bytes| async move { Ok::<_, Infallible>(Reply::from("bye".to_owned()).close()) },
        );
    let pipeline = Pipeline::new(Lines::default).service(bye);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
