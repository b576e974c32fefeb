//! The buffers of one connection between its stream and its codec.
//!
//! An idle connection holds no buffers. Each thread has a block of memory to read into and one to
//! encode into. A connection *takes* a block when it reads or encodes. Before it waits, it copies
//! undecoded input and unwritten output to buffers that fit, and returns the block to the thread.
//! Output is not copied if it nearly fills its block. The connection then keeps that block, and the
//! thread allocates another block. If the poll of one connection polls another connection, the
//! inner connection may find no block on the thread. It then allocates its own.

mod input;
mod output;

pub(super) use input::Input;
pub(super) use output::Output;
