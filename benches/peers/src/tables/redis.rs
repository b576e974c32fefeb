//! A whole protocol: the `redis` example and redis itself, under redis' own benchmark.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use crate::bench::Bench;
use crate::load::micros;
use crate::server::{Running, Server, free_port};
use crate::table::{self, Figure, Table};

const COMMANDS: [&str; 5] = ["SET", "GET", "INCR", "LPUSH", "MSET"];

/// The number of requests ahead, and roughly the number that redis answers in a second.
const PIPELINES: [(usize, f64); 3] = [(1, 50e3), (16, 500e3), (64, 800e3)];

const FIGURES: [Figure; 3] = [
    Figure::new("requests/s").compared(),
    Figure::new("CPU µs/request").digits(3).compared(),
    Figure::new("p99 ms").digits(3),
];

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    let port = free_port()?;
    let theirs = Server::installed("redis-server", port)?;
    table::head(
        bench,
        "Redis",
        "`redis-benchmark -c 50 -P ahead`; nothing is saved, one key. Each server has one thread.",
    )?;
    let Some(theirs) = theirs else {
        println!("redis-server is not installed.\n");
        return Ok(());
    };
    let port = port.to_string();
    let theirs = [
        "--port",
        &port,
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    .into_iter()
    .fold(theirs, Server::arg);
    let servers = [theirs, Server::example("redis")?.named("**tower-tcp**")];

    let mut table = Table::new("command, ahead", FIGURES);
    for (ahead, rate) in PIPELINES {
        let requests = (rate * bench.effort.secs).ceil();
        let samples = bench
            .rounds(&servers, async |server| {
                let mut figures = [0.0; 3 * COMMANDS.len()];
                for (figures, command) in figures.chunks_mut(3).zip(COMMANDS) {
                    figures.copy_from_slice(&measure(server, command, ahead, requests).await?);
                }
                Ok(figures)
            })
            .await?;
        for (n, command) in COMMANDS.iter().enumerate() {
            let rows: Vec<_> = samples
                .iter()
                .map(|samples| samples.select([0, 1, 2].map(|figure| 3 * n + figure)))
                .collect();
            table.rows(&format!("{command}, {ahead}"), &servers, &rows);
        }
    }
    table.print();
    Ok(())
}

async fn measure(server: &Running, command: &str, ahead: usize, requests: f64) -> Result<[f64; 3]> {
    let before = server.cpu()?;
    let run = Command::new("redis-benchmark")
        .args(["--csv", "-c", "50", "-t", command])
        .args(["-P", &ahead.to_string(), "-n", &requests.to_string()])
        .args(["-p", &server.address().port().to_string()])
        .stderr(Stdio::inherit())
        .output()
        .await?;
    let cpu = server.cpu()? - before;
    ensure!(run.status.success(), "redis-benchmark failed");

    // A line of names, then a line of figures: the command, requests per second, milliseconds
    // (mean, minimum, p50, p95, p99, maximum).
    let table = String::from_utf8(run.stdout)?;
    let line = table
        .lines()
        .nth(1)
        .context("redis-benchmark tells nothing")?;
    let mut cells = line
        .split(',')
        .skip(1)
        .map(|cell| cell.trim_matches('"').parse());
    let rate = cells.next().context("no requests a second")??;
    let p99 = cells.nth(4).context("no p99")??;
    Ok([rate, micros(cpu) / requests, p99])
}
