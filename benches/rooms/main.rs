//! Measures what the main modules cost in process, without sockets, beside a loop written by hand.
//!
//! `cargo bench --package rooms` prints a table for each file here, and
//! `cargo bench --package rooms -- dispatch` prints that of one. The first row of each group is the
//! baseline (rows are sorted by name). Compare the ratios to it within one run, because machines
//! differ and drift. `benches/instructions` counts instructions instead of time. Most counts differ
//! by only a few tenths of a percent between runs, so two commits can be compared. The counts of
//! `large_frames` and of `serde` depend on where the allocator puts their buffers; compare these
//! rows in runs of one row each.
#![expect(clippy::unwrap_used, reason = "a failure ends the run")]

mod accept;
mod admit;
mod decode;
mod dispatch;
mod layers;
mod observe;
mod push;
mod support;
mod transport;

use std::time::Duration;

use divan::Divan;

fn main() {
    Divan::default()
        // The default, a hundred samples, can end before a busy machine has had a quiet moment.
        .min_time(Duration::from_millis(300))
        .config_with_args()
        .main();
}
