//! Limits the connections of each client: their number, and the rate of new ones.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use thiserror::Error;
use tokio::time::sleep_until;
use tower_service::Service;

use super::client::{Clients, Held, quota};
use super::sealed::{Admission, Permit};
use super::{OverflowLayer, overflow};
use crate::connection::{Address, Connection, ConnectionInfo, Moment, not_a_layer};
use crate::end::{ConnectionEnded, EndReason};

/// Limits the connections of each client. Clones share the counts. Set the options before cloning,
/// because clones with different options do not agree on who a client is, and a client keeps the
/// rate of the clone that saw it first.
///
/// `PerClient` is a pre-connect hook, and counts connections by [`ConnectionInfo::client_addr`].
/// Behind a proxy, put it after the hook that reads the proxy's header. Put it before the TLS
/// handshake, so that a connection over the limit costs no handshake:
///
/// ```
/// use std::time::Duration;
/// use tower::ServiceBuilder;
/// use tower_tcp::admit::PerClient;
/// use tower_tcp::bind::Socket;
/// use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
/// use tower_tcp::{BoxError, Connection};
/// # let tls = tower::service_fn(|c: Connection<Socket>| async { Ok::<_, BoxError>(c) });
///
/// let per_client = PerClient::new(32).rate(100, Duration::from_secs(1));
/// let stack = ServiceBuilder::new()
///     .layer(PreConnectLayer::new(per_client.chain(tls)))
///     .service_fn(|conn: Connection<Socket>| async move { Ok::<_, BoxError>(drop(conn)) });
/// # drop(stack);
/// ```
///
/// The count is exact. A connection is counted until it has ended, however it ends. A client is
/// identified by its IPv4 address, or by the first [`v6_prefix`](Self::v6_prefix) bits of its IPv6
/// address. Clients of Unix sockets and of in-memory connections have no IP address, unless a
/// proxy's header contains one. Clients without an IP address are not limited.
///
/// A connection over a limit ends with [`EndReason::ClientLimitExceeded`] or
/// [`EndReason::ClientRateExceeded`]. Its end is logged at debug level, and counted by reason in
/// the metrics. [`wait`](Self::wait) lets such a connection wait instead, and
/// [`overflow`](Self::overflow) answers it before it is closed.
#[derive(Clone)]
#[doc(alias = "max_connections_per_ip")]
#[doc(alias = "limit_conn")]
pub struct PerClient {
    clients: Clients,
    waiting: usize,
}

/// The error of a connection over its client's limit. The connection ends with
/// [`EndReason::ClientLimitExceeded`] or [`EndReason::ClientRateExceeded`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OverClientLimit {
    /// The client has this number of open connections, which is the maximum.
    #[error("the client has {0} connections open")]
    Connections(usize),
    /// The client connects faster than its rate allows.
    #[error("the client connects too often")]
    Rate,
}

impl From<OverClientLimit> for ConnectionEnded {
    fn from(over: OverClientLimit) -> Self {
        let reason = match over {
            OverClientLimit::Connections(_) => EndReason::ClientLimitExceeded,
            OverClientLimit::Rate => EndReason::ClientRateExceeded,
        };
        Self::new(reason, over)
    }
}

impl PerClient {
    /// Creates a limit of open connections for each client. `0` admits none.
    pub fn new(connections: usize) -> Self {
        Self {
            clients: Clients::new(connections, None),
            waiting: 0,
        }
    }

    /// Limits how fast each client connects: a burst of `connections`, and then as many in each
    /// `period`, evenly spread. `0` connections count as 1, and a period of more than 10 years as
    /// 10 years.
    ///
    /// Default: no limit. Why: the limit of open connections already bounds the cost of a client.
    /// When reached: the connection ends with [`EndReason::ClientRateExceeded`], or
    /// [waits](Self::wait).
    #[must_use]
    pub fn rate(mut self, connections: u32, period: Duration) -> Self {
        self.clients.quota = Some(quota(connections, period));
        self
    }

    /// Sets the number of leading bits of an IPv6 address that identify a client.
    ///
    /// Default: 64. Why: a host usually has a network of this size and can use any address in it,
    /// so a longer prefix would not limit the host. A customer of an internet provider often has a
    /// larger network, with a prefix of 56 or 48 bits.
    #[must_use]
    pub fn v6_prefix(mut self, bits: u8) -> Self {
        self.clients.v6_prefix = bits;
        self
    }

    /// Sets how many connections over a limit may wait, for each client. A client's waiting
    /// connections are admitted in order of arrival. They wait in the hook, so the
    /// [deadline](crate::deadline::Deadlines::pre_connect) of the hooks also ends their wait.
    ///
    /// Default: 0. Why: a waiting connection counts towards the maximum number of connections in
    /// the hooks ([`PreConnectLayer::pending`](crate::preconnect::PreConnectLayer::pending)). When
    /// reached: further connections that are over a limit end immediately.
    #[must_use]
    pub fn wait(mut self, connections: usize) -> Self {
        self.waiting = connections;
        self
    }

    /// Sets the maximum number of clients whose rates are remembered while they have no connection.
    ///
    /// Default: 65,536. Why: to bound memory to about 18 MB in a flood from random addresses. When
    /// reached: clients whose whole burst is available again are forgotten first, then as many
    /// others without an open connection as necessary. A client with an open connection is never
    /// forgotten, so only the [server's limit](crate::ServerBuilder::limit) bounds the number of
    /// such clients.
    ///
    /// A client whose whole burst is available when its last connection ends is forgotten
    /// immediately. Other clients are forgotten only when a new client arrives, so there may be
    /// more than the maximum for a while after many connections have closed.
    #[must_use]
    pub fn remembered(mut self, clients: usize) -> Self {
        self.clients.remembered = clients;
        self
    }

    /// Returns the number of open connections of the client that has this address.
    pub fn open(&self, address: &Address) -> usize {
        self.clients.open(address)
    }

    /// Returns the number of clients in memory, with or without open connections.
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// Returns a layer that passes each connection that is over a limit to `service`, which can
    /// tell the peer why. See
    /// [`ConnectionLimitLayer::overflow`](super::ConnectionLimitLayer::overflow).
    ///
    /// Connections over a limit do not [`wait`](Self::wait) in this layer. Add the layer inside of
    /// the [`PreConnectLayer`](crate::preconnect::PreConnectLayer) whose hooks determine the
    /// client's address.
    pub fn overflow<O>(self, service: O) -> OverflowLayer<O, Self> {
        overflow::layer(self, service)
    }

    fn slot(&self, conn: &ConnectionInfo) -> Option<Slot> {
        let client = self.clients.of(conn.client_addr())?;
        Some(Slot {
            client,
            is_taken: false,
            is_waiting: false,
        })
    }

    /// Admits a connection if its client is below the limits and no other connection of the client
    /// waits.
    fn try_enter(&self, slot: &mut Slot) -> Result<(), OverClientLimit> {
        let others_wait = slot.client.waiting.load(Ordering::Acquire) > 0;
        let many = OverClientLimit::Connections(self.clients.connections);
        if !slot.try_take() {
            return Err(many);
        }
        if !others_wait && slot.client.take_rate().is_ok() {
            return Ok(());
        }
        // A connection that already waits may need the slot.
        slot.free();
        let is_by_rate = self.clients.quota.is_some();
        Err(if is_by_rate {
            OverClientLimit::Rate
        } else {
            many
        })
    }

    /// Admits a connection if its client is below the limits and no other connection of the client
    /// waits. Otherwise waits for the connection's turn, or fails if the connection may not wait.
    async fn enter(&self, slot: &mut Slot) -> Result<(), OverClientLimit> {
        let Err(over) = self.try_enter(slot) else {
            return Ok(());
        };
        if !slot.start_waiting(self.waiting) {
            return Err(over);
        }
        slot.take_in_turn().await;
        slot.stop_waiting();
        Ok(())
    }
}

/// A connection's slot under the limit of its client. Dropping this value frees the slot.
struct Slot {
    client: Held,
    is_taken: bool,
    is_waiting: bool,
}

impl Slot {
    fn try_take(&mut self) -> bool {
        let permit = self.client.slots.try_acquire();
        self.is_taken = permit.map(|permit| permit.forget()).is_ok();
        self.is_taken
    }

    async fn take_in_turn(&mut self) {
        let client = &*self.client;
        let _turn = client.turn.lock().await;
        // `acquire` fails only on a closed semaphore, and nothing closes this one.
        if let Ok(permit) = client.slots.acquire().await {
            permit.forget();
            self.is_taken = true;
        }
        while let Err(not_before) = client.take_rate() {
            sleep_until(not_before).await;
        }
    }

    fn free(&mut self) {
        if std::mem::take(&mut self.is_taken) {
            self.client.slots.add_permits(1);
        }
    }

    fn start_waiting(&mut self, most: usize) -> bool {
        // A connection that is not allowed to wait is not counted, because while the count is above
        // zero, no new connection is admitted without waiting.
        let more = |waiting| (waiting < most).then_some(waiting + 1);
        let waiting = &self.client.waiting;
        let begun = waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        self.is_waiting = begun.is_ok();
        self.is_waiting
    }

    fn stop_waiting(&mut self) {
        if std::mem::take(&mut self.is_waiting) {
            self.client.waiting.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.stop_waiting();
        self.free();
    }
}

impl Admission for PerClient {
    fn admit(&self, conn: &ConnectionInfo) -> Result<Option<Permit>, ConnectionEnded> {
        if let Some(mut slot) = self.slot(conn) {
            self.try_enter(&mut slot)?;
            free_at_end(conn, slot);
        }
        Ok(None)
    }
}

/// Holds a slot until the connection has ended, however it ends.
fn free_at_end(conn: &ConnectionInfo, slot: Slot) {
    conn.life.on(Moment::End, |_, _| drop(slot));
}

not_a_layer!(PerClient);

/// Applies the limit as a pre-connect hook.
impl<Io: Send + 'static> Service<Connection<Io>> for PerClient {
    type Response = Connection<Io>;
    type Error = ConnectionEnded;
    type Future = Pin<Box<dyn Future<Output = Result<Connection<Io>, ConnectionEnded>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), ConnectionEnded>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, conn: Connection<Io>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            if let Some(mut slot) = this.slot(conn.info()) {
                this.enter(&mut slot).await?;
                free_at_end(conn.info(), slot);
            }
            Ok(conn)
        })
    }
}

impl fmt::Debug for PerClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerClient")
            .field("connections", &self.clients.connections)
            .field("quota", &self.clients.quota)
            .field("clients", &self.clients())
            .finish_non_exhaustive()
    }
}
