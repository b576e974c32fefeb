//! What was read and is not decoded yet.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, BytesMut};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

use super::scratch;

/// More capacity than this beyond twice its content, and a resting buffer is copied to one that fits: a codec may have
/// reserved what a peer merely announced.
const SLACK: usize = 1024;

/// The undecoded input of one connection.
#[derive(Debug, Default)]
pub(crate) struct Input {
    buf: BytesMut,
    /// `buf` is a part of the thread's block, and pins it.
    in_block: bool,
    eof: bool,
}

impl Input {
    /// Reads once, at most `at_most` bytes. Zero bytes are the end of the stream.
    pub(crate) fn poll_fill<Io: AsyncRead + Unpin>(
        &mut self,
        io: &mut Io,
        at_most: usize,
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
                self.buf.extend_from_slice(&block);
            }
        }
        scratch::give_read(block);
        Poll::Ready(ready!(read))
    }

    /// Returns whether the peer has finished sending.
    pub(crate) fn is_eof(&self) -> bool {
        self.eof
    }

    /// Takes it that no more will come.
    pub(crate) fn set_eof(&mut self) {
        self.eof = true;
    }

    pub(crate) fn len(&self) -> usize {
        self.buf.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.buf.is_empty()
    }

    pub(crate) fn buf(&mut self) -> &mut BytesMut {
        &mut self.buf
    }

    /// Forgets what is undecoded.
    pub(crate) fn clear(&mut self) {
        *self = Self {
            buf: BytesMut::new(),
            in_block: false,
            eof: self.eof,
        };
    }

    /// Before a wait: keeps no more memory than what is undecoded needs.
    pub(crate) fn rest(&mut self) {
        let len = self.buf.len();
        if len == 0 {
            if self.buf.capacity() > 0 {
                self.clear();
            }
        } else if self.in_block || self.buf.capacity() > 2 * len + SLACK {
            self.buf = BytesMut::from(&self.buf[..]);
            self.in_block = false;
        }
    }
}
