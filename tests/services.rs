//! Services: a user's code that panics, fails, is never ready or never completes affects only its
//! own connection.

mod support;

use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tower::util::BoxCloneService;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::frame::{CodecExt, InOut, Lines};
use tower_tcp::pipeline::ShutdownOnErrorLayer;
use tower_tcp::testkit::serve;
use tower_tcp::{BoxError, Connection, EndReason, Peer, Pipeline};

use support::{Clients, Ends, exchange, panic_if, read_to_end, until};
use tokio::io::DuplexStream as Io;

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

/// Fails for lines that begin with `fail`, and hangs for those that begin with `hang`.
async fn moody(line: Bytes) -> Result<Bytes, BoxError> {
    if line.starts_with(b"fail") {
        return Err("as asked".into());
    }
    if line.starts_with(b"hang") {
        pending::<()>().await;
    }
    Ok(line)
}

// Panics

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    PollReady,
    Call,
    Future,
    DropOfFuture,
}

/// Echoes one line, and panics at the second.
struct PanicsAtSecond {
    place: Place,
    begun: usize,
}

impl Service<Bytes> for PanicsAtSecond {
    type Response = Bytes;
    type Error = Infallible;
    type Future = PanicsFuture;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        panic_if(self.place == Place::PollReady && self.begun > 0);
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, line: Bytes) -> PanicsFuture {
        self.begun += 1;
        let place = (self.begun > 1).then_some(self.place);
        panic_if(place == Some(Place::Call));
        PanicsFuture { line, place }
    }
}

struct PanicsFuture {
    line: Bytes,
    place: Option<Place>,
}

impl Future for PanicsFuture {
    type Output = Result<Bytes, Infallible>;

    fn poll(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Self::Output> {
        panic_if(self.place == Some(Place::Future));
        Poll::Ready(Ok(self.line.clone()))
    }
}

impl Drop for PanicsFuture {
    fn drop(&mut self) {
        panic_if(self.place == Some(Place::DropOfFuture));
    }
}

async fn a_panic_ends_its_connection_behind_the_answers_before_it(place: Place) {
    let make = service_fn(move |_peer: Peer<Bytes>| async move {
        Ok::<_, Infallible>(PanicsAtSecond { place, begun: 0 })
    });
    let server = serve(Pipeline::new(Lines::default).make_service(make));
    let bystander = server.stream().await;

    let replies = server.exchange("one\ntwo\nthree\n").await;

    assert_eq!(replies, "one\n");
    until(|| server.reasons() == [EndReason::Panic]).await;
    assert_eq!(exchange(bystander, "still\n").await, "still\n");
    server.all_gone().await;
}

#[tokio::test(start_paused = true)]
async fn e1_a_panic_in_poll_ready_ends_its_connection_only() {
    a_panic_ends_its_connection_behind_the_answers_before_it(Place::PollReady).await;
}

#[tokio::test(start_paused = true)]
async fn e1_a_panic_in_call_ends_its_connection_only() {
    a_panic_ends_its_connection_behind_the_answers_before_it(Place::Call).await;
}

#[tokio::test(start_paused = true)]
async fn e1_a_panic_in_the_future_ends_its_connection_only() {
    a_panic_ends_its_connection_behind_the_answers_before_it(Place::Future).await;
}

#[tokio::test(start_paused = true)]
async fn e1_a_panic_in_drop_of_the_future_ends_its_connection_only() {
    a_panic_ends_its_connection_behind_the_answers_before_it(Place::DropOfFuture).await;
}

/// A connection service's future that completes at once, and panics when it is dropped.
struct PanicsInDrop;

impl Future for PanicsInDrop {
    type Output = Result<(), BoxError>;

    fn poll(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(Ok(()))
    }
}

impl Drop for PanicsInDrop {
    fn drop(&mut self) {
        panic_if(true);
    }
}

#[tokio::test(start_paused = true)]
async fn e1_a_panic_in_drop_of_a_connections_own_future_is_its_end() {
    let server = serve(service_fn(|conn: Connection<Io>| {
        drop(conn);
        PanicsInDrop
    }));

    let replies = [
        read_to_end(server.stream().await).await,
        read_to_end(server.stream().await).await,
    ];

    assert_eq!(replies, ["", ""]);
    until(|| server.reasons() == [EndReason::Panic; 2]).await;
    server.all_gone().await;
}

#[tokio::test(start_paused = true)]
async fn e1_a_panic_among_requests_in_flight_takes_its_place_in_the_order() {
    let service = service_fn(|line: Bytes| async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        panic_if(line == "two");
        Ok::<_, Infallible>(line)
    });
    let pipeline = Pipeline::new(Lines::default).service(service).in_flight(3);
    let server = serve(pipeline);

    let replies = server.exchange("one\ntwo\nthree\n").await;

    assert_eq!(replies, "one\n");
    until(|| server.reasons() == [EndReason::Panic]).await;
    server.all_gone().await;
}

/// A layer's service that panics for its connections or requests, in `call` or in its future.
#[derive(Clone)]
struct PanickingLayer(Place);

#[derive(Clone)]
struct Panicking<S>(S, Place);

impl<S> Layer<S> for PanickingLayer {
    type Service = Panicking<S>;

    fn layer(&self, inner: S) -> Panicking<S> {
        Panicking(inner, self.0)
    }
}

impl<S, R> Service<R> for Panicking<S>
where
    S: Service<R>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        panic_if(self.1 == Place::Call);
        let (inner, place) = (self.0.call(request), self.1);
        Box::pin(async move {
            panic_if(place == Place::Future);
            inner.await
        })
    }
}

#[tokio::test(start_paused = true)]
async fn e3_a_panic_in_a_layer_around_requests_ends_its_connection_only() {
    for place in [Place::Call, Place::Future] {
        let service = ServiceBuilder::new()
            .layer(PanickingLayer(place))
            .service_fn(echo);
        let server = serve(Pipeline::new(Lines::default).service(service));

        let replies = [server.exchange("a\n").await, server.exchange("b\n").await];

        assert_eq!(replies, ["", ""]);
        until(|| server.reasons() == [EndReason::Panic; 2]).await;
        server.all_gone().await;
    }
}

#[tokio::test(start_paused = true)]
async fn e3_a_panic_in_a_layer_around_connections_ends_its_connection_only() {
    for place in [Place::Call, Place::Future] {
        let stack = ServiceBuilder::new()
            .layer(PanickingLayer(place))
            .service(Pipeline::new(Lines::default).service(service_fn(echo)));
        let server = serve(stack);

        let replies = [
            read_to_end(server.stream().await).await,
            read_to_end(server.stream().await).await,
        ];

        assert_eq!(replies, ["", ""]);
        until(|| server.reasons() == [EndReason::Panic; 2]).await;
        server.all_gone().await;
    }
}

#[tokio::test(start_paused = true)]
async fn e3_a_panic_in_an_on_end_callback_keeps_nothing_from_its_turn() {
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    let stack = ServiceBuilder::new()
        .map_request(move |conn: Connection<Io>| {
            let count = Arc::clone(&count);
            conn.on_closing(|_end| panic_if(true));
            conn.on_end(|_end| panic_if(true));
            conn.on_end(move |_end| {
                count.fetch_add(1, Ordering::SeqCst);
            });
            conn
        })
        .service(Pipeline::new(Lines::default).service(service_fn(echo)));
    let server = serve(stack);

    let replies = server.exchange("a\n").await;

    assert_eq!(replies, "a\n");
    server.all_gone().await;
    assert_eq!(told.load(Ordering::SeqCst), 1);
    assert_eq!(server.reasons(), [EndReason::PeerClosed]);
}

// Errors

#[tokio::test(start_paused = true)]
async fn e4_a_service_error_ends_the_connection_behind_the_answers_before_it() {
    let server = serve(Pipeline::new(Lines::default).service(service_fn(moody)));

    let replies = server.exchange("a\nb\nfail\nc\n").await;

    assert_eq!(replies, "a\nb\n");
    until(|| server.reasons() == [EndReason::ServiceError]).await;
}

#[tokio::test(start_paused = true)]
async fn e4_with_the_policy_off_a_service_error_costs_its_reply_only() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(moody))
        .shutdown_on_error(false);
    let server = serve(pipeline);

    let replies = server.exchange("a\nfail\nb\nfail\nc\n").await;

    assert_eq!(replies, "a\nb\nc\n");
    until(|| server.reasons() == [EndReason::PeerClosed]).await;
}

/// Serves `a`, `fail`, `b` with `shutdown_on_error` off. Returns the replies and the reason.
async fn with_policy_off<S>(service: S) -> (String, EndReason)
where
    S: Service<Bytes, Response = Bytes> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    let pipeline = Pipeline::new(Lines::default)
        .service(service)
        .shutdown_on_error(false);
    let server = serve(pipeline);
    let replies = server.exchange("a\nfail\nb\n").await;
    until(|| server.reasons().len() == 1).await;
    (replies, server.reasons()[0])
}

#[tokio::test(start_paused = true)]
async fn e4_errors_marked_inside_other_layers_end_the_connection_with_the_policy_off() {
    let service = ServiceBuilder::new()
        .layer(BoxCloneService::layer())
        .load_shed()
        .timeout(Duration::from_secs(5))
        .layer(ShutdownOnErrorLayer::new())
        .service_fn(moody);

    let ended = with_policy_off(service).await;

    assert_eq!(ended, ("a\n".to_owned(), EndReason::ServiceError));
}

#[tokio::test(start_paused = true)]
async fn e4_errors_of_layers_inside_the_marking_one_end_the_connection_too() {
    let service = ServiceBuilder::new()
        .layer(ShutdownOnErrorLayer::new())
        .timeout(Duration::from_secs(5))
        .service_fn(moody);
    let pipeline = Pipeline::new(Lines::default)
        .service(service)
        .shutdown_on_error(false);
    let server = serve(pipeline);

    let replies = server.exchange("a\nhang\nb\n").await;

    assert_eq!(replies, "a\n");
    until(|| server.reasons() == [EndReason::ServiceError]).await;
}

#[tokio::test(start_paused = true)]
async fn e4_errors_of_layers_outside_the_marking_one_are_not_marked() {
    let service = ServiceBuilder::new()
        .timeout(Duration::from_secs(5))
        .layer(ShutdownOnErrorLayer::new())
        .service_fn(moody);
    let pipeline = Pipeline::new(Lines::default)
        .service(service)
        .shutdown_on_error(false);
    let server = serve(pipeline);

    let replies = server.exchange("a\nhang\nb\n").await;

    assert_eq!(replies, "a\nb\n");
    until(|| server.reasons() == [EndReason::PeerClosed]).await;
}

/// Is ready once, then fails in `poll_ready`. Counts its calls.
struct Dies {
    ready: usize,
    calls: Arc<AtomicUsize>,
}

impl Service<Bytes> for Dies {
    type Response = Bytes;
    type Error = BoxError;
    type Future = std::future::Ready<Result<Bytes, BoxError>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.ready += 1;
        Poll::Ready(if self.ready == 1 {
            Ok(())
        } else {
            Err("dead".into())
        })
    }

    fn call(&mut self, line: Bytes) -> Self::Future {
        self.calls.fetch_add(1, Ordering::SeqCst);
        std::future::ready(Ok(line))
    }
}

#[tokio::test(start_paused = true)]
async fn e6_a_service_whose_poll_ready_failed_is_not_called_again() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&calls);
    let make = service_fn(move |_peer: Peer<Bytes>| {
        let calls = Arc::clone(&count);
        async move { Ok::<_, Infallible>(Dies { ready: 0, calls }) }
    });
    // Also with `shutdown_on_error` off, because the service is dead.
    let pipeline = Pipeline::new(Lines::default)
        .make_service(make)
        .shutdown_on_error(false);
    let server = serve(pipeline);

    let replies = server.exchange("a\nb\nc\n").await;

    assert_eq!(replies, "a\n");
    until(|| server.reasons() == [EndReason::ServiceNotReady]).await;
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

/// Is never ready.
#[derive(Clone)]
struct NeverReady;

impl<R> Service<R> for NeverReady {
    type Response = Bytes;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Bytes, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Pending
    }

    fn call(&mut self, _request: R) -> Self::Future {
        panic!("called, and not ready")
    }
}

#[tokio::test(start_paused = true)]
async fn e7_a_service_that_is_never_ready_does_not_hold_up_a_shutdown_beyond_its_deadline() {
    let mut server = serve(Pipeline::new(Lines::default).service(NeverReady));
    let mut client = server.stream().await;
    client.write_all(b"a\n").await.unwrap();
    until(|| server.handle().live() == 1).await;

    server.handle().shutdown_within(Duration::from_secs(5));

    let report = server.report().await;
    assert_eq!((report.drained, report.aborted), (0, 1));
    assert_eq!(report.duration, Duration::from_secs(5));
    assert_eq!(read_to_end(client).await, "");
}

#[tokio::test(start_paused = true)]
async fn e7_a_service_that_is_never_ready_stops_the_reading() {
    let server = serve(Pipeline::new(Lines::default).service(NeverReady));
    let mut client = server.stream().await;
    let requests = vec![b'\n'; 1024 * 1024];

    let write = tokio::time::timeout(Duration::from_secs(60), client.write_all(&requests));

    assert!(write.await.is_err(), "the server has read a mebibyte");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_its_service_is_dropped_before_the_linger() {
    let held = Arc::new(());
    let codec = {
        let held = Arc::clone(&held);
        move || {
            let held = Arc::clone(&held);
            InOut::new(
                Lines::default().map_decode(move |_line| Arc::clone(&held)),
                Lines::default(),
            )
        }
    };
    let (tell, mut peers) = tokio::sync::mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room");
        std::future::ready(Ok::<_, Infallible>(NeverReady))
    });
    let served = serve(Pipeline::new(codec).make_service(make));
    let mut client = served.stream().await;
    let peer = peers.recv().await.expect("it is served");
    let idle = Arc::strong_count(&held);
    client.write_all(b"waits\n").await.expect("it is open");
    support::settled().await;
    assert_eq!(Arc::strong_count(&held), idle + 1);

    peer.close();
    peer.closing().await;
    tokio::time::sleep(Duration::from_millis(100)).await;

    assert_eq!(served.handle().live(), 1, "it lingers");
    assert_eq!(Arc::strong_count(&held), idle);
}

// Dropped while pending

/// Counts futures that were made and dropped. Each takes a few turns.
#[derive(Clone, Default)]
struct Counted {
    made: Arc<AtomicUsize>,
    dropped: Arc<AtomicUsize>,
}

struct CountedCall(Arc<AtomicUsize>);

impl Drop for CountedCall {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Counted {
    fn call(&self) -> CountedCall {
        self.made.fetch_add(1, Ordering::SeqCst);
        CountedCall(Arc::clone(&self.dropped))
    }

    fn counts(&self) -> (usize, usize) {
        (
            self.made.load(Ordering::SeqCst),
            self.dropped.load(Ordering::SeqCst),
        )
    }
}

async fn turns(n: usize) {
    for _ in 0..n {
        tokio::task::yield_now().await;
    }
}

/// Serves four requests, and aborts the connection after `k` turns. Returns whether it had ended by
/// itself before.
async fn cut_off_after(k: usize, in_flight: usize) -> bool {
    let counted = Counted::default();
    let counting = counted.clone();
    let make = service_fn(move |_peer: Peer<Bytes>| {
        let counting = counting.clone();
        async move {
            let making = counting.call();
            turns(2).await;
            drop(making);
            Ok::<_, Infallible>(service_fn(move |line: Bytes| {
                let call = counting.call();
                async move {
                    turns(3).await;
                    drop(call);
                    Ok::<_, Infallible>(line)
                }
            }))
        }
    });
    let shared = tower::limit::GlobalConcurrencyLimitLayer::new(1);
    let stack = ServiceBuilder::new().layer(shared.clone()).service(
        Pipeline::new(Lines::default)
            .make_service(make)
            .in_flight(in_flight),
    );
    let mut server = serve(stack);
    let mut client = server.stream().await;
    client.write_all(b"a\nb\nc\nd\n").await.expect("it fits");
    client.shutdown().await.expect("it is open");

    turns(k).await;
    let ended_before = server.reasons().len() == 1;
    server.handle().abort();
    server.report().await;

    let (made, dropped) = counted.counts();
    assert_eq!(made, dropped, "after {k} turns");
    assert_eq!(server.handle().live(), 0, "after {k} turns");
    assert_eq!(server.handle().limit().in_use(), 0, "after {k} turns");
    // There is no end if the client was still in the backlog.
    assert!(server.reasons().len() <= 1, "after {k} turns");
    let mut free = shared.layer(service_fn(echo));
    assert!(
        poll_fn(|cx| Poll::Ready(free.poll_ready(cx).is_ready())).await,
        "the permit is back after {k} turns"
    );
    read_to_end(client).await;
    ended_before
}

#[tokio::test(start_paused = true)]
async fn e11_a_connection_cut_off_at_any_turn_gives_back_all_it_had_once() {
    for in_flight in [1, 2] {
        let mut k = 0;
        while !cut_off_after(k, in_flight).await {
            k += 1;
            assert!(k < 1000, "it never ends by itself");
        }
        assert!(k > 5, "the sweep had {k} steps only");
    }
}

#[tokio::test(start_paused = true)]
async fn e11_nothing_is_called_after_the_connection_is_gone() {
    let counted = Counted::default();
    let counting = counted.clone();
    let service = service_fn(move |_line: Bytes| {
        let call = counting.call();
        async move {
            pending::<()>().await;
            drop(call);
            Ok::<_, Infallible>(Bytes::new())
        }
    });
    let mut server = serve(Pipeline::new(Lines::default).service(service));
    let mut client = server.stream().await;
    client.write_all(b"a\nb\n").await.unwrap();
    until(|| counted.counts() == (1, 0)).await;

    server.handle().abort();

    server.report().await;
    assert_eq!(counted.counts(), (1, 1));
    assert_eq!(server.reasons(), [EndReason::Killed]);
    // The same service still works in tower's combinators: nothing in it was poisoned.
    assert!(service_fn(echo).oneshot(Bytes::new()).await.is_ok());
}
