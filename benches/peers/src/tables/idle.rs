//! The memory of each idle connection.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::echoes;
use crate::bench::Bench;
use crate::load::{allow_connections, connect};
use crate::server::Running;
use crate::table::{self, Figure, Table};

/// As many as fit where a process may open 20,000 files.
const CONNECTIONS: u32 = 15_000;

/// The time that the last connection takes to become idle.
const SETTLE: Duration = Duration::from_secs(1);

const FIGURES: [Figure; 1] = [Figure::new("bytes/connection").compared()];

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    allow_connections(CONNECTIONS)?;

    let (servers, missing) = echoes()?;
    table::head(
        bench,
        "Connections at rest",
        &format!(
            "Growth of the server's resident memory by {CONNECTIONS} connections, each of which \
             has sent a line and received it back.{missing}"
        ),
    )?;
    let samples = bench
        .rounds(&servers, async |server| measure(server).await)
        .await?;
    let mut table = Table::new("connections", FIGURES);
    table.rows(&CONNECTIONS.to_string(), &servers, &samples);
    table.print();
    Ok(())
}

async fn measure(server: &Running) -> Result<[f64; 1]> {
    let before = server.resident()?;
    let mut open = Vec::new();
    for n in 0..CONNECTIONS {
        let stream = connection(server, n)
            .await
            .with_context(|| format!("connection {n}"))?;
        open.push(stream);
    }
    sleep(SETTLE).await;
    let grown = server.resident()?.saturating_sub(before);
    Ok([grown as f64 / f64::from(CONNECTIONS)])
}

async fn connection(server: &Running, number: u32) -> Result<TcpStream> {
    let mut stream = connect(server, number).await?;
    stream.write_all(b"line\n").await?;
    stream.read_exact(&mut [0; 5]).await?;
    Ok(stream)
}
