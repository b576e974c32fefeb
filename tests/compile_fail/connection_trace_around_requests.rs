//! Puts the trace layer of connections around a service of requests.

use std::convert::Infallible;

use bytes::Bytes;
use tower::ServiceBuilder;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::frame::Lines;
use tower_tcp::observe::ConnectionTraceLayer;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let pipeline = Pipeline::new(Lines::default).service(echo);
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(pipeline).await?;
    Ok(())
}
