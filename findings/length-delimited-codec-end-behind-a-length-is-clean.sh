#!/usr/bin/env bash
# tokio-util: `LengthDelimitedCodec` removes a frame's length from the buffer before the frame has
# arrived. So a stream that ends right after a length leaves nothing behind, and `FramedRead` ends as
# after a complete frame: with `None`, not with the error for the rest of a frame. One byte earlier,
# or one byte later, the end is that error. The cure keeps the length in the buffer, in front of the
# frame: `.num_skip(0).length_adjustment(4)`, and the reader drops the first four bytes.
#
# Seen with tokio-util 0.7.19 and 0.7.20.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
cargo init --quiet --name finding --vcs none

cat >src/main.rs <<'RUST'
use futures_util::StreamExt;
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};

/// Returns how a stream ends that was cut off after `len` bytes of a frame.
async fn end(codec: LengthDelimitedCodec, len: usize) -> String {
    let frame = b"\0\0\0\x02hi";
    let mut frames = FramedRead::new(&frame[..len], codec);
    match frames.next().await {
        None => "no error".to_owned(),
        Some(Err(err)) => err.to_string(),
        Some(Ok(frame)) => format!("a frame of {} bytes", frame.len()),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let kept = || LengthDelimitedCodec::builder().num_skip(0).length_adjustment(4).new_codec();
    for len in 0..=6 {
        let default = end(LengthDelimitedCodec::new(), len).await;
        println!("{len} bytes: {default}; with the length kept: {}", end(kept(), len).await);
    }
}
RUST

cat >expected <<'TEXT'
0 bytes: no error; with the length kept: no error
1 bytes: bytes remaining on stream; with the length kept: bytes remaining on stream
2 bytes: bytes remaining on stream; with the length kept: bytes remaining on stream
3 bytes: bytes remaining on stream; with the length kept: bytes remaining on stream
4 bytes: no error; with the length kept: bytes remaining on stream
5 bytes: bytes remaining on stream; with the length kept: bytes remaining on stream
6 bytes: a frame of 2 bytes; with the length kept: a frame of 6 bytes
TEXT

for version in 0.7.19 0.7.20; do
    cat >Cargo.toml <<TOML
[package]
name = "finding"
version = "0.0.0"
edition = "2024"

[dependencies]
futures-util = "0.3.31"
tokio = { version = "1", features = ["macros", "rt"] }
tokio-util = { version = "=$version", features = ["codec"] }
TOML
    echo "tokio-util $version"
    cargo run --quiet >seen
    cat seen
    diff expected seen
done
