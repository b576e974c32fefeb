//! Serves HTTP by a service of lines.

use std::convert::Infallible;

use bytes::Bytes;
use tower::service_fn;
use tower_tcp::Server;
use tower_tcp::http::Http;

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    Server::bind("127.0.0.1:7000")
        .await?
        .serve(Http::new(echo))
        .await?;
    Ok(())
}
