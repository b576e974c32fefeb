use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream with bytes that were read from it ahead of time. A reader gets these bytes first, then
/// the rest of the stream.
///
/// An upgrade ([`Pipeline::on_upgrade`](crate::Pipeline::on_upgrade)) passes such a stream to the
/// next service, and so do the hooks [`Peek`](crate::preconnect::Peek) and `ProxyProtocol` (feature
/// `proxy-protocol`).
#[derive(Debug)]
pub struct Rewind<Io> {
    buffered: Bytes,
    io: Io,
}

impl<Io> Rewind<Io> {
    /// Creates a stream from which `buffered` is read first.
    pub fn new(buffered: Bytes, io: Io) -> Self {
        Self { buffered, io }
    }

    /// Returns the bytes that were read ahead and that no reader has taken yet.
    ///
    /// There must be no such bytes when a TLS handshake begins on a connection that has carried
    /// plain text (STARTTLS). `Tls` reads them as a part of the handshake, which fails if they are
    /// plain text. To close with a clear reason, check for them before the handshake. Other TLS
    /// implementations may treat them as data received under TLS
    /// ([CVE-2011-0411](https://www.cve.org/CVERecord?id=CVE-2011-0411)).
    pub fn buffered(&self) -> &[u8] {
        &self.buffered
    }

    /// Returns a reference to the stream. It does not include the buffered bytes.
    pub fn get_ref(&self) -> &Io {
        &self.io
    }

    /// Returns the buffered bytes and the stream.
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
            // Release the buffer's memory.
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
