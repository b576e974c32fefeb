//! Shutdown: pending requests are answered, no new connection is accepted, and the server ends by
//! its deadline, whatever the peers do.

#[path = "support/certificates.rs"]
mod certificates;
mod support;

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::either::Either;
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::{Socket, SocketOptions};
use tower_tcp::deadline::{Deadlines, MinRate};
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::Limits;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{self, Connector, MemoryListener, Served, serve, serve_with};
use tower_tcp::tls::Tls;
use tower_tcp::{
    BoxError, Connection, ConnectionPhase, EndReason, Handle, Peer, Pipeline, Server,
    ServerBuilder, ServerPhase,
};

use certificates::certified;
use support::{Clients, Ends, each_way, read_to_end, serve_stream, settled, until};
use tokio::io::DuplexStream as Io;

/// The limit of every wait on the real clock, far longer than any of them takes.
const NET: Duration = Duration::from_secs(30);

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

fn echo_server(
    build: impl FnOnce(ServerBuilder) -> ServerBuilder,
) -> (Server<MemoryListener>, Connector) {
    let (listener, connector) = testkit::memory();
    (build(Server::builder()).build(listener), connector)
}

/// Answers once the gate has a permit.
fn gated(
    gate: &Arc<Semaphore>,
) -> impl Service<Bytes, Response = Bytes, Error = BoxError, Future: Send> + Clone + Send + 'static
{
    let gate = Arc::clone(gate);
    service_fn(move |line: Bytes| {
        let gate = Arc::clone(&gate);
        async move {
            gate.acquire().await?.forget();
            Ok(line)
        }
    })
}

async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

async fn send(server: &Served, requests: &[u8]) -> Io {
    let mut client = server.stream().await;
    client
        .write_all(requests)
        .await
        .expect("the connection is open");
    client
}

#[tokio::test(start_paused = true)]
async fn h1_all_in_flight_is_delivered_in_order_and_then_the_end() {
    let service = service_fn(|line: Bytes| async move {
        // Between 0 and 499 ms; later requests often complete sooner.
        let number = line
            .iter()
            .fold(7_u64, |sum, byte| sum * 31 + u64::from(*byte));
        tokio::time::sleep(Duration::from_millis(number % 500)).await;
        Ok::<_, Infallible>(line)
    });
    let pipeline = Pipeline::new(Lines::default).service(service).in_flight(4);
    let mut server = serve(pipeline);
    let mut clients = Vec::new();
    for n in 0..500 {
        let requests = format!("{n}a\n{n}b\n{n}c\n{n}d\n");
        clients.push((send(&server, requests.as_bytes()).await, requests));
    }
    until(|| server.handle().live() == 500).await;

    server.handle().shutdown();

    for (client, requests) in clients {
        assert_eq!(read_to_end(client).await, requests);
    }
    let report = server.report().await;
    assert_eq!((report.drained, report.aborted), (500, 0));
    assert_eq!(server.reasons(), [EndReason::Drained; 500]);
}

#[tokio::test(start_paused = true)]
async fn h2_a_connection_in_its_hook_may_finish_it_and_is_then_closed() {
    let gate = Arc::new(Semaphore::new(0));
    let opens = Arc::clone(&gate);
    let hook = service_fn(move |conn: Connection<Io>| {
        let gate = Arc::clone(&gate);
        async move {
            gate.acquire().await?.forget();
            Ok::<_, BoxError>(conn)
        }
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service(Pipeline::new(Lines::default).service(service_fn(echo)));
    let mut server = serve(stack);
    let client = send(&server, b"asked before\n").await;
    until(|| server.handle().live() == 1).await;

    server.handle().shutdown();
    settle().await;
    opens.add_permits(1);

    assert_eq!(read_to_end(client).await, "asked before\n");
    assert_eq!(server.report().await.drained, 1);
}

#[tokio::test(start_paused = true)]
async fn h2_a_hook_that_hangs_holds_a_shutdown_for_a_second() {
    let hook = service_fn(|_conn: Connection<Io>| pending::<Result<Connection<Io>, BoxError>>());
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service(Pipeline::new(Lines::default).service(service_fn(echo)));
    let mut server = serve(stack);
    let client = server.stream().await;
    until(|| server.handle().live() == 1).await;

    server.handle().shutdown();

    assert_eq!(server.report().await.duration, Duration::from_secs(1));
    assert_eq!(server.reasons(), [EndReason::Drained]);
    assert_eq!(read_to_end(client).await, "");
}

#[tokio::test(start_paused = true)]
async fn h3_the_rest_of_a_frame_that_was_begun_is_waited_for_and_answered() {
    let mut server = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    let mut client = send(&server, b"whole\nha").await;
    settle().await;

    server.handle().shutdown();
    tokio::time::sleep(Duration::from_secs(2)).await;
    client.write_all(b"lf\nand more\n").await.unwrap();

    assert_eq!(read_to_end(client).await, "whole\nhalf\n");
    assert_eq!(server.report().await.drained, 1);
}

#[tokio::test(start_paused = true)]
async fn h3_a_frame_that_is_never_whole_calls_nobody() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&calls);
    let service = service_fn(move |line: Bytes| {
        count.fetch_add(1, Ordering::SeqCst);
        echo(line)
    });
    let pipeline = Pipeline::new(Lines::default)
        .service(service)
        .deadlines(Deadlines::default().frame(Duration::from_secs(4)));
    let mut server = serve(pipeline);
    let client = send(&server, b"ha").await;
    settle().await;

    server.handle().shutdown();

    assert_eq!(read_to_end(client).await, "");
    assert_eq!(calls.load(Ordering::SeqCst), 0);
    assert!(server.report().await.duration <= Duration::from_secs(4));
}

/// Starts a server whose answer is larger than the peer's stream.
async fn with_a_pending_write(bytes: usize) -> (Served, Io) {
    let (listener, connector) = testkit::memory_with_buffer(1024);
    let server = Server::builder()
        .shutdown_deadline(Duration::from_secs(20))
        .build(listener);
    let service = service_fn(move |_line: Bytes| async move {
        Ok::<_, Infallible>(Bytes::from(vec![b'x'; bytes]))
    });
    let server = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service),
    );
    let client = send(&server, b"a\n").await;
    settle().await;
    (server, client)
}

#[tokio::test(start_paused = true)]
async fn h4_what_is_written_to_a_slow_reader_arrives_whole() {
    let (mut server, client) = with_a_pending_write(100_000).await;

    server.handle().shutdown();
    tokio::time::sleep(Duration::from_secs(19)).await;

    assert_eq!(read_to_end(client).await.len(), 100_001);
    let report = server.report().await;
    assert_eq!((report.drained, report.aborted), (1, 0));
    assert_eq!(server.reasons(), [EndReason::Drained]);
}

#[tokio::test(start_paused = true)]
async fn h4_a_reader_that_never_resumes_is_cut_off_and_reported_as_that() {
    // Above and below the high mark. Below it, requests are still read.
    for bytes in [100_000, 10_000] {
        let (mut server, _client) = with_a_pending_write(bytes).await;

        server.handle().shutdown();

        let report = server.report().await;
        assert_eq!((report.drained, report.aborted), (0, 1));
        assert_eq!(report.duration, Duration::from_secs(20));
        assert_eq!(server.reasons(), [EndReason::DrainDeadline]);
    }
}

#[tokio::test(start_paused = true)]
async fn h4_readers_that_time_out_in_a_drain_are_reported_as_that() {
    let deadlines = Deadlines::default().write(Duration::from_secs(5));
    let large = service_fn(|line: Bytes| async move {
        Ok::<_, BoxError>(match &line[..] {
            b"large" => Bytes::from(vec![b'x'; 1 << 20]),
            b"hang" => pending().await,
            _ => line,
        })
    });
    let pipeline = Pipeline::new(Lines::default).service(large);
    for mut server in each_way(pipeline.deadlines(deadlines)) {
        let mut there = Vec::new();
        for line in ["large\n", "large\n", "hang\n", "small\n"] {
            there.push(send(&server, line.as_bytes()).await);
        }
        settle().await;

        server.handle().shutdown();

        let report = server.report().await;
        let way = server.way();
        assert_eq!(
            (report.drained, report.timed_out, report.aborted),
            (1, 2, 1),
            "{way}: {:?}",
            server.reasons()
        );
        let said = "connections: 1 drained, 2 timed out, 1 aborted";
        assert_eq!(report.to_string(), said, "{way}");
    }
}

#[tokio::test(start_paused = true)]
async fn h4_a_slow_reader_whose_stack_is_not_done_at_the_deadline_is_counted_once() {
    let rate = MinRate::new(1 << 20, Duration::from_secs(5));
    let large =
        service_fn(|_: Bytes| async { Ok::<_, BoxError>(Bytes::from(vec![b'x'; 1 << 20])) });
    let pipeline = Pipeline::new(Lines::default)
        .service(large)
        .deadlines(Deadlines::default().min_rate(rate));
    let (done, mut its_end) = mpsc::channel(1);
    let stack = ServiceBuilder::new()
        .then(move |ended: Result<EndReason, BoxError>| {
            done.try_send(ended.as_ref().ok().copied()).unwrap();
            pending::<Result<EndReason, BoxError>>()
        })
        .service(pipeline);
    let mut served = serve(stack);
    let mut client = served.connect().await.unwrap();
    client.write_all(b"large\n").await.unwrap();
    assert_eq!(its_end.recv().await, Some(Some(EndReason::SlowReader)));

    let report = served.shutdown().await.unwrap();

    assert_eq!(
        (report.drained, report.timed_out, report.aborted),
        (0, 1, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn h5_a_shutdown_while_paused_is_not_held_up() {
    let (server, connector) = echo_server(|server| server.limit(ConnectionLimit::new(1)));
    let mut server = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    let inside = send(&server, b"a\n").await;
    until(|| server.handle().live() == 1).await;
    server.handle().pause();
    let waiting = server.stream().await;

    server.handle().shutdown();

    assert_eq!(read_to_end(inside).await, "a\n");
    assert_eq!(read_to_end(waiting).await, "");
    assert!(server.report().await.duration <= Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_for_a_paused_server_are_served_what_they_have_asked() {
    let mut server = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    server.handle().pause();
    settle().await;
    let waiting = send(&server, b"asked\n").await;
    settle().await;

    server.handle().shutdown();

    assert_eq!(read_to_end(waiting).await, "asked\n");
    assert_eq!(server.report().await.drained, 1);
}

#[tokio::test(start_paused = true)]
async fn what_has_arrived_is_answered_whatever_a_turn_costs() {
    for len in 500..600 {
        let (listener, connector) = testkit::memory_with_buffer(1 << 20);
        let costly = service_fn(async |line: Bytes| {
            tokio::task::consume_budget().await;
            echo(line).await
        });
        let server = serve_with(
            Server::from_listener(listener),
            connector,
            Pipeline::new(Lines::default).service(costly),
        );
        let lines = [vec![b'x'; len - 1], b"\n".to_vec()].concat().repeat(400);
        let client = send(&server, &lines).await;

        server.handle().shutdown();

        let answered = read_to_end(client).await.len() / len;
        assert_eq!(answered, 400, "of {len} bytes each");
    }
}

/// Consumes this many units of tokio's task budget at each poll before it can become ready.
struct Costly<S>(S, usize);

impl<S: Service<R>, R> Service<R> for Costly<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        for _ in 0..self.1 {
            ready!(pin!(tokio::task::consume_budget()).poll(cx));
        }
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> S::Future {
        self.0.call(request)
    }
}

#[tokio::test(start_paused = true)]
async fn the_backlog_is_taken_in_whatever_a_turn_costs() {
    for units in 5..20 {
        let pipeline = Pipeline::new(Lines::default).service(service_fn(echo));
        let server = serve(Costly(pipeline, units));
        let mut clients = Vec::new();
        for _ in 0..100 {
            clients.push(send(&server, b"asked\n").await);
        }

        server.handle().shutdown();

        for client in clients {
            assert_eq!(read_to_end(client).await, "asked\n", "{units} units each");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn h6_those_in_the_backlog_are_served_what_they_have_asked() {
    let mut server = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(send(&server, b"asked\n").await);
    }
    assert!(
        server.handle().live() < 100,
        "the loop had its turns already"
    );

    server.handle().shutdown();

    for client in clients {
        assert_eq!(read_to_end(client).await, "asked\n");
    }
    assert_eq!(server.report().await.drained, 100);
}

/// Serves echo over TCP on a port that the system chose.
async fn tcp() -> (
    SocketAddr,
    Handle,
    tokio::task::JoinHandle<Result<tower_tcp::Report, tower_tcp::Error>>,
) {
    let server = Server::bind("127.0.0.1:0")
        .await
        .expect("loopback is there");
    let handle = server.handle();
    let addr = handle.local_addrs()[0].tcp().expect("it is TCP");
    let pipeline = Pipeline::new(Lines::default).service(service_fn(echo));
    let task = tokio::spawn(server.serve(pipeline));
    (addr, handle, task)
}

#[tokio::test]
async fn h6_those_whom_the_kernel_has_connected_are_served_what_they_have_asked() {
    use std::io::{Read, Write};
    let (addr, handle, task) = tcp().await;
    // The loop waits for a connection. It gets no turn before the shutdown, because this thread is
    // the only one.
    settle().await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut client = std::net::TcpStream::connect(addr).unwrap();
        client.write_all(b"asked\n").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        clients.push(client);
    }

    handle.shutdown();

    let report = timeout(NET, task).await.unwrap().unwrap().unwrap();
    assert_eq!(report.drained, 20);
    for mut client in clients {
        client.set_read_timeout(Some(NET)).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "asked\n");
    }
}

/// The length of the default backlog is 1,024.
#[tokio::test]
async fn h6_those_in_a_backlog_longer_than_usual_are_served() {
    const CLIENTS: usize = 1_100;
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    let _raised_or_not = setrlimit(Resource::Nofile, files);
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
    let is_long = most.trim().parse().is_ok_and(|most: usize| most >= CLIENTS);
    if !is_long || files.maximum.is_some_and(|files| files < 4096) {
        eprintln!("skipped: the system allows no such backlog, or too few files");
        return;
    }
    let server = Server::builder()
        .listen("127.0.0.1:0")
        .socket_options(SocketOptions::default().backlog(4096))
        .bind()
        .await
        .unwrap();
    let handle = server.handle();
    let addr = handle.local_addrs()[0].tcp().unwrap();
    let task = tokio::spawn(server.serve(Pipeline::new(Lines::default).service(service_fn(echo))));
    handle.pause();
    settle().await;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| std::net::TcpStream::connect(addr).unwrap())
        .collect();

    handle.shutdown();

    let report = timeout(NET, task).await.unwrap().unwrap().unwrap();
    assert_eq!(report.drained, CLIENTS);
    drop(clients);
}

#[tokio::test(start_paused = true)]
async fn h7_what_was_pipelined_before_the_signal_is_answered_and_nothing_later_is() {
    let gate = Arc::new(Semaphore::new(0));
    let mut server = serve(Pipeline::new(Lines::default).service(gated(&gate)));
    let mut client = send(&server, b"a\nb\nc\n").await;
    settle().await;

    server.handle().shutdown();
    settle().await;
    gate.add_permits(3);
    let mut answers = [0; 6];
    client.read_exact(&mut answers).await.expect("it is served");
    // The connection may have ended before this write.
    drop(client.write_all(b"d\n").await);

    assert_eq!(&answers, b"a\nb\nc\n");
    assert_eq!(read_to_end(client).await, "");
    assert_eq!(server.report().await.drained, 1);
}

/// Has 20 clients send a request that the runtime does not know of when the shutdown begins: this
/// thread is the only one, and neither waits nor gives the server a turn in between.
async fn ask_unreported<Io, F>(
    handle: Handle,
    task: tokio::task::JoinHandle<Result<tower_tcp::Report, tower_tcp::Error>>,
    connect: impl Fn() -> F,
) where
    Io: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Io>,
{
    let mut clients = Vec::new();
    for n in 0..20 {
        let mut client = connect().await;
        // Half of them have been served already.
        if n % 2 == 0 {
            client.write_all(b"before\n").await.expect("it is served");
            client.read_exact(&mut [0; 7]).await.expect("it is served");
        }
        clients.push(client);
    }
    // Longer than a drain waits for the first bytes of a new connection.
    sleep(Duration::from_millis(100)).await;

    for client in &mut clients {
        let sent = client.write_all(b"asked\n").now_or_never();
        sent.expect("there is room").expect("it is open");
    }
    handle.shutdown();

    for mut client in clients {
        let mut answer = String::new();
        let read = timeout(NET, client.read_to_string(&mut answer)).await;
        read.expect("in time").expect("it is text");
        assert_eq!(answer, "asked\n");
    }
    let ended = timeout(NET, task).await.expect("in time");
    let report = ended.expect("it ran").expect("it drained");
    assert_eq!(report.drained, 20);
}

#[tokio::test]
async fn h7_a_request_that_the_runtime_has_not_reported_is_answered() {
    let (addr, handle, task) = tcp().await;
    ask_unreported(handle, task, async || {
        TcpStream::connect(addr).await.unwrap()
    })
    .await;
}

#[tokio::test]
async fn h7_a_request_that_the_runtime_has_not_reported_is_answered_over_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let server = Server::bind(format!("unix:{}", path.display())).await;
    let server = server.expect("the path is free");
    let handle = server.handle();
    let pipeline = Pipeline::new(Lines::default).service(service_fn(echo));
    let task = tokio::spawn(server.serve(pipeline));
    ask_unreported(handle, task, async || {
        UnixStream::connect(&path).await.unwrap()
    })
    .await;
}

#[tokio::test]
async fn h7_a_request_that_the_runtime_has_not_reported_is_answered_over_tls() {
    let (server, client) = certified();
    let hook = PreConnectLayer::new(Tls::from(server));
    let server = Server::bind("127.0.0.1:0").await;
    let server = server.expect("loopback is there");
    let handle = server.handle();
    let addr = handle.local_addrs()[0].tcp().expect("it is TCP");
    let pipeline = Pipeline::new(Lines::default).service(service_fn(echo));
    let task = tokio::spawn(server.serve(hook.layer(pipeline)));
    let tls = TlsConnector::from(client);
    ask_unreported(handle, task, async || {
        let stream = TcpStream::connect(addr).await.unwrap();
        let name = ServerName::try_from("localhost").expect("a name");
        tls.connect(name, stream).await.unwrap()
    })
    .await;
}

#[tokio::test]
async fn h7_all_that_has_arrived_is_answered_however_little_is_read_ahead() {
    const REQUESTS: usize = 5000;
    for has_tls in [false, true] {
        let [begun, released] = [(); 2].map(|()| Arc::new(Notify::new()));
        let signals = (Arc::clone(&begun), Arc::clone(&released));
        let service = service_fn(move |line: Bytes| {
            let (begun, released) = signals.clone();
            async move {
                if line == "wait" {
                    begun.notify_one();
                    released.notified().await;
                }
                Ok::<_, BoxError>(line)
            }
        });
        let pipeline = Pipeline::new(Lines::default)
            .service(service)
            .limits(Limits::default().read_ahead(1000));
        let server = Server::bind("127.0.0.1:0").await;
        let server = server.expect("loopback is there");
        let handle = server.handle();
        let addr = handle.local_addrs()[0].tcp().expect("it is TCP");
        let (identity, client) = certified();
        let task = if has_tls {
            let hook = PreConnectLayer::new(Tls::from(identity));
            tokio::spawn(server.serve(hook.layer(pipeline)))
        } else {
            tokio::spawn(server.serve(pipeline))
        };
        let stream = TcpStream::connect(addr).await.expect("it listens");
        let mut stream = if has_tls {
            let name = ServerName::try_from("localhost").expect("a name");
            let tls = TlsConnector::from(client).connect(name, stream).await;
            Either::Left(tls.expect("a good handshake"))
        } else {
            Either::Right(stream)
        };
        stream.write_all(b"wait\n").await.expect("it is open");
        stream.flush().await.expect("it is open");
        begun.notified().await;
        let requests = "0123456789\n".repeat(REQUESTS);
        let sent = stream.write_all(requests.as_bytes()).await;
        sent.expect("it is open");
        stream.flush().await.expect("it is open");

        handle.shutdown();
        released.notify_one();

        let mut replies = String::new();
        let read = timeout(NET, stream.read_to_string(&mut replies)).await;
        read.expect("it closes").expect("in good order");
        assert_eq!(replies.lines().count(), 1 + REQUESTS, "TLS: {has_tls}");
        drop(stream);
        let report = task.await.expect("no panic").expect("it has served");
        assert_eq!((report.drained, report.aborted), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn h8_idle_connections_are_closed_at_once() {
    let mut server = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    let mut clients = Vec::new();
    for n in 0..5000 {
        // Some have been served, others have sent nothing yet.
        clients.push(send(&server, if n % 2 == 0 { b"a\n" } else { b"" }).await);
    }
    until(|| server.handle().live() == 5000).await;
    // By now the input of each connection has been read, if there was any.
    tokio::time::advance(Duration::from_millis(50)).await;
    let begun = Instant::now();

    server.handle().shutdown();

    for client in clients {
        read_to_end(client).await;
    }
    assert_eq!(begun.elapsed(), Duration::ZERO);
    let report = server.report().await;
    assert_eq!((report.drained, report.aborted), (5000, 0));
}

#[tokio::test(start_paused = true)]
async fn e16_a_call_may_shut_its_own_server_down_or_abort_it() {
    for (request, reply, drained) in [("shut down\n", "shut down\n", 1), ("abort\n", "", 0)] {
        let own = Arc::new(OnceLock::<Handle>::new());
        let known = Arc::clone(&own);
        let service = service_fn(move |line: Bytes| {
            let handle = known.get().expect("it is set").clone();
            async move {
                if line == "abort" {
                    handle.abort();
                    pending::<()>().await;
                }
                handle.shutdown();
                Ok::<_, Infallible>(line)
            }
        });
        let mut server = serve(Pipeline::new(Lines::default).service(service));
        assert!(own.set(server.handle().clone()).is_ok());
        let begun = Instant::now();

        let client = send(&server, request.as_bytes()).await;

        assert_eq!(read_to_end(client).await, reply);
        let report = server.report().await;
        assert_eq!((report.drained, report.aborted), (drained, 1 - drained));
        assert!(begun.elapsed() < Duration::from_secs(1));
    }
}

#[tokio::test(start_paused = true)]
async fn h9_the_deadline_cuts_off_those_who_are_left_and_counts_them() {
    let service = service_fn(|line: Bytes| async move {
        if line == "hang" {
            pending::<()>().await;
        }
        Ok::<_, Infallible>(line)
    });
    let mut server = serve(Pipeline::new(Lines::default).service(service));
    let mut clients = Vec::new();
    for n in 0..10 {
        clients.push(send(&server, if n < 3 { b"hang\n" } else { b"fine\n" }).await);
    }
    settle().await;

    server.handle().shutdown_within(Duration::from_secs(7));

    let mut replies = Vec::new();
    for client in clients {
        replies.push(read_to_end(client).await);
    }
    let report = server.report().await;
    assert_eq!((report.drained, report.aborted), (7, 3));
    assert_eq!(report.duration, Duration::from_secs(7));
    assert_eq!(replies.iter().filter(|reply| *reply == "fine\n").count(), 7);
    let cut = |end: &&EndReason| **end == EndReason::DrainDeadline;
    assert_eq!(server.reasons().iter().filter(cut).count(), 3);
}

#[tokio::test(start_paused = true)]
async fn h10_an_abort_after_a_shutdown_is_immediate() {
    let gate = Arc::new(Semaphore::new(0));
    let mut server = serve(Pipeline::new(Lines::default).service(gated(&gate)));
    let client = send(&server, b"a\n").await;
    settle().await;
    server.handle().shutdown();
    tokio::time::sleep(Duration::from_secs(1)).await;

    server.handle().abort();

    let report = server.report().await;
    assert_eq!((report.drained, report.aborted), (0, 1));
    assert_eq!(report.duration, Duration::from_secs(1));
    assert_eq!(server.reasons(), [EndReason::Killed]);
    assert_eq!(read_to_end(client).await, "");
}

#[tokio::test(start_paused = true)]
async fn a_second_shutdown_changes_nothing() {
    let gate = Arc::new(Semaphore::new(0));
    let mut server = serve(Pipeline::new(Lines::default).service(gated(&gate)));
    let client = send(&server, b"a\n").await;
    settle().await;
    server.handle().shutdown();
    tokio::time::sleep(Duration::from_secs(1)).await;

    server.handle().shutdown();
    tokio::time::sleep(Duration::from_secs(1)).await;
    gate.add_permits(1);

    assert_eq!(read_to_end(client).await, "a\n");
    let report = server.report().await;
    assert_eq!((report.drained, report.aborted), (1, 0));
    assert_eq!(report.duration, Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_can_be_brought_forward_during_a_shutdown_and_not_put_off() {
    for (later, ends) in [(3, 5), (60, 30)] {
        let gate = Arc::new(Semaphore::new(0));
        let mut server = serve(Pipeline::new(Lines::default).service(gated(&gate)));
        let _client = send(&server, b"a\n").await;
        settle().await;
        server.handle().shutdown();
        tokio::time::sleep(Duration::from_secs(2)).await;

        server.handle().shutdown_within(Duration::from_secs(later));

        let report = server.report().await;
        assert_eq!(report.duration, Duration::from_secs(ends));
        assert_eq!(server.reasons(), [EndReason::DrainDeadline]);
    }
}

/// Serves a stack that takes several turns at every stage, with a few clients at different stages.
fn busy_stack() -> impl Service<
    Connection<Io>,
    Response = EndReason,
    Error = BoxError,
    Future = impl Future<Output = Result<EndReason, BoxError>> + Send + 'static,
> + Send
+ 'static {
    let hook = service_fn(|conn: Connection<Io>| async move {
        tokio::task::yield_now().await;
        Ok::<_, BoxError>(conn)
    });
    let make = service_fn(|peer: Peer<Bytes>| async move {
        peer.send("hello".into()).await?;
        tokio::task::yield_now().await;
        Ok::<_, BoxError>(service_fn(|line: Bytes| async move {
            for _ in 0..5 {
                tokio::task::yield_now().await;
            }
            Ok::<_, Infallible>(line)
        }))
    });
    ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service(
            Pipeline::new(Lines::default)
                .make_service(make)
                .in_flight(2),
        )
}

/// Connects a few clients, to be at different stages.
async fn busy_clients(connector: &Connector) -> Vec<Io> {
    let mut clients = Vec::new();
    for n in 0..20 {
        let mut client = connector.connect().await.expect("the server listens");
        let requests = &b"a\nb\nc\n"[..n % 7];
        client.write_all(requests).await.expect("there is room");
        clients.push(client);
    }
    clients
}

#[tokio::test(start_paused = true)]
async fn h13_dropping_the_serve_future_at_any_turn_ends_every_connection() {
    for k in 0..60 {
        let (listener, connector) = testkit::memory();
        let server = Server::from_listener(listener);
        let handle = server.handle();
        let task = tokio::spawn(server.serve(busy_stack()));
        let clients = busy_clients(&connector).await;
        for _ in 0..k {
            tokio::task::yield_now().await;
        }

        task.abort();

        let gone = timeout(Duration::from_secs(60), handle.closed()).await;
        gone.unwrap_or_else(|_| panic!("it is not closed, dropped after {k} turns"));
        for client in clients {
            read_to_end(client).await;
        }
        assert_eq!((handle.live(), handle.limit().in_use()), (0, 0));
    }
    let metrics = tokio::runtime::Handle::current().metrics();
    assert_eq!(metrics.num_alive_tasks(), 0);
}

#[tokio::test(start_paused = true)]
async fn h13_a_server_that_never_served_is_closed_when_it_is_dropped() {
    let (server, connector) = echo_server(|server| server);
    let handle = server.handle();

    drop(server);

    assert!(
        timeout(Duration::from_secs(1), handle.closed())
            .await
            .is_ok()
    );
    assert!(connector.connect().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn h13_dropping_handles_changes_nothing() {
    let (server, connector) = echo_server(|server| server);
    drop(server.handle());
    let task = tokio::spawn(server.serve(Pipeline::new(Lines::default).service(service_fn(echo))));
    let client = connector.connect().await.unwrap();

    assert_eq!(support::exchange(client, "a\n").await, "a\n");
    assert!(!task.is_finished());
}

#[test]
fn h13_dropping_the_runtime_at_any_turn_ends_every_connection() {
    for k in 0..40 {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (server, clients) = runtime.block_on(async {
            let server = serve(busy_stack());
            let clients = busy_clients(server.connector()).await;
            for _ in 0..k {
                tokio::task::yield_now().await;
            }
            (server, clients)
        });
        let live = server.handle().live();

        drop(runtime);

        assert_eq!(server.handle().live(), 0, "after {k} turns");
        assert_eq!(server.handle().limit().in_use(), 0, "after {k} turns");
        assert!(server.reasons().len() >= live, "after {k} turns");
        drop(clients);
    }
}

#[tokio::test(start_paused = true)]
async fn h15_new_connections_are_refused_after_a_shutdown() {
    let gate = Arc::new(Semaphore::new(0));
    let mut server = serve(Pipeline::new(Lines::default).service(gated(&gate)));
    let _busy = send(&server, b"a\n").await;
    settle().await;

    server.handle().shutdown();
    settle().await;

    let refused = server.connector().connect().await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    gate.add_permits(1);
    server.report().await;
}

#[tokio::test]
async fn h15_the_kernel_refuses_new_connections_while_the_server_still_drains() {
    let gate = Arc::new(Semaphore::new(0));
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let handle = server.handle();
    let addr = handle.local_addrs()[0].tcp().unwrap();
    let (accepted, mut is_accepted) = mpsc::channel(1);
    let stack = ServiceBuilder::new()
        .map_request(move |conn: Connection<Socket>| {
            accepted.try_send(()).unwrap();
            conn
        })
        .service(Pipeline::new(Lines::default).service(gated(&gate)));
    let task = tokio::spawn(server.serve(stack));
    let mut busy = TcpStream::connect(addr).await.unwrap();
    busy.write_all(b"a\n").await.unwrap();
    timeout(NET, is_accepted.recv()).await.unwrap().unwrap();

    handle.shutdown();

    let refused = async {
        loop {
            match TcpStream::connect(addr).await {
                Err(err) if err.kind() == std::io::ErrorKind::ConnectionReset => {}
                Err(err) => return err,
                // It connected before the listener was closed, as did one that was reset.
                Ok(_) => tokio::task::yield_now().await,
            }
        }
    };
    let refused = timeout(NET, refused).await.unwrap();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(!task.is_finished());
    gate.add_permits(1);
    drop(busy);
    timeout(NET, task).await.unwrap().unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lame_duck_serves_as_before_and_then_drains() {
    let (server, connector) = echo_server(|server| server.lame_duck(Duration::from_secs(5)));
    let mut server = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    let handle = server.handle().clone();
    let begun = Instant::now();
    let mut before = server.client().await;
    until(|| handle.live() == 1).await;
    assert_eq!(handle.phase(), ServerPhase::Serving);

    handle.shutdown();

    assert_eq!(handle.phase(), ServerPhase::LameDuck);
    tokio::time::sleep(Duration::from_secs(4)).await;
    // One that was silent all the while, and one that comes now.
    let mut late = server.client().await;
    for client in [&mut before, &mut late] {
        for text in ["a", "b"] {
            client.send(format!("{text}\n")).await;
            assert_eq!(client.line().await, text);
        }
    }
    assert!(
        handle
            .connections()
            .all(|live| live.phase() == ConnectionPhase::Serving)
    );
    assert_eq!(
        handle.reached(ServerPhase::Draining).await,
        ServerPhase::Draining
    );
    assert_eq!(begun.elapsed().as_secs(), 5);
    assert!(before.rest().await.is_empty());
    drop((before, late));
    let report = server.report().await;
    assert_eq!(report.duration.as_secs(), 5);
    assert_eq!((report.drained, report.aborted), (2, 0));
    assert_eq!(handle.phase(), ServerPhase::Ended);
    assert!(server.connector().connect().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_lame_duck_waits_for_a_shutdown_if_told_so() {
    let (server, connector) = echo_server(|server| server.lame_duck(Duration::from_secs(60)));
    let mut server = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    let handle = server.handle().clone();
    handle.lame_duck();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(handle.phase(), ServerPhase::LameDuck);
    let mut client = server.client().await;
    client.send("a\n").await;
    assert_eq!(client.line().await, "a");

    // The phase has lasted long enough.
    handle.shutdown();

    assert!(client.rest().await.is_empty());
    drop(client);
    assert_eq!(server.report().await.duration.as_secs(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_lame_duck_begun_by_hand_lasts_as_long_as_one_of_a_shutdown() {
    let (server, connector) = echo_server(|server| server.lame_duck(Duration::from_secs(60)));
    let mut server = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    server.handle().lame_duck();
    tokio::time::sleep(Duration::from_secs(40)).await;

    server.handle().shutdown();

    assert_eq!(server.report().await.duration.as_secs(), 20);
}

#[tokio::test(start_paused = true)]
async fn a_drain_begins_at_once_in_every_phase() {
    type Before = fn(&Handle);
    let ways: [Before; 3] = [|_| {}, Handle::lame_duck, Handle::shutdown];
    for before in ways {
        let (server, connector) = echo_server(|server| server.lame_duck(Duration::from_secs(60)));
        let mut server = serve_with(
            server,
            connector,
            Pipeline::new(Lines::default).service(service_fn(echo)),
        );
        let mut client = server.client().await;
        client.send("a\n").await;
        assert_eq!(client.line().await, "a");
        before(server.handle());
        settle().await;

        server.handle().drain();

        assert_eq!(server.handle().phase(), ServerPhase::Draining);
        assert!(client.rest().await.is_empty());
        drop(client);
        assert_eq!(server.report().await.duration.as_secs(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_ends_a_lame_duck_leaves_connections_the_time_of_its_shutdown() {
    let second = Duration::from_secs(1);
    for (time, ends) in [(None, 30), (Some(5), 5), (Some(90), 90)] {
        let (server, connector) = echo_server(|server| server.lame_duck(60 * second));
        let gate = Arc::new(Semaphore::new(0));
        let stack = Pipeline::new(Lines::default).service(gated(&gate));
        let mut server = serve_with(server, connector, stack);
        let _client = send(&server, b"a\n").await;
        settle().await;
        match time {
            Some(time) => server.handle().shutdown_within(time * second),
            None => server.handle().shutdown(),
        }
        tokio::time::sleep(second).await;

        server.handle().drain();

        assert_eq!(server.report().await.duration, (1 + ends) * second);
        assert_eq!(server.reasons(), [EndReason::DrainDeadline]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_phase_that_was_skipped_counts_as_reached() {
    let (server, connector) = echo_server(|server| server);
    let server = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    let handle = server.handle().clone();
    let reached = tokio::spawn(handle.reached(ServerPhase::LameDuck));
    settle().await;
    assert!(!reached.is_finished());

    handle.abort();

    assert!(reached.await.unwrap() >= ServerPhase::Draining);
    assert_eq!(handle.reached(ServerPhase::Ended).await, ServerPhase::Ended);
    assert_eq!(
        handle.reached(ServerPhase::Serving).await,
        ServerPhase::Ended
    );
}

#[tokio::test(start_paused = true)]
async fn an_abort_ends_a_lame_duck_at_once() {
    let (server, connector) = echo_server(|server| server.lame_duck(Duration::from_secs(5)));
    let mut server = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    server.handle().shutdown();
    settle().await;

    server.handle().abort();

    assert_eq!(server.report().await.duration, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_lame_duck_can_close_its_listener_and_serves_the_others_as_before() {
    let (server, connector) = echo_server(|server| {
        server
            .lame_duck(Duration::from_secs(5))
            .lame_duck_closes_listener()
    });
    let mut server = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    let handle = server.handle().clone();
    let mut before = server.client().await;
    assert_eq!(before.ask("a").await, "a");
    // The one in the backlog is served, too, even by a server that is paused.
    handle.pause();
    let mut waits = server.client().await;

    handle.shutdown();

    until(|| handle.live() == 2).await;
    assert_eq!(handle.phase(), ServerPhase::LameDuck);
    assert!(server.connect().await.is_err());
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(before.ask("b").await, "b");
    assert_eq!(waits.ask("c").await, "c");
    assert_eq!(handle.phase(), ServerPhase::LameDuck);
    assert!(before.rest().await.is_empty());
    assert!(waits.rest().await.is_empty());
    drop((before, waits));
    let report = server.report().await;
    assert_eq!((report.drained, report.duration.as_secs()), (2, 5));
}

#[tokio::test(start_paused = true)]
async fn a_lame_duck_with_a_closed_listener_is_drained_and_aborted_at_once() {
    for end in [Handle::drain, Handle::abort] {
        let (server, connector) = echo_server(|server| {
            server
                .lame_duck(Duration::from_secs(60))
                .lame_duck_closes_listener()
        });
        let mut server = serve_with(
            server,
            connector,
            Pipeline::new(Lines::default).service(service_fn(echo)),
        );
        let mut client = server.client().await;
        assert_eq!(client.ask("a").await, "a");
        server.handle().lame_duck();
        settle().await;
        assert!(server.connect().await.is_err());
        assert_eq!(client.ask("b").await, "b");

        end(server.handle());

        drop(client);
        assert_eq!(server.report().await.duration, Duration::ZERO);
    }
}

#[tokio::test(start_paused = true)]
async fn a_graceful_shutdown_begins_with_its_signal() {
    let (server, connector) = echo_server(|server| server);
    let (signal, signalled) = oneshot::channel::<()>();
    let serve = server
        .serve(Pipeline::new(Lines::default).service(service_fn(echo)))
        .with_graceful_shutdown(async {
            drop(signalled.await);
        });
    let task = tokio::spawn(serve);
    let client = connector.connect().await.unwrap();
    assert_eq!(support::exchange(client, "a\n").await, "a\n");
    let idle = connector.connect().await.unwrap();
    settle().await;
    assert!(!task.is_finished());

    signal.send(()).unwrap();

    assert_eq!(read_to_end(idle).await, "");
    assert_eq!(task.await.unwrap().unwrap().drained, 1);
}

#[tokio::test(start_paused = true)]
async fn closed_gives_everyone_who_asks_the_report() {
    let mut server = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    let client = server.stream().await;
    until(|| server.handle().live() == 1).await;
    let handle = server.handle().clone();
    let asked_before = tokio::spawn(async move { handle.closed().await });
    settle().await;
    assert!(!asked_before.is_finished());

    server.handle().shutdown();
    drop(client);

    let report = server.report().await;
    assert_eq!(report.drained, 1);
    assert_eq!(asked_before.await.unwrap(), report);
    assert_eq!(server.handle().closed().await, report);
}

#[tokio::test(start_paused = true)]
async fn an_abort_from_an_on_end_callback_counts_no_connection_that_has_ended() {
    let handle: Arc<OnceLock<Handle>> = Arc::default();
    let known = Arc::clone(&handle);
    let service = service_fn(move |conn: Connection<Io>| {
        let known = Arc::clone(&known);
        conn.on_end(move |_| known.get().expect("it is set").abort());
        async move {
            drop(conn);
            Ok::<_, BoxError>(())
        }
    });
    let mut served = serve(service);
    assert!(handle.set(served.handle().clone()).is_ok());

    let _client = served.stream().await;

    let report = served.closed().await.unwrap();
    assert_eq!(
        (report.aborted, served.reasons()),
        (0, vec![EndReason::ServiceClosed])
    );
}

/// A stream that its peer resets by dropping the sender.
struct Reset(Io, oneshot::Receiver<()>);

impl AsyncRead for Reset {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if Pin::new(&mut self.1).poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Reset {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Resets a connection whose call runs in a drain. Returns why it ended, and how long after the
/// reset.
async fn reset_in_a_drain<S>(stack: S) -> (EndReason, Duration)
where
    S: Service<Connection<Reset>, Response = EndReason, Error = BoxError, Future: Send>
        + Send
        + 'static,
{
    let (mut client, stream) = tokio::io::duplex(1024);
    let (keep, reset) = oneshot::channel();
    let served = serve_stream(Reset(stream, reset), stack);
    client.write_all(b"hang\n").await.expect("it is open");
    settled().await;
    served.handle().shutdown();
    settled().await;
    let begun = Instant::now();

    drop(keep);

    (served.reason().await, begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_resets_while_its_call_runs_in_a_drain_is_noticed_at_once() {
    let at_once = (EndReason::PeerReset, Duration::ZERO);
    let hang = service_fn(|_: Bytes| pending::<Result<Bytes, BoxError>>());
    let pipeline = Pipeline::new(Lines::default).service(hang);

    assert_eq!(reset_in_a_drain(pipeline.clone()).await, at_once);
    assert_eq!(
        reset_in_a_drain(pipeline.clone().in_flight(8)).await,
        at_once
    );
    assert_eq!(reset_in_a_drain(pipeline.multiplexed(8)).await, at_once);
}
