//! Serves requests without a pipeline around them.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Server;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(echo).await?;
    Ok(())
}
