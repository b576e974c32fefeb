//! An axum app, served by this crate and by other servers.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use crate::bench::Bench;
use crate::load::micros;
use crate::server::{Running, Server};
use crate::table::{self, Figure, Table};

const CONNECTIONS: &str = "64";

const FIGURES: [Figure; 2] = [
    Figure::new("requests/s").compared(),
    Figure::new("CPU µs/request").digits(2).compared(),
];

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    table::head(
        bench,
        "HTTP",
        &format!(
            "wrk requests `Hello, world!` from one axum app over {CONNECTIONS} connections, \
             HTTP/1.1; TLS 1.3 by rustls and ring for all. Guarded has a deadline for request \
             heads and `ConnectInfo`, which the crate has by default."
        ),
    )?;
    let dir = tempfile::tempdir()?;
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    fs::write(&cert, made.cert.pem())?;
    fs::write(&key, made.signing_key.serialize_pem())?;

    let mut table = Table::new("way", FIGURES);
    let tls = [cert.as_path(), key.as_path()];
    for (way, scheme, files) in [("plain", "http", &[][..]), ("TLS", "https", &tls)] {
        let servers = servers(files)?;
        let samples = bench
            .rounds(&servers, async |server| {
                wrk(server, scheme, bench.period()).await
            })
            .await?;
        table.rows(way, &servers, &samples);
    }
    table.print();
    Ok(())
}

fn servers(files: &[&Path]) -> Result<Vec<Server>> {
    let http = Server::own("http")?;
    let by = |arg, name| {
        let server = http.clone().arg(arg).named(name);
        files.iter().fold(server, |server, file| server.arg(file))
    };
    Ok(vec![
        by("axum-serve", "axum::serve"),
        by("axum-server", "axum-server"),
        by("axum-server-guarded", "axum-server, guarded"),
        by("tower-tcp", "**tower-tcp**"),
    ])
}

/// Runs wrk for `period`, rounded up to whole seconds.
async fn wrk(server: &Running, scheme: &str, period: Duration) -> Result<[f64; 2]> {
    let cpu = server.cpu()?;
    let output = Command::new("wrk")
        .args(["--threads", "1", "--connections", CONNECTIONS])
        .arg(format!("--duration={}s", period.as_secs_f64().ceil()))
        .arg(format!("{scheme}://{}/", server.address()))
        .stdin(Stdio::null())
        .output()
        .await
        .context("wrk is not installed")?;
    let cpu = server.cpu()? - cpu;
    let said = String::from_utf8(output.stdout)?;
    let errors = said.contains("Socket errors") || said.contains("Non-2xx");
    ensure!(output.status.success() && !errors, "{said}");
    let figure = |line: &str| -> Result<f64> {
        let mut words = said.lines().filter(|said| said.contains(line));
        let words = words.next().with_context(|| said.clone())?;
        let mut words = words.split_whitespace();
        words
            .find_map(|word| word.parse().ok())
            .context("no figure")
    };
    Ok([
        figure("Requests/sec:")?,
        micros(cpu) / figure(" requests in ")?,
    ])
}
