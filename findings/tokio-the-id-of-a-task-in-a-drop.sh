#!/usr/bin/env bash
# In code that tokio runs within a task, `tokio::task::try_id` should be the id of that task. While
# the output of another, finished task is dropped, it is the id of the finished one: dropping a
# `JoinHandle` drops the output at once, on the dropping thread, in the name of its own task. So a
# `Drop` cannot tell by the id whether it runs inside a certain task, for example one that polls
# with a lock held. The id of the thread can tell.
#
# Seen with tokio 1.54.1. Needs cargo.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "ids"
version = "0.0.0"
edition = "2024"

[dependencies]
tokio = { version = "=1.54.1", features = ["rt"] }
TOML
cat >src/main.rs <<'RUST'
use std::thread;

use tokio::task;

/// Says, when it is dropped, in which task and on which thread that is.
struct Output(task::Id, thread::ThreadId);

impl Drop for Output {
    fn drop(&mut self) {
        println!("in the task that drops it: {}", task::try_id() == Some(self.0));
        println!("on the thread that drops it: {}", thread::current().id() == self.1);
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let dropping = task::spawn(async {
            let (here, thread) = (task::id(), thread::current().id());
            let finished = task::spawn(async move { Output(here, thread) });
            while !finished.is_finished() {
                task::yield_now().await;
            }
            drop(finished);
        });
        dropping.await.unwrap();
    });
}
RUST
cargo build --quiet

said=$(target/debug/ids)
echo "$said"
[[ $said == $'in the task that drops it: false\non the thread that drops it: true' ]]
