//! Limits the connections of each client: how many are open, and how fast they come.

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
use crate::connection::{Address, Connection, ConnectionInfo, Moment};
use crate::end::{ConnectionEnded, EndReason};

/// Limits the connections of each client. Clones share the counts.
///
/// It is a pre-connect hook. Behind the hook that reads a proxy's header, it counts by
/// [`ConnectionInfo::client_addr`]. In front of the TLS handshake, a connection over the limit
/// costs no handshake:
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
/// The count is exact. A connection is counted until it has ended, however it ends. Clients are
/// told apart by IPv4 address, and by [`v6_prefix`](Self::v6_prefix) for IPv6. Clients of Unix
/// sockets and of in-memory connections have no address of their own, so they are not limited.
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

/// The cause of an end with [`EndReason::ClientLimitExceeded`] or
/// [`EndReason::ClientRateExceeded`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OverClientLimit {
    /// The client has as many connections open as it may have.
    #[error("the client has {0} connections open")]
    Connections(usize),
    /// The client has made as many connections as it may make in this time.
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

    /// Limits how fast each client connects: `connections` at once, and as many in each `period`
    /// after that, evenly spread. `0` counts as 1, and a period of more than 10 years as 10 years.
    ///
    /// Default: no limit of the rate, because the limit of open connections already bounds what a
    /// client costs.
    #[must_use]
    pub fn rate(mut self, connections: u32, period: Duration) -> Self {
        self.clients.quota = Some(quota(connections, period));
        self
    }

    /// Sets the number of leading bits of an IPv6 address that tell clients apart.
    ///
    /// Default: 64. Why: one host chooses its addresses in a network of this size, so a longer
    /// prefix limits nobody. A customer often has a network of 56 or 48 bits.
    #[must_use]
    pub fn v6_prefix(mut self, bits: u8) -> Self {
        self.clients.v6_prefix = bits;
        self
    }

    /// Lets connections over a limit wait for their turn, up to `connections` of each client, in
    /// the order in which they came. They wait in the hook, so at most until its deadline.
    ///
    /// Default: 0. Why: connections that wait take room in the budget of the hooks
    /// ([`PreConnectLayer::pending`](crate::preconnect::PreConnectLayer::pending)). When reached:
    /// further connections over the limit end at once.
    #[must_use]
    pub fn wait(mut self, connections: usize) -> Self {
        self.waiting = connections;
        self
    }

    /// Sets the number of clients whose rates are remembered while they have no connection.
    ///
    /// Default: 65,536. Why: it bounds memory, to some 18 MB, in a flood from random addresses.
    /// When reached: clients whose rate is whole again are forgotten first, and then any. A client
    /// with an open connection is never forgotten, so the
    /// [server's limit](crate::ServerBuilder::limit) bounds their number.
    #[must_use]
    pub fn remembered(mut self, clients: usize) -> Self {
        self.clients.remembered = clients;
        self
    }

    /// Returns the number of open connections of the client that has this address.
    pub fn open(&self, address: &Address) -> usize {
        self.clients.open(address)
    }

    /// Returns the number of clients that are kept in memory.
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// Returns a layer that passes connections over a limit to `service`, which can tell the peer
    /// why. See [`ConnectionLimitLayer::overflow`](super::ConnectionLimitLayer::overflow).
    ///
    /// Such a connection does not [`wait`](Self::wait). Add the layer inside of the
    /// [`PreConnectLayer`](crate::preconnect::PreConnectLayer) whose hooks find out the client's
    /// address.
    pub fn overflow<O>(self, service: O) -> OverflowLayer<O, Self> {
        overflow::layer(self, service)
    }

    fn place(&self, conn: &ConnectionInfo) -> Option<Place> {
        let client = self.clients.of(conn.client_addr())?;
        Some(Place {
            client,
            is_taken: false,
            is_waiting: false,
        })
    }

    /// Admits a connection below the limits, unless others have waited longer.
    fn try_enter(&self, place: &mut Place) -> Result<(), OverClientLimit> {
        let others_wait = place.client.waiting.load(Ordering::Acquire) > 0;
        let many = OverClientLimit::Connections(self.clients.connections);
        if !place.try_take() {
            return Err(many);
        }
        if !others_wait && place.client.take_rate().is_ok() {
            return Ok(());
        }
        // One that waits longer may need it.
        place.give_back();
        let is_by_rate = self.clients.quota.is_some();
        Err(if is_by_rate {
            OverClientLimit::Rate
        } else {
            many
        })
    }

    /// Admits a connection that is below the limits, or waits until it is, if it may wait.
    async fn enter(&self, place: &mut Place) -> Result<(), OverClientLimit> {
        let Err(over) = self.try_enter(place) else {
            return Ok(());
        };
        if !place.begin_to_wait(self.waiting) {
            return Err(over);
        }
        place.take_in_turn().await;
        place.end_to_wait();
        Ok(())
    }
}

/// A connection's place under the limit of its client. Dropping it gives the place back.
struct Place {
    client: Held,
    is_taken: bool,
    is_waiting: bool,
}

impl Place {
    fn try_take(&mut self) -> bool {
        let permit = self.client.places.try_acquire();
        self.is_taken = permit.map(|permit| permit.forget()).is_ok();
        self.is_taken
    }

    async fn take_in_turn(&mut self) {
        let client = &*self.client;
        let _turn = client.turn.lock().await;
        // It fails only if it is closed, which nothing does.
        if let Ok(permit) = client.places.acquire().await {
            permit.forget();
            self.is_taken = true;
        }
        while let Err(not_before) = client.take_rate() {
            sleep_until(not_before).await;
        }
    }

    fn give_back(&mut self) {
        if std::mem::take(&mut self.is_taken) {
            self.client.places.add_permits(1);
        }
    }

    fn begin_to_wait(&mut self, most: usize) -> bool {
        // One that may not wait is not counted, because a newcomer waits behind those that are.
        let more = |waiting| (waiting < most).then_some(waiting + 1);
        let waiting = &self.client.waiting;
        let begun = waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        self.is_waiting = begun.is_ok();
        self.is_waiting
    }

    fn end_to_wait(&mut self) {
        if std::mem::take(&mut self.is_waiting) {
            self.client.waiting.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.end_to_wait();
        self.give_back();
    }
}

impl Admission for PerClient {
    fn admit(&self, conn: &ConnectionInfo) -> Result<Option<Permit>, ConnectionEnded> {
        if let Some(mut place) = self.place(conn) {
            self.try_enter(&mut place)?;
            give_back_at_end(conn, place);
        }
        Ok(None)
    }
}

/// Holds a place until the connection has ended, however that comes.
fn give_back_at_end(conn: &ConnectionInfo, place: Place) {
    conn.life.on(Moment::End, |_, _| drop(place));
}

/// As a pre-connect hook.
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
            if let Some(mut place) = this.place(conn.info()) {
                this.enter(&mut place).await?;
                give_back_at_end(conn.info(), place);
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
