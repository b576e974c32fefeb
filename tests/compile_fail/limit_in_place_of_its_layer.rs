//! Adds a limit as a layer, without calling its method for the layer.

use std::convert::Infallible;

use bytes::Bytes;
use tower::ServiceBuilder;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let stack = ServiceBuilder::new()
        .layer(ConnectionLimit::new(100))
        .service(Pipeline::new(Lines::default).service(echo));
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(stack).await?;
    Ok(())
}
