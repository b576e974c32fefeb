//! The stream of a handshake. It still reads after a write has failed.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream whose first write error is kept, and which discards all output from then on.
///
/// A TLS 1.3 server writes session tickets at the end of the handshake. On a Unix socket or a pipe
/// this write fails if the peer has closed, although the peer's request may already have arrived.
/// So a failed write does not end a handshake. Either the peer has already sent its part, or the
/// end of its input ends the handshake.
pub(super) struct ReadsOn<Io> {
    pub(super) io: Io,
    failed_write: Option<io::Error>,
}

impl<Io> ReadsOn<Io> {
    pub(super) fn new(io: Io) -> Self {
        Self {
            io,
            failed_write: None,
        }
    }

    /// Returns the stream with the error of a failed handshake. The failed write goes before what
    /// came of it.
    pub(super) fn failed(self, err: io::Error) -> (io::Error, Io) {
        (self.failed_write.unwrap_or(err), self.io)
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for ReadsOn<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<Io: AsyncWrite + Unpin> ReadsOn<Io> {
    /// Writes with `write`. Returns `discarded` in place of the first error, and for every later
    /// call.
    fn poll_or<T>(
        &mut self,
        discarded: T,
        write: impl FnOnce(Pin<&mut Io>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.failed_write.is_some() {
            return Poll::Ready(Ok(discarded));
        }
        Poll::Ready(Ok(ready!(write(Pin::new(&mut self.io))).unwrap_or_else(
            |err| {
                self.failed_write = Some(err);
                discarded
            },
        )))
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for ReadsOn<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_or(buf.len(), |io| io.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all = bufs.iter().map(|buf| buf.len()).sum();
        self.poll_or(all, |io| io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_or((), |io| io.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_or((), |io| io.poll_shutdown(cx))
    }
}
