//! Queries to the socket beneath a connection, whatever streams hooks have put around it.

use std::fmt;
#[cfg(feature = "http")]
use std::io;
#[cfg(feature = "http")]
use std::os::fd::OwnedFd;
use std::sync::Weak;

/// The socket beneath a connection. A [`Life`](super::Life) holds it weakly, so it neither keeps
/// the socket open nor outlives it.
///
/// Each query is a system call, so there is none on the path of a request.
pub(crate) trait Transport: Send + Sync {
    /// Returns the amount of written output that the peer has not taken yet: over TCP the bytes
    /// that it has not acknowledged, over a Unix socket the memory of the bytes that it has not
    /// read. Returns zero once nothing can arrive any more, and `None` if the system does not
    /// report it.
    fn unacknowledged(&self) -> Option<u64>;

    /// Returns the state of the peer's side, even if unread input is before its end.
    #[expect(
        dead_code,
        reason = "a handler that runs while its peer leaves will ask"
    )]
    fn peer_side(&self) -> PeerSide;

    /// Returns another descriptor of the socket, which keeps it open.
    #[cfg(feature = "http")]
    fn second_descriptor(&self) -> io::Result<OwnedFd>;

    /// Makes the coming close a reset, which releases the socket's memory at once.
    fn reset_at_close(&self);
}

/// The peer's side of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerSide {
    /// It may send more.
    Open,
    /// It has finished sending. It may still read.
    Finished,
    /// It has reset the connection, or both sides are finished.
    Gone,
}

/// A connection's access to its socket. It is empty if the listener knows no socket.
#[derive(Clone, Default)]
pub(crate) struct Probe(Option<Weak<dyn Transport>>);

impl Probe {
    pub(crate) fn new(transport: Weak<dyn Transport>) -> Self {
        Self(Some(transport))
    }

    /// Returns whether there is a socket, open or closed.
    pub(crate) fn knows(&self) -> bool {
        self.0.is_some()
    }

    /// Queries the socket, if it is still open.
    pub(crate) fn ask<R>(&self, question: impl FnOnce(&dyn Transport) -> R) -> Option<R> {
        let transport = self.0.as_ref()?.upgrade()?;
        Some(question(&*transport))
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Probe").field(&self.knows()).finish()
    }
}
