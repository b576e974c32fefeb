#!/usr/bin/env bash
# tokio-util: with 0.7.20 `LengthDelimitedCodec` also encodes `&[u8]`. It encoded only `Bytes` before,
# and code that left that type to inference does not compile any more: `framed.send("hi".into())`,
# and even `framed.close()`, which never names the type of the frames. Code that is generic over
# `C: Encoder<T>`, such as a server for any codec, meets the same error. The cure names the type, as
# in `framed.send(Bytes::from("hi"))` and `SinkExt::<Bytes>::close(&mut framed)`.
#
# Seen with tokio-util 0.7.19 and 0.7.20, rustc 1.95.0.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
cargo init --quiet --name finding --vcs none

manifest() {
    cat >Cargo.toml <<TOML
[package]
name = "finding"
version = "0.0.0"
edition = "2024"

[dependencies]
bytes = "1"
futures-util = { version = "0.3.31", features = ["sink"] }
tokio = { version = "1", features = ["io-util", "macros", "rt"] }
tokio-util = { version = "=$1", features = ["codec"] }
TOML
}

program() {
    cat >src/main.rs <<RUST
#![allow(unused_imports)]
use bytes::Bytes;
use futures_util::SinkExt;
use tokio_util::codec::{FramedWrite, LengthDelimitedCodec};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut framed = FramedWrite::new(Vec::new(), LengthDelimitedCodec::new());
    $1
    $2
    println!("{:?}", framed.get_ref());
}
RUST
}

# Checks that a version of tokio-util compiles a program with these two lines, or does not.
expect() {
    manifest "$2"
    program "$3" "$4"
    if cargo check --quiet 2>said; then seen=compiles; else seen=fails; fi
    printf '%s: %s   %s   %s\n' "$2" "$3" "$4" "$seen"
    [[ $seen == "$1" ]] || { cat said && exit 1; }
    [[ $seen == compiles ]] || grep -m 2 '^error' said
}

expect compiles 0.7.19 'framed.send("hi".into()).await.unwrap();' 'framed.close().await.unwrap();'
expect fails 0.7.20 'framed.send("hi".into()).await.unwrap();' ''
expect fails 0.7.20 'framed.send(Bytes::from("hi")).await.unwrap();' 'framed.close().await.unwrap();'
expect compiles 0.7.20 'framed.send(Bytes::from("hi")).await.unwrap();' \
    'SinkExt::<Bytes>::close(&mut framed).await.unwrap();'
