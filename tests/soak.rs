//! Random faults for a time leave nothing behind: no memory, no descriptor, no task, no permit.
//! Neither do many connections that come and go.
//!
//! A run prints its seconds and its seed. Environment variables set both, for example to repeat the
//! run, and the number of connections that come and go:
//!
//! ```sh
//! TOWER_TCP_SOAK=1800 TOWER_TCP_SEED=1 cargo test --test soak l4 -- --nocapture
//! TOWER_TCP_CONNECTIONS=10000000 cargo test --release --test soak l5 -- --nocapture
//! ```
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

use std::alloc::System;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use bytes::Bytes;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle as Runtime;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::Resumption;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::bind::Socket;
use tower_tcp::close::Linger;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::faults::{Faulty, Plan};
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Connection, EndReason, Handle, Pipeline, Reply, Server};

use certificates::certified;

#[path = "support/certificates.rs"]
mod certificates;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Held by a test while it looks at the memory of the process.
static ALONE: Mutex<()> = Mutex::const_new(());

/// The connections of a round, all at the same time.
const CLIENTS: u64 = 100;

/// The longest deadline that is set for the servers.
const LONG: Duration = Duration::from_millis(200);

/// The limit of every wait.
const NET: Duration = Duration::from_secs(60);

/// The number of bytes by which the median of what is allocated in the last third of a run may
/// exceed the median of the second third. Measured: 30 KiB, in blocks of tokio's channels and
/// timers. Single samples are up to 200 KiB higher.
const SLACK: isize = 64 * 1024;

/// Pseudo-random numbers that depend only on the seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Serves whatever a line asks for.
async fn serve(line: Bytes) -> Result<Reply<Bytes>, BoxError> {
    match line.as_ref() {
        b"panic" => resume_unwind(Box::new("a planted panic")),
        b"error" => Err("as it was told".into()),
        b"slow" => {
            sleep(LONG / 10).await;
            Ok(line.into())
        }
        b"never" => std::future::pending().await,
        b"large" => Ok(Bytes::from(vec![b'x'; 256 * 1024]).into()),
        b"nothing" => Ok(Reply::none()),
        b"close" => Ok(Reply::from(line).close()),
        _ => Ok(line.into()),
    }
}

/// The number of connections that ended for each reason.
type Ends = Arc<StdMutex<BTreeMap<&'static str, u64>>>;

/// Returns a function that has the ends of connections counted, and gives each connection a stream
/// with random faults.
fn faulty(
    seed: u64,
    ends: &Ends,
) -> impl Fn(Connection<Socket>) -> Connection<Faulty<Socket>> + Clone + Send + 'static {
    let (ends, number) = (Arc::clone(ends), Arc::new(AtomicU64::new(seed)));
    move |conn| {
        let ends = Arc::clone(&ends);
        conn.on_end(move |end| {
            *ends
                .lock()
                .unwrap()
                .entry(end.reason().as_str())
                .or_default() += 1;
        });
        let mut random = Random(number.fetch_add(1, Ordering::Relaxed));
        let plan = match random.below(3) {
            0 => Plan::seeded(random.next(), 2000, 2000),
            1 => Plan::seeded(random.next(), 100, 100),
            _ => Plan::new(),
        };
        conn.map_io(|io| Faulty::new(io, plan))
    }
}

/// The servers, and the ways to them.
#[derive(Clone)]
struct Servers {
    handles: [Handle; 2],
    path: PathBuf,
    connector: TlsConnector,
}

impl Servers {
    async fn start(seed: u64, path: PathBuf, ends: &Ends) -> Self {
        let deadlines = Deadlines::default()
            .first_byte(LONG / 2)
            .frame(LONG / 2)
            .idle(LONG / 2)
            .write(LONG)
            .half_closed(LONG / 2);
        // `never` does not complete, and a peer whose machine is gone gives no sign of that.
        let service = ServiceBuilder::new().timeout(LONG).service_fn(serve);
        let linger = Linger::default().time(LONG / 2).write(LONG / 2);
        let pipeline = Pipeline::new(|| Lines::default().max_line(1000))
            .service(service)
            .deadlines(deadlines)
            .linger(linger)
            .farewell(|_, reason: EndReason| Bytes::from(reason.as_str()));
        let (server, mut client) = certified();
        Arc::make_mut(&mut client).resumption = Resumption::disabled();

        let clear = Server::builder().listen("127.0.0.1:0").listen(
            format!("unix:{}", path.display())
                .parse::<tower_tcp::bind::Endpoint>()
                .unwrap(),
        );
        let clear = clear.bind().await.unwrap();
        let secured = Server::builder().listen("127.0.0.1:0");
        let secured = secured.bind().await.unwrap();
        let handles = [clear.handle(), secured.handle()];
        let stack = ServiceBuilder::new()
            .map_request(faulty(seed, ends))
            .service(pipeline.clone());
        tokio::spawn(clear.serve(stack));
        let stack = ServiceBuilder::new()
            .map_request(faulty(seed ^ 1 << 63, ends))
            .layer(PreConnectLayer::new(Tls::from(server)).deadline(LONG))
            .service(pipeline.in_flight(8));
        tokio::spawn(secured.serve(stack));
        Self {
            handles,
            path,
            connector: TlsConnector::from(client),
        }
    }

    async fn tcp(&self, server: usize) -> io::Result<TcpStream> {
        let addr = self.handles[server].local_addrs()[0].tcp().unwrap();
        TcpStream::connect(addr).await
    }

    /// Opens one connection, and does with it what the seed determines.
    async fn client(self, seed: u64) {
        let mut random = Random(seed);
        // The faults may cause any failure.
        let _any: io::Result<()> = match random.below(8) {
            0..=2 => match self.tcp(0).await {
                Ok(mut io) => {
                    let talked = talk(&mut io, &mut random).await;
                    if random.below(3) == 0 {
                        io.set_zero_linger().unwrap();
                    }
                    talked
                }
                Err(err) => Err(err),
            },
            3..=4 => match UnixStream::connect(&self.path).await {
                Ok(mut io) => talk(&mut io, &mut random).await,
                Err(err) => Err(err),
            },
            5..=6 => {
                let name = "localhost".try_into().unwrap();
                let secured = async { self.connector.connect(name, self.tcp(1).await?).await };
                match secured.await {
                    Ok(mut io) => talk(&mut io, &mut random).await,
                    Err(err) => Err(err),
                }
            }
            // Plain text to the TLS port.
            _ => match self.tcp(1).await {
                Ok(mut io) => talk(&mut io, &mut random).await,
                Err(err) => Err(err),
            },
        };
    }

    /// Waits until no connection is left, and no permit is taken.
    async fn at_rest(&self) {
        let rest = async {
            for handle in &self.handles {
                while handle.live() > 0 || handle.limit().in_use() > 0 {
                    sleep(Duration::from_millis(1)).await;
                }
            }
        };
        let rested = timeout(NET, rest).await;
        rested.unwrap_or_else(|_| panic!("connections are left: {:?}", self.handles));
    }
}

/// Holds a conversation of a few steps.
async fn talk<Io>(io: &mut Io, random: &mut Random) -> io::Result<()>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let words = [
        "a line",
        "slow",
        "large",
        "nothing",
        "panic",
        "error",
        "never",
        "close",
        "",
        "slow\nslow",
    ];
    for _ in 0..=random.below(6) {
        match random.below(10) {
            0..=4 => {
                let last = words.len() as u64;
                let word = words[usize::try_from(random.below(last)).unwrap()];
                io.write_all(format!("{word}\n").as_bytes()).await?;
            }
            5 => io.write_all(b"half a li").await?,
            6 => {
                // A flood of requests, of which no reply is read; or of a line that never ends.
                let flood = [&b"large\n"[..], b"x"][usize::from(random.below(2) == 0)].repeat(2000);
                drop(timeout(LONG, io.write_all(&flood)).await);
            }
            7 => io.shutdown().await?,
            8 => sleep(Duration::from_millis(random.below(30))).await,
            _ => {
                let mut buf = [0; 4096];
                drop(timeout(LONG / 10, io.read(&mut buf)).await);
            }
        }
    }
    if random.below(2) == 0 {
        let mut rest = Vec::new();
        drop(timeout(2 * LONG, io.read_to_end(&mut rest)).await);
    }
    Ok(())
}

/// The tasks and descriptors of the process, while no connection is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Has {
    tasks: usize,
    descriptors: usize,
}

fn has() -> Has {
    Has {
        tasks: Runtime::current().metrics().num_alive_tasks(),
        descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
    }
}

/// Returns the allocated memory in bytes, and the resident memory of the process in KiB.
fn memory() -> (isize, usize) {
    let stats = ALLOCATOR.stats();
    let held = stats.bytes_allocated.cast_signed() - stats.bytes_deallocated.cast_signed();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.unwrap().split_whitespace().next().unwrap();
    (held, resident.parse().unwrap())
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number")),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l4_random_faults_leave_no_memory_descriptor_task_or_permit_behind() {
    let _alone = ALONE.lock().await;
    let seconds = number("TOWER_TCP_SOAK").unwrap_or(5);
    let seed = number("TOWER_TCP_SEED").unwrap_or_else(|| RandomState::new().hash_one(0_u8));
    println!("TOWER_TCP_SOAK={seconds} TOWER_TCP_SEED={seed}");
    let dir = tempfile::tempdir().unwrap();
    let ends = Ends::default();
    let servers = Servers::start(seed, dir.path().join("socket"), &ends).await;
    let mut random = Random(seed);
    let mut samples = Vec::new();
    let mut before = Has {
        tasks: usize::MAX,
        descriptors: usize::MAX,
    };
    let begun = Instant::now();
    let mut said = begun;
    // At least enough samples to compare two thirds of them.
    while begun.elapsed() < Duration::from_secs(seconds) || samples.len() < 9 {
        let mut clients: JoinSet<_> = (0..CLIENTS)
            .map(|_| servers.clone().client(random.next()))
            .collect();
        while let Some(done) = timeout(NET, clients.join_next())
            .await
            .expect("clients end")
        {
            done.unwrap();
        }
        drop(clients);
        servers.at_rest().await;

        // A worker closes the last descriptors a moment after it has counted the connections. The
        // numbers of the first round may therefore be too high, and later ones can only be lower.
        let settled = async {
            loop {
                let now = has();
                if now.tasks <= before.tasks && now.descriptors <= before.descriptors {
                    return now;
                }
                sleep(Duration::from_millis(1)).await;
            }
        };
        let settled = timeout(NET, settled).await;
        before =
            settled.unwrap_or_else(|_| panic!("seed {seed}: {before:?}, and then {:?}", has()));
        // Without the list of samples itself, which grows by the hour.
        let (held, resident) = memory();
        let list = samples.capacity() * size_of::<(isize, usize)>();
        samples.push((held - list as isize, resident));
        if said.elapsed() > Duration::from_secs(30) {
            said = Instant::now();
            let (held, resident) = samples[samples.len() - 1];
            let connections = samples.len() as u64 * CLIENTS;
            let (time, has) = (begun.elapsed().as_secs(), has());
            println!(
                "{time:4} s, {connections} connections: {held} bytes, {resident} KiB, {has:?}"
            );
        }
    }

    let third = samples.len() / 3;
    let median = |samples: &[(isize, usize)]| {
        let mut samples = samples.to_vec();
        samples.sort_unstable();
        samples[samples.len() / 2]
    };
    let (middle, last) = (
        median(&samples[third..2 * third]),
        median(&samples[2 * third..]),
    );
    let ends = ends.lock().unwrap();
    println!("median of the second third: {middle:?}, of the last: {last:?}; ends: {ends:#?}");
    assert!(
        last.0 - middle.0 < SLACK,
        "seed {seed}: {middle:?}, then {last:?}"
    );
    // Every connection has ended once; those that were reset in the queue were never accepted.
    let ended: u64 = ends.values().sum();
    let connected = samples.len() as u64 * CLIENTS;
    assert!(
        ended <= connected && ended > connected * 9 / 10,
        "{ended} of {connected}"
    );
    assert!(ends.len() > 8, "seed {seed}: {ends:?}");
}

/// Connects, gets a line back, and leaves.
async fn visit<Io: AsyncRead + AsyncWrite + Unpin>(io: &mut Io) {
    io.write_all(b"hello\n").await.unwrap();
    let mut reply = [0; 6];
    io.read_exact(&mut reply).await.unwrap();
    assert_eq!(&reply, b"hello\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l5_connections_that_come_and_go_leave_no_memory_behind() {
    let _alone = ALONE.lock().await;
    let connections = number("TOWER_TCP_CONNECTIONS").unwrap_or(5_000);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let server = Server::builder().listen("127.0.0.1:0").listen(
        format!("unix:{}", path.display())
            .parse::<tower_tcp::bind::Endpoint>()
            .unwrap(),
    );
    let server = server.bind().await.unwrap();
    let handle = server.handle();
    let addr = handle.local_addrs()[0].tcp().unwrap();
    let ended = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&ended);
    let stack = ServiceBuilder::new()
        .map_request(move |conn: Connection<Socket>| {
            let count = Arc::clone(&count);
            conn.on_end(move |_| _ = count.fetch_add(1, Ordering::Relaxed));
            conn
        })
        .service(Pipeline::new(Lines::default).service(service_fn(serve)));
    tokio::spawn(server.serve(stack));

    let mut samples = Vec::new();
    let tenth = connections / 10;
    for _ in 0..10 {
        let clients: JoinSet<_> = (0..CLIENTS)
            .map(|client| {
                let path = path.clone();
                let share = tenth / CLIENTS + u64::from(client < tenth % CLIENTS);
                async move {
                    for _ in 0..share {
                        if client % 2 == 0 {
                            let mut io = TcpStream::connect(addr).await.unwrap();
                            visit(&mut io).await;
                            // A reset, so that none of the client's ports waits for a minute.
                            io.set_zero_linger().unwrap();
                        } else {
                            visit(&mut UnixStream::connect(&path).await.unwrap()).await;
                        }
                    }
                }
            })
            .collect();
        clients.join_all().await;
        let rested = timeout(NET, async {
            while handle.live() > 0 || handle.limit().in_use() > 0 {
                sleep(Duration::from_millis(1)).await;
            }
        });
        rested.await.unwrap();
        samples.push(memory().0);
    }

    println!("{connections} connections: {samples:?} bytes");
    assert_eq!(ended.load(Ordering::Relaxed), 10 * tenth);
    let grown = samples.iter().max().unwrap() - samples[0];
    assert!(grown < SLACK / 2, "{samples:?}"); // a few bytes a connection, or less
}
