//! The cost that tower's layers add to a request, one by one and all together.

use std::{io, iter};

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use super::ahead;
use crate::bench::{Bench, Samples};
use crate::load::{CONNECTIONS, Load};
use crate::server::Server;
use crate::table::{self, Figure, Table};

/// The stacks of `servers/layers.rs`, except `by-hand`.
const STACKS: [&str; 13] = [
    "none",
    "map-result",
    "timeout",
    "concurrency-limit",
    "rate-limit",
    "load-shed",
    "shutdown-on-error",
    "all",
    "all-by-hand",
    "shared",
    "shared-rate-limit",
    "trace",
    "whole",
];

const AHEAD: [usize; 2] = [1, 16];

/// The number of counted requests. It changes only how long counting takes.
const COUNTED: usize = 1600;

const INSTRUCTIONS: [Figure; 2] = [
    Figure::new("instructions/request").compared(),
    Figure::new("more than with none"),
];

const STANDS_FOR: &str = "\
    `all` is the request stack of the `stack` example, `all-by-hand` the same in the raw loop, \
    `whole` its connection stack around `all`. `shared` is one service that is cloned for each \
    request, `shared-rate-limit` one behind a buffer. The other services are made for each \
    connection.";

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    let layers = Server::own("layers")?;
    let mut servers = vec![Server::own("bytes")?];
    servers.extend(STACKS.map(|stack| layers.clone().arg(stack).named(stack)));
    table::head(
        bench,
        "Layers",
        &format!("Lines of 16 bytes over {CONNECTIONS} connections, as above. {STANDS_FOR}"),
    )?;
    ahead(bench, &servers, &AHEAD, |ahead| Load::lines(16, ahead)).await?;

    table::head(
        bench,
        "Layers, in instructions",
        &format!(
            "Counted by callgrind, with client and server over a stream in memory: the \
             instructions that {COUNTED} further requests add, divided by their number."
        ),
    )?;
    let mut table = Table::of("ahead", "stack", INSTRUCTIONS);
    for ahead in AHEAD {
        let Some(none) = instructions(&layers, "none", ahead).await? else {
            println!("Valgrind is not installed.\n");
            return Ok(());
        };
        let mut first = None;
        for stack in iter::once("by-hand").chain(STACKS) {
            let count = instructions(&layers, stack, ahead)
                .await?
                .context("valgrind is gone")?;
            let row = Samples::once([count, count - none]);
            let first = first.get_or_insert_with(|| row.clone());
            table.row(&ahead.to_string(), stack, &row, first);
        }
    }
    table.print();
    Ok(())
}

/// Returns the instructions of a request, or nothing if valgrind is not installed.
async fn instructions(layers: &Server, stack: &str, ahead: usize) -> Result<Option<f64>> {
    let batches = COUNTED / ahead;
    let Some(some) = total(layers, stack, ahead, batches).await? else {
        return Ok(None);
    };
    let more = total(layers, stack, ahead, 2 * batches).await?;
    Ok(more.map(|more| (more - some) / COUNTED as f64))
}

/// Returns the instructions of a whole run of the program.
async fn total(layers: &Server, stack: &str, ahead: usize, batches: usize) -> Result<Option<f64>> {
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(layers.program())
        .args([
            stack,
            "--in-memory",
            &batches.to_string(),
            "--ahead",
            &ahead.to_string(),
        ])
        .output()
        .await;
    let run = match run {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        run => run?,
    };
    let told = String::from_utf8_lossy(&run.stderr);
    ensure!(run.status.success(), "callgrind failed:\n{told}");
    let (_, total) = told
        .rsplit_once("Collected : ")
        .context("callgrind tells no total")?;
    let total = total.lines().next().unwrap_or_default().trim();
    Ok(Some(total.parse()?))
}
