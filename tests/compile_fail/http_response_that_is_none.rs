//! Answers an HTTP request with plain text in place of a response.

use std::convert::Infallible;

use tower::service_fn;
use tower_tcp::Server;
use tower_tcp::http::hyper::Request;
use tower_tcp::http::{Http, RequestBody};

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let hello = service_fn(|_: Request<RequestBody>| async move { Ok::<_, Infallible>("hello") });
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(Http::new(hello)).await?;
    Ok(())
}
