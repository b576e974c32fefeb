//! What each room costs in process, without a kernel, beside what one would write by hand.
//!
//! `cargo bench` prints a table for each room; `cargo bench -- dispatch` that of one. The first row of each group is the baseline (rows are sorted by
//! name), and what counts is the ratio to it within one run: machines differ, and drift. `benches/instructions` counts the same in instructions,
//! which stay the same from run to run, so that two commits can be compared.
#![expect(clippy::unwrap_used, reason = "a failure ends the run")]

mod accept;
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
        // By default it is a hundred samples, some of them over before a busy machine has had time to be quiet.
        .min_time(Duration::from_millis(300))
        .config_with_args()
        .main();
}
