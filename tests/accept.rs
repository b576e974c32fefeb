//! Accept: the loop survives every error of accept(2) and everything that one connection does.

mod support;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::accept::AcceptErrorAction;
use tower_tcp::admit::{AddressFilter, ConnectionLimit, Verdict};
use tower_tcp::bind::{Incoming, Listener, ListenerClosed, ListenerExt, Socket};
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::{self, Connector, MemoryListener, serve, serve_with};
use tower_tcp::{Address, BoxError, Connection, EndReason, Error, Peer, Pipeline, Server};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::SubscriberExt;

use support::{Clients, Ends, exchange, panic_if, read_to_end, settled, until};
use tokio::io::DuplexStream as Io;

/// Every error of accept(2) from which a server can recover.
const ERRNOS: &[Errno] = &[
    Errno::MFILE,
    Errno::NFILE,
    Errno::NOBUFS,
    Errno::NOMEM,
    Errno::CONNABORTED,
    Errno::PROTO,
    Errno::PERM,
    Errno::INTR,
    Errno::NETDOWN,
    Errno::NOPROTOOPT,
    Errno::HOSTDOWN,
    #[cfg(target_os = "linux")]
    Errno::NONET,
    Errno::HOSTUNREACH,
    Errno::OPNOTSUPP,
    Errno::NETUNREACH,
    Errno::TIMEDOUT,
    Errno::CONNREFUSED,
    Errno::CONNRESET,
    Errno::INVAL,
    Errno::IO,
];

/// Accepts a number of connections, then fails with the given errors.
struct Scripted {
    inner: MemoryListener,
    accepted: usize,
    after: usize,
    failures: VecDeque<io::Error>,
}

impl Listener for Scripted {
    type Io = Io;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner.poll_readable(cx)
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Io>>> {
        if self.accepted >= self.after
            && let Some(failure) = self.failures.pop_front()
        {
            return Poll::Ready(Err(failure));
        }
        let polled = self.inner.poll_accept(cx);
        self.accepted += usize::from(polled.is_ready());
        polled
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.inner.local_addrs()
    }
}

fn scripted(after: usize, failures: impl IntoIterator<Item = io::Error>) -> (Scripted, Connector) {
    let (inner, connector) = testkit::memory();
    let scripted = Scripted {
        inner,
        accepted: 0,
        after,
        failures: failures.into_iter().collect(),
    };
    (scripted, connector)
}

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

/// A queue in which 100,000 connections wait, whose peers have left.
struct Crowded(Arc<AtomicUsize>);

impl Listener for Crowded {
    type Io = Io;

    fn poll_accept(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Io>>> {
        if self.0.fetch_add(1, Ordering::Relaxed) == 100_000 {
            return Poll::Pending;
        }
        let address = || Address::from(SocketAddr::from(([127, 0, 0, 1], 1)));
        let (io, _) = tokio::io::duplex(1);
        Poll::Ready(Ok(Incoming::new(io, address(), address())))
    }

    fn local_addrs(&self) -> Vec<Address> {
        Vec::new()
    }
}

#[tokio::test(start_paused = true)]
async fn a10_a_queue_that_is_never_empty_leaves_other_tasks_their_turns() {
    let accepted = Arc::new(AtomicUsize::new(0));
    let crowded = Server::from_listener(Crowded(Arc::clone(&accepted)));
    let served = serve_with(crowded, (), echoing());

    for _ in 0..100 {
        let before = accepted.load(Ordering::Relaxed);
        tokio::task::yield_now().await;
        assert!(accepted.load(Ordering::Relaxed) <= before + 17);
    }

    assert!(accepted.load(Ordering::Relaxed) > 1_000);
    drop(served);
}

fn echoing()
-> impl Service<Connection<Io>, Response = EndReason, Error = BoxError, Future: Send + 'static>
+ Clone
+ Send
+ 'static {
    Pipeline::new(Lines::default).service(service_fn(echo))
}

// Records what is logged on this thread, which is the only one of its test.

thread_local! {
    static LOGGED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Log;

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Log {
    fn on_event(&self, event: &tracing::Event<'_>, _cx: tracing_subscriber::layer::Context<'_, S>) {
        struct Message(String);
        impl Visit for Message {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        LOGGED.with_borrow_mut(|logged| logged.push(message.0));
    }
}

fn listen_to_the_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Log);
        tracing::subscriber::set_global_default(subscriber).expect("it is the only one");
    });
    LOGGED.take();
}

fn logged(message: &str) -> usize {
    LOGGED.with_borrow(|logged| logged.iter().filter(|line| *line == message).count())
}

// Errors of accept

#[tokio::test(start_paused = true)]
async fn a3_a4_every_error_five_times_in_a_row_keeps_nobody_from_being_served() {
    listen_to_the_log();
    let begun = Instant::now();
    for &errno in ERRNOS {
        LOGGED.take();
        let (listener, connector) = scripted(19, (0..5).map(|_| errno.into()));
        let mut server = serve_with(Server::from_listener(listener), connector, echoing());

        for n in 1..=25 {
            assert_eq!(
                server.exchange("hi\n").await,
                "hi\n",
                "client {n} after {errno}"
            );
        }

        let failures = (logged("accept.error"), logged("accept.stalled"));
        assert!(matches!(failures, (5, 0) | (0, 1)), "{errno}: {failures:?}");
        assert_eq!(logged("accept.resumed"), failures.1, "{errno}");
        server.handle().shutdown();
        assert_eq!(server.report().await.aborted, 0);
    }
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[tokio::test(start_paused = true)]
async fn a2_a_back_off_ends_when_a_connection_does() {
    // Out of descriptors until the first client leaves, when the back-off has reached its maximum.
    let failures = (0..12).map(|_| Errno::MFILE.into());
    let (listener, connector) = scripted(1, failures);
    let server = serve_with(Server::from_listener(listener), connector, echoing());
    let first = server.stream().await;
    until(|| server.handle().live() == 1).await;
    let mut second = server.stream().await;
    second.write_all(b"hi\n").await.unwrap();
    // The twelve waits double from 5 ms to 1 s. The last one lasts from 4,275 ms to 5,275 ms.
    tokio::time::sleep(Duration::from_millis(4300)).await;
    assert_eq!(server.handle().live(), 1);
    let left = Instant::now();

    drop(first);

    assert_eq!(exchange(second, "").await, "hi\n");
    assert_eq!(left.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a6_a_stall_is_said_once_an_episode() {
    listen_to_the_log();
    let (listener, connector) = scripted(0, (0..100).map(|_| Errno::MFILE.into()));
    let server = serve_with(Server::from_listener(listener), connector, echoing());

    let reply = server.exchange("hi\n").await;

    assert_eq!(reply, "hi\n");
    assert_eq!(logged("accept.stalled"), 1);
    assert_eq!(logged("accept.resumed"), 1);
}

#[tokio::test(start_paused = true)]
async fn a6_a_failure_that_is_retried_for_ever_neither_spins_nor_floods() {
    listen_to_the_log();
    let (listener, connector) = scripted(0, (0..1000).map(|_| Errno::CONNABORTED.into()));
    let server = serve_with(Server::from_listener(listener), connector, echoing());
    let _client = server.stream().await;

    tokio::time::sleep(Duration::from_secs(10)).await;

    assert_eq!(logged("accept.error"), 16);
    assert_eq!(logged("accept.stalled"), 1);
}

#[tokio::test(start_paused = true)]
async fn an_accept_that_failed_leaves_no_permit_reserved() {
    // The client is gone by the time it is accepted, and no other client comes.
    struct Aborts(MemoryListener);
    impl Listener for Aborts {
        type Io = Io;
        fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.0.poll_readable(cx)
        }
        fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Io>>> {
            self.0
                .poll_accept(cx)
                .map(|_gone| Err(Errno::CONNABORTED.into()))
        }
        fn local_addrs(&self) -> Vec<Address> {
            self.0.local_addrs()
        }
    }
    let limit = ConnectionLimit::new(1);
    let (inner, connector) = testkit::memory();
    let server = Server::builder().limit(limit.clone()).build(Aborts(inner));
    let server = serve_with(server, connector, echoing());

    drop(server.stream().await);
    tokio::time::sleep(Duration::from_secs(1)).await;

    assert_eq!(limit.in_use(), 0);
}

async fn a_dead_listener_ends_the_server(failure: io::Error, found: impl Fn(&Error) -> bool) {
    let (listener, connector) = scripted(1, [failure]);
    let (answer, answered) = oneshot::channel::<()>();
    let answered = std::sync::Arc::new(tokio::sync::Mutex::new(Some(answered)));
    let service = service_fn(move |line: Bytes| {
        let answered = std::sync::Arc::clone(&answered);
        async move {
            let answered = answered.lock().await.take().expect("there is one request");
            drop(answered.await);
            Ok::<_, Infallible>(line)
        }
    });
    let pipeline = Pipeline::new(Lines::default).service(service);
    let mut server = serve_with(Server::from_listener(listener), connector, pipeline);
    let mut busy = server.stream().await;
    busy.write_all(b"hi\n").await.expect("it is open");
    until(|| server.handle().live() == 1).await;
    let begun = Instant::now();

    let _never_accepted = server.stream().await;
    until(|| answer.is_closed() || begun.elapsed() > Duration::from_secs(1)).await;
    assert!(!answer.is_closed(), "it did not drain");
    drop(answer);

    assert_eq!(read_to_end(busy).await, "hi\n");
    let err = server.closed().await.expect_err("the listener is dead");
    assert!(found(&err), "{err:?}");
    assert_eq!(server.handle().closed().await.drained, 1);
}

#[tokio::test(start_paused = true)]
async fn a5_a_listener_that_says_it_is_closed_ends_the_server_with_that_error() {
    let closed = io::Error::other(ListenerClosed);

    a_dead_listener_ends_the_server(closed, |err| find_cause::<ListenerClosed>(err).is_some())
        .await;
}

#[tokio::test(start_paused = true)]
async fn a5_a_listener_whose_descriptor_is_bad_ends_the_server_with_that_error() {
    a_dead_listener_ends_the_server(Errno::BADF.into(), |err| {
        find_cause::<io::Error>(err).and_then(Errno::from_io_error) == Some(Errno::BADF)
    })
    .await;
}

#[tokio::test]
async fn a7_peers_that_reset_in_the_accept_queue_are_counted_and_dropped() {
    const ROUNDS: usize = 20;
    const EACH: usize = 50;
    let (report, mut ends) = mpsc::channel(ROUNDS * EACH);
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let handle = server.handle();
    let addr: SocketAddr = handle.local_addrs()[0].tcp().unwrap();
    let stack = ServiceBuilder::new()
        .map_request(move |conn: Connection<Socket>| {
            let report = report.clone();
            conn.on_end(move |end| report.try_send(end.reason()).unwrap());
            conn
        })
        .service(Pipeline::new(Lines::default).service(service_fn(echo)));
    let task = tokio::spawn(server.serve(stack));

    for _ in 0..ROUNDS {
        handle.pause();
        for _ in 0..EACH {
            let client = TcpStream::connect(addr).await.unwrap();
            SockRef::from(&client)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
        }
        handle.resume();
        for _ in 0..EACH {
            let end = timeout(Duration::from_secs(30), ends.recv()).await;
            assert_eq!(end.unwrap(), Some(EndReason::PeerReset));
        }
    }

    assert_eq!((handle.live(), handle.limit().in_use()), (0, 0));
    handle.shutdown();
    let report = timeout(Duration::from_secs(30), task).await;
    assert_eq!(report.unwrap().unwrap().unwrap().aborted, 0);
}

#[tokio::test(start_paused = true)]
async fn a_policy_of_ones_own_takes_the_place_of_the_default() {
    listen_to_the_log();
    let asked = std::sync::Arc::new(AtomicUsize::new(0));
    let count = std::sync::Arc::clone(&asked);
    let failures = [
        Errno::MFILE.into(),
        Errno::MFILE.into(),
        Errno::CONNABORTED.into(),
    ];
    let (listener, connector) = scripted(0, failures);
    // The opposite of the default actions.
    let server = Server::builder()
        .on_accept_error(move |err| {
            count.fetch_add(1, Ordering::SeqCst);
            match Errno::from_io_error(err) {
                Some(Errno::MFILE) => AcceptErrorAction::Retry,
                _ => AcceptErrorAction::Stop,
            }
        })
        .build(listener);
    let mut server = serve_with(server, connector, echoing());
    let _client = server.stream().await;

    let err = server.closed().await.expect_err("told to stop");

    assert!(matches!(err, Error::Accept(_)), "{err:?}");
    assert_eq!(asked.load(Ordering::SeqCst), 3);
    assert_eq!((logged("accept.error"), logged("accept.stalled")), (2, 0));
}

/// Stands for a user's listener that can only accept.
struct OnlyAccepts(MemoryListener);

impl Listener for OnlyAccepts {
    type Io = Io;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Io>>> {
        self.0.poll_accept(cx)
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.0.local_addrs()
    }
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_can_only_accept_serves() {
    let (listener, connector) = testkit::memory();
    let server = Server::builder()
        .limit(ConnectionLimit::new(1))
        .build(OnlyAccepts(listener));
    let mut server = serve_with(server, connector, echoing());

    for _ in 0..20 {
        assert_eq!(server.exchange("hi\n").await, "hi\n");
    }

    server.handle().shutdown();
    assert_eq!(server.report().await.aborted, 0);
}

#[tokio::test(start_paused = true)]
async fn a_paused_server_accepts_nobody_until_it_is_resumed() {
    let server = serve(echoing());
    let inside = server.stream().await;
    until(|| server.handle().live() == 1).await;

    server.handle().pause();
    let mut waiting = server.stream().await;
    waiting.write_all(b"hi\n").await.unwrap();
    assert_eq!(exchange(inside, "still\n").await, "still\n");
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(server.handle().live(), 0);
    server.handle().resume();

    assert_eq!(exchange(waiting, "").await, "hi\n");
}

/// A connection stack that is full until the gate opens, and then panics.
struct PanicsAfterWaiting(Arc<AtomicBool>);

impl Service<Connection<Io>> for PanicsAfterWaiting {
    type Response = ();
    type Error = Infallible;
    type Future = std::future::Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        panic_if(self.0.load(Ordering::Relaxed));
        Poll::Pending
    }

    fn call(&mut self, _conn: Connection<Io>) -> Self::Future {
        unreachable!("it is never ready")
    }
}

#[tokio::test(start_paused = true)]
async fn a_paused_server_accepts_one_at_most_if_its_stack_panics_after_waiting() {
    let opens = Arc::new(AtomicBool::new(false));
    let server = serve(PanicsAfterWaiting(Arc::clone(&opens)));
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(server.stream().await);
    }
    settled().await;

    opens.store(true, Ordering::Relaxed);
    server.handle().pause();
    settled().await;

    let mut ended = 0;
    for mut client in clients {
        let read = timeout(Duration::from_millis(1), client.read_u8()).await;
        ended += usize::from(read.is_ok());
    }
    assert!(ended <= 1, "{ended} were accepted");
}

// Panics in calls made by the accept loop

#[tokio::test(start_paused = true)]
async fn e2_a_panic_in_the_policy_leaves_the_decision_to_the_default() {
    let (listener, connector) = scripted(0, [Errno::CONNABORTED.into()]);
    let server = Server::builder()
        .on_accept_error(|_| {
            panic_if(true);
            AcceptErrorAction::Stop
        })
        .build(listener);
    let served = serve_with(server, connector, echoing());

    let client = served.stream().await;

    assert_eq!(exchange(client, "hi\n").await, "hi\n");
}

/// A connection stack that panics once, in `poll_ready` or in `call`.
struct PanicsOnce<S> {
    inner: S,
    in_poll_ready: bool,
    armed: bool,
}

impl<S: Service<Connection<Io>>> Service<Connection<Io>> for PanicsOnce<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        panic_if(self.in_poll_ready && std::mem::take(&mut self.armed));
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, conn: Connection<Io>) -> S::Future {
        if !self.in_poll_ready && std::mem::take(&mut self.armed) {
            conn.on_end(|end| assert_eq!(end.reason(), EndReason::Panic));
            panic_if(true);
        }
        self.inner.call(conn)
    }
}

async fn a_panic_of_the_stack_costs_one_connection(in_poll_ready: bool) {
    let server = serve(PanicsOnce {
        inner: echoing(),
        in_poll_ready,
        armed: true,
    });
    let first = server.stream().await;
    let second = server.stream().await;
    let begun = Instant::now();

    assert_eq!(read_to_end(first).await, "");
    assert_eq!(exchange(second, "hi\n").await, "hi\n");

    assert_eq!(begun.elapsed(), Duration::ZERO);
    server.all_gone().await;
}

#[tokio::test(start_paused = true)]
async fn e2_a_panic_in_poll_ready_of_the_stack_costs_one_connection() {
    a_panic_of_the_stack_costs_one_connection(true).await;
}

#[tokio::test(start_paused = true)]
async fn e2_a_panic_in_call_of_the_stack_costs_one_connection() {
    a_panic_of_the_stack_costs_one_connection(false).await;
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    PollReady,
    Call,
    Future,
}

/// A make-service that panics for the first connection.
#[derive(Clone)]
struct PanickingMake(Place);

impl Service<Peer<Bytes>> for PanickingMake {
    type Response = tower::util::BoxService<Bytes, Bytes, BoxError>;
    type Error = Infallible;
    type Future =
        std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        panic_if(self.0 == Place::PollReady);
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _peer: Peer<Bytes>) -> Self::Future {
        panic_if(self.0 == Place::Call);
        let place = self.0;
        Box::pin(async move {
            panic_if(place == Place::Future);
            Ok(tower::util::BoxService::new(service_fn(echo)))
        })
    }
}

async fn a_panic_of_the_make_service_costs_its_connection(place: Place) {
    let server = serve(Pipeline::new(Lines::default).make_service(PanickingMake(place)));
    let clients = [server.stream().await, server.stream().await];
    let begun = Instant::now();

    for client in clients {
        assert_eq!(read_to_end(client).await, "");
    }

    assert_eq!(begun.elapsed(), Duration::ZERO);
    until(|| server.reasons() == [EndReason::Panic; 2]).await;
    server.all_gone().await;
}

#[tokio::test(start_paused = true)]
async fn e2_a_panic_in_poll_ready_of_the_make_service_leaves_the_loop_alone() {
    a_panic_of_the_make_service_costs_its_connection(Place::PollReady).await;
}

#[tokio::test(start_paused = true)]
async fn e2_a_panic_in_call_of_the_make_service_leaves_the_loop_alone() {
    a_panic_of_the_make_service_costs_its_connection(Place::Call).await;
}

#[tokio::test(start_paused = true)]
async fn e2_a_panic_in_the_future_of_the_make_service_leaves_the_loop_alone() {
    a_panic_of_the_make_service_costs_its_connection(Place::Future).await;
}

#[tokio::test(start_paused = true)]
async fn e5_a_make_service_that_always_fails_leaks_nothing() {
    let make = service_fn(|_peer: Peer<Bytes>| async {
        Err::<tower::util::BoxService<Bytes, Bytes, BoxError>, BoxError>("not today".into())
    });
    let server = serve(Pipeline::new(Lines::default).make_service(make));

    for _ in 0..1000 {
        assert_eq!(read_to_end(server.stream().await).await, "");
    }

    server.all_gone().await;
    assert_eq!(server.reasons(), [EndReason::MakeServiceError; 1000]);
    // The one task is the server.
    let metrics = tokio::runtime::Handle::current().metrics();
    assert_eq!(metrics.num_alive_tasks(), 1);
}

/// A make-service that is never ready.
#[derive(Clone)]
struct NeverReady;

impl Service<Peer<Bytes>> for NeverReady {
    type Response = tower::util::BoxService<Bytes, Bytes, BoxError>;
    type Error = Infallible;
    type Future = std::future::Pending<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Pending
    }

    fn call(&mut self, _peer: Peer<Bytes>) -> Self::Future {
        panic!("called, and not ready")
    }
}

#[tokio::test(start_paused = true)]
async fn e8_a_make_service_that_is_never_ready_holds_up_neither_accept_nor_shutdown() {
    let mut server = serve(Pipeline::new(Lines::default).make_service(NeverReady));
    let clients = [server.stream().await, server.stream().await];
    until(|| server.handle().live() == 2).await;

    server.handle().shutdown_within(Duration::from_secs(3));

    let report = server.report().await;
    assert!(report.duration <= Duration::from_secs(3), "{report:?}");
    for client in clients {
        assert_eq!(read_to_end(client).await, "");
    }
}

#[tokio::test(start_paused = true)]
async fn e8_a_make_service_that_never_returns_ends_its_connection_in_time() {
    let make = service_fn(|_peer: Peer<Bytes>| {
        pending::<Result<tower::util::BoxService<Bytes, Bytes, BoxError>, Infallible>>()
    });
    let server = serve(Pipeline::new(Lines::default).make_service(make));
    let clients = [server.stream().await, server.stream().await];
    until(|| server.handle().live() == 2).await;
    let begun = Instant::now();

    for client in clients {
        assert_eq!(read_to_end(client).await, "");
    }

    assert!(begun.elapsed() <= Duration::from_secs(10));
    until(|| server.reasons() == [EndReason::MakeServiceError; 2]).await;
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_what_maps_or_taps_a_stream_costs_that_connection_only() {
    for taps in [true, false] {
        let (listener, connector) = testkit::memory();
        let accepted = AtomicUsize::new(0);
        let panics = move || panic_if(accepted.fetch_add(1, Ordering::Relaxed) == 1);
        let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
        let pipeline = Pipeline::new(Lines::default).service(echo);
        let served = if taps {
            let server = Server::from_listener(listener.tap_io(move |_| panics()));
            serve_with(server, connector, pipeline)
        } else {
            let map = move |io| {
                panics();
                io
            };
            serve_with(
                Server::from_listener(listener.map_io(map)),
                connector,
                pipeline,
            )
        };

        assert_eq!(served.client().await.ask("first").await, "first");
        assert_eq!(served.client().await.line().await, "");
        assert_eq!(served.client().await.ask("third").await, "third");
    }
}

/// A listener whose first accept fails after the filters have seen the peer's address.
struct LostAfterTheFilters {
    inner: MemoryListener,
    is_lost: bool,
}

impl Listener for LostAfterTheFilters {
    type Io = Io;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Io>>> {
        self.inner.poll_accept(cx)
    }

    fn poll_accept_if(
        &mut self,
        cx: &mut Context<'_>,
        admits: &mut dyn FnMut(&Address) -> bool,
    ) -> Poll<io::Result<Option<Incoming<Io>>>> {
        if !std::mem::replace(&mut self.is_lost, true) {
            admits(&Address::Memory(0));
            return Poll::Ready(Err(Errno::CONNABORTED.into()));
        }
        self.inner.poll_accept_if(cx, admits)
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.inner.local_addrs()
    }
}

#[tokio::test(start_paused = true)]
async fn a_filter_that_panics_for_a_lost_connection_does_not_end_the_next_one() {
    let (inner, connector) = testkit::memory();
    let listener = LostAfterTheFilters {
        inner,
        is_lost: false,
    };
    let filter = AddressFilter::new(|peer: &Address| {
        panic_if(*peer == Address::Memory(0));
        Verdict::Allow
    });
    let server = Server::builder().address_filter(filter).build(listener);
    let served = serve_with(server, connector, echoing());
    let mut client = served.client().await;

    assert_eq!(client.ask("hi").await, "hi");
}
