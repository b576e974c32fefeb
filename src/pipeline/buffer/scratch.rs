//! The thread's blocks: what a connection reads into and encodes into while it is being polled.
//!
//! A resting connection holds no buffers. So a block is *taken* for as long as a poll lasts (nothing is borrowed across one: a nested
//! connection finds the place empty and makes its own) and given back when it is empty.

use std::cell::Cell;

use bytes::BytesMut;

/// What is read into: large enough that a flood of small frames costs one system call in thousands of them.
pub(super) const READ_BLOCK: usize = 64 * 1024;

/// The least room left in a block that is shared with frames still in use; below it a new one is taken.
/// Going on in the rest is what keeps a service that collects small frames from pinning a block for each.
const LEAST_ROOM: usize = 4 * 1024;

/// What is encoded into, at first; it grows with what is encoded.
const WRITE_BLOCK: usize = 16 * 1024;

/// A block that has grown beyond this is not kept.
const LARGEST_KEPT: usize = 128 * 1024;

thread_local! {
    static READ: Cell<BytesMut> = Cell::new(BytesMut::new());
    static WRITE: Cell<BytesMut> = Cell::new(BytesMut::new());
}

/// Takes the thread's block for reading: empty, with room.
pub(super) fn take_read() -> BytesMut {
    // A thread that is being torn down has no block any more; then a new one serves.
    let mut block = READ.try_with(Cell::take).unwrap_or_default();
    if !block.try_reclaim(READ_BLOCK) && block.capacity() < LEAST_ROOM {
        block = BytesMut::with_capacity(READ_BLOCK);
    }
    block
}

pub(super) fn give_read(mut block: BytesMut) {
    block.clear();
    // Failing means the thread is ending: the block is simply freed.
    let _ended = READ.try_with(|place| place.set(block));
}

/// Takes the thread's block for encoding: empty, with room.
pub(super) fn take_write() -> BytesMut {
    let mut block = WRITE.try_with(Cell::take).unwrap_or_default();
    block.reserve(WRITE_BLOCK);
    block
}

pub(super) fn give_write(mut block: BytesMut) {
    block.clear();
    if block.try_reclaim(WRITE_BLOCK) && block.capacity() <= LARGEST_KEPT {
        let _ended = WRITE.try_with(|place| place.set(block));
    }
}
