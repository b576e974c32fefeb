//! The comparisons.

pub(crate) mod churn;
pub(crate) mod dispatch;
pub(crate) mod fairness;
pub(crate) mod fanout;
pub(crate) mod http;
pub(crate) mod layers;
pub(crate) mod lines;
pub(crate) mod memory;
pub(crate) mod redis;
pub(crate) mod rest;
pub(crate) mod tls;

use anyhow::Result;

use crate::bench::Bench;
use crate::load::{FIGURES, Load};
use crate::server::Server;
use crate::table::Table;

/// Returns the servers that echo lines, the one written by hand first, and a note about those that
/// are not installed.
fn echoes() -> Result<(Vec<Server>, &'static str)> {
    let mut servers = vec![
        Server::own("bytes")?,
        Server::example("echo")?.named("**tower-tcp**"),
        Server::own("tuned")?,
        Server::own("framed")?,
        Server::own("tokio-tower")?,
    ];
    let go = Server::go("echo")?;
    let missing = match go {
        Some(_) => "",
        None => " Go is not installed.",
    };
    servers.extend(go);
    Ok((servers, missing))
}

/// Prints the figures of the servers for each number of requests ahead.
async fn ahead(
    bench: &Bench,
    servers: &[Server],
    numbers: &[usize],
    load: impl Fn(usize) -> Load,
) -> Result<()> {
    let mut table = Table::new("ahead", FIGURES);
    for &ahead in numbers {
        let load = load(ahead);
        let samples = bench
            .rounds(servers, async |server| {
                load.measure(server, bench.period()).await
            })
            .await?;
        table.rows(&ahead.to_string(), servers, &samples);
    }
    table.print();
    Ok(())
}
