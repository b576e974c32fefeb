//! Gives a service of requests where one that makes services belongs.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let pipeline = Pipeline::new(Lines::default).make_service(echo);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
