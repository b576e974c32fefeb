//! `RequestsOnlyLayer` puts a layer around the requests of an event service. Messages bypass it,
//! and readiness is kept.

mod support;

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use support::{Clients, Ends, settled};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tower::limit::{ConcurrencyLimitLayer, RateLimitLayer};
use tower::load_shed::{LoadShedLayer, error::Overloaded};
use tower::timeout::{TimeoutLayer, error::Elapsed};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{Event, RequestsOnlyLayer};
use tower_tcp::testkit::serve;
use tower_tcp::{BoxError, EndReason, Peer, Pipeline};

const SECOND: Duration = Duration::from_secs(1);

type Teller = Peer<Bytes, Duration>;

/// Sleeps for as many seconds as a request says, or as long as a message is.
async fn sleeps(event: Event<Bytes, Duration>) -> Result<Option<Bytes>, Infallible> {
    match event {
        Event::Request(seconds) => {
            let seconds = String::from_utf8_lossy(&seconds).parse().unwrap_or(0);
            sleep(seconds * SECOND).await;
            Ok(Some("request".into()))
        }
        Event::Message(time) => {
            sleep(time).await;
            Ok(Some("message".into()))
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stock_timeout_ends_a_slow_request_and_no_slow_message() {
    let (tell, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Teller| {
        tell.try_send(peer).expect("there is room");
        let timeout = RequestsOnlyLayer::new(TimeoutLayer::new(5 * SECOND));
        ready(Ok::<_, Infallible>(timeout.layer(service_fn(sleeps))))
    });
    let served = serve(Pipeline::new(Lines::default).make_event_service(make));
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is served");

    peer.post(20 * SECOND).await.expect("it is open");
    assert_eq!(client.line().await, "message");
    assert_eq!(client.ask("4").await, "request");
    let begun = Instant::now();
    client.send("6\n").await;
    client.rest().await;

    assert_eq!(begun.elapsed(), 5 * SECOND);
    drop(client);
    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::ServiceError);
    assert!(
        end.error()
            .is_some_and(|err| find_cause::<Elapsed>(err).is_some())
    );
}

#[tokio::test(start_paused = true)]
async fn a_stock_concurrency_limit_bounds_requests_and_takes_no_place_for_messages() {
    let (tell, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Teller| {
        tell.try_send(peer).expect("there is room");
        let limit = RequestsOnlyLayer::new(ConcurrencyLimitLayer::new(2));
        ready(Ok::<_, Infallible>(limit.layer(service_fn(sleeps))))
    });
    let pipeline = Pipeline::new(Lines::default).make_event_service(make);
    let served = serve(pipeline.multiplexed(8));
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is served");

    // Five messages in progress leave the requests their two places.
    for _ in 0..5 {
        peer.post(60 * SECOND).await.expect("it is open");
    }
    settled().await;
    let begun = Instant::now();
    client.send("10\n10\n10\n").await;
    for after in [10, 10, 20] {
        assert_eq!(client.line().await, "request");
        assert_eq!(begun.elapsed(), after * SECOND);
    }
    assert_eq!(client.line().await, "message");
}

#[tokio::test(start_paused = true)]
async fn a_stock_rate_limit_counts_requests_only() {
    let rate = RequestsOnlyLayer::new(RateLimitLayer::new(1, 10 * SECOND));
    let mut service = rate.layer(service_fn(sleeps));
    let begun = Instant::now();

    for _ in 0..100 {
        let message = Event::Message(Duration::ZERO);
        service.ready().await.unwrap().call(message).await.unwrap();
    }
    let request = || Event::Request(Bytes::from("0"));
    service
        .ready()
        .await
        .unwrap()
        .call(request())
        .await
        .unwrap();
    assert!(begun.elapsed() < SECOND);
    service
        .ready()
        .await
        .unwrap()
        .call(request())
        .await
        .unwrap();

    assert!(begun.elapsed() >= 10 * SECOND);
}

/// Becomes ready at every second poll. A call while it is not ready is counted as a fault.
struct Strict {
    looks: usize,
    ready: bool,
    calls: Arc<AtomicUsize>,
    faults: Arc<AtomicUsize>,
}

impl Service<Event<u32, u32>> for Strict {
    type Response = u32;
    type Error = BoxError;
    type Future = Ready<Result<u32, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.looks += 1;
        if !self.ready && self.looks % 2 == 1 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, event: Event<u32, u32>) -> Self::Future {
        let was_ready = std::mem::take(&mut self.ready);
        self.faults
            .fetch_add((!was_ready).into(), Ordering::Relaxed);
        self.calls.fetch_add(1, Ordering::Relaxed);
        let (Event::Request(number) | Event::Message(number)) = event;
        ready(Ok(number))
    }
}

#[tokio::test(start_paused = true)]
async fn the_service_that_is_called_is_the_one_that_was_made_ready() {
    let (calls, faults) = (Arc::default(), Arc::default());
    let strict = Strict {
        looks: 0,
        ready: false,
        calls: Arc::clone(&calls),
        faults: Arc::clone(&faults),
    };
    // The timeout is ready when its service is, load shedding always, and the concurrency limit
    // holds a permit while its service is not ready.
    let layers = ServiceBuilder::new()
        .layer(TimeoutLayer::new(SECOND))
        .layer(LoadShedLayer::new())
        .layer(ConcurrencyLimitLayer::new(1))
        .into_inner();
    let mut service = RequestsOnlyLayer::new(layers).layer(strict);

    let mut answered = 0;
    for n in 0..100 {
        let request = n % 3 == 0;
        let event = if request {
            Event::Request(n)
        } else {
            Event::Message(n)
        };
        match service.ready().await.unwrap().call(event).await {
            Ok(number) => {
                assert_eq!(number, n);
                answered += 1;
            }
            Err(err) => assert!(request && err.is::<Overloaded>(), "{err}"),
        }
    }

    assert!(answered >= 66, "all messages are answered");
    assert_eq!(calls.load(Ordering::Relaxed), answered);
    assert_eq!(faults.load(Ordering::Relaxed), 0);
}
