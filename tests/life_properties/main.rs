//! The life of a connection, as 100,000 random operations of its peer, its service and the rest of
//! the program. No finished reply is lost, and nothing is out of order. Each connection ends once,
//! for a reason that occurred, and leaves nothing behind.
//!
//! A failure prints its seed. `TOWER_TCP_SEED=<seed>` starts with the same case again.
//!
//! | file | content |
//! | --- | --- |
//! | `main.rs` | the test that runs case after case |
//! | `case.rs` | one case: a server, a few connections, and the checks at their end |
//! | `wire.rs` | the protocol: requests, frames, the codec |
//! | `record.rs` | the record of everything that happened to a connection |
//! | `peer.rs`, `service.rs`, `program.rs` | the operations of the three parties |
//! | `check.rs` | what must be true of the record at the end |
//! | `random.rs` | pseudo-random numbers |
//! | `frames.rs` | a second test: a million pushed frames between replies |
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use case::run;
use record::Message;
use wire::Out;

mod case;
mod check;
mod frames;
mod peer;
mod program;
mod random;
mod record;
mod service;
#[path = "../support/mod.rs"]
mod support;
mod wire;

type Peer = tower_tcp::Peer<Out, Message>;

/// The number of operations in all, unless a case fails earlier.
const OPERATIONS: usize = 100_000;

/// The most calls of a connection at a time, in a pipeline that runs several.
const IN_FLIGHT: usize = 4;

/// Every party acts at even milliseconds. At odd ones, only `look` checks the output.
const STEP: Duration = Duration::from_millis(2);

const DRAIN_DEADLINE: Duration = Duration::from_secs(60);

/// The limit of every wait, on the paused clock.
const NET: Duration = Duration::from_secs(3600);

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
}

fn seed() -> u64 {
    match std::env::var("TOWER_TCP_SEED") {
        Ok(seed) => seed.parse().expect("a seed is a number"),
        Err(_) => RandomState::new().hash_one(0_u8),
    }
}

#[test]
fn whatever_happens_to_connections_nothing_is_lost_or_out_of_order_and_each_ends_once() {
    let mut seed = seed();
    let mut operations = 0;
    while operations < OPERATIONS {
        match paused().block_on(run(seed)) {
            Ok(done) => operations += done,
            Err(err) => panic!("{err}\nTOWER_TCP_SEED={seed}"),
        }
        seed = seed.wrapping_add(1);
    }
}
