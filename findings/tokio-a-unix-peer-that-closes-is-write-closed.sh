#!/usr/bin/env bash
# tokio: `Ready::is_write_closed` tells a TCP peer that has reset the connection from one that has
# only closed its socket. It does not tell the two apart on a Unix socket: there, it is `true` as
# soon as the peer has closed its socket in good order, although everything that the peer has
# written can still be read. (On Linux the flag is EPOLLHUP.) So a server that drops its work once
# writing is closed loses the requests of a Unix client that writes and closes.
#
# Seen with tokio 1.50.0 and 1.54.1 on Linux.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
cargo init --quiet --name finding --vcs none

cat >src/main.rs <<'RUST'
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream, UnixStream};

/// Waits until the peer is seen to have left, and only then reads.
macro_rules! left {
    ($name:literal, $stream:ident) => {
        let both = Interest::READABLE | Interest::WRITABLE;
        let left = async {
            loop {
                let ready = $stream.ready(both).await.unwrap();
                if ready.is_read_closed() {
                    return ready;
                }
                tokio::task::yield_now().await;
            }
        };
        let ready = tokio::time::timeout(Duration::from_secs(5), left).await.unwrap();
        let mut bytes = Vec::new();
        let read = $stream.read_to_end(&mut bytes).await.map_err(|err| err.kind());
        println!("{}: write closed {}, then read {read:?}", $name, ready.is_write_closed());
    };
}

async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (mut client, mut server) = tcp().await;
    client.write_all(b"bytes").await.unwrap();
    drop(client);
    left!("TCP, closed", server);

    let (mut client, mut server) = tcp().await;
    client.write_all(b"bytes").await.unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    left!("TCP, reset", server);

    let (mut client, mut server) = UnixStream::pair().unwrap();
    client.write_all(b"bytes").await.unwrap();
    drop(client);
    left!("Unix, closed", server);
}
RUST

cat >expected <<'TEXT'
TCP, closed: write closed false, then read Ok(5)
TCP, reset: write closed true, then read Err(ConnectionReset)
Unix, closed: write closed true, then read Ok(5)
TEXT

for version in 1.50.0 1.54.1; do
    cat >Cargo.toml <<TOML
[package]
name = "finding"
version = "0.0.0"
edition = "2024"

[dependencies]
tokio = { version = "=$version", features = ["io-util", "macros", "net", "rt", "time"] }
TOML
    echo "tokio $version"
    cargo run --quiet >seen
    cat seen
    diff expected seen
done
