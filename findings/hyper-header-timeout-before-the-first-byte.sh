#!/usr/bin/env bash
# hyper's `header_read_timeout` ends a silent HTTP/1 connection when hyper's own `http1::Builder`
# serves it, but not when hyper-util's `auto::Builder` does with the same timeout. The latter reads
# the first bytes by itself to tell HTTP/1 from HTTP/2, and no timeout covers this read. The timeout
# begins with the first byte. A server that relies on it keeps silent connections for ever.
#
# Seen with hyper 1.9.0, hyper-util 0.1.20, tokio 1.50.0.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
cargo init --quiet --name finding --vcs none

cat >Cargo.toml <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2024"

[dependencies]
http-body-util = "=0.1.3"
hyper = { version = "=1.9.0", features = ["http1", "http2", "server"] }
hyper-util = { version = "=0.1.20", features = ["server-auto", "tokio"] }
tokio = { version = "=1.50.0", features = ["full"] }
TOML

cat >src/main.rs <<'RUST'
use std::convert::Infallible;
use std::time::{Duration, Instant};

use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;

const HEADER: Duration = Duration::from_millis(500);
const LONG: Duration = Duration::from_secs(3);

async fn answer(_: Request<Incoming>) -> Result<Response<Empty<Bytes>>, Infallible> {
    Ok(Response::new(Empty::new()))
}

/// Waits for the server to close the connection.
async fn closed_after(mut client: DuplexStream) -> Option<Duration> {
    let begun = Instant::now();
    let mut rest = Vec::new();
    timeout(LONG, client.read_to_end(&mut rest)).await.ok()?.ok()?;
    Some(begun.elapsed())
}

fn http1(io: DuplexStream) {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER);
    tokio::spawn(builder.serve_connection(TokioIo::new(io), service_fn(answer)));
}

fn auto(io: DuplexStream) {
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER);
    tokio::spawn(async move {
        let served = builder.serve_connection(TokioIo::new(io), service_fn(answer)).await;
        drop(served);
    });
}

#[tokio::main]
async fn main() {
    let (client, io) = tokio::io::duplex(1024);
    http1(io);
    let silent = closed_after(client).await;
    println!("http1::Builder, silent: closed after {silent:?}");
    assert!(silent.is_some_and(|time| time < Duration::from_secs(2)));

    let (client, io) = tokio::io::duplex(1024);
    auto(io);
    let silent = closed_after(client).await;
    println!("auto::Builder, silent: closed after {silent:?}");
    assert!(silent.is_none(), "it has a timeout now");

    let (mut client, io) = tokio::io::duplex(1024);
    auto(io);
    client.write_all(b"G").await.expect("it is open");
    let begun = closed_after(client).await;
    println!("auto::Builder, one byte: closed after {begun:?}");
    assert!(begun.is_some_and(|time| time < Duration::from_secs(2)));
}
RUST

cargo run --quiet
