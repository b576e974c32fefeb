//! The memory of each idle connection.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::echoes;
use crate::bench::Bench;
use crate::load::connect;
use crate::server::Running;
use crate::table::{self, Figure, Table};

/// As many as fit where a process may open 20,000 files.
const CONNECTIONS: u32 = 15_000;

/// The number of other files that a process has open.
const OTHER_FILES: u32 = 100;

/// The time that the last connection takes to become idle.
const SETTLE: Duration = Duration::from_secs(1);

const FIGURES: [Figure; 1] = [Figure::new("bytes/connection").compared()];

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    // Child processes inherit this limit.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let files = u32::try_from(most).unwrap_or(u32::MAX);
    let connections = CONNECTIONS.min(files.saturating_sub(OTHER_FILES));

    let (servers, missing) = echoes()?;
    table::head(
        bench,
        "Connections at rest",
        &format!(
            "Growth of the server's resident memory by {connections} connections, each of which \
             has sent a line and received it back.{missing}"
        ),
    )?;
    let samples = bench
        .rounds(&servers, async |server| measure(server, connections).await)
        .await?;
    let mut table = Table::new("connections", FIGURES);
    table.rows(&connections.to_string(), &servers, &samples);
    table.print();
    Ok(())
}

async fn measure(server: &Running, connections: u32) -> Result<[f64; 1]> {
    let before = server.resident()?;
    let mut open = Vec::new();
    for n in 0..connections {
        let stream = connection(server, n)
            .await
            .with_context(|| format!("connection {n}"))?;
        open.push(stream);
    }
    sleep(SETTLE).await;
    let grown = server.resident()?.saturating_sub(before);
    Ok([grown as f64 / f64::from(connections)])
}

async fn connection(server: &Running, number: u32) -> Result<TcpStream> {
    let mut stream = connect(server, number).await?;
    stream.write_all(b"line\n").await?;
    stream.read_exact(&mut [0; 5]).await?;
    Ok(stream)
}
