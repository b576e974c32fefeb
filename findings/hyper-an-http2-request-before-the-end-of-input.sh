#!/usr/bin/env bash
# A client writes one complete request and finishes sending, as `nc -N` does. It then reads. All
# bytes and the end of input are there when hyper's server begins to read. Over HTTP/1 the service
# is called, and with `half_close(true)` the request is answered. Over HTTP/2 the request carries
# END_STREAM, so it is just as complete, and yet the service is never called: h2 takes the end of
# input for the end of all streams before it hands out the request. The connection ends without an
# error, and hyper has no setting for that.
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
h2 = "=0.4.20"
http-body-util = "=0.1.5"
hyper = { version = "=1.12.0", features = ["http1", "http2", "server"] }
hyper-util = { version = "=0.1.21", features = ["tokio"] }
tokio = { version = "=1.54.1", features = ["full"] }
TOML

cat >src/main.rs <<'RUST'
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

const HTTP1: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

/// The preface, SETTINGS, and `GET http://a/` with END_STREAM and END_HEADERS.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
    \0\0\0\x04\0\0\0\0\0\
    \0\0\x06\x01\x05\0\0\0\x01\x82\x86\x41\x01a\x84";

async fn ask(name: &str, input: &[u8], http1: Option<&http1::Builder>) {
    let (mut client, server) = duplex(64 * 1024);
    client.write_all(input).await.unwrap();
    client.shutdown().await.unwrap();

    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let service = service_fn(move |_: Request<Incoming>| {
        counted.fetch_add(1, Ordering::Relaxed);
        async { Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())) }
    });
    let io = TokioIo::new(server);
    let ended = match http1 {
        Some(http1) => http1.serve_connection(io, service).await,
        None => http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await,
    };
    let mut output = Vec::new();
    client.read_to_end(&mut output).await.unwrap();
    let calls = calls.load(Ordering::Relaxed);
    let answered = output.starts_with(b"HTTP/1.1 200");
    println!("{name}: {calls} calls, answered {answered}, ended with {ended:?}");
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    ask("HTTP/1", HTTP1, Some(&http1::Builder::new())).await;
    ask("HTTP/1, half_close", HTTP1, Some(http1::Builder::new().half_close(true))).await;
    ask("HTTP/2", HTTP2, None).await;
}
RUST

cat >expected <<'TEXT'
HTTP/1: 1 calls, answered false, ended with Err(hyper::Error(IncompleteMessage))
HTTP/1, half_close: 1 calls, answered true, ended with Ok(())
HTTP/2: 0 calls, answered false, ended with Ok(())
TEXT

cargo run --quiet >seen
cat seen
diff expected seen
