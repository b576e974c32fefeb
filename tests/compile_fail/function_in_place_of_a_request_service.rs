//! Gives an `async fn`, which is no service by itself, to a pipeline.

use std::convert::Infallible;

use bytes::Bytes;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

async fn echo(line: Bytes) -> Result<Bytes, Infallible> {
    Ok(line)
}

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let pipeline = Pipeline::new(Lines::default).service(echo);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
