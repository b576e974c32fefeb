//! Detects that a peer has disconnected while its input is unread.
//!
//! A read reports the end of input, or a reset, only after all earlier input has been read. The
//! kernel's readiness events report either of them immediately.

use std::os::fd::OwnedFd;
use std::task::{Context, Poll};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::connection::Probe;

/// Watches whether the peer of a socket disconnects, without reading the peer's input.
///
/// While input is unread, the runtime does not wake a reader when the peer disconnects. So this
/// type registers a second descriptor of the socket. That descriptor keeps the socket open, so a
/// value of this type exists only while it is needed. A pipeline needs one while it has read ahead
/// as much input as its limit allows, while a drain answers the requests that had arrived before
/// the drain, and while requests are in progress although the peer has finished sending. HTTP/1
/// needs one during a request if the peer has sent more input or has finished sending, or if the
/// service has left a part of the request's body unread.
#[derive(Debug)]
pub(crate) struct Departing(AsyncFd<OwnedFd>);

impl Departing {
    /// Begins to watch the socket of `probe`. Returns `None` if there is no socket, or if no second
    /// descriptor can be opened and registered.
    #[allow(
        clippy::allow_attributes,
        deprecated,
        reason = "as for listening sockets: a socket does not change its descriptor"
    )]
    pub(crate) fn of(probe: &Probe) -> Option<Self> {
        let watched = probe.second_descriptor()?;
        let both = Interest::READABLE | Interest::WRITABLE;
        AsyncFd::with_interest(watched, both).ok().map(Self)
    }

    /// Completes once the peer has finished sending or can no longer be reached, or the runtime
    /// shuts down.
    pub(crate) fn poll_finished(&self, cx: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(guard) = self.0.poll_read_ready(cx) {
            match guard {
                // Only more input has arrived.
                Ok(mut guard) if !guard.ready().is_read_closed() => guard.clear_ready(),
                // The peer has finished sending, or the runtime shuts down.
                _ => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }

    /// Completes once the peer can no longer be reached: it has reset the connection, or closed its
    /// end of a Unix socket, or the system has given up on the connection. Also completes when the
    /// runtime shuts down.
    pub(crate) fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(guard) = self.0.poll_write_ready(cx) {
            match guard {
                // The event only reports that output can be written.
                Ok(mut guard) if !guard.ready().is_write_closed() => guard.clear_ready(),
                _ => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }
}
