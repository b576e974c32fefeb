//! Checks a connection, and does not give it back.

use std::convert::Infallible;

use bytes::Bytes;
use tower::ServiceBuilder;
use tower::service_fn;
use tower_tcp::BoxError;
use tower_tcp::Connection;
use tower_tcp::Pipeline;
use tower_tcp::Server;
use tower_tcp::bind::Socket;
use tower_tcp::frame::Lines;
use tower_tcp::preconnect::PreConnectLayer;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let check = service_fn(|_: Connection<Socket>| async move { Ok::<_, BoxError>(()) });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(check))
        .service(Pipeline::new(Lines::default).service(echo));
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(stack).await?;
    Ok(())
}
