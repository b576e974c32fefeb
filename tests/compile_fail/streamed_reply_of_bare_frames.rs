//! Streams frames without `Result` around them.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::stream;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Reply;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let twice = service_fn(|line: Bytes| async move {
        Ok::<_, Infallible>(Reply::stream(stream::iter([line.clone(), line])))
    });
    let pipeline = Pipeline::new(Lines::default).service(twice);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
