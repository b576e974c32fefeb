//! The buffers of one connection between its stream and its codec.
//!
//! An idle connection holds no buffers. Each thread has a block of memory to read into and one to
//! encode into. A connection *takes* a block when it reads or encodes. After a read, it returns the
//! rest of the block to the thread at once. After encoding, it returns the block before it waits.
//! Before it waits, it also copies undecoded input and unwritten output to buffers of about their
//! size. Output that almost fills its block is not copied. Instead, the connection keeps that
//! block, and the thread allocates another block. If the poll of one connection polls another
//! connection, the inner connection may find no block on the thread. It then allocates its own.

mod input;
mod output;

pub(super) use input::Input;
pub(super) use output::Output;
