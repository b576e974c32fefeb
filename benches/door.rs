//! Measures the cost of unwelcome clients: a greedy client beside others, banned addresses, and
//! connections from a million addresses.
//!
//! `cargo bench --bench door` prints all three figures, `cargo bench --bench door -- banned` only
//! one. The process needs 20,000 descriptors (`ulimit -n`). Compare only the ratios of one run.
#![expect(clippy::unwrap_used, reason = "a failure ends the run")]
#![expect(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "clients are threads on the clock of the system"
)]

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use socket2::{Domain, SockRef, Socket as RawSocket, Type};
use tokio::runtime::Builder;
use tower::util::option_layer;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::{AddressFilter, Bans, ConnectionLimit, PerClient};
use tower_tcp::bind::{Incoming, Listener, Socket, SocketOptions};
use tower_tcp::frame::Lines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::{
    Address, BoxError, Connection, ConnectionService, Handle, Pipeline, Server, ServerBuilder,
};

/// The number of rounds with the greedy client. Each round measures all three cases in turn.
const ROUNDS: usize = 5;

fn main() {
    let only = std::env::args()
        .nth(1)
        .filter(|only| !only.starts_with('-'));
    let parts = [
        ("greedy", greedy as fn()),
        ("banned", banned),
        ("addresses", addresses),
    ];
    for (name, part) in parts {
        if only.as_ref().is_none_or(|only| only == name) {
            part();
        }
    }
}

/// A server in a thread of its own.
struct Served {
    handle: Handle,
    addr: SocketAddr,
    thread: JoinHandle<Duration>,
}

impl Served {
    fn new(builder: ServerBuilder, stack: impl ConnectionService<Socket>) -> Self {
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let server = builder.listen("127.0.0.1:0").bind().await.unwrap();
                tell.send(server.handle()).unwrap();
                server.serve(stack).await.unwrap();
            });
            thread_time()
        });
        let handle = told.recv().unwrap();
        let addr = handle.local_addrs()[0].tcp().unwrap();
        Self {
            handle,
            addr,
            thread,
        }
    }

    /// Ends the server, and returns the CPU time of its thread.
    fn end(self) -> Duration {
        self.handle.abort();
        self.thread.join().unwrap()
    }
}

fn thread_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
}

fn echo() -> impl ConnectionService<Socket> + Clone {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    Pipeline::new(Lines::default).service(echo)
}

fn connect(from: Ipv4Addr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = RawSocket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(from.into(), 0).into())?;
    socket.connect(&to.into())?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn median<T: PartialOrd + Copy>(mut values: Vec<T>) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).unwrap());
    values[values.len() / 2]
}

// A greedy client

/// The number of connections that the greedy client makes before the others are measured.
const GREEDY: usize = 10_000;
/// The same number without a limit. Each connection takes two of the process's 20,000 descriptors.
const UNLIMITED: usize = 9_500;
const OTHERS: u8 = 100;

/// Returns the 99th percentile of the response time of the other clients, while the greedy client
/// sends a request on each of its connections four times a second.
fn others(greedy: usize, limit: Option<usize>) -> Duration {
    let hook = limit.map(|limit| PreConnectLayer::new(PerClient::new(limit)));
    let stack = ServiceBuilder::new()
        .layer(option_layer(hook))
        .map_err(Into::<BoxError>::into)
        .service(echo());
    let builder = Server::builder().limit(ConnectionLimit::new(20_000));
    let served = Served::new(builder, stack);
    let addr = served.addr;
    let mut clients: Vec<_> = (0..OTHERS)
        .map(|n| connect(Ipv4Addr::new(127, 0, 1, n), addr).unwrap())
        .collect();

    // The greedy client keeps its connections open, refused or not.
    let kept: Vec<_> = (0..greedy)
        .map(|_| connect(Ipv4Addr::new(127, 0, 2, 1), addr).unwrap())
        .collect();
    for client in &kept {
        client.set_nonblocking(true).unwrap();
    }
    // Wait until the server has closed those that it refuses, and serves the rest.
    thread::sleep(Duration::from_millis(500));
    let done = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&done);
    let greedy = thread::spawn(move || {
        let mut open: Vec<_> = kept.iter().collect();
        while !stop.load(Ordering::Relaxed) {
            // It asks on all of its connections that are open.
            open.retain(|client| {
                let mut client = *client;
                let _sent = client.write(b"hello\n");
                !matches!(client.read(&mut [0; 64]), Ok(0))
            });
            thread::sleep(Duration::from_millis(250));
        }
    });

    let mut times = Vec::new();
    let begun = Instant::now();
    let mut reply = [0; 6];
    while begun.elapsed() < Duration::from_secs(3) {
        for client in &mut clients {
            let asked = Instant::now();
            client.write_all(b"hello\n").unwrap();
            client.read_exact(&mut reply).unwrap();
            times.push(asked.elapsed());
            thread::sleep(Duration::from_micros(100));
        }
    }
    let live = served.handle.live();
    done.store(true, Ordering::Relaxed);
    greedy.join().unwrap();
    times.sort();
    let p99 = times[times.len() * 99 / 100];
    println!(
        "  {live} open; others: {} requests, p50 {:?}, p99 {p99:?}",
        times.len(),
        times[times.len() / 2],
    );
    served.end();
    p99
}

fn greedy() {
    println!("99th percentile of 100 clients beside one with {GREEDY} connections:");
    let (mut alone, mut limited, mut unlimited) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        alone.push(others(0, Some(32)));
        limited.push(others(GREEDY, Some(32)));
        unlimited.push(others(UNLIMITED, None));
    }
    let ratio = |with: Vec<Duration>| {
        let ratios = with.iter().zip(&alone);
        median(
            ratios
                .map(|(with, alone)| with.as_secs_f64() / alone.as_secs_f64())
                .collect(),
        )
    };
    println!("limit of 32 for each client: {:.2} × alone", ratio(limited));
    println!(
        "no limit:                    {:.2} × alone",
        ratio(unlimited)
    );
}

// Banned addresses

/// The number of connections to each server, in all rounds together.
const BANNED: usize = 100_000;
/// The number of rounds. They are short, so other work of the machine affects all servers alike.
const TURNS: usize = 25;

/// Makes the connections of a round from banned addresses.
fn knock(at: SocketAddr) {
    let addresses: Vec<_> = (0..200).map(|n| Ipv4Addr::new(127, 0, 3, n)).collect();
    let addresses = addresses.iter().cycle().take(BANNED / TURNS);
    // As in a flood, many at once.
    for from in addresses.collect::<Vec<_>>().chunks(64) {
        // Some are reset before they know that they are connected.
        let clients = from.iter().flat_map(|from| connect(**from, at));
        for mut client in clients.collect::<Vec<_>>() {
            // It ends, or is reset.
            let _end = client.read(&mut [0]);
        }
    }
}

/// Makes connections that are refused, and returns the CPU time of the server.
fn refused(builder: ServerBuilder, stack: impl ConnectionService<Socket>) -> Duration {
    let served = Served::new(builder, stack);
    knock(served.addr);
    served.end()
}

/// Returns the CPU time of the system calls alone: accept, reset if `resets`, close.
fn bare(resets: bool) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let thread = thread::spawn(move || {
        for _ in 0..BANNED / TURNS {
            let (client, _peer) = listener.accept().unwrap();
            if resets {
                let client = SockRef::from(&client);
                client.set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
        thread_time()
    });
    knock(addr);
    thread.join().unwrap()
}

fn banned() {
    println!("CPU time of the server for {BANNED} connections from banned addresses:");
    let bans = Bans::new();
    for n in 0..200 {
        let ip = IpAddr::V4(Ipv4Addr::new(127, 0, 3, n));
        bans.ban(&SocketAddr::new(ip, 0).into(), Duration::from_secs(86_400));
    }
    let filter = AddressFilter::from(bans);
    let (mut alone, mut early) = ([vec![], vec![]], [vec![], vec![]]);
    let (mut layer, mut hook) = (vec![], vec![]);
    for _ in 0..TURNS {
        for resets in [false, true] {
            alone[usize::from(resets)].push(bare(resets));
            let options = SocketOptions::default().reset_cut_off(resets);
            let builder = Server::builder().socket_options(options);
            early[usize::from(resets)]
                .push(refused(builder.address_filter(filter.clone()), echo()));
        }
        let judge = filter.clone();
        let stack = ServiceBuilder::new()
            .layer(ConnectionTraceLayer::new())
            .filter(move |conn: Connection<Socket>| {
                match judge.verdict(conn.info().client_addr()) {
                    tower_tcp::admit::Verdict::Allow => Ok(conn),
                    _ => Err(BoxError::from("denied")),
                }
            })
            .map_response(drop)
            .service(echo());
        layer.push(refused(Server::builder(), stack));
        let stack = ServiceBuilder::new()
            .layer(ConnectionTraceLayer::new())
            .layer(PreConnectLayer::new(filter.clone()))
            .service(echo());
        hook.push(refused(Server::builder(), stack));
    }
    for (name, times) in [
        ("accept, reset, close:", &alone[1]),
        ("in the accept loop:", &early[1]),
        ("accept, close:", &alone[0]),
        ("the loop without reset:", &early[0]),
        ("by a layer:", &layer),
        ("by a hook:", &hook),
    ] {
        let (sum, of) = (times.iter().sum::<Duration>(), layer.iter());
        let ratios = times
            .iter()
            .zip(of)
            .map(|(time, of)| time.as_secs_f64() / of.as_secs_f64());
        let ratio = median(ratios.collect());
        println!("{name:24}{sum:?}, {ratio:.2} × by a layer");
    }
}

// A million addresses

const ADDRESSES: u32 = 1_000_000;

/// A listener that returns one connection from each of this many addresses.
struct Flood(u32);

impl Listener for Flood {
    type Io = ();

    fn poll_accept(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<Incoming<()>>> {
        if self.0 == 0 {
            return Poll::Pending;
        }
        self.0 -= 1;
        let ip = Ipv4Addr::from_bits(self.0.wrapping_mul(2_654_435_761));
        let peer = SocketAddr::new(ip.into(), 1).into();
        Poll::Ready(Ok(Incoming::new((), peer, Address::Memory(0))))
    }

    fn local_addrs(&self) -> Vec<Address> {
        vec![Address::Memory(0)]
    }
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn addresses() {
    println!("Memory after {ADDRESSES} connections from as many addresses:");
    let rated = PerClient::new(32).rate(10, Duration::from_secs(3600));
    for (name, per_client) in [
        ("a limit", PerClient::new(32)),
        ("a limit and a rate", rated),
    ] {
        let before = resident();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let (mut most, begun) = (0, Instant::now());
        runtime.block_on(async {
            let server = Server::from_listener(Flood(ADDRESSES));
            let handle = server.handle();
            let (tell, mut told) = tokio::sync::mpsc::channel(1024);
            let stack = ServiceBuilder::new()
                .layer(PreConnectLayer::new(per_client.clone()))
                .service_fn(move |conn: Connection<()>| {
                    let tell = tell.clone();
                    async move {
                        drop(conn);
                        tell.send(()).await
                    }
                });
            let serving = tokio::spawn(server.serve(stack));
            for n in 0..ADDRESSES {
                told.recv().await.unwrap();
                if n % 1000 == 0 {
                    most = most.max(per_client.clients());
                }
            }
            handle.shutdown();
            serving.await.unwrap().unwrap();
        });
        let (clients, time) = (per_client.clients(), begun.elapsed());
        let grown = resident().saturating_sub(before) / 1024;
        println!("{name}: at most {most} clients, {clients} left; {grown} KiB more; {time:?}");
    }
}
