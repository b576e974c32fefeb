//! Bytes that are read but not yet decoded.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, BytesMut};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

/// The size, in bytes, of a thread's block, into which all connections on that thread read. It is
/// large, so that one system call reads thousands of small frames.
const BLOCK: usize = 64 * 1024;

/// The minimum number of free bytes at which the rest of a block is still used. While frames still
/// hold the front of a block, the next read uses the rest if at least this many bytes are free.
/// Otherwise, a new block is allocated. Because small frames share a block in this way, a service
/// that collects them does not keep a whole block alive for each of them.
const LEAST_ROOM: usize = 4 * 1024;

/// The number of bytes that may be used up at the start of a block before `take_block` tries to
/// reclaim them. Each attempt costs more than a small read.
const USED: usize = 4 * 1024;

/// The number of bytes that a buffer may keep, beyond twice the size of its content, while the
/// connection waits. The content of a larger buffer is copied to one that fits, because a codec may
/// have reserved memory for a frame whose size the peer has only announced.
const SLACK: usize = 1024;

/// The number of frames in a row that a decoder may return without consuming input. If `max_frame`
/// is larger, it is the limit instead.
const FRAMES: u32 = 65_536;

thread_local! {
    static THREAD_BLOCK: Cell<BytesMut> = Cell::new(BytesMut::new());
}

/// The undecoded input of one connection.
#[derive(Debug, Default)]
pub(in crate::pipeline) struct Input {
    buf: BytesMut,
    /// `true` if `buf` is a part of the thread's block, and so keeps the block alive.
    in_block: bool,
    eof: bool,
    /// The number of bytes of decoded frames for which `buf` still holds memory. Used only while
    /// `in_block` is `false`.
    consumed: usize,
    /// The number of frames in a row for which the decoder consumed no bytes.
    empty_frames: u32,
}

impl Input {
    /// Reads once, up to `at_most` bytes. The buffer grows to at most `max_frame` plus the bytes
    /// read. Returns `0` at the end of the stream.
    pub(in crate::pipeline) fn poll_fill<Io: AsyncRead + Unpin>(
        &mut self,
        io: &mut Io,
        at_most: usize,
        max_frame: usize,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut block = take_block();
        let read = poll_read_buf(Pin::new(io), cx, &mut (&mut block).limit(at_most));
        if let Poll::Ready(Ok(n)) = read {
            if n == 0 {
                self.eof = true;
            } else if self.buf.is_empty() {
                self.buf = block.split();
                self.in_block = true;
            } else {
                self.reserve(n, max_frame);
                self.buf.extend_from_slice(&block);
            }
        }
        give_block(block);
        Poll::Ready(ready!(read))
    }

    /// Makes room for `more` bytes. A new buffer is twice as large as the content, but at most
    /// `max_frame`, because an almost complete frame does not need room for a second one. If this
    /// size is too small for the content plus `more` bytes, the new buffer has exactly their size.
    fn reserve(&mut self, more: usize, max_frame: usize) {
        let len = self.buf.len();
        if self.buf.capacity() - len >= more {
            return;
        }
        self.copy_to((2 * len).min(max_frame).max(len + more));
    }

    fn copy_to(&mut self, room: usize) {
        let mut copy = BytesMut::with_capacity(room);
        copy.extend_from_slice(&self.buf);
        *self = Self {
            buf: copy,
            eof: self.eof,
            empty_frames: self.empty_frames,
            ..Self::default()
        };
    }

    /// Returns whether the peer has finished sending.
    pub(in crate::pipeline) fn is_eof(&self) -> bool {
        self.eof
    }

    /// Records that the peer has finished sending.
    pub(in crate::pipeline) fn set_eof(&mut self) {
        self.eof = true;
    }

    pub(in crate::pipeline) fn len(&self) -> usize {
        self.buf.len()
    }

    pub(in crate::pipeline) fn is_empty(&self) -> bool {
        self.buf.is_empty()
    }

    pub(in crate::pipeline) fn buf(&mut self) -> &mut BytesMut {
        &mut self.buf
    }

    fn held(&self) -> usize {
        self.buf.capacity() + self.consumed
    }

    /// Records that the decoder consumed `bytes` bytes for a frame.
    #[inline]
    pub(in crate::pipeline) fn count_consumed(&mut self, bytes: usize) {
        self.empty_frames = 0;
        self.consumed += bytes;
    }

    /// Records that the decoder returned a frame without consuming bytes. Returns `false` if there
    /// were too many such frames in a row. The limit is [`FRAMES`] frames, or `max_frame` frames if
    /// `max_frame` is larger.
    pub(in crate::pipeline) fn count_empty_frame(&mut self, max_frame: usize) -> bool {
        self.empty_frames = self.empty_frames.saturating_add(1);
        let most = u32::try_from(max_frame).unwrap_or(u32::MAX);
        self.empty_frames <= most.clamp(FRAMES, u32::MAX - 1)
    }

    /// Drops the undecoded bytes.
    pub(in crate::pipeline) fn clear(&mut self) {
        *self = Self {
            eof: self.eof,
            empty_frames: self.empty_frames,
            ..Self::default()
        };
    }

    /// Releases memory that the undecoded bytes do not need. Called before each wait.
    pub(in crate::pipeline) fn shrink(&mut self) {
        let len = self.buf.len();
        if len == 0 {
            // Even an empty buffer may keep alive the block from which its last frame was split
            // off.
            self.clear();
        } else if self.in_block || self.held() > 2 * len + SLACK {
            self.copy_to(len);
        }
    }
}

/// Takes the thread's block. Allocates a new block if the thread has none, or if its block has
/// fewer than [`LEAST_ROOM`] bytes left and cannot be reclaimed. The returned block is empty.
fn take_block() -> BytesMut {
    // A thread that is ending no longer has a block, so a new one is allocated.
    let mut block = THREAD_BLOCK.try_with(Cell::take).unwrap_or_default();
    if block.capacity() < BLOCK - USED && !block.try_reclaim(BLOCK) && block.capacity() < LEAST_ROOM
    {
        block = BytesMut::with_capacity(BLOCK);
    }
    block
}

fn give_block(mut block: BytesMut) {
    block.clear();
    // This fails only if the thread is ending. The block is then freed.
    let _ended = THREAD_BLOCK.try_with(|place| place.set(block));
}
