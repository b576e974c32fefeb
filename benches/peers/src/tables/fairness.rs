//! The delay that flooding connections cause for connections that seldom ask.

use std::cell::RefCell;
use std::ops::Range;
use std::time::Duration;

use anyhow::Result;
use futures_util::future::try_join_all;
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use crate::bench::Bench;
use crate::load::{WARM_UP, line, nanos};
use crate::server::{Running, Server};
use crate::table::{self, Figure, Table};

/// The number of connections that send requests, and the interval between the requests of each.
const ASKING: u32 = 100;
const EVERY: Duration = Duration::from_millis(10);

/// The numbers of connections that flood the server, and the number of requests ahead on each.
const FLOODS: [usize; 3] = [0, 1, 4];
const AHEAD: usize = 128;

const FIGURES: [Figure; 3] = [
    Figure::new("p50 µs").compared(),
    Figure::new("p99 µs").compared(),
    Figure::new("p99.9 µs").compared(),
];

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    let servers = [
        Server::own("bytes")?,
        Server::example("echo")?.named("**tower-tcp**"),
    ];
    table::head(
        bench,
        "Fairness",
        &format!(
            "{ASKING} connections ask every {EVERY:?} and wait for the answer, while others \
             always keep {AHEAD} lines of 16 bytes ahead. Ratios to the same server without the \
             others."
        ),
    )?;
    let samples = bench
        .rounds(&servers, async |server| {
            let mut figures = [0.0; 9];
            for (figures, floods) in figures.chunks_mut(3).zip(FLOODS) {
                figures.copy_from_slice(&measure(server, floods, bench.period()).await?);
            }
            Ok(figures)
        })
        .await?;
    let mut table = Table::of("server", "floods", FIGURES);
    for (server, samples) in servers.iter().zip(samples) {
        let quiet = samples.select([0, 1, 2]);
        for (n, floods) in FLOODS.iter().enumerate() {
            let row = samples.select([0, 1, 2].map(|figure| 3 * n + figure));
            table.row(server.name(), &floods.to_string(), &row, &quiet);
        }
    }
    table.print();
    Ok(())
}

async fn measure(server: &Running, floods: usize, period: Duration) -> Result<[f64; 3]> {
    let times = RefCell::new(Histogram::<u64>::new(3)?);
    let begin = Instant::now() + WARM_UP;
    let end = begin + period;
    let floods = async {
        tokio::select! {
            ended = try_join_all((0..floods).map(|_| flood(server))), if floods > 0 => {
                ended.map(drop)
            }
            () = sleep_until(end) => Ok(()),
        }
    };
    // Start one after the other, not all at once.
    let asking = (0..ASKING).map(|n| {
        let first = begin - WARM_UP + n * (EVERY / ASKING);
        ask(server, first, begin..end, &times)
    });
    tokio::try_join!(floods, try_join_all(asking))?;

    let times = times.into_inner();
    Ok([0.5, 0.99, 0.999].map(|quantile| times.value_at_quantile(quantile) as f64 / 1e3))
}

/// Asks again and again, and records how long each answer takes.
async fn ask(
    server: &Running,
    first: Instant,
    noted: Range<Instant>,
    times: &RefCell<Histogram<u64>>,
) -> Result<()> {
    let mut stream = TcpStream::connect(server.address()).await?;
    stream.set_nodelay(true)?;
    let request = line(16);
    let mut reply = request.clone();
    let mut turns = interval_at(first, EVERY);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        let sent = Instant::now();
        if sent >= noted.end {
            return Ok(());
        }
        stream.write_all(&request).await?;
        stream.read_exact(&mut reply).await?;
        if sent >= noted.start {
            times.borrow_mut().record(nanos(sent.elapsed()))?;
        }
    }
}

/// Sends back what arrives, so the same amount is always ahead.
async fn flood(server: &Running) -> Result<()> {
    let mut stream = TcpStream::connect(server.address()).await?;
    stream.set_nodelay(true)?;
    let mut lines = line(16).repeat(AHEAD);
    let mut length = lines.len();
    loop {
        stream.write_all(&lines[..length]).await?;
        length = stream.read(&mut lines).await?;
        anyhow::ensure!(length > 0, "the server closed a flood");
    }
}
