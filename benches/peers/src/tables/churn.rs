//! A connection for each line: the cost to accept, serve and close it.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use super::echoes;
use crate::bench::Bench;
use crate::load::{connect, micros};
use crate::server::Running;
use crate::table::{self, Figure, Table};

/// The number of clients that connect at the same time.
const CLIENTS: usize = 32;

/// A connection that takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(5);

const FIGURES: [Figure; 3] = [
    Figure::new("connections/s").compared(),
    Figure::new("CPU µs/connection").digits(1).compared(),
    Figure::new("failed"),
];

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    let (servers, missing) = echoes()?;
    table::head(
        bench,
        "A connection for each line",
        &format!(
            "{CLIENTS} clients connect, send a line, read it back and close, again and \
             again.{missing}"
        ),
    )?;
    let samples = bench
        .rounds(&servers, async |server| {
            measure(server, bench.period()).await
        })
        .await?;
    let mut table = Table::new("clients", FIGURES);
    table.rows(&CLIENTS.to_string(), &servers, &samples);
    table.print();
    Ok(())
}

async fn measure(server: &Running, period: Duration) -> Result<[f64; 3]> {
    let begin = Instant::now();
    let end = begin + period;
    let (served, failed) = (Cell::new(0_u32), Cell::new(0_u32));
    let clients = (0..CLIENTS).map(|_| async {
        while Instant::now() < end {
            let number = served.get() + failed.get();
            let counter = match timeout(DEADLINE, connection(server, number)).await {
                Ok(Ok(())) => &served,
                Ok(Err(_)) | Err(_) => &failed,
            };
            counter.set(counter.get() + 1);
        }
    });
    let (_, cpu) = tokio::join!(join_all(clients), server.cpu_in(begin..end));

    ensure!(served.get() > 0, "no connection was served");
    Ok([
        f64::from(served.get()) / period.as_secs_f64(),
        micros(cpu?) / f64::from(served.get()),
        f64::from(failed.get()),
    ])
}

async fn connection(server: &Running, number: u32) -> io::Result<()> {
    let mut stream = connect(server, number).await?;
    stream.write_all(b"line\n").await?;
    stream.read_exact(&mut [0; 5]).await?;
    Ok(())
}
