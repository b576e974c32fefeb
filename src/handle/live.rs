use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::connection::{Address, ConnectionId, ConnectionPhase, Life, Moment};
use crate::end::{End, EndReason};

/// A view of an open connection. It does not keep the connection open. Returned by
/// [`Handle::connections`](super::Handle::connections) and
/// [`Handle::connection`](super::Handle::connection).
#[derive(Clone)]
pub struct LiveConnection {
    pub(super) life: Arc<Life>,
}

impl LiveConnection {
    /// Returns the connection's number.
    pub fn id(&self) -> ConnectionId {
        self.life.origin.id
    }

    /// Returns the address of the peer, which is the other end of the socket.
    pub fn peer_addr(&self) -> &Address {
        &self.life.origin.peer_addr
    }

    /// Returns the address of the client, as
    /// [`ConnectionInfo::client_addr`](crate::ConnectionInfo::client_addr) does.
    pub fn client_addr(&self) -> &Address {
        self.life.origin.client_addr()
    }

    /// Returns the fact of type `F`, if one was added, as
    /// [`ConnectionInfo::get`](crate::ConnectionInfo::get) does.
    pub fn get<F: Any + Send + Sync>(&self) -> Option<&F> {
        self.life.origin.facts.get()
    }

    /// Returns the address that the peer connected to.
    pub fn local_addr(&self) -> &Address {
        &self.life.origin.local_addr
    }

    /// Returns the connection's phase.
    pub fn phase(&self) -> ConnectionPhase {
        self.life.phase()
    }

    /// Returns the time since the connection was accepted.
    pub fn age(&self) -> Duration {
        self.life.origin.accepted_at.elapsed()
    }

    /// Returns the number of requests passed to the service so far.
    pub fn requests(&self) -> u64 {
        self.life.requests()
    }

    /// Returns the number of bytes that the service has read from the peer. Under TLS, decrypted
    /// bytes are counted.
    pub fn bytes_read(&self) -> u64 {
        self.life.bytes_read()
    }

    /// Returns the number of bytes that the service has written to the peer. Under TLS, bytes are
    /// counted before encryption.
    pub fn bytes_written(&self) -> u64 {
        self.life.bytes_written()
    }

    /// Returns the number of bytes that were written but that the peer has not taken, as
    /// [`Peer::unacknowledged`](crate::Peer::unacknowledged) does.
    pub fn unacknowledged(&self) -> Option<u64> {
        self.life.probe.sent().map(|sent| sent.left)
    }

    /// Closes the connection gracefully, as a drain does: requests in progress are answered. For a
    /// raw service, which reads and writes the stream itself,
    /// [`Connection::draining`](crate::Connection::draining) completes.
    pub fn close(&self) {
        self.life.close_gracefully();
    }

    /// Aborts the connection, as [`Peer::abort`](crate::Peer::abort) does. Requests in progress and
    /// unwritten output are dropped.
    pub fn abort(&self) {
        self.life.abort(EndReason::Aborted);
    }

    /// Waits until the connection has ended, and returns how it ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: a later call returns the same end.
    pub async fn closed(&self) -> End {
        self.life.reached(Moment::End).await
    }

    /// Waits until closing begins, and returns the end as it is known then. This end is provisional
    /// until the connection has ended, as described at
    /// [`ConnectionInfo::closing`](crate::ConnectionInfo::closing).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: once closing has begun, a later call completes at once.
    pub async fn closing(&self) -> End {
        self.life.reached(Moment::Closing).await
    }
}

impl fmt::Debug for LiveConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveConnection")
            .field("id", &self.id())
            .field("peer_addr", self.peer_addr())
            .field("client_addr", self.client_addr())
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}
