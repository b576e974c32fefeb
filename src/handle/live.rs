use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::connection::{Address, ConnectionId, ConnectionPhase, Life};
use crate::end::{End, EndReason};

/// One of a server's connections, seen from outside. It keeps nothing open. Made by [`Handle::connections`](super::Handle::connections).
#[derive(Clone)]
pub struct LiveConnection {
    pub(super) life: Arc<Life>,
}

impl LiveConnection {
    /// Returns the connection's number.
    pub fn id(&self) -> ConnectionId {
        self.life.origin.id
    }

    /// Returns the address of the socket's other end.
    pub fn peer_addr(&self) -> &Address {
        &self.life.origin.peer_addr
    }

    /// Returns the address the peer connected to.
    pub fn local_addr(&self) -> &Address {
        &self.life.origin.local_addr
    }

    /// Returns how far it has come.
    pub fn phase(&self) -> ConnectionPhase {
        self.life.phase()
    }

    /// Returns the time since it was accepted.
    pub fn age(&self) -> Duration {
        self.life.origin.accepted_at.elapsed()
    }

    /// Returns the requests that were handed to its service so far.
    pub fn requests(&self) -> u64 {
        self.life.requests()
    }

    /// Returns the bytes read from the peer by what serves it so far; under TLS these are plain bytes.
    pub fn bytes_read(&self) -> u64 {
        self.life.bytes_read()
    }

    /// Returns the bytes written to the peer by what serves it so far; under TLS these are plain bytes.
    pub fn bytes_written(&self) -> u64 {
        self.life.bytes_written()
    }

    /// Has it leave as at a drain: what was asked is answered. A raw service sees it at
    /// [`Connection::draining`](crate::Connection::draining).
    pub fn close(&self) {
        self.life.leave();
    }

    /// Ends it at once.
    pub fn abort(&self) {
        self.life.abort(EndReason::Aborted);
    }

    /// Waits for its end, and returns how it ended.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost: asking again gives the same.
    pub async fn closed(&self) -> End {
        self.life.ended().await
    }
}

impl fmt::Debug for LiveConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveConnection")
            .field("id", &self.id())
            .field("peer", self.peer_addr())
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}
