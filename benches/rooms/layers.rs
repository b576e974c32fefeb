//! The request stack: the cost that each layer alone adds to a request, and the cost of all layers.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use divan::Bencher;
use tower::layer::util::Identity;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::ShutdownOnErrorLayer;
use tower_tcp::testkit::Connector;
use tower_tcp::{BoxError, Peer, Pipeline};

use crate::support::{Client, Load, by_hand, echo, line, line_of, serve};

/// Never reached, like the limits below.
const LONG: Duration = Duration::from_secs(60);
const MANY: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
enum Layers {
    Bare,
    BareCloned,
    ByHand,
    MapErr,
    Timeout,
    ConcurrencyLimit,
    RateLimit,
    LoadShed,
    ShutdownOnError,
    Buffer,
    Whole,
}

const ALL: [Layers; 11] = [
    Layers::Bare,
    Layers::BareCloned,
    Layers::ByHand,
    Layers::MapErr,
    Layers::Timeout,
    Layers::ConcurrencyLimit,
    Layers::RateLimit,
    Layers::LoadShed,
    Layers::ShutdownOnError,
    Layers::Buffer,
    Layers::Whole,
];

#[divan::bench(consts = [1, 16], args = ALL)]
fn ahead<const AHEAD: usize>(bencher: Bencher, layers: Layers) {
    let client = match layers {
        Layers::ByHand => Client::of(|stream| by_hand(stream, line)),
        Layers::BareCloned => {
            Client::of_server(|| serve(Pipeline::new(Lines::default).service(service_fn(echo))))
        }
        Layers::Bare => stack(|new| new.service_fn(echo)),
        Layers::MapErr => stack(|new| {
            new.map_err(|never: Infallible| -> BoxError { match never {} })
                .service_fn(echo)
        }),
        Layers::Timeout => stack(|new| new.timeout(LONG).service_fn(echo)),
        Layers::ConcurrencyLimit => {
            let limit = GlobalConcurrencyLimitLayer::new(256);
            stack(move |new| new.layer(limit.clone()).service_fn(echo))
        }
        Layers::RateLimit => stack(|new| new.rate_limit(MANY, LONG).service_fn(echo)),
        Layers::LoadShed => stack(|new| new.load_shed().service_fn(echo)),
        Layers::ShutdownOnError => stack(|new| new.layer(ShutdownOnErrorLayer).service_fn(echo)),
        Layers::Buffer => stack(|new| new.buffer(64).service_fn(echo)),
        // As in the `stack` example.
        Layers::Whole => {
            let limit = GlobalConcurrencyLimitLayer::new(256);
            stack(move |new| {
                new.map_result(|reply: Result<Bytes, BoxError>| reply)
                    .layer(limit.clone())
                    .load_shed()
                    .rate_limit(MANY, LONG)
                    .timeout(LONG)
                    .layer(ShutdownOnErrorLayer)
                    .service_fn(echo)
            })
        }
    };
    client.bench(bencher, &Load::new(&line_of(16), AHEAD));
}

/// A client of a stack that is made for each connection.
fn stack<S>(make: impl Fn(ServiceBuilder<Identity>) -> S + Clone + Send + 'static) -> Client
where
    S: Service<Bytes, Response = Bytes, Error: Into<BoxError>> + Send + 'static,
    S::Future: Send,
{
    Client::of_server(move || -> Connector {
        let make = service_fn(move |_: Peer<Bytes>| {
            let service = make(ServiceBuilder::new());
            async { Ok::<_, BoxError>(service) }
        });
        serve(Pipeline::new(Lines::default).make_service(make))
    })
}
