//! What is encoded and not written yet.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::AsyncWrite;

use super::scratch;

/// More capacity than this beyond its content, and output that waits is copied: it grows by doubling, and begins in a block.
const SLACK: usize = 4 * 1024;

/// The unwritten output of one connection. It holds no memory while it is empty.
#[derive(Debug, Default)]
pub(in crate::pipeline) struct Output {
    buf: BytesMut,
    /// The length up to which `buf` is whole frames: what a panicking encoder left behind it is taken away.
    whole: usize,
    /// How much was written, ever, and how much of that is flushed: the stream may hold some (TLS does).
    written: u64,
    flushed: u64,
}

impl Output {
    pub(in crate::pipeline) fn len(&self) -> usize {
        self.buf.len()
    }

    /// Returns whether there is nothing left to write or to flush.
    pub(in crate::pipeline) fn is_flushed(&self) -> bool {
        self.buf.is_empty() && self.flushed == self.written
    }

    /// Returns where in all that is ever written the next frame will begin.
    pub(in crate::pipeline) fn position(&self) -> u64 {
        self.written + self.buf.len() as u64
    }

    /// Returns the position up to which all is written and flushed.
    pub(in crate::pipeline) fn flushed(&self) -> u64 {
        self.flushed
    }

    /// Encodes one frame, whole or not at all.
    #[inline]
    pub(in crate::pipeline) fn encode<E>(
        &mut self,
        encode: impl FnOnce(&mut BytesMut) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.buf.capacity() == 0 {
            self.buf = scratch::take_write();
        }
        let done = encode(&mut self.buf);
        match done {
            Ok(()) => self.whole = self.buf.len(),
            Err(_) => self.drop_torn(),
        }
        done
    }

    /// Takes away a frame that was not finished.
    pub(in crate::pipeline) fn drop_torn(&mut self) {
        self.buf.truncate(self.whole);
    }

    /// Writes as much as the stream takes, and says whether that was anything. Ready when all is written and flushed.
    ///
    /// When it is `awaited` what the stream has comes first: else a stream that is fed without end might never be flushed.
    pub(in crate::pipeline) fn poll_flush<Io: AsyncWrite + Unpin>(
        &mut self,
        io: &mut Io,
        awaited: bool,
        progress: &mut bool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if awaited {
            ready!(self.poll_flush_stream(io, cx))?;
        }
        while !self.buf.is_empty() {
            let n = ready!(Pin::new(&mut *io).poll_write(cx, &self.buf))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.buf.advance(n);
            self.whole = self.whole.saturating_sub(n);
            self.written += n as u64;
            *progress = true;
        }
        if self.buf.capacity() > 0 {
            scratch::give_write(std::mem::take(&mut self.buf));
        }
        self.poll_flush_stream(io, cx)
    }

    fn poll_flush_stream<Io: AsyncWrite + Unpin>(
        &mut self,
        io: &mut Io,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if self.flushed != self.written {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.flushed = self.written;
        }
        Poll::Ready(Ok(()))
    }

    /// Before a wait for the peer: keeps no more memory than what is unwritten needs.
    pub(in crate::pipeline) fn rest(&mut self) {
        if self.buf.capacity() > self.buf.len() + SLACK {
            let fitting = BytesMut::from(&self.buf[..]);
            scratch::give_write(std::mem::replace(&mut self.buf, fitting));
        }
    }

    /// Forgets what is unwritten.
    pub(in crate::pipeline) fn clear(&mut self) {
        *self = Self::default();
    }
}
