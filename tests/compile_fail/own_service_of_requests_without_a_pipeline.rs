//! Serves requests without a pipeline, by a handwritten service.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use bytes::Bytes;
use tower::Service;
use tower_tcp::Server;

struct Counter {
    count: u64,
}

impl Service<Bytes> for Counter {
    type Response = Bytes;
    type Error = Infallible;
    type Future = Ready<Result<Bytes, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Bytes) -> Self::Future {
        self.count += 1;
        ready(Ok(self.count.to_string().into()))
    }
}

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let server = Server::bind("127.0.0.1:7000").await?;
    server.serve(Counter { count: 0 }).await?;
    Ok(())
}
