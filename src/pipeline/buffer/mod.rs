//! The buffers of one connection between its stream and its codec.
//!
//! An idle connection holds no buffers. Each thread has a block of memory to read into and one to
//! encode into. A connection *takes* a block while it is being polled, and returns it when it is
//! empty. No borrow of a block outlives a poll. If the poll of one connection polls another one,
//! the inner connection finds no block on the thread and allocates its own.

mod input;
mod output;

pub(super) use input::Input;
pub(super) use output::Output;
