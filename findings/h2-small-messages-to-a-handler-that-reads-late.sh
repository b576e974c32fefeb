#!/usr/bin/env bash
# HTTP/2: a client streams 4,000 messages of 20 bytes, 80 kB in all, to a handler that waits for a
# second before it reads its body. All windows have room, and yet hyper's server ends the whole
# connection with ENHANCE_YOUR_CALM, also for the other streams: h2 counts unread DATA frames under
# 256 bytes against half of the *connection's* window. hyper has no setting for that count, but it
# grows with the connection's window: with one of 16 MiB the same 4,000 messages arrive. Clients
# of gRPC stream like this.
#
# Seen with hyper 1.12.0, h2 0.4.20, tokio 1.54.1.
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
bytes = "=1.12.1"
h2 = "=0.4.20"
http = "1"
http-body-util = "=0.1.5"
hyper = { version = "=1.12.0", features = ["http2", "server"] }
hyper-util = { version = "=0.1.21", features = ["tokio"] }
tokio = { version = "=1.54.1", features = ["full"] }
TOML

cat >src/main.rs <<'RUST'
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::DuplexStream;

const MESSAGES: usize = 4_000;

async fn count(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    tokio::time::sleep(Duration::from_secs(1)).await;
    let body = request.into_body().collect().await?.to_bytes();
    Ok(Response::new(Full::new(Bytes::from(body.len().to_string()))))
}

/// Sends the messages. Returns the answer or the error that the client sees, and how the server's
/// connection ended.
async fn stream(window: Option<u32>) -> (Result<Bytes, h2::Error>, String) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder.initial_connection_window_size(window);
    let server = tokio::spawn(async move {
        let served = builder.serve_connection(TokioIo::new(far), service_fn(count)).await;
        format!("{served:?}")
    });
    let answer = send(near).await;
    (answer, server.await.expect("it does not panic"))
}

async fn send(io: DuplexStream) -> Result<Bytes, h2::Error> {
    let (mut client, connection) = h2::client::handshake(io).await?;
    let connection = tokio::spawn(connection);
    // So that the server's settings, with its windows, are known.
    client = client.ready().await?;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let request = Request::post("http://localhost/").body(()).expect("a request");
    let (response, mut body) = client.send_request(request, false)?;
    for sent in 1..=MESSAGES {
        body.reserve_capacity(20);
        body.send_data(Bytes::from_static(&[b'.'; 20]), sent == MESSAGES)?;
        tokio::task::yield_now().await;
    }
    let mut body = response.await?.into_body();
    let answer = body.data().await.expect("a body");
    connection.abort();
    answer
}

#[tokio::main]
async fn main() {
    let (answer, ended) = stream(None).await;
    println!("by default: {answer:?}\n  the server: {ended}");
    answer.expect_err("it arrives now");
    assert!(ended.contains("ENHANCE_YOUR_CALM"));

    let (wide, _) = stream(Some(16 * 1024 * 1024)).await;
    println!("with a connection window of 16 MiB: {wide:?}");
    assert_eq!(wide.expect("it arrives"), "80000");
}
RUST

cargo run --quiet
