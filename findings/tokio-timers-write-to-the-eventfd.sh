#!/usr/bin/env bash
# On a runtime with one thread a timer of tokio should cost no system call: the thread that sets it
# is the one that waits, and computes how long just before. Yet tokio wakes its driver for each
# timer that is due before all those known when it last waited. So the running thread writes to its
# own eventfd, and its next epoll_wait returns at once. A server whose connections set a short
# deadline beside long ones pays two system calls for each. A timer that is due later costs none.
#
# Seen with tokio 1.54.1. Needs cargo and strace.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "timers"
version = "0.0.0"
edition = "2024"

[dependencies]
tokio = { version = "=1.54.1", features = ["net", "rt", "time"] }
TOML
cat >src/main.rs <<'RUST'
use std::future::{Future, poll_fn};
use std::task::Poll;
use std::time::Duration;

use tokio::time::sleep;

/// Starts ten timers beside one of 200 seconds, all due before it or all after.
fn main() {
    let before = std::env::args().any(|arg| arg == "before");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut timers = Vec::new();
        for n in 0..11 {
            let seconds = if before { 200 - 10 * n } else { 200 + 10 * n };
            let mut timer = Box::pin(sleep(Duration::from_secs(seconds)));
            poll_fn(|cx| Poll::Ready(assert!(timer.as_mut().poll(cx).is_pending()))).await;
            timers.push(timer);
            if n == 0 {
                // The runtime waits, so it knows the first timer. What follows is counted.
                sleep(Duration::from_millis(10)).await;
                eprintln!("counted from here");
            }
        }
    });
}
RUST
cargo build --quiet --release

for due in after before; do
    writes=$(strace -f -e trace=write target/release/timers $due 2>&1 |
        sed '1,/counted from here/d' | grep -c 'write([0-9]*, "\\1\\0' || true)
    echo "ten timers due $due the first: $writes writes to the eventfd"
    case $due in
    after) ((writes == 0)) ;;
    before) ((writes == 10)) ;;
    esac
done
