//! Allows or denies connections by their address.

use std::fmt;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::task::{Context, Poll};

use thiserror::Error;
use tower_service::Service;

use super::sealed::{Admission, Permit};
use super::{OverflowLayer, overflow};
use crate::connection::{Address, Connection, ConnectionInfo, not_a_layer};
use crate::end::{ConnectionEnded, EndReason};

/// A decision about an address: whether it may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The address may connect.
    Allow,
    /// Connections from the address are closed. They end with [`EndReason::Denied`].
    Deny,
}

/// The error of a connection from a denied address. The connection ends with [`EndReason::Denied`].
#[derive(Clone, Copy, Debug, Error)]
#[error("the address is denied")]
pub struct AddressDenied;

/// Denies connections by address, for example by the rules of an `AccessList` or by `Bans`.
///
/// A filter can be applied to either of two addresses, or to both:
///
/// - To the peer's address, by
///   [`ServerBuilder::address_filter`](crate::ServerBuilder::address_filter). The accept loop
///   closes a denied connection at once. A TCP connection is reset, unless
///   [`SocketOptions::reset_cut_off`](crate::bind::SocketOptions::reset_cut_off) is off. The
///   connection gets no task, no entry in the table of connections and no span. It is counted in
///   the metrics, and logged only at trace level.
/// - To [`ConnectionInfo::client_addr`], as a pre-connect hook after the hook that reads a proxy's
///   header, or as the layer that [`overflow`](Self::overflow) returns. A denied connection ends
///   with [`EndReason::Denied`], and is logged at debug level.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_tcp::admit::{AddressFilter, Verdict};
/// use tower_tcp::bind::Socket;
/// use tower_tcp::preconnect::PreConnectLayer;
/// use tower_tcp::{Address, BoxError, Connection, Server};
///
/// let local_only = AddressFilter::new(|addr: &Address| match addr.tcp() {
///     Some(addr) if !addr.ip().is_loopback() => Verdict::Deny,
///     _ => Verdict::Allow,
/// });
/// let server = Server::builder().address_filter(local_only.clone());
/// let stack = ServiceBuilder::new()
///     .layer(PreConnectLayer::new(local_only))
///     .service_fn(|conn: Connection<Socket>| async move { Ok::<_, BoxError>(drop(conn)) });
/// # drop((server, stack));
/// ```
#[derive(Clone)]
#[doc(alias = "acl")]
#[doc(alias = "ConnectionFilter")]
pub struct AddressFilter(Arc<Decide>);

type Decide = dyn Fn(&Address) -> Verdict + Send + Sync;

impl AddressFilter {
    /// Creates a filter from a function. The function may run in the accept loop, so it must not
    /// block.
    pub fn new(verdict: impl Fn(&Address) -> Verdict + Send + Sync + 'static) -> Self {
        Self(Arc::new(verdict))
    }

    /// Returns the decision about an address.
    pub fn verdict(&self, address: &Address) -> Verdict {
        (self.0)(address)
    }

    /// Returns a layer that passes denied connections to `service`, which can tell the peer why.
    /// See [`ConnectionLimitLayer::overflow`](super::ConnectionLimitLayer::overflow).
    pub fn overflow<O>(self, service: O) -> OverflowLayer<O, Self> {
        overflow::layer(self, service)
    }
}

impl Admission for AddressFilter {
    fn admit(&self, conn: &ConnectionInfo) -> Result<Option<Permit>, ConnectionEnded> {
        match self.verdict(conn.client_addr()) {
            Verdict::Allow => Ok(None),
            Verdict::Deny => Err(ConnectionEnded::new(EndReason::Denied, AddressDenied)),
        }
    }
}

/// Applies the filter as a pre-connect hook.
impl<Io> Service<Connection<Io>> for AddressFilter {
    type Response = Connection<Io>;
    type Error = ConnectionEnded;
    type Future = Ready<Result<Connection<Io>, ConnectionEnded>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), ConnectionEnded>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, conn: Connection<Io>) -> Self::Future {
        ready(self.admit(conn.info()).map(|_no_permit| conn))
    }
}

not_a_layer!(AddressFilter);

impl fmt::Debug for AddressFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressFilter").finish_non_exhaustive()
    }
}
