//! What was read and is not decoded yet.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, BytesMut};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

use super::scratch;

/// More memory than this beyond twice its content, and a resting buffer is copied to one that fits: a codec may have
/// reserved what a peer merely announced.
const SLACK: usize = 1024;

/// The undecoded input of one connection.
#[derive(Debug, Default)]
pub(in crate::pipeline) struct Input {
    buf: BytesMut,
    /// `buf` is a part of the thread's block, and pins it.
    in_block: bool,
    eof: bool,
    /// How many bytes were split off what `buf` is a part of, and pins.
    given: u32,
}

impl Input {
    /// Reads once, at most `at_most` bytes, into room for a frame of `max_frame`, at most, and what is read. Zero bytes are the end of the stream.
    pub(in crate::pipeline) fn poll_fill<Io: AsyncRead + Unpin>(
        &mut self,
        io: &mut Io,
        at_most: usize,
        max_frame: usize,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut block = scratch::take_read();
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
        scratch::give_read(block);
        Poll::Ready(ready!(read))
    }

    /// Doubles, but for no more than a frame: one that is almost there would have room for two.
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
            ..Self::default()
        };
    }

    /// Returns whether the peer has finished sending.
    pub(in crate::pipeline) fn is_eof(&self) -> bool {
        self.eof
    }

    /// Takes it that no more will come.
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
        self.buf.capacity().saturating_add(self.given as usize)
    }

    /// A frame of so many bytes was split off.
    #[inline]
    pub(in crate::pipeline) fn gave(&mut self, bytes: usize) {
        self.given = self
            .given
            .saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Forgets what is undecoded.
    pub(in crate::pipeline) fn clear(&mut self) {
        *self = Self {
            eof: self.eof,
            ..Self::default()
        };
    }

    /// Before a wait: keeps no more memory than what is undecoded needs.
    pub(in crate::pipeline) fn rest(&mut self) {
        let len = self.buf.len();
        if len == 0 {
            // Even without capacity it may pin the block that its last frame was split off.
            self.clear();
        } else if self.in_block || self.held() > 2 * len + SLACK {
            self.copy_to(len);
        }
    }
}
