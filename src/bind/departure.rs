//! Learns that a peer has left while its input lies unread.
//!
//! A read tells of a peer's end of input, or of its reset, only behind everything that the peer
//! sent before. The kernel tells at once.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpStream, UnixStream};
#[cfg(feature = "tls")]
use tokio_rustls::server::TlsStream;

use super::Socket;
use crate::connection::Rewind;

/// Watches whether the peer of a socket leaves, and does not read its input.
///
/// The runtime wakes a reader only if it has read everything before. So this registers a second
/// descriptor of the socket. It is made only while a peer is waited for, and keeps the socket open
/// as long as it exists.
#[derive(Debug)]
pub(crate) struct Departing(AsyncFd<OwnedFd>);

impl Departing {
    /// Begins to watch. Returns `None` if there is no socket beneath the stream, or no descriptor
    /// to spare.
    #[allow(
        clippy::allow_attributes,
        deprecated,
        reason = "as for listening sockets: a socket does not change its descriptor"
    )]
    pub(crate) fn of(io: &dyn Any) -> Option<Self> {
        let watched = socket(io)?.try_clone_to_owned().ok()?;
        let both = Interest::READABLE | Interest::WRITABLE;
        AsyncFd::with_interest(watched, both).ok().map(Self)
    }

    /// Ready once the peer has finished sending, or can no longer be reached.
    pub(crate) fn poll_finished(&self, cx: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(guard) = self.0.poll_read_ready(cx) {
            match guard {
                // Only more input has arrived.
                Ok(mut guard) if !guard.ready().is_read_closed() => guard.clear_ready(),
                // The runtime shuts down, or the peer has finished.
                _ => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }

    /// Ready once the peer can no longer be reached: it has reset the connection, or closed a Unix
    /// socket.
    pub(crate) fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(guard) = self.0.poll_write_ready(cx) {
            match guard {
                // There is only room for output.
                Ok(mut guard) if !guard.ready().is_write_closed() => guard.clear_ready(),
                _ => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }
}

/// Returns the socket beneath a stream, also through the streams that this crate puts around it.
fn socket(io: &dyn Any) -> Option<BorrowedFd<'_>> {
    let socket = beneath::<Socket>(io).map(Socket::as_fd);
    socket
        .or_else(|| Some(beneath::<TcpStream>(io)?.as_fd()))
        .or_else(|| Some(beneath::<UnixStream>(io)?.as_fd()))
}

#[cfg(feature = "tls")]
fn beneath<Io: 'static>(io: &dyn Any) -> Option<&Io> {
    rewound(io)
        .or_else(|| Some(rewound::<TlsStream<Io>>(io)?.get_ref().0))
        .or_else(|| Some(rewound::<TlsStream<Rewind<Io>>>(io)?.get_ref().0.get_ref()))
}

#[cfg(not(feature = "tls"))]
fn beneath<Io: 'static>(io: &dyn Any) -> Option<&Io> {
    rewound(io)
}

fn rewound<Io: 'static>(io: &dyn Any) -> Option<&Io> {
    io.downcast_ref()
        .or_else(|| Some(io.downcast_ref::<Rewind<Io>>()?.get_ref()))
}
