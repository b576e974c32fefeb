#!/usr/bin/env bash
# hyper's HTTP/1 setting `pipeline_flush(true)` is to join the responses to pipelined requests. With
# it, hyper writes nothing while its read buffer holds any byte, be it only a part of the next
# request. The finished response to a complete request is kept at least until the client has sent
# the whole head of the next one, even if that takes ten minutes. If the connection ends before
# that, the response is lost: by `graceful_shutdown`, and by a client that half-closes, also with
# `half_close(true)`. Two more cases need no part of a request. A response with `connection: close`
# is lost if another request has arrived. The response to a single complete request is lost if the
# handler leaves two chunks of its body unread. Apart from the half-close, all these connections end
# without an error: the server sees `Ok(())`, and the client not one byte. By default, the client
# gets the response in each of these cases.
#
# Seen with hyper 1.12.0, hyper-util 0.1.21, tokio 1.54.1. Time is simulated, so no case waits.
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
http-body-util = "=0.1.5"
hyper = { version = "=1.12.0", features = ["http1", "server"] }
hyper-util = { version = "=0.1.21", features = ["tokio"] }
tokio = { version = "=1.54.1", features = ["full", "test-util"] }
TOML

cat >src/main.rs <<'RUST'
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::Notify;
use tokio::time::timeout;

const A_PART: &str = "GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\n";
const ITS_REST: &str = "host: a\r\n\r\n";
const LAST_OF_TWO: &str = "GET /last HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n";
const UNREAD_BODY: &str = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
    1\r\na\r\n1\r\nb\r\n0\r\n\r\n";

/// An act of the client or the server, ten minutes after the input.
enum Then {
    Nothing,
    SendTheRest,
    HalfClose,
    ShutDown,
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::builder();
    if request.uri() == "/last" {
        response = response.header("connection", "close");
    }
    Ok(response.body(Full::from("hello")).unwrap())
}

/// Counts the responses that arrive within ten minutes.
async fn responses(client: &mut DuplexStream) -> usize {
    let mut output = Vec::new();
    let _ = timeout(Duration::from_secs(600), client.read_to_end(&mut output)).await;
    String::from_utf8(output).unwrap().matches("HTTP/1.1 200 OK").count()
}

async fn case(name: &str, input: &str, then: Then) {
    println!("{name}:");
    for enabled in [false, true] {
        let (mut client, server) = duplex(64 * 1024);
        client.write_all(input.as_bytes()).await.unwrap();

        let shut_down = Arc::new(Notify::new());
        let told = Arc::clone(&shut_down);
        let server = tokio::spawn(async move {
            let mut http1 = Builder::new();
            http1.half_close(true).pipeline_flush(enabled);
            let served = http1.serve_connection(TokioIo::new(server), service_fn(answer));
            let mut served = pin!(served);
            tokio::select! {
                ended = served.as_mut() => return ended,
                () = told.notified() => served.as_mut().graceful_shutdown(),
            }
            served.await
        });

        let before = responses(&mut client).await;
        match then {
            Then::Nothing => {}
            Then::SendTheRest => client.write_all(ITS_REST.as_bytes()).await.unwrap(),
            Then::HalfClose => client.shutdown().await.unwrap(),
            Then::ShutDown => shut_down.notify_one(),
        }
        let after = responses(&mut client).await;
        drop(client);
        let ended = server.await.unwrap();
        println!("  pipeline_flush({enabled}): responses first {before}, later {after}; {ended:?}");
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    tokio::time::pause();
    case("a part of the next request, then its rest", A_PART, Then::SendTheRest).await;
    case("a part of the next request, then graceful_shutdown", A_PART, Then::ShutDown).await;
    case("a part of the next request, then half-close", A_PART, Then::HalfClose).await;
    case("two requests, `connection: close` in the response", LAST_OF_TWO, Then::Nothing).await;
    case("one request, two chunks of its body unread", UNREAD_BODY, Then::Nothing).await;
}
RUST

cat >expected <<'TEXT'
a part of the next request, then its rest:
  pipeline_flush(false): responses first 1, later 1; Ok(())
  pipeline_flush(true): responses first 0, later 2; Ok(())
a part of the next request, then graceful_shutdown:
  pipeline_flush(false): responses first 1, later 0; Ok(())
  pipeline_flush(true): responses first 0, later 0; Ok(())
a part of the next request, then half-close:
  pipeline_flush(false): responses first 1, later 0; Err(hyper::Error(IncompleteMessage))
  pipeline_flush(true): responses first 0, later 0; Err(hyper::Error(IncompleteMessage))
two requests, `connection: close` in the response:
  pipeline_flush(false): responses first 1, later 0; Ok(())
  pipeline_flush(true): responses first 0, later 0; Ok(())
one request, two chunks of its body unread:
  pipeline_flush(false): responses first 1, later 0; Ok(())
  pipeline_flush(true): responses first 0, later 0; Ok(())
TEXT

cargo run --quiet >seen
cat seen
diff expected seen
