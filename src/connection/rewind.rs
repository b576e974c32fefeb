use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream that was read from ahead of time: what was read already, and not used, is read first.
///
/// It is what an upgrade hands on ([`Pipeline::on_upgrade`](crate::Pipeline::on_upgrade)), and what a peek leaves behind
/// ([`Peek`](crate::preconnect::Peek)).
#[derive(Debug)]
pub struct Rewind<Io> {
    buffered: Bytes,
    io: Io,
}

impl<Io> Rewind<Io> {
    /// Puts bytes in front of what is still to be read from a stream.
    pub fn new(buffered: Bytes, io: Io) -> Self {
        Self { buffered, io }
    }

    /// Returns what was read ahead, and not read again yet.
    ///
    /// Before a TLS handshake on a connection that has been spoken on in the clear there must be none: what was sent in the clear, behind the command that asks for TLS, would be taken for something
    /// said inside of it ([CVE-2011-0411](https://www.cve.org/CVERecord?id=CVE-2011-0411)).
    pub fn buffered(&self) -> &[u8] {
        &self.buffered
    }

    /// Returns the stream itself, which knows nothing of what is buffered.
    pub fn get_ref(&self) -> &Io {
        &self.io
    }

    /// Takes it apart: what is buffered, and the stream.
    pub fn into_parts(self) -> (Bytes, Io) {
        (self.buffered, self.io)
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Rewind<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.buffered.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        let n = self.buffered.len().min(buf.remaining());
        buf.put_slice(&self.buffered[..n]);
        self.buffered.advance(n);
        if self.buffered.is_empty() {
            // Gives back the memory.
            self.buffered = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Rewind<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
