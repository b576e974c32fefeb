//! Gives a make-service where a service of HTTP requests belongs.

use std::convert::Infallible;

use tower::service_fn;
use tower_tcp::ConnectionInfo;
use tower_tcp::Server;
use tower_tcp::http::hyper::{Request, Response};
use tower_tcp::http::{Http, RequestBody};

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let make = service_fn(|_: ConnectionInfo| async move {
        Ok::<_, Infallible>(service_fn(|_: Request<RequestBody>| async move {
            Ok::<_, Infallible>(Response::new("hello".to_owned()))
        }))
    });
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(Http::new(make)).await?;
    Ok(())
}
