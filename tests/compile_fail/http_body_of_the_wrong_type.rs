//! Answers with a type that is not a body.

use std::convert::Infallible;

use tower::service_fn;
use tower_tcp::Server;
use tower_tcp::http::hyper::{Request, Response};
use tower_tcp::http::{Http, RequestBody};

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let count =
        service_fn(|_: Request<RequestBody>| async move { Ok::<_, Infallible>(Response::new(1)) });
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(Http::new(count)).await?;
    Ok(())
}
