//! The stream of a connection over TCP or a Unix socket.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// The stream of an accepted connection, TCP or Unix.
#[derive(Debug)]
pub struct Socket(Family);

#[derive(Debug)]
enum Family {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Returns the TCP stream, if it is one.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match &self.0 {
            Family::Tcp(stream) => Some(stream),
            Family::Unix(_) => None,
        }
    }

    /// Returns the Unix stream, if it is one. Its `peer_cred` identifies the process at the other
    /// end.
    pub fn as_unix(&self) -> Option<&UnixStream> {
        match &self.0 {
            Family::Unix(stream) => Some(stream),
            Family::Tcp(_) => None,
        }
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self(Family::Tcp(stream))
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self(Family::Unix(stream))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Family::Tcp(stream) => stream.as_fd(),
            Family::Unix(stream) => stream.as_fd(),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Family::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Family::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Family::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Family::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Family::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Family::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.0 {
            Family::Tcp(stream) => stream.is_write_vectored(),
            Family::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Family::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Family::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Family::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Family::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
