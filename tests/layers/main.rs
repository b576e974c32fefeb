//! Tests that LAYERS.md names: what stock tower layers do at each place.
//!
//! `tests/stock_layers.rs` has more of them.

#[path = "../support/mod.rs"]
mod support;

mod around_make_services;
mod connections;
mod made_services;
mod requests;
mod table;

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;
use tower::Service;
use tower::retry::Policy;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{BoxError, Peer, Pipeline};

use support::{Clients, Ends};

const SEC: Duration = Duration::from_secs(1);

/// Answers a line that is a number after that many seconds, and any other line at once.
async fn desk(line: Bytes) -> Result<Bytes, BoxError> {
    if let Ok(seconds) = std::str::from_utf8(&line)?.parse() {
        sleep(SEC * seconds).await;
    }
    Ok(line)
}

/// Turns an error into a reply.
fn told(result: Result<Bytes, BoxError>) -> Result<Bytes, BoxError> {
    Ok(result.unwrap_or_else(|err| err.to_string().into()))
}

/// Serves all connections with one service, which is cloned for each request.
fn serve_all_with<S>(service: S) -> Served
where
    S: Service<Bytes, Response = Bytes, Error: Into<BoxError>, Future: Send>
        + Clone
        + Send
        + 'static,
{
    serve(Pipeline::new(Lines::default).service(service))
}

/// Serves each connection with a service that is made for it.
fn serve_each_with<S>(make: impl Fn() -> S + Clone + Send + 'static) -> Served
where
    S: Service<Bytes, Response = Bytes, Error: Into<BoxError>, Future: Send> + Send + 'static,
{
    let make = tower::service_fn(move |_: Peer<Bytes>| ready(Ok::<_, Infallible>(make())));
    serve(Pipeline::new(Lines::default).make_service(make))
}

/// Retries a failed request this many times, if it can be cloned.
#[derive(Clone)]
struct Tries<F>(u32, F);

impl<F: FnMut(&Req) -> Option<Req>, Req, Res, E> Policy<Req, Res, E> for Tries<F> {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Req, result: &mut Result<Res, E>) -> Option<Ready<()>> {
        let again = result.is_err() && self.0 > 0;
        self.0 = self.0.saturating_sub(1);
        again.then(|| ready(()))
    }

    fn clone_request(&mut self, request: &Req) -> Option<Req> {
        self.1(request)
    }
}
