use std::any::Any;
use std::fmt;
use std::sync::Arc;

use tokio::time::Instant;

use super::address::Address;
use super::hooks::Moment;
use super::life::Life;
use super::origin::ConnectionId;
use crate::end::End;
use crate::signals::Signal;

/// The facts known about a connection and its peer. Cheap to clone.
///
/// Hooks add more facts with [`Connection::insert`](super::Connection::insert). For example, the
/// TLS handshake adds `TlsInfo`.
#[derive(Clone)]
#[doc(alias = "ConnectInfo")]
pub struct ConnectionInfo {
    pub(crate) life: Arc<Life>,
}

impl ConnectionInfo {
    /// Returns the connection's number, unique in the process.
    pub fn id(&self) -> ConnectionId {
        self.life.origin.id
    }

    /// Returns the address of the peer, which is the other end of the socket. Behind most proxies
    /// and load balancers, it is their address, not the client's. OpenTelemetry calls it
    /// `network.peer.address`.
    #[doc(alias = "peer")]
    #[doc(alias = "remote_addr")]
    pub fn peer_addr(&self) -> &Address {
        &self.life.origin.peer_addr
    }

    /// Returns the address of the client: the one that a trusted hop has reported
    /// ([`Connection::set_client_addr`](super::Connection::set_client_addr)), or else
    /// [`peer_addr`](Self::peer_addr). OpenTelemetry calls it `client.address`.
    #[doc(alias = "client_ip")]
    #[doc(alias = "x-forwarded-for")]
    pub fn client_addr(&self) -> &Address {
        self.life.origin.client_addr()
    }

    /// Returns the address that the peer connected to.
    #[doc(alias = "local")]
    pub fn local_addr(&self) -> &Address {
        &self.life.origin.local_addr
    }

    /// Returns the time at which the connection was accepted.
    pub fn accepted_at(&self) -> Instant {
        self.life.origin.accepted_at
    }

    /// Returns whether the connection should finish and close: the server drains, the connection
    /// has reached its [maximum age](crate::deadline::Deadlines::max_age), or the program has
    /// called [`LiveConnection::close`](crate::LiveConnection::close).
    ///
    /// [`Peer::close`](crate::Peer::close) does not make this `true`, because the pipeline then
    /// closes the connection itself. After an upgrade there is no pipeline, and `Peer::close` makes
    /// this `true`.
    pub fn is_draining(&self) -> bool {
        self.life.signals.is_raised(Signal::Drain)
    }

    /// Waits until the connection should finish and close, as [`is_draining`](Self::is_draining)
    /// reports.
    ///
    /// When the future completes, a service whose work has no natural end (a WebSocket, server-sent
    /// events) should finish. The future does not borrow or hold the stream.
    ///
    /// Once the future has completed, [`Peer::send`](crate::Peer::send) may fail. To send a last
    /// frame, use the pipeline's [farewell](crate::Pipeline::farewell).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: the signal stays raised, so a later call completes at
    /// once.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + use<> {
        let life = Arc::clone(&self.life);
        async move { life.signals.raised(Signal::Drain).await }
    }

    /// Registers a callback for the moment when closing begins.
    ///
    /// Closing begins when the connection's service is done. From then on, no more requests,
    /// messages or frames are accepted. The connection writes its remaining output, shuts down
    /// writing, and lingers until the peer has closed as well. So the callback runs up to 2 s (by
    /// default) before the end if the peer is slow to close, and even earlier if the peer is slow
    /// to read. For example, a chat server can use the callback to free the user's name, or to tell
    /// the others that the user has left.
    ///
    /// The callback runs exactly once, however the connection ends, and before the callbacks for
    /// the end ([`Connection::on_end`](super::Connection::on_end)). If the connection ends without
    /// closing, the callback runs immediately before those for the end. This happens if the
    /// connection is aborted, its future is dropped, a pre-connect hook fails or does not complete,
    /// a layer rejects the connection, the connection service panics, or a raw service returns
    /// without calling [`Connection::close`](super::Connection::close). After an upgrade, the
    /// callback runs when the upgraded stream closes.
    ///
    /// The callback normally runs in the connection's task, and must not block. Callbacks run in
    /// registration order; one that is registered after closing has begun runs at once.
    ///
    /// Until the connection has ended, the [`End`] passed to the callback is provisional: more
    /// bytes may still be written, and an error may replace an orderly reason, for example if the
    /// peer does not read the remaining output.
    #[doc(alias = "on_close")]
    #[doc(alias = "on_disconnect")]
    pub fn on_closing(&self, f: impl FnOnce(&End) + Send + 'static) {
        self.life.on(Moment::Closing, |_, end| f(end));
    }

    /// Waits until closing begins, and returns the end as it is known then. This end is
    /// provisional, as described at [`on_closing`](Self::on_closing), unless the connection has
    /// ended already.
    ///
    /// The connection's own service must not await this future in a call, because closing begins
    /// only once all calls are done. Use [`draining`](Self::draining) there.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: once closing has begun, a later call completes at once.
    pub fn closing(&self) -> impl Future<Output = End> + Send + use<> {
        let life = Arc::clone(&self.life);
        async move { life.reached(Moment::Closing).await }
    }

    /// Returns the fact of type `F`, if one was added. Of several facts of that type, it returns
    /// the latest.
    pub fn get<F: Any + Send + Sync>(&self) -> Option<&F> {
        self.life.origin.facts.get()
    }
}

impl fmt::Debug for ConnectionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionInfo")
            .field("id", &self.id())
            .field("peer_addr", self.peer_addr())
            .field("client_addr", self.client_addr())
            .field("local_addr", self.local_addr())
            .finish_non_exhaustive()
    }
}
