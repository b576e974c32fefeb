//! The thread's blocks, into which a connection reads and encodes while it is being polled.
//!
//! An idle connection holds no buffers. A block is *taken* for the length of a poll and given back
//! when it is empty. Nothing is borrowed across a poll: a nested connection finds the place empty
//! and allocates its own.

use std::cell::Cell;

use bytes::BytesMut;

/// The size of the block for reads. It is large, so that thousands of small frames cost one system
/// call.
pub(super) const READ_BLOCK: usize = 64 * 1024;

/// The least room left in a block that is shared with frames still in use. With less, a new block
/// is taken. Using the rest of a block keeps a service that collects small frames from keeping a
/// block alive for each.
const LEAST_ROOM: usize = 4 * 1024;

/// The initial size of the block for encoding. It grows as needed.
const WRITE_BLOCK: usize = 16 * 1024;

/// The size above which a block is not kept.
const LARGEST_KEPT: usize = 128 * 1024;

thread_local! {
    static READ: Cell<BytesMut> = Cell::new(BytesMut::new());
    static WRITE: Cell<BytesMut> = Cell::new(BytesMut::new());
}

/// Takes the thread's block for reading. It is empty and has room.
pub(super) fn take_read() -> BytesMut {
    // A thread that is ending has no block any more, so a new one is used.
    let mut block = READ.try_with(Cell::take).unwrap_or_default();
    if !block.try_reclaim(READ_BLOCK) && block.capacity() < LEAST_ROOM {
        block = BytesMut::with_capacity(READ_BLOCK);
    }
    block
}

pub(super) fn give_read(mut block: BytesMut) {
    block.clear();
    // This fails only if the thread is ending; the block is then freed.
    let _ended = READ.try_with(|place| place.set(block));
}

/// Takes the thread's block for encoding. It is empty and has room.
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
