//! Measures what a second core brings over real sockets: `ServerBuilder::workers` beside tokio's
//! own worker threads.
//!
//! `cargo bench --bench cores` prints a row for each way of running connections: requests per
//! second, and the CPU time of a request (user and system, of the whole server process). Both are
//! also shown as a ratio to one worker, and for bare threads as a ratio to one bare thread. Each
//! figure is the median of five rounds; in every round each way runs once.
//!
//! The load is a process of its own with two threads. On a machine with two processors it takes CPU
//! time from the server; the last column says how much, in processors. Requests per second
//! therefore show the gain of a second core only where asking costs next to nothing beside
//! answering, as in the first table. The first two rows of that table are the ceiling: the same
//! computation on bare threads. If two threads do not reach twice the requests of one, something
//! else is running on the machine. In the other tables compare the CPU time of a request: if it is
//! no higher on two cores than on one, the server serves more requests in proportion to the CPU
//! time it gets. The CPU time of a request is comparable on a busy machine, too.

#![expect(clippy::unwrap_used, reason = "a failure ends the run")]

use std::convert::Infallible;
use std::hash::{DefaultHasher, Hasher};
use std::hint::black_box;
use std::io;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;
use tower::service_fn;
use tower_tcp::frame::Lines;
use tower_tcp::{BoxError, Pipeline, Server};

/// The first argument of the load process.
const LOAD: &str = "as-load";

const LINE: &[u8] = b"0123456789abcde\n";
const CONNECTIONS: usize = 64;
const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_millis(500);

/// A way to run connections.
#[derive(Clone, Copy)]
enum Way {
    /// No server: bare threads, which show what this machine makes of a second core.
    Bare(usize),
    Workers(usize),
    Tokio(usize),
}

const WAYS: [(&str, Way); 6] = [
    ("no server, 1 thread", Way::Bare(1)),
    ("no server, 2 threads", Way::Bare(2)),
    ("workers(1)", Way::Workers(1)),
    ("workers(2)", Way::Workers(2)),
    ("tokio, 1 thread", Way::Tokio(1)),
    ("tokio, 2 threads", Way::Tokio(2)),
];

/// The shape of a load.
struct Load {
    name: &'static str,
    /// The number of requests that each connection sends ahead of the answers.
    ahead: usize,
    /// The number of bytes that are hashed for a request.
    work: usize,
    /// Opens a new connection for each batch.
    leaves: bool,
}

static LOADS: [Load; 4] = [
    Load {
        name: "work, 16 ahead",
        ahead: 16,
        work: 100 * 1024,
        leaves: false,
    },
    Load {
        name: "echo, 16 ahead",
        ahead: 16,
        work: 0,
        leaves: false,
    },
    Load {
        name: "echo, 1 ahead",
        ahead: 1,
        work: 0,
        leaves: false,
    },
    Load {
        name: "connect, ask, leave",
        ahead: 1,
        work: 0,
        leaves: true,
    },
];

/// The figures of one round.
#[derive(Clone, Copy)]
struct Round {
    requests_per_second: f64,
    /// CPU time of the server per request, in microseconds.
    cpu: f64,
    /// The share of one processor that the load used.
    load: f64,
}

impl Round {
    fn new(requests: u64, server: Duration, load: Duration) -> Self {
        Self {
            requests_per_second: requests as f64 / TIME.as_secs_f64(),
            cpu: server.as_secs_f64() * 1e6 / requests as f64,
            load: load.as_secs_f64() / TIME.as_secs_f64(),
        }
    }
}

/// Returns the user and system time of this process so far.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap()
}

fn compute(bytes: usize) -> u64 {
    let mut hasher = DefaultHasher::new();
    for _ in 0..bytes / 1024 {
        hasher.write(&[7; 1024]);
    }
    hasher.finish()
}

/// Measures the ceiling: only the computation of a request, without a connection.
fn bare(threads: usize, work: usize) -> Round {
    let before = cpu_time();
    let running = Vec::from_iter((0..threads).map(|_| {
        thread::spawn(move || {
            let (begun, mut requests) = (Instant::now(), 0);
            while begun.elapsed() < TIME {
                black_box(compute(black_box(work)));
                requests += 1;
            }
            requests
        })
    }));
    let requests = running.into_iter().map(|one| one.join().unwrap()).sum();
    Round::new(requests, cpu_time() - before, Duration::ZERO)
}

/// Serves while another process asks.
fn served(runtime: &Runtime, workers: usize, load: &Load) -> Round {
    let work = load.work;
    let answer = move |line: Bytes| async move {
        black_box(compute(work));
        Ok::<_, Infallible>(line)
    };
    let stack = Pipeline::new(Lines::default).service(service_fn(answer));
    let serve = async {
        let builder = Server::builder().workers(workers).listen("127.0.0.1:0");
        let server = builder.bind().await?;
        let handle = server.handle();
        let serving = tokio::spawn(server.serve(stack));
        let before = cpu_time();

        let said = Command::new(std::env::current_exe()?)
            .args([LOAD, load.name, &handle.local_addrs()[0].to_string()])
            .output()
            .await?;

        let server = cpu_time() - before;
        handle.abort();
        serving.await??;
        let said = String::from_utf8(said.stdout)?;
        let (requests, cpu) = said.trim().split_once(' ').ok_or("the load failed")?;
        let load = Duration::from_nanos(cpu.parse()?);
        Ok::<_, BoxError>(Round::new(requests.parse()?, server, load))
    };
    runtime.block_on(serve).unwrap()
}

fn round(way: Way, load: &Load) -> Round {
    let mut threads = match way {
        Way::Bare(threads) => return bare(threads, load.work),
        Way::Workers(_) => Builder::new_current_thread(),
        Way::Tokio(_) => Builder::new_multi_thread(),
    };
    let workers = match way {
        Way::Workers(workers) => workers,
        Way::Tokio(count) => {
            threads.worker_threads(count);
            0
        }
        Way::Bare(_) => unreachable!("it has returned"),
    };
    served(&threads.enable_all().build().unwrap(), workers, load)
}

/// Runs the load process. It prints how many requests were answered, and how many nanoseconds of
/// CPU time asking took.
async fn ask(server: String, load: &'static Load) -> io::Result<()> {
    let end = Instant::now() + TIME;
    let asking = Vec::from_iter((0..CONNECTIONS).map(|_| {
        let server = server.clone();
        tokio::spawn(async move {
            let mut stream = connect(&server).await?;
            let batch = LINE.repeat(load.ahead);
            let mut answers = vec![0; batch.len()];
            let mut requests = 0;
            while Instant::now() < end {
                stream.write_all(&batch).await?;
                stream.read_exact(&mut answers).await?;
                requests += load.ahead;
                if load.leaves {
                    stream = connect(&server).await?;
                }
            }
            io::Result::Ok(requests)
        })
    }));
    let mut requests = 0;
    for one in asking {
        requests += one.await.unwrap()?;
    }
    println!("{requests} {}", cpu_time().as_nanos());
    Ok(())
}

async fn connect(server: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(server).await?;
    // Close by a reset. An orderly close would leave each port in `TIME_WAIT`, and they would run
    // out.
    stream.set_zero_linger()?;
    Ok(stream)
}

fn median(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> f64 {
    let mut figures = Vec::from_iter(rounds.iter().map(figure));
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn compare(load: &Load) {
    let ways = Vec::from_iter(
        WAYS.iter()
            .filter(|(_, way)| load.work > 0 || !matches!(way, Way::Bare(_))),
    );
    let mut rounds = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for (&&(_, way), rounds) in ways.iter().zip(&mut rounds) {
            rounds.push(round(way, load));
        }
    }
    println!(
        "{:22}{:>12}{:>8}{:>12}{:>8}{:>8}",
        load.name, "requests/s", "ratio", "CPU us", "ratio", "load"
    );
    let mut first = None;
    for ((name, way), rounds) in ways.into_iter().zip(&rounds) {
        let rate = median(rounds, |round| round.requests_per_second);
        let cpu = median(rounds, |round| round.cpu);
        if let Way::Bare(1) | Way::Workers(1) = way {
            first = Some((rate, cpu));
        }
        let (first_rate, first_cpu) = first.unwrap();
        println!(
            "{name:22}{rate:>12.0}{:>8.2}{cpu:>12.2}{:>8.2}{:>8.2}",
            rate / first_rate,
            cpu / first_cpu,
            median(rounds, |round| round.load),
        );
    }
    println!();
}

fn main() -> io::Result<()> {
    let args = Vec::from_iter(std::env::args().skip(1));
    if let [load, name, server] = &args[..]
        && load == LOAD
    {
        let load = LOADS.iter().find(|load| load.name == name).unwrap();
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        return runtime.block_on(ask(server.clone(), load));
    }
    let filters = Vec::from_iter(args.iter().filter(|arg| !arg.starts_with('-')));
    LOADS
        .iter()
        .filter(|load| filters.is_empty() || filters.iter().any(|part| load.name.contains(*part)))
        .for_each(compare);
    Ok(())
}
