//! The socket beneath a connection, asked past the streams that hooks have put around it.

use std::fmt;
#[cfg(feature = "http")]
use std::io;
#[cfg(feature = "http")]
use std::os::fd::OwnedFd;
use std::sync::Weak;

/// The socket beneath a connection. A [`Life`](super::Life) holds it weakly, so it neither keeps
/// the socket open nor outlives it.
///
/// Each question is a system call, so none is asked on the path of a request.
pub(crate) trait Transport: Send + Sync {
    /// Returns how much of what was written the peer has not taken yet: over TCP the bytes that it
    /// has not acknowledged, over a Unix socket the memory of what it has not read. Zero once
    /// nothing can arrive any more. `None` if the system does not tell.
    fn unacknowledged(&self) -> Option<u64>;

    /// Returns what the peer has done with its side, whatever lies unread in front of that.
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

/// A connection's way to its socket, or none if its listener knows none.
#[derive(Clone, Default)]
pub(crate) struct Probe(Option<Weak<dyn Transport>>);

impl Probe {
    pub(crate) fn new(transport: Weak<dyn Transport>) -> Self {
        Self(Some(transport))
    }

    /// Returns whether there is a socket to ask.
    pub(crate) fn knows(&self) -> bool {
        self.0.is_some()
    }

    /// Asks the socket, if it is still open.
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
