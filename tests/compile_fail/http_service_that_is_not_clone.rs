//! Serves HTTP by a service that is not `Clone`.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use tower::Service;
use tower_tcp::Server;
use tower_tcp::http::hyper::{Request, Response};
use tower_tcp::http::{Http, RequestBody};

struct Counter {
    count: u64,
}

impl Service<Request<RequestBody>> for Counter {
    type Response = Response<String>;
    type Error = Infallible;
    type Future = Ready<Result<Response<String>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<RequestBody>) -> Self::Future {
        self.count += 1;
        ready(Ok(Response::new(self.count.to_string())))
    }
}

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(Http::new(Counter { count: 0 })).await?;
    Ok(())
}
