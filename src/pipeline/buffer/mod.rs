//! The buffers of one connection between its stream and its codec.
//!
//! An idle connection holds none. Each thread has a block to read into and one to encode into. A
//! connection *takes* it while it is being polled, and gives it back when it is empty. Nothing is
//! borrowed across a poll: a nested connection finds the place empty and allocates its own.

mod input;
mod output;

pub(super) use input::Input;
pub(super) use output::Output;
