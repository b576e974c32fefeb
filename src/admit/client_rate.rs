//! Limits the rate of each client's requests.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Sleep, sleep_until};
use tower_layer::Layer;
use tower_service::Service;

use super::client::{Clients, Held, quota};
use crate::connection::ConnectionInfo;

/// Limits the rate of each client's requests, across all of its connections. Clones share the
/// rates. Set the options before cloning, because clones with different options do not agree on who
/// a client is.
///
/// tower's `RateLimit` limits the requests of one connection, or of all connections together.
/// `ClientRate` creates a layer for each connection, and all layers of one client share its rate.
/// Add the layer where the connection's service is made:
///
/// ```
/// use std::time::Duration;
/// use bytes::Bytes;
/// use tower::{ServiceBuilder, service_fn};
/// use tower_tcp::admit::ClientRate;
/// use tower_tcp::{BoxError, Peer, Pipeline, frame::Lines};
///
/// let rate = ClientRate::new(100, Duration::from_secs(1));
/// let make = service_fn(move |peer: Peer<Bytes>| {
///     let service = ServiceBuilder::new()
///         .layer(rate.layer(peer.info()))
///         .service_fn(|line: Bytes| async move { Ok::<_, BoxError>(line) });
///     async { Ok::<_, BoxError>(service) }
/// });
/// # drop(Pipeline::new(Lines::default).make_service::<Bytes, _>(make));
/// ```
///
/// A request over the rate waits, because the service is not ready until the rate allows the
/// request. If tower's `LoadShed` is around this layer, such a request fails instead. A `MapResult`
/// around both can turn the failure into a reply. The layer costs an atomic operation and a reading
/// of the clock for each request.
///
/// Clients are identified in the same way as by [`PerClient`](super::PerClient), which limits
/// connections.
#[derive(Clone)]
#[doc(alias = "throttle")]
#[doc(alias = "limit_req")]
#[doc(alias = "governor")]
pub struct ClientRate {
    clients: Clients,
}

impl ClientRate {
    /// Creates a rate that allows a burst of `requests`, and then as many in each `period`, evenly
    /// spread. `0` requests count as 1, and a period of more than 10 years as 10 years.
    pub fn new(requests: u32, period: Duration) -> Self {
        let quota = quota(requests, period);
        Self {
            clients: Clients::new(Semaphore::MAX_PERMITS, Some(quota)),
        }
    }

    /// Sets the number of leading bits of an IPv6 address that identify a client, as
    /// [`PerClient::v6_prefix`](super::PerClient::v6_prefix) does. Default: 64.
    #[must_use]
    pub fn v6_prefix(mut self, bits: u8) -> Self {
        self.clients.v6_prefix = bits;
        self
    }

    /// Sets the maximum number of clients whose rates are remembered while they have no connection,
    /// as [`PerClient::remembered`](super::PerClient::remembered) does. Default: 65,536.
    #[must_use]
    pub fn remembered(mut self, clients: usize) -> Self {
        self.clients.remembered = clients;
        self
    }

    /// Returns the number of clients in memory, with or without open connections.
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// Returns the layer for the requests of one connection.
    pub fn layer(&self, conn: &ConnectionInfo) -> ClientRateLayer {
        ClientRateLayer {
            client: self.clients.of(conn.client_addr()).map(Arc::new),
        }
    }
}

impl fmt::Debug for ClientRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientRate")
            .field("quota", &self.clients.quota)
            .field("clients", &self.clients())
            .finish_non_exhaustive()
    }
}

/// Applies a [`ClientRate`] to the requests of one connection.
#[derive(Clone)]
pub struct ClientRateLayer {
    client: Option<Arc<Held>>,
}

impl fmt::Debug for ClientRateLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientRateLayer")
            .field("is_limited", &self.client.is_some())
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for ClientRateLayer {
    type Service = ClientRateLimit<S>;

    fn layer(&self, inner: S) -> ClientRateLimit<S> {
        ClientRateLimit {
            inner,
            layer: self.clone(),
            has_taken: false,
            sleep: None,
        }
    }
}

/// A service that is ready only when its client's rate allows another request. See [`ClientRate`].
#[derive(Debug)]
pub struct ClientRateLimit<S> {
    inner: S,
    layer: ClientRateLayer,
    /// `true` if the next request has already been counted against the rate.
    has_taken: bool,
    /// The timer of a wait. It is reused for the next wait.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl<S: Clone> Clone for ClientRateLimit<S> {
    fn clone(&self) -> Self {
        // A clone is not ready.
        self.layer.layer(self.inner.clone())
    }
}

impl<S> ClientRateLimit<S> {
    fn poll_rate(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let client = self.layer.client.as_ref();
        while let Err(not_before) = client.map_or(Ok(()), |client| client.take_rate()) {
            let sleep = match &mut self.sleep {
                Some(sleep) => {
                    sleep.as_mut().reset(not_before);
                    sleep
                }
                none => none.insert(Box::pin(sleep_until(not_before))),
            };
            ready!(sleep.as_mut().poll(cx));
        }
        Poll::Ready(())
    }
}

impl<S, R> Service<R> for ClientRateLimit<S>
where
    S: Service<R>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    /// Waits for the rate first and then for the inner service, so that the inner service reserves
    /// no shared resource while the rate is exceeded.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        if !self.has_taken {
            ready!(self.poll_rate(cx));
            self.has_taken = true;
        }
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> S::Future {
        self.has_taken = false;
        self.inner.call(request)
    }
}
