//! Limits: never more connections than allowed, changes act at once, and no kind of end leaves a
//! permit behind.

mod support;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::runtime::Handle as Runtime;
use tokio::time::{Instant, timeout};
use tokio_test::task;
use tokio_test::{assert_pending, assert_ready_ok};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_tcp::admit::{ConnectionLimit, Limited};
use tower_tcp::bind::{Incoming, Listener};
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::Limits;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{self, Connector, MemoryListener, Served, serve, serve_with};
use tower_tcp::{Address, BoxError, Connection, EndReason, Peer, Pipeline, Reply, Server};

use support::{Clients, Ends, read_to_end};
use tokio::io::DuplexStream as Io;

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

/// Starts an echo server with a limit.
fn limited(limit: &ConnectionLimit) -> Served {
    let (listener, connector) = testkit::memory();
    let server = Server::builder().limit(limit.clone()).build(listener);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(echo))
        .deadlines(Deadlines::default().first_byte(None).idle(None));
    serve_with(server, connector, pipeline)
}

async fn connect(server: &Served, n: usize) -> Vec<Io> {
    let mut clients = Vec::new();
    for _ in 0..n {
        clients.push(server.stream().await);
    }
    clients
}

/// Lets every task run until it waits. No time passes.
async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

/// Asserts that exactly `n` of the connected clients are served, without any time passing.
async fn assert_in(server: &Served, n: usize) {
    let now = Instant::now();
    settle().await;
    assert_eq!(server.handle().live(), n);
    assert_eq!(server.handle().limit().in_use(), n);
    assert_eq!(Instant::now(), now);
}

// The limit changes while the server runs

#[tokio::test(start_paused = true)]
async fn each_change_of_the_limit_acts_at_once() {
    let limit = ConnectionLimit::new(0);
    let server = limited(&limit);
    let mut clients = connect(&server, 6).await;
    assert_in(&server, 0).await;

    limit.set(1);
    assert_in(&server, 1).await;
    limit.set_unlimited();
    assert_in(&server, 6).await;
    limit.set(2);
    clients.extend(connect(&server, 2).await);
    assert_in(&server, 6).await;
    clients.drain(..5);
    assert_in(&server, 2).await;
    limit.set(0);
    assert_in(&server, 2).await;
    clients.drain(..2);
    assert_in(&server, 0).await;
}

#[tokio::test(start_paused = true)]
async fn unlimited_while_paused_admits_the_waiting() {
    let limit = ConnectionLimit::new(1);
    let server = limited(&limit);
    let _clients = connect(&server, 4).await;
    assert_in(&server, 1).await;

    limit.set_unlimited();

    assert_in(&server, 4).await;
}

#[tokio::test(start_paused = true)]
async fn zero_at_the_start_admits_none_and_does_not_stick() {
    let limit = ConnectionLimit::new(0);
    let server = limited(&limit);
    let _clients = connect(&server, 3).await;
    assert_in(&server, 0).await;

    limit.set(3);

    assert_in(&server, 3).await;
}

#[tokio::test(start_paused = true)]
async fn accepting_goes_on_whenever_fewer_are_in_than_the_limit() {
    let limit = ConnectionLimit::new(4);
    let server = limited(&limit);
    let mut clients = connect(&server, 6).await;
    assert_in(&server, 4).await;

    // Far below the number of connections. The next client is accepted only when all four have
    // closed.
    limit.set(1);
    clients.drain(..3);
    assert_in(&server, 1).await;
    clients.remove(0);
    assert_in(&server, 1).await;
    // From one below the number of clients to several above it, in one step.
    limit.set(5);
    assert_in(&server, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_place_is_held_until_the_connections_service_is_done() {
    let limit = ConnectionLimit::new(1);
    let (listener, connector) = testkit::memory();
    let server = Server::builder().limit(limit.clone()).build(listener);
    let slow_to_leave = service_fn(|mut conn: Connection<Io>| async move {
        conn.read_to_end(&mut Vec::new()).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok::<_, BoxError>(())
    });
    let server = serve_with(server, connector, slow_to_leave);
    let mut clients = connect(&server, 2).await;
    assert_in(&server, 1).await;

    clients.remove(0);

    settle().await;
    assert_eq!(server.reasons(), []);
    assert_eq!(limit.in_use(), 1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    settle().await;
    assert_eq!(server.reasons(), [EndReason::PeerClosed]);
    assert_eq!(limit.in_use(), 1, "the second is in");
}

#[tokio::test(start_paused = true)]
async fn no_end_frees_more_than_its_own_place() {
    let limit = ConnectionLimit::new(1);
    let (listener, connector) = testkit::memory();
    let server = Server::builder().limit(limit.clone()).build(listener);
    // All kinds of end happen to each connection at the same time.
    let make = service_fn(|peer: Peer<Bytes>| async move {
        Ok::<_, Infallible>(service_fn(move |_line: Bytes| {
            peer.close();
            peer.abort();
            peer.abort();
            async { Err::<Bytes, BoxError>("and an error".into()) }
        }))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let server = serve_with(server, connector, pipeline);
    let mut clients = connect(&server, 5).await;

    for ended in 1..=3 {
        let mut client = clients.remove(0);
        client.write_all(b"a\n").await.unwrap();
        drop(client);
        assert_in(&server, 1).await;
        assert_eq!(server.reasons().len(), ended);
    }
}

// An accept loop that waits

/// Stands for a user's listener that can only accept.
struct OnlyAccepts(MemoryListener);

impl Listener for OnlyAccepts {
    type Io = Io;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<Incoming<Io>>> {
        self.0.poll_accept(cx)
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.0.local_addrs()
    }
}

#[tokio::test(start_paused = true)]
async fn a_loop_whose_listener_only_accepts_holds_no_permit_while_it_waits() {
    let limit = ConnectionLimit::new(1);
    let (listener, connector) = testkit::memory();
    let server = Server::builder()
        .limit(limit.clone())
        .build(OnlyAccepts(listener));
    let server = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    settle().await;
    assert_eq!(limit.in_use(), 0);

    limit.set(0);

    let _client = server.stream().await;
    assert_in(&server, 0).await;
    limit.set(1);
    assert_in(&server, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_loop_that_waits_for_a_connection_holds_no_permit() {
    let limit = ConnectionLimit::new(1);
    let resting = limited(&limit);
    let busy = limited(&limit);
    assert_in(&resting, 0).await;

    let replies = [busy.exchange("a\n").await, busy.exchange("b\n").await];

    assert_eq!(replies, ["a\n", "b\n"]);
    busy.all_gone().await;
}

#[tokio::test(start_paused = true)]
async fn a_server_at_its_own_limit_holds_no_permit_that_servers_share() {
    let shared = GlobalConcurrencyLimitLayer::new(2);
    let stack = || {
        ServiceBuilder::new()
            .layer(shared.clone())
            .service(Pipeline::new(Lines::default).service(service_fn(echo)))
    };
    let (listener, connector) = testkit::memory();
    let full = Server::builder()
        .limit(ConnectionLimit::new(1))
        .build(listener);
    let full = serve_with(full, connector, stack());
    let _inside_and_waiting = connect(&full, 2).await;
    assert_in(&full, 1).await;

    let other = serve(stack());

    let answer = timeout(Duration::from_secs(1), other.exchange("a\n")).await;
    assert_eq!(answer.as_deref(), Ok("a\n"));
}

// Faults

/// Counts the connections in progress, and their maximum.
#[derive(Clone, Default)]
struct Crowd(Arc<(AtomicUsize, AtomicUsize)>);

struct Inside(Crowd);

impl Crowd {
    fn enter(&self) -> Inside {
        let now = self.0.0.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.1.fetch_max(now, Ordering::SeqCst);
        Inside(self.clone())
    }

    fn peak(&self) -> usize {
        self.0.1.load(Ordering::SeqCst)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A connection service that lets a client stay for a while, then greets it.
fn lodging(
    crowd: &Crowd,
) -> impl Service<Connection<Io>, Response = (), Error = BoxError, Future: Send + 'static>
+ Clone
+ Send
+ 'static {
    let crowd = crowd.clone();
    service_fn(move |mut conn: Connection<Io>| {
        let inside = crowd.enter();
        async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            conn.write_all(b"ok").await?;
            drop(inside);
            Ok::<_, BoxError>(())
        }
    })
}

async fn ten_times_as_many_are_all_served(server: &Served, n: usize) {
    let clients = connect(server, 10 * n).await;
    for client in clients {
        assert_eq!(read_to_end(client).await, "ok");
    }
}

#[tokio::test(start_paused = true)]
async fn f1_the_servers_limit_is_exact_and_all_are_served() {
    let crowd = Crowd::default();
    let (listener, connector) = testkit::memory();
    let server = Server::builder()
        .limit(ConnectionLimit::new(7))
        .build(listener);
    let server = serve_with(server, connector, lodging(&crowd));

    ten_times_as_many_are_all_served(&server, 7).await;

    assert_eq!(crowd.peak(), 7);
    server.all_gone().await;
}

#[tokio::test(start_paused = true)]
async fn f1_a_limit_used_as_a_layer_is_exact_and_all_are_served() {
    let crowd = Crowd::default();
    let limit = ConnectionLimit::new(7);
    let server = serve(limit.layer().layer(lodging(&crowd)));

    ten_times_as_many_are_all_served(&server, 7).await;

    assert_eq!(crowd.peak(), 7);
    server.all_gone().await;
    assert_eq!(limit.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn f1_a_stock_limit_of_connections_is_exact_and_all_are_served() {
    let crowd = Crowd::default();
    let stack = ServiceBuilder::new()
        .concurrency_limit(7)
        .service(lodging(&crowd));
    let server = serve(stack);

    ten_times_as_many_are_all_served(&server, 7).await;

    assert_eq!(crowd.peak(), 7);
    server.all_gone().await;
}

/// Panics without printing, because the test causes hundreds of panics.
fn quiet_panic() -> ! {
    std::panic::resume_unwind(Box::new("of user code"))
}

/// The hook of the chaos test. The first byte tells it what to do.
async fn chaotic_hook(mut conn: Connection<Io>) -> Result<Connection<Io>, BoxError> {
    match conn.read_u8().await? {
        b'r' => Err("rejected".into()),
        b'h' => pending().await,
        b'p' => quiet_panic(),
        _ => Ok(conn),
    }
}

/// The service of the chaos test. Each line tells it what to do.
async fn chaotic_service(line: Bytes) -> Result<Reply<Bytes>, BoxError> {
    match &line[..] {
        b"fail" => Err("failed".into()),
        b"panic" => quiet_panic(),
        b"quit" => Ok(Reply::from(line).close()),
        b"hang" => pending().await,
        b"flood" => Ok(Bytes::from(vec![b'x'; 300_000]).into()),
        _ => Ok(line.into()),
    }
}

/// The input of a client, and `true` if it then stays until the server closes the connection.
const CHAOS: [(&[u8], bool); 16] = [
    (b".hi\n", true),
    (b".hi\n", false),
    (b".half", true),
    (b".half", false),
    (b".quit\nmore\n", true),
    (b".fail\n", true),
    (b".panic\n", true),
    (b".hang\n", true),
    (b".hang\n", false),
    (b".flood\n", true),
    (b".flood\n", false),
    (b".0123456789012345678901234567890123456789\n", true),
    (b"r", true),
    (b"h", true),
    (b"p", true),
    (b"", false),
];

async fn chaotic_client(connector: Connector, kind: usize) {
    let (bytes, stays) = CHAOS[kind % CHAOS.len()];
    let Ok(mut client) = connector.connect().await else {
        return;
    };
    // The server may close at any time.
    if client.write_all(bytes).await.is_ok() && stays {
        if kind.is_multiple_of(3) {
            drop(client.shutdown().await);
        }
        drop(client.read_to_end(&mut Vec::new()).await);
    }
}

fn chaotic_server(limit: &ConnectionLimit) -> Served {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        Ok::<_, Infallible>(service_fn(move |line: Bytes| {
            match &line[..] {
                b"abort" => peer.abort(),
                b"close" => peer.close(),
                _ => {}
            }
            chaotic_service(line)
        }))
    });
    let pipeline = Pipeline::new(|| Lines::default().max_line(32)).make_service(make);
    let stack = ServiceBuilder::new()
        .timeout(Duration::from_secs(5))
        .load_shed()
        .concurrency_limit(100)
        .layer(
            PreConnectLayer::new(service_fn(chaotic_hook))
                .deadline(Duration::from_secs(1))
                .pending(8),
        )
        .service(pipeline);
    let (listener, connector) = testkit::memory();
    let server = Server::builder()
        .limit(limit.clone())
        .shutdown_deadline(Duration::from_secs(3))
        .build(listener);
    serve_with(server, connector, stack)
}

#[tokio::test(start_paused = true)]
async fn f2_ten_thousand_connections_ended_in_every_way_leave_nothing_behind() {
    let limit = ConnectionLimit::new(400);
    let mut ends = BTreeMap::<&str, usize>::new();
    let mut ended = 0;

    // Each server serves 5,000 connections. The first server drains, the second aborts.
    for drains in [true, false] {
        let mut server = chaotic_server(&limit);
        for round in 0..10_usize {
            let clients: Vec<_> = (0..489)
                // Every other round has bursts of 32 clients of one kind, more than may be pending.
                .map(|n| if round.is_multiple_of(2) { n } else { n / 32 })
                .map(|kind| tokio::spawn(chaotic_client(server.connector().clone(), kind)))
                .collect();
            for client in clients {
                client.await.unwrap();
            }
            // No newer connection evicts the last one, so it meets its deadline.
            for word in [&b".abort\n"[..], b".close\n", b"h"] {
                let mut client = server.stream().await;
                client.write_all(word).await.unwrap();
                drop(client.read_to_end(&mut Vec::new()).await);
            }
        }
        let mut last = connect(&server, 80).await;
        for (n, client) in last.iter_mut().enumerate() {
            client
                .write_all(if n % 2 == 0 { b".hang\n" } else { b".hi\n" })
                .await
                .unwrap();
        }
        settle().await;
        if drains {
            server.handle().shutdown();
        } else {
            server.handle().abort();
        }
        server.report().await;
        drop(last);

        server.all_gone().await;
        for reason in server.reasons() {
            *ends.entry(reason.as_str()).or_default() += 1;
            ended += 1;
        }
    }

    // The two servers own their state until here. Now nothing may be left.
    settle().await;
    println!("{ended} ended: {ends:?}");
    assert_eq!(ended, 2 * (10 * 492 + 80));
    assert_eq!(limit.in_use(), 0);
    assert_eq!(Runtime::current().metrics().num_alive_tasks(), 0);
    for reason in [
        EndReason::PeerClosed,
        EndReason::PeerReset,
        EndReason::Truncated,
        EndReason::FrameTooLarge,
        EndReason::PreConnectTimeout,
        EndReason::PreConnectEvicted,
        EndReason::Rejected,
        EndReason::LimitExceeded,
        EndReason::ServiceTimeout,
        EndReason::ServiceClosed,
        EndReason::Aborted,
        EndReason::ServiceError,
        EndReason::Panic,
        EndReason::Drained,
        EndReason::DrainDeadline,
        EndReason::Killed,
    ] {
        assert!(ends.contains_key(reason.as_str()), "none ended as {reason}");
    }
}

type Waiter = task::Spawn<Limited<Accepts>>;

/// A service that accepts everything and does nothing.
#[derive(Clone)]
struct Accepts;

impl Service<()> for Accepts {
    type Response = ();
    type Error = Infallible;
    type Future = std::future::Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (): ()) -> Self::Future {
        std::future::ready(Ok(()))
    }
}

fn waiter(limit: &ConnectionLimit) -> Waiter {
    task::spawn(limit.layer().layer(Accepts))
}

fn poll_ready(waiter: &mut Waiter) -> Poll<Result<(), Infallible>> {
    waiter.enter(|cx, service| service.get_mut().poll_ready(cx))
}

#[test]
fn f3_a_waiter_dropped_while_it_waits_leaves_the_next_its_turn() {
    let limit = ConnectionLimit::new(1);
    let (mut holder, mut first, mut second) = (waiter(&limit), waiter(&limit), waiter(&limit));
    assert_ready_ok!(poll_ready(&mut holder));
    assert_pending!(poll_ready(&mut first));
    assert_pending!(poll_ready(&mut second));

    drop(first);
    drop(holder);

    assert!(second.is_woken());
    assert_ready_ok!(poll_ready(&mut second));
}

#[test]
fn f4_a_waiter_dropped_when_it_was_woken_leaves_the_next_its_turn() {
    let limit = ConnectionLimit::new(1);
    let (mut holder, mut first, mut second) = (waiter(&limit), waiter(&limit), waiter(&limit));
    assert_ready_ok!(poll_ready(&mut holder));
    assert_pending!(poll_ready(&mut first));
    assert_pending!(poll_ready(&mut second));
    drop(holder);
    assert!(first.is_woken());

    drop(first);

    assert!(second.is_woken());
    assert_ready_ok!(poll_ready(&mut second));
}

#[test]
fn f3_a_waiter_dropped_with_a_permit_in_hand_gives_it_to_the_next() {
    let limit = ConnectionLimit::new(1);
    let (mut first, mut second) = (waiter(&limit), waiter(&limit));
    assert_ready_ok!(poll_ready(&mut first));
    assert_pending!(poll_ready(&mut second));

    drop(first);

    assert!(second.is_woken());
    assert_ready_ok!(poll_ready(&mut second));
    drop(second);
    assert_eq!(limit.in_use(), 0);
}

#[test]
fn f3_a_call_that_is_dropped_before_its_first_poll_gives_its_permit_back() {
    let limit = ConnectionLimit::new(1);
    let (mut first, mut second) = (waiter(&limit), waiter(&limit));
    assert_ready_ok!(poll_ready(&mut first));
    let call = first.enter(|_cx, service| service.get_mut().call(()));
    assert_pending!(poll_ready(&mut second));

    drop(call);

    assert!(second.is_woken());
    assert_ready_ok!(poll_ready(&mut second));
}

/// Sends a line and reads the reply.
async fn ask(client: &mut BufReader<Io>, line: &str) -> String {
    client
        .write_all(format!("{line}\n").as_bytes())
        .await
        .expect("the server reads");
    let mut reply = String::new();
    timeout(Duration::from_secs(3600), client.read_line(&mut reply))
        .await
        .expect("a reply comes")
        .expect("replies are text");
    reply.trim_end().to_owned()
}

#[tokio::test(start_paused = true)]
async fn f5_idle_peers_hold_no_shared_permits() {
    let service = ServiceBuilder::new()
        .layer(GlobalConcurrencyLimitLayer::new(2))
        .service_fn(echo);
    let server = serve(Pipeline::new(Lines::default).service(service));
    let mut idle = Vec::new();
    for _ in 0..20 {
        let mut client = BufReader::new(server.stream().await);
        assert_eq!(ask(&mut client, "once").await, "once");
        idle.push(client);
    }
    idle.extend(connect(&server, 20).await.into_iter().map(BufReader::new));
    settle().await;

    let mut active = BufReader::new(server.stream().await);
    let begun = Instant::now();

    assert_eq!(ask(&mut active, "now").await, "now");
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn f6_a_stalled_reader_holds_no_shared_permits() {
    let work = service_fn(|_line: Bytes| async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        Ok::<_, BoxError>(Bytes::from(vec![b'x'; 1000]))
    });
    let service = ServiceBuilder::new()
        .layer(GlobalConcurrencyLimitLayer::new(4))
        .service(work);
    let pipeline = Pipeline::new(Lines::default)
        .service(service)
        .limits(Limits::default().high_mark(4096))
        .deadlines(Deadlines::default().write(None))
        .in_flight(16);
    let (listener, connector) = testkit::memory_with_buffer(1024);
    let server = serve_with(Server::from_listener(listener), connector, pipeline);
    let mut stalled = server.stream().await;
    let requests = b"a\n".repeat(100_000);
    let write = timeout(Duration::from_secs(10), stalled.write_all(&requests)).await;
    assert!(write.is_err(), "it was read to the end");

    let mut healthy = BufReader::new(server.stream().await);
    let begun = Instant::now();

    assert_eq!(ask(&mut healthy, "b").await.len(), 1000);
    assert!(begun.elapsed() <= Duration::from_millis(2));
}

/// Pseudo-random numbers, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from((self.0 >> 33) % n).expect("it is small")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn f7_changes_from_many_sides_lose_nobody() {
    let crowd = Crowd::default();
    let limit = ConnectionLimit::new(4);
    let (listener, connector) = testkit::memory();
    let server = Server::builder().limit(limit.clone()).build(listener);
    let counting = crowd.clone();
    let service = service_fn(move |mut conn: Connection<Io>| {
        let inside = counting.enter();
        async move {
            tokio::task::yield_now().await;
            conn.write_all(b"ok").await?;
            drop(inside);
            Ok::<_, BoxError>(())
        }
    });
    let server = serve_with(server, connector, service);
    let churn: Vec<_> = (0..64)
        .map(|_| {
            let connector = server.connector().clone();
            tokio::spawn(async move {
                for _ in 0..100 {
                    let mut client = connector.connect().await.expect("it listens");
                    let mut reply = String::new();
                    client.read_to_string(&mut reply).await.expect("text");
                    assert_eq!(reply, "ok");
                }
            })
        })
        .collect();

    let changes: Vec<_> = (0..4)
        .map(|seed| {
            let limit = limit.clone();
            tokio::spawn(async move {
                let mut numbers = Numbers(seed);
                for _ in 0..500 {
                    limit.set(numbers.below(9));
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for change in changes {
        change.await.unwrap();
    }
    limit.set(3);

    for client in churn {
        let ended = timeout(Duration::from_secs(60), client).await;
        ended.expect("no stall after the last change").unwrap();
    }
    assert!(crowd.peak() <= 8, "{} were in at once", crowd.peak());
    let gone = async {
        while server.handle().live() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(60), gone)
        .await
        .expect("all leave");
    assert_eq!(limit.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn f8_lowering_the_limit_cuts_nobody_and_admits_below_it_only() {
    let limit = ConnectionLimit::new(20);
    let server = limited(&limit);
    let mut clients = connect(&server, 22).await;
    assert_in(&server, 20).await;

    limit.set(5);

    assert_in(&server, 20).await;
    clients.drain(..15);
    assert_in(&server, 5).await;
    clients.remove(0);
    assert_in(&server, 5).await;
    let mut waited = BufReader::new(clients.remove(5));
    assert_eq!(clients.len(), 5);
    drop(clients.drain(..2));
    assert_eq!(ask(&mut waited, "in").await, "in");
}

#[tokio::test(start_paused = true)]
async fn f9_raising_the_limit_serves_the_waiting_at_once() {
    let limit = ConnectionLimit::new(2);
    let server = limited(&limit);
    let mut clients = connect(&server, 4).await;
    assert_in(&server, 2).await;

    limit.set(4);

    assert_in(&server, 4).await;
    let mut last = BufReader::new(clients.remove(3));
    assert_eq!(ask(&mut last, "in").await, "in");
}

#[tokio::test(start_paused = true)]
async fn f10_a_limit_of_zero_keeps_nobody_from_shutting_down() {
    let limit = ConnectionLimit::new(0);
    let mut server = limited(&limit);
    let _client = server.stream().await;
    assert_in(&server, 0).await;

    server.handle().shutdown();

    let report = server.report().await;
    assert_eq!((report.drained, report.aborted), (0, 0));
    assert_eq!(report.duration, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn f11_a_shutdown_at_the_limit_is_not_held_up_and_closes_the_queue() {
    let limit = ConnectionLimit::new(1);
    let mut server = limited(&limit);
    let inside = server.stream().await;
    let waiting = server.stream().await;
    assert_in(&server, 1).await;

    server.handle().shutdown();

    assert_eq!(read_to_end(waiting).await, "");
    assert_eq!(read_to_end(inside).await, "");
    assert!(server.connector().connect().await.is_err());
    assert!(server.report().await.duration <= Duration::from_millis(100));
}
