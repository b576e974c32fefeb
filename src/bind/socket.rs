//! The stream of a connection over TCP or a Unix socket.

use std::io::{self, IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::BufMut;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use super::options::SocketOptions;
use crate::connection::{Family, Probe, Wire};

/// The stream of an accepted connection, TCP or Unix.
#[derive(Debug)]
pub struct Socket(Arc<Wire>);

impl Socket {
    pub(super) fn tcp(stream: TcpStream, options: &SocketOptions) -> Self {
        Self(Wire::new(Family::Tcp(stream), options.resets_cut_off()))
    }

    /// Returns the TCP stream, or `None` for a Unix socket.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match &self.0.family {
            Family::Tcp(stream) => Some(stream),
            Family::Unix(_) => None,
        }
    }

    /// Returns the Unix stream, or `None` for a TCP socket. The stream's `peer_cred` identifies the
    /// process at the other end.
    pub fn as_unix(&self) -> Option<&UnixStream> {
        match &self.0.family {
            Family::Unix(stream) => Some(stream),
            Family::Tcp(_) => None,
        }
    }

    pub(super) fn probe(&self) -> Probe {
        Probe::new(&self.0)
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self(Wire::new(Family::Tcp(stream), true))
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self(Wire::new(Family::Unix(stream), false))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// True on the systems listed here, which have epoll or kqueue. There, a short write means that the
/// send buffer is full. A short read means that the socket has no more input, unless urgent data
/// ended the read (see [`Probe::look_again`]). So the stream's readiness can be cleared, and the
/// next change will wake the task.
const SHORT_IS_DONE: bool = cfg!(any(
    target_os = "android",
    target_os = "freebsd",
    target_os = "ios",
    target_os = "linux",
    target_os = "macos",
    target_os = "netbsd",
    target_os = "openbsd",
));

/// Reads or writes like tokio's own `poll_read` and `poll_write`, which cannot be used here because
/// they need `&mut` access. Waits until the stream is ready, and evaluates `$done`, which is the
/// read or the write. Clears the readiness if `$done` would block. If [`SHORT_IS_DONE`] is true,
/// also clears the readiness if `$done` moves some bytes, but fewer than `$len`.
macro_rules! poll_io {
    ($stream:ident, $cx:ident, $ready:ident, $interest:expr, $len:expr, $done:expr) => {
        loop {
            if $stream.$ready($cx)?.is_pending() {
                break Poll::Pending;
            }
            let mut moved = None;
            // `try_io` clears only the readiness from before the call, not a readiness reported
            // during the call.
            let tried = $stream.try_io($interest, || {
                let n = $done?;
                moved = Some(n);
                if SHORT_IS_DONE && 0 < n && n < $len {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(())
            });
            match (moved, tried) {
                (Some(n), _) => break Poll::Ready(Ok::<usize, io::Error>(n)),
                (None, Err(err)) if err.kind() != io::ErrorKind::WouldBlock => {
                    break Poll::Ready(Err(err));
                }
                (None, _) => {}
            }
        }
    };
}

/// Evaluates `$do` with the socket's stream, TCP or Unix.
macro_rules! on_stream {
    ($socket:ident, $stream:ident => $do:expr) => {
        match &$socket.0.family {
            Family::Tcp($stream) => $do,
            Family::Unix($stream) => $do,
        }
    };
}

/// The maximum size, in bytes, of a read that is tried although the runtime has reported no input.
/// It is small, because such a read seldom finds bytes, and the buffer must be initialized for each
/// such read.
const LOOK: usize = 4 * 1024;

/// The maximum number of bytes that a vectored write copies into one buffer. For so few bytes, the
/// copy and a plain write take less time than `writev`. A typical case is the head and the body of
/// a short HTTP response.
const JOINED: usize = 512;

/// The maximum number of buffers that `writev` takes (`IOV_MAX`). The standard library passes no
/// more. So a write of more buffers is first cut to this number. Otherwise the write would look
/// short, as if the socket's send buffer were full.
const BUFFERS: usize = 1024;

impl Socket {
    /// Reads bytes that the runtime has not reported. [`Probe::look`] requests such a read.
    fn poll_look(&self, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let room = buf.remaining().min(LOOK);
        let read = (&*SockRef::from(self)).read(buf.initialize_unfilled_to(room));
        match read {
            Ok(n) => {
                buf.advance(n);
                // Even a read that fills the buffer may leave bytes that the runtime does not
                // report.
                self.0.read(n, n > 0);
                // After a full read, the next read asks the system again, because a stream around
                // the socket may need more bytes. For example, TLS may need the rest of a record.
                if n == room {
                    self.0.look();
                }
                Poll::Ready(Ok(()))
            }
            // The caller has registered the waker.
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
            Err(err) => Poll::Ready(Err(err)),
        }
    }

    fn count(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(n)) = &written {
            self.0.count(*n);
        }
        written
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let room = buf.remaining();
        let read = on_stream!(self, stream => {
            let ready = Interest::READABLE;
            poll_io!(stream, cx, poll_read_ready, ready, room, stream.try_read_buf(buf))
        });
        match read {
            Poll::Ready(Ok(n)) => {
                self.0.read(n, 0 < n && n < room);
                Poll::Ready(Ok(()))
            }
            Poll::Pending if self.0.take_look() => self.poll_look(buf),
            other => other.map_ok(drop),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let len = buf.len();
        self.count(on_stream!(self, stream => {
            poll_io!(stream, cx, poll_write_ready, Interest::WRITABLE, len, stream.try_write(buf))
        }))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [buf] = bufs {
            return self.poll_write(cx, buf);
        }
        let bufs = &bufs[..bufs.len().min(BUFFERS)];
        let len: usize = bufs.iter().map(|buf| buf.len()).sum();
        if len <= JOINED {
            let mut joined = [0; JOINED];
            let mut rest = &mut joined[..];
            for buf in bufs {
                rest.put_slice(buf);
            }
            return self.poll_write(cx, &joined[..len]);
        }
        self.count(on_stream!(self, stream => {
            let ready = Interest::WRITABLE;
            poll_io!(stream, cx, poll_write_ready, ready, len, stream.try_write_vectored(bufs))
        }))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match SockRef::from(&*self).shutdown(Shutdown::Write) {
            // The peer has reset the connection.
            Err(err) if err.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done,
        })
    }
}
