//! Puts tower's `RateLimit`, which is not `Clone`, into a `PerCall`, which clones for each request.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use tower::ServiceBuilder;
use tower::layer::layer_fn;
use tower::service_fn;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::PerCall;
use tower_tcp::{Peer, Pipeline, Server};

#[tokio::main]
async fn main() -> Result<(), tower_tcp::Error> {
    let make = service_fn(|_: Peer<Bytes>| async {
        let limited = ServiceBuilder::new()
            .layer(layer_fn(PerCall::new))
            .rate_limit(10, Duration::from_secs(1))
            .service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
        Ok::<_, Infallible>(limited)
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    Server::bind("127.0.0.1:7000").await?.serve(pipeline).await?;
    Ok(())
}
