//! Workers: a connection stays on the thread it was given, with all its tasks and timers, and the
//! server still has one limit, one drain and one end.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use process::{Client, soon};
use support::Streams;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::{self, Runtime};
use tokio::sync::mpsc as tokio_mpsc;
use tokio::task::JoinHandle;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::{Socket, SocketOptions};
use tower_tcp::frame::Lines;
use tower_tcp::testkit::memory;
use tower_tcp::{
    BoxError, Connection, EndReason, Error, Handle, LiveConnection, Pipeline, Report, Server,
    ServerBuilder,
};

#[path = "support/process.rs"]
mod process;
mod support;

/// The limit of every wait, far longer than any of them takes.
const NET: Duration = Duration::from_secs(20);

/// Answers each line with the name of its thread.
async fn who(_line: Bytes) -> Result<Bytes, Infallible> {
    Ok(here().into())
}

fn here() -> String {
    thread::current().name().unwrap_or("nameless").to_owned()
}

struct Running {
    addr: SocketAddr,
    handle: Handle,
    task: JoinHandle<Result<Report, Error>>,
}

/// Starts a server on a free port.
async fn start<S>(builder: ServerBuilder, stack: S) -> Running
where
    S: Service<Connection<Socket>> + Send + 'static,
    S::Response: 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    let server = builder.listen("127.0.0.1:0").bind().await;
    let server = server.expect("a port can be had");
    let handle = server.handle();
    let addr = handle.local_addrs()[0].tcp().expect("it is one of TCP");
    let task = tokio::spawn(server.serve(stack));
    Running { addr, handle, task }
}

impl Running {
    async fn ended(self) -> Result<Report, Error> {
        let ended = soon("the end of the server", self.task).await;
        ended.expect("the server does not panic")
    }

    async fn connect(&self) -> Client {
        Client::connect(self.addr).await
    }

    /// Connects clients, one after the other. Returns them by the name of their thread.
    async fn connect_each(&self, count: usize) -> BTreeMap<String, Vec<Client>> {
        let mut by_thread: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for _ in 0..count {
            let mut client = self.connect().await;
            let thread = client.ask("who").await;
            by_thread.entry(thread).or_default().push(client);
        }
        by_thread
    }

    async fn until_live(&self, live: usize) {
        until(|| self.handle.live() == live).await;
    }
}

async fn until(fact: impl Fn() -> bool) {
    let reached = async {
        while !fact() {
            tokio::task::yield_now().await;
        }
    };
    soon("what the test waits for", reached).await;
}

fn builder(workers: usize) -> ServerBuilder {
    Server::builder().name("w").workers(workers)
}

fn pipeline() -> impl Service<
    Connection<Socket>,
    Response = EndReason,
    Error = BoxError,
    Future = impl Future<Output = Result<EndReason, BoxError>> + Send + 'static,
> + Clone
+ Send
+ 'static {
    Pipeline::new(Lines::default).service(service_fn(who))
}

fn counts(by_thread: &BTreeMap<String, Vec<Client>>) -> Vec<(&str, usize)> {
    by_thread
        .iter()
        .map(|(thread, clients)| (thread.as_str(), clients.len()))
        .collect()
}

// The thread of a connection

#[tokio::test]
async fn without_workers_connections_run_where_the_server_does() {
    let server = start(Server::builder().workers(0), pipeline()).await;

    let served = server.connect().await.ask("who").await;

    assert_eq!(served, here());
}

#[tokio::test]
async fn a_servers_name_may_contain_what_a_threads_name_may_not() {
    let builder = Server::builder().name("w\0x").workers(1);
    let server = start(builder, pipeline()).await;

    assert_eq!(server.handle.name(), Some("w\0x"));
    assert_eq!(server.connect().await.ask("who").await, "wx-0");
}

#[tokio::test]
async fn each_worker_is_given_its_share() {
    let server = start(builder(3), pipeline()).await;

    let by_thread = server.connect_each(12).await;

    assert_eq!(counts(&by_thread), [("w-0", 4), ("w-1", 4), ("w-2", 4)]);
}

#[tokio::test]
async fn the_worker_with_the_fewest_is_next() {
    let server = start(builder(2), pipeline()).await;
    let mut by_thread = server.connect_each(8).await;

    by_thread.remove("w-1");
    server.until_live(4).await;

    let more = server.connect_each(4).await;
    assert_eq!(counts(&more), [("w-1", 4)]);
}

#[tokio::test]
async fn workers_with_equally_many_take_turns() {
    let server = start(builder(3), pipeline()).await;

    let mut threads = Vec::new();
    for _ in 0..6 {
        threads.push(server.connect().await.ask("who").await);
        server.until_live(0).await;
    }

    assert_eq!(threads, ["w-0", "w-1", "w-2", "w-0", "w-1", "w-2"]);
}

#[tokio::test]
async fn turns_are_taken_by_connections_not_by_looks_for_one() {
    let (streams, accepted) = tokio::sync::mpsc::channel(1);
    let server = builder(2).build(Streams(accepted));
    let handle = server.handle();
    let stack = Pipeline::new(Lines::default).service(service_fn(who));
    let _serving = tokio::spawn(server.serve(stack));

    let mut threads = Vec::new();
    for _ in 0..4 {
        let (client, stream) = tokio::io::duplex(64);
        streams.send(stream).await.unwrap();
        threads.push(ask(&mut BufReader::new(client)).await);
        until(|| handle.live() == 0).await;
    }

    assert_eq!(threads, ["w-0\n", "w-1\n", "w-0\n", "w-1\n"]);
}

#[tokio::test]
async fn a_connection_stays_on_its_thread() {
    let server = start(builder(4), pipeline()).await;
    let by_thread = server.connect_each(8).await;

    for (thread, clients) in by_thread {
        for mut client in clients {
            for _ in 0..50 {
                assert_eq!(client.ask("who").await, thread);
            }
        }
    }
}

#[tokio::test]
async fn what_a_service_spawns_is_on_its_thread() {
    let spawned_from_call = |conn: Connection<Socket>| {
        let spawned = tokio::spawn(async { here() });
        async move {
            let mut conn = conn;
            conn.write_all(format!("{} {}", here(), spawned.await?).as_bytes())
                .await?;
            Ok::<_, BoxError>(())
        }
    };
    let server = start(builder(1), service_fn(spawned_from_call)).await;

    let mut client = server.connect().await;

    assert_eq!(client.rest().await, b"w-0 w-0");
}

/// Asks for the name of the thread.
async fn ask(client: &mut BufReader<impl AsyncRead + AsyncWrite + Unpin>) -> String {
    let mut line = String::new();
    let asked = async {
        client.write_all(b"who\n").await?;
        client.read_line(&mut line).await
    };
    let asked = soon("a line", asked).await;
    asked.expect("the connection is open");
    line
}

/// Returns a client without tokio. While it waits, the runtime of the test, which is also the
/// server's, stands still. The client has received one line, so it no longer needs the runtime.
async fn blocking(server: &Running) -> std::net::TcpStream {
    let connected = TcpStream::connect(server.addr).await;
    let mut client = BufReader::new(connected.expect("the server listens"));
    assert_eq!(ask(&mut client).await, "w-0\n");
    let client = client.into_inner().into_std();
    let client = client.expect("it is registered");
    client.set_nonblocking(false).expect("it can be set");
    client.set_read_timeout(Some(NET)).expect("it can be set");
    client
}

#[tokio::test]
async fn a_connection_goes_on_while_the_runtime_of_the_server_stands_still() {
    let server = start(builder(1), pipeline()).await;
    let mut client = blocking(&server).await;

    let mut answer = [0; 4];
    for _ in 0..10 {
        client.write_all(b"who\n").unwrap();
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"w-0\n");
    }
}

#[tokio::test]
async fn timers_of_the_connection_stack_go_on_too() {
    let stack = ServiceBuilder::new()
        .timeout(Duration::from_millis(200))
        .service(pipeline());
    let server = start(builder(1), stack).await;
    let mut client = blocking(&server).await;

    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[tokio::test]
async fn unix_sockets_run_on_workers() {
    let dir = tempfile::tempdir().unwrap();
    let path = format!("unix:{}", dir.path().join("sock").display());
    let server = builder(2).listen(path.as_str()).bind().await.unwrap();
    let _serving = tokio::spawn(server.serve(pipeline()));

    let mut threads = Vec::new();
    let mut clients = Vec::new();
    for _ in 0..2 {
        let stream = UnixStream::connect(dir.path().join("sock")).await;
        let mut client = BufReader::new(stream.unwrap());
        threads.push(ask(&mut client).await);
        clients.push(client);
    }

    assert_eq!(threads, ["w-0\n", "w-1\n"]);
}

#[tokio::test]
async fn streams_of_a_listener_of_ones_own_run_on_workers() {
    let (listener, connector) = memory();
    let server = builder(2).build(listener);
    let stack = Pipeline::new(Lines::default).service(service_fn(who));
    let _serving = tokio::spawn(server.serve(stack));

    let mut threads = Vec::new();
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = BufReader::new(connector.connect().await.unwrap());
        threads.push(ask(&mut client).await);
        clients.push(client);
    }

    assert_eq!(threads, ["w-0\n", "w-1\n"]);
}

// Still one server

/// Counts the connections in progress, and their maximum.
#[derive(Clone, Default)]
struct Gauge(Arc<(AtomicUsize, AtomicUsize)>);

impl Gauge {
    fn enter(&self) -> Inside {
        let now = self.0.0.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.1.fetch_max(now, Ordering::SeqCst);
        Inside(self.clone())
    }

    fn now(&self) -> usize {
        self.0.0.load(Ordering::SeqCst)
    }

    fn peak(&self) -> usize {
        self.0.1.load(Ordering::SeqCst)
    }
}

struct Inside(Gauge);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Echoes everything up to the end.
fn counted(
    gauge: &Gauge,
) -> impl Service<
    Connection<Socket>,
    Response = (),
    Error = BoxError,
    Future = impl Future<Output = Result<(), BoxError>> + Send + 'static,
> + Clone
+ Send
+ 'static {
    let gauge = gauge.clone();
    service_fn(move |mut conn: Connection<Socket>| {
        let inside = gauge.enter();
        async move {
            let _inside = inside;
            let (mut reader, mut writer) = tokio::io::split(&mut conn);
            tokio::io::copy(&mut reader, &mut writer).await?;
            Ok(())
        }
    })
}

/// Connects, asks once and leaves.
async fn visit(addr: SocketAddr) {
    let mut client = Client::connect(addr).await;
    assert_eq!(client.ask("hi").await, "hi");
    client.half_close().await;
    assert_eq!(client.rest().await, b"");
}

#[tokio::test]
async fn the_limit_is_exact_over_all_workers() {
    let (limit, gauge) = (ConnectionLimit::new(3), Gauge::default());
    let server = start(builder(4).limit(limit.clone()), counted(&gauge)).await;

    join_all((0..200).map(|_| visit(server.addr))).await;

    server.until_live(0).await;
    assert_eq!((gauge.peak(), gauge.now(), limit.in_use()), (3, 0, 0));
}

#[tokio::test]
async fn a_drain_reaches_all_workers_and_counts_each_connection_once() {
    let stack = Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
        match &line[..] {
            b"hang" => pending().await,
            _ => who(line).await,
        }
    }));
    let server = start(builder(3), stack).await;
    let mut by_thread = server.connect_each(9).await;
    assert_eq!(counts(&by_thread), [("w-0", 3), ("w-1", 3), ("w-2", 3)]);
    let mut hanging = Vec::new();
    for clients in by_thread.values_mut() {
        let mut client = clients.remove(0);
        client.send("hang\n").await;
        hanging.push(client);
    }
    let requests = || server.handle.connections().map(|one| one.requests());
    until(|| requests().sum::<u64>() == 9 + 3).await;

    server.handle.shutdown();

    for mut client in by_thread.into_values().flatten() {
        assert_eq!(client.rest().await, b"");
    }
    server.until_live(3).await;
    server.handle.abort();
    let report = server.ended().await.unwrap();
    assert_eq!((report.drained, report.aborted), (6, 3));
}

#[tokio::test]
async fn a_panic_costs_the_one_connection_and_not_its_thread() {
    let stack = Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
        assert_ne!(&line[..], b"panic", "as it was asked to");
        who(line).await
    }));
    let server = start(builder(1), stack).await;
    let (mut first, mut second) = (server.connect().await, server.connect().await);
    assert_eq!(second.ask("who").await, "w-0");

    first.send("panic\n").await;

    first.gone().await;
    assert_eq!(second.ask("who").await, "w-0");
    assert_eq!(server.connect().await.ask("who").await, "w-0");
}

// The end of a server

/// Returns a function that spawns a task which never ends. The task reports when it is dropped.
fn lasting(gone: &mpsc::Sender<String>) -> impl Fn() + Clone + Send + 'static {
    struct Gone(mpsc::Sender<String>);
    impl Drop for Gone {
        fn drop(&mut self) {
            // The drop takes a moment, so that a server that does not wait for it is caught.
            let (_never, moment) = mpsc::channel::<()>();
            let _elapsed = moment.recv_timeout(Duration::from_millis(20));
            // The test may be over.
            drop(self.0.send(here()));
        }
    }
    let gone = gone.clone();
    move || {
        let gone = Gone(gone.clone());
        tokio::spawn(async move {
            pending::<()>().await;
            drop(gone);
        });
    }
}

#[tokio::test]
async fn nothing_of_the_workers_is_left_when_the_server_has_ended() {
    let (gone, left) = mpsc::channel();
    let spawn = lasting(&gone);
    let stack = ServiceBuilder::new()
        .map_request(move |conn| {
            spawn();
            conn
        })
        .service(pipeline());
    let server = start(builder(2), stack).await;
    let by_thread = server.connect_each(2).await;
    drop(by_thread);

    server.handle.shutdown();
    server.ended().await.unwrap();

    let mut threads: Vec<_> = left.try_iter().collect();
    threads.sort();
    assert_eq!(threads, ["w-0", "w-1"]);
}

#[tokio::test]
async fn dropping_the_server_frees_what_runs_on_workers() {
    let (limit, gauge) = (ConnectionLimit::new(8), Gauge::default());
    let (gone, left) = mpsc::channel();
    let spawn = lasting(&gone);
    let stack = ServiceBuilder::new()
        .map_request(move |conn| {
            spawn();
            conn
        })
        .service(counted(&gauge));
    let server = start(builder(2).limit(limit.clone()), stack).await;
    let mut clients = join_all((0..8).map(|_| server.connect())).await;
    for client in &mut clients {
        assert_eq!(client.ask("hi").await, "hi");
    }

    server.task.abort();

    for client in &mut clients {
        client.gone().await;
    }
    let report = soon("the report", server.handle.closed()).await;
    assert_eq!((report.drained, report.aborted), (0, 8));
    // Each thread drops the tasks left on it when it exits.
    for _ in 0..8 {
        left.recv_timeout(NET).unwrap();
    }
    until(|| (gauge.now(), limit.in_use()) == (0, 0)).await;
}

/// In memory and on the paused clock, so that the test does not wait as long as the server waits
/// for a blocked thread.
#[tokio::test(start_paused = true)]
async fn a_blocked_worker_does_not_keep_the_server_from_its_end() {
    let (free, blocked) = mpsc::channel::<()>();
    let (entered, inside) = mpsc::channel();
    let mut once = Some((blocked, entered));
    let stack = service_fn(move |_conn| {
        let once = once.take();
        async move {
            if let Some((blocked, entered)) = once {
                entered.send(()).unwrap();
                // Blocks until the test releases it.
                let _either_way = blocked.recv_timeout(NET);
            }
            Ok::<_, BoxError>(())
        }
    });
    let (listener, connector) = memory();
    let server = builder(1).shutdown_deadline(Duration::ZERO).build(listener);
    let handle = server.handle();
    let serving = tokio::spawn(server.serve(stack));
    let _client = connector.connect().await.unwrap();
    // On another thread: paused time does not advance while a blocking task runs.
    let entered = tokio::task::spawn_blocking(move || inside.recv_timeout(NET));
    entered.await.unwrap().unwrap();

    handle.shutdown();

    let report = soon("the end of the server", serving).await.unwrap();
    assert_eq!(report.unwrap().aborted, 1);
    free.send(()).unwrap();
}

/// Blocks its thread when it is dropped, until the sender of `free` is dropped.
struct BlocksInDrop {
    dropped: tokio_mpsc::Sender<String>,
    free: Arc<Mutex<mpsc::Receiver<()>>>,
}

impl Drop for BlocksInDrop {
    fn drop(&mut self) {
        let sent = self.dropped.try_send(here());
        sent.expect("the test waits for it");
        let free = self.free.lock().expect("nothing panics here");
        let _disconnected = free.recv_timeout(NET);
    }
}

#[tokio::test]
async fn e12_m2_a_drop_that_blocks_stops_its_own_thread_and_only_for_as_long() {
    let (free, blocked) = mpsc::channel();
    let blocked = Arc::new(Mutex::new(blocked));
    let (called, mut calls) = tokio_mpsc::channel(2);
    let (dropped, mut drops) = tokio_mpsc::channel(2);
    let service = service_fn(move |line: Bytes| {
        let (dropped, free) = (dropped.clone(), Arc::clone(&blocked));
        let blocks = (line == "hang").then(|| BlocksInDrop { dropped, free });
        let called = called.clone();
        async move {
            if let Some(_blocks) = blocks {
                called.try_send(()).expect("the test waits for it");
                pending::<()>().await;
            }
            who(line).await
        }
    });
    let stack = Pipeline::new(Lines::default).service(service);
    let server = start(builder(2), stack).await;
    let mut clients = server.connect_each(4).await;
    let mut client = |thread| clients.get_mut(thread).unwrap().pop().unwrap();
    let (blocking, mut left) = (["w-0", "w-1"].map(&mut client), ["w-0", "w-1"].map(client));
    let [first, second] = blocking;
    let mut block = async |mut client: Client| {
        client.send("hang\n").await;
        soon("the call", calls.recv()).await.unwrap();
        let its_own = |live: &LiveConnection| live.peer_addr().tcp() == Some(client.addr);
        server.handle.connections().find(its_own).unwrap().abort();
        soon("the drop", drops.recv()).await.unwrap()
    };

    assert_eq!(block(first).await, "w-0");
    assert_eq!(left[1].ask("who").await, "w-1");
    assert_eq!(block(second).await, "w-1");
    drop(free);

    assert_eq!(left[0].ask("who").await, "w-0");
    assert_eq!(left[1].ask("who").await, "w-1");
    server.handle.shutdown();
    let report = server.ended().await.unwrap();
    assert_eq!((report.drained, report.aborted), (2, 0));
}

// The user's own runtimes

fn runtime(name: &str) -> Runtime {
    runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name(name)
        .enable_all()
        .build()
        .expect("a thread can be had")
}

/// Shuts a runtime down, and waits until all its tasks are gone.
async fn shut_down(runtime: Runtime) {
    let gone = tokio::task::spawn_blocking(move || drop(runtime));
    soon("the end of the runtime", gone)
        .await
        .expect("it does not panic");
}

#[tokio::test]
async fn a_runtime_that_is_shut_down_takes_its_connections_along_and_gets_no_more() {
    let (first, second) = (runtime("first"), runtime("second"));
    let both = [first.handle().clone(), second.handle().clone()];
    let server = start(Server::builder().runtimes(both), pipeline()).await;
    let mut by_thread = server.connect_each(4).await;
    assert_eq!(counts(&by_thread), [("first", 2), ("second", 2)]);

    shut_down(first).await;
    for client in by_thread.get_mut("first").unwrap() {
        client.gone().await;
    }

    let more = server.connect_each(4).await;
    assert_eq!(counts(&more), [("second", 4)]);
    drop((by_thread, more));
    server.until_live(0).await;
    shut_down(second).await;
}

#[tokio::test]
async fn a_server_whose_runtimes_were_all_shut_down_ends_with_an_error() {
    let only = runtime("only");
    let server = start(
        Server::builder().runtimes([only.handle().clone()]),
        pipeline(),
    )
    .await;
    assert_eq!(server.connect().await.ask("who").await, "only");

    shut_down(only).await;
    server.until_live(0).await;
    let _client = server.connect().await;

    let ended = server.ended().await;
    assert!(matches!(ended, Err(Error::Workers(_))), "{ended:?}");
}

#[tokio::test]
async fn runtimes_that_were_given_stay_when_the_server_has_ended() {
    let only = runtime("only");
    let builder = Server::builder().runtimes([only.handle().clone()]);
    let server = start(builder, pipeline()).await;
    assert_eq!(server.connect().await.ask("who").await, "only");
    server.handle.shutdown();
    server.ended().await.unwrap();

    let still = only.spawn(async { here() });

    assert_eq!(soon("a task", still).await.unwrap(), "only");
    shut_down(only).await;
}

// Independent accept loops on one port

#[tokio::test]
async fn loops_that_share_a_port_and_a_limit_of_one_serve_everybody() {
    let (limit, gauge) = (ConnectionLimit::new(1), Gauge::default());
    let builder = || {
        let options = SocketOptions::default().reuse_port(true);
        Server::builder()
            .socket_options(options)
            .limit(limit.clone())
    };
    let first = builder().listen("127.0.0.1:0").bind().await.unwrap();
    let addr = first.handle().local_addrs()[0].tcp().unwrap();
    let mut servers = vec![first];
    for _ in 1..4 {
        servers.push(builder().listen(addr).bind().await.unwrap());
    }
    let handles: Vec<_> = servers.iter().map(Server::handle).collect();
    let stack = counted(&gauge);
    let runtimes: Vec<_> = (0..4).map(|n| runtime(&format!("loop-{n}"))).collect();
    let mut loops = Vec::new();
    for (server, runtime) in servers.into_iter().zip(&runtimes) {
        loops.push(runtime.spawn(server.serve(stack.clone())));
    }

    join_all((0..200).map(|_| visit(addr))).await;

    handles.iter().for_each(Handle::shutdown);
    for one in loops {
        soon("the end of a loop", one).await.unwrap().unwrap();
    }
    assert_eq!((gauge.peak(), gauge.now(), limit.in_use()), (1, 0, 0));
    for runtime in runtimes {
        shut_down(runtime).await;
    }
}
