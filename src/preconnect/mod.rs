//! Hooks that run between accept and the first frame. A hook can reject a connection, replace its
//! stream, or add facts about its peer.
//!
//! A hook is a service: `Service<Connection<A>, Response = Connection<B>>`. A TLS handshake is such
//! a hook, and so is a check of the peer's address. Layers of tower can wrap a hook.
//! [`PreConnectLayer`] puts a hook in front of a connection service, and [`PreConnectExt::chain`]
//! runs one hook after another.
//!
//! Hooks run in the connection's own task, never in the accept loop. [`PreConnectLayer`] sets one
//! deadline for all of them, and a budget: the maximum number of connections that may be in their
//! hooks at the same time. If the error of a hook is or contains a [`ConnectionEnded`], the
//! connection ends with [its reason](ConnectionEnded::reason). After any other error of a hook, the
//! connection ends with [`EndReason::Rejected`].
//!
//! ```
//! use tower::{ServiceBuilder, service_fn};
//! use tower_tcp::bind::Socket;
//! use tower_tcp::preconnect::PreConnectLayer;
//! use tower_tcp::{BoxError, Connection};
//!
//! let local_only = service_fn(|conn: Connection<Socket>| async move {
//!     match conn.info().peer_addr().tcp() {
//!         Some(addr) if !addr.ip().is_loopback() => Err(BoxError::from("not from here")),
//!         _ => Ok(conn),
//!     }
//! });
//! let stack = ServiceBuilder::new()
//!     .layer(PreConnectLayer::new(local_only))
//!     .service_fn(|conn: Connection<Socket>| async move { Ok::<_, BoxError>(drop(conn)) });
//! # drop(stack);
//! ```
//!
//! The hook [`Peek`] detects the peer's protocol. [`PreConnectExt::when`] runs a hook only for some
//! connections: for example, it runs `Tls` only for clients that begin a TLS handshake.
//!
//! # Clones
//!
//! The hook and the service behind it are cloned for each connection. The connection's task waits
//! until each clone is ready. A layer whose service is not `Clone`, such as tower's `RateLimit`,
//! must be outside of the [`PreConnectLayer`], or behind tower's `Buffer`.

mod chain;
mod detect;
mod peek;
mod pending;
mod time;
mod when;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::future::{self, select};
use pin_project::pin_project;
use thiserror::Error;
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

use crate::connection::{Connection, ConnectionPhase, Life};
use crate::deadline::Deadlines;
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, ServiceError};
use crate::make::{CloneForConnection, oneshot, readied};
use crate::observe::record_client;

pub use chain::{Chain, PreConnectExt};
pub use detect::{Detection, Protocol};
pub use peek::{Peek, Unknown, UnknownProtocol};
use pending::{Pending, Ticket};
use time::Times;
pub use tokio_util::either::Either;
pub use when::When;

/// The error for a connection that reached the deadline of its [`PreConnectLayer`], or the deadline
/// of a [`Peek`] that refuses unknown protocols. The layer's deadline includes the wait until the
/// service behind the hooks is ready.
#[derive(Clone, Copy, Debug, Error)]
#[error("pre-connect not done within {0:?}")]
pub struct PreConnectElapsed(Duration);

/// The error for a connection that was evicted. Too many connections were in their hooks, and this
/// one was the oldest of them.
#[derive(Clone, Copy, Debug, Error)]
#[error("pushed out of pre-connect by newer connections")]
pub struct PreConnectEvicted;

/// Puts a hook in front of a connection service.
#[derive(Clone, Debug)]
pub struct PreConnectLayer<H> {
    hook: H,
    times: Times,
    pending: Pending,
}

impl<H> PreConnectLayer<H> {
    /// Creates the layer, with a [`deadline`](Self::deadline) of 10 s, and a maximum of 512
    /// connections in their hooks ([`pending`](Self::pending)).
    pub fn new(hook: H) -> Self {
        Self {
            hook,
            times: Deadlines::default().into(),
            pending: Pending::new(512),
        }
    }

    /// Sets the maximum time for everything before the service is called: the wait until the hook
    /// is ready, the hook itself, and the wait until the service is ready. With `None` there is no
    /// deadline, and a silent peer's connection can stay open until newer connections evict it or a
    /// drain ends it.
    ///
    /// Default: 10 s. Why: enough for several round trips on the slowest networks. When reached:
    /// the connection is dropped with [`EndReason::PreConnectTimeout`].
    #[must_use]
    pub fn deadline(mut self, deadline: impl Into<Option<Duration>>) -> Self {
        self.times.deadline = deadline.into();
        self
    }

    /// Takes the deadline of the hooks, and their deadline in a drain, from the `deadlines` of the
    /// whole stack: [`Deadlines::pre_connect`](Deadlines::pre_connect) and
    /// [`DrainDeadlines::pre_connect`](crate::deadline::DrainDeadlines::pre_connect).
    #[must_use]
    pub fn deadlines(mut self, deadlines: Deadlines) -> Self {
        self.times = deadlines.into();
        self
    }

    /// Sets the maximum number of connections in their hooks at the same time. A connection counts
    /// until the service behind its hooks is ready for it. `0` counts as 1.
    ///
    /// Default: 512. Why: to bound the memory of unfinished handshakes. When reached: the next
    /// connection evicts the *oldest*, which is dropped with [`EndReason::PreConnectEvicted`].
    ///
    /// If the next connection waited instead, 512 silent peers could lock out all others until the
    /// deadline, again and again. A client's connection is evicted only if 512 newer connections
    /// arrive before the service is ready for it.
    ///
    /// At the [server's own limit](crate::ServerBuilder::limit), no connection is accepted, so none
    /// is evicted. Keep this number well below that limit. Otherwise, silent peers in their hooks
    /// can take all of the limit.
    #[must_use]
    pub fn pending(mut self, connections: usize) -> Self {
        self.pending = Pending::new(connections.max(1));
        self
    }
}

impl<H: Clone, S> Layer<S> for PreConnectLayer<H> {
    type Service = PreConnect<H, S>;

    fn layer(&self, inner: S) -> PreConnect<H, S> {
        let Self {
            hook,
            times,
            pending,
        } = self.clone();
        PreConnect {
            hook,
            inner,
            times,
            pending,
        }
    }
}

/// A connection service with a hook in front of it. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct PreConnect<H, S> {
    hook: H,
    inner: S,
    times: Times,
    pending: Pending,
}

impl<A, B, H, S> Service<Connection<A>> for PreConnect<H, S>
where
    A: Send + 'static,
    B: Send + 'static,
    H: Service<Connection<A>, Response = Connection<B>> + CloneForConnection + Send + 'static,
    H::Error: ServiceError,
    H::Future: Send,
    S: Service<Connection<B>> + CloneForConnection + Send + 'static,
    S::Error: ServiceError,
    S::Future: Send,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = PreConnectFuture<S::Future>;

    /// Returns ready at once. The connection's task waits until the hook and the service are ready,
    /// because a wait there delays no other connection.
    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, conn: Connection<A>) -> Self::Future {
        let Self {
            hook,
            inner,
            times,
            pending,
        } = self.clone();
        let ticket = pending.enter();
        let life = Arc::clone(conn.life());
        life.enter(ConnectionPhase::PreConnect);
        let span = tracing::debug_span!(target: "tower_tcp", "pre_connect", otel.kind = "internal");
        PreConnectFuture(PreConnectState::Hooks(Box::pin(async move {
            let hooked = within(times, &life, ticket, through(hook, inner, conn))
                .instrument(span)
                .await;
            record_client(&life.origin);
            let (mut service, conn) = hooked?;
            conn.life().enter(ConnectionPhase::Serving);
            Ok(service.call(conn))
        })))
    }
}

/// Runs the hook on the connection, then waits until the service behind it is ready.
async fn through<A, B, H, S>(
    hook: H,
    mut inner: S,
    conn: Connection<A>,
) -> Result<(S, Connection<B>), BoxError>
where
    H: Service<Connection<A>, Response = Connection<B>>,
    H::Error: ServiceError,
    S: Service<Connection<B>>,
    S::Error: ServiceError,
{
    let conn = oneshot(hook, conn).await.map_err(rejected)?;
    readied(&mut inner).await.map_err(Into::into)?;
    Ok((inner, conn))
}

/// Converts an error of a hook to a boxed [`ConnectionEnded`]. If the error already contains a
/// `ConnectionEnded`, its reason is kept. Otherwise the reason is `Rejected`.
fn rejected(err: impl Into<BoxError>) -> BoxError {
    ConnectionEnded::of(err.into(), EndReason::Rejected).into()
}

async fn within<T>(
    times: Times,
    life: &Life,
    mut ticket: Ticket,
    work: impl Future<Output = Result<T, BoxError>>,
) -> Result<T, BoxError> {
    let elapsed = times.elapsed(life);
    tokio::pin!(elapsed, work);
    // The hooks are polled first, so that hooks that completed in time do not fail because their
    // task was polled late.
    match select(work, select(elapsed, ticket.evicted())).await {
        future::Either::Left((done, _)) => done,
        future::Either::Right((future::Either::Left((ended, _)), _)) => Err(ended.into()),
        future::Either::Right((future::Either::Right(((), _)), _)) => Err(ConnectionEnded::new(
            EndReason::PreConnectEvicted,
            BoxError::from(PreConnectEvicted),
        )
        .into()),
    }
}

/// The future of [`PreConnect`].
///
/// The hooks' future is boxed, because the type of `PreConnectFuture` would otherwise contain the
/// types of all hooks. The box is dropped as soon as the hooks are done, because a handshake takes
/// several times the memory of an idle connection.
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct PreConnectFuture<F>(#[pin] PreConnectState<F>);

#[pin_project(project = StateProjection)]
enum PreConnectState<F> {
    Hooks(Pin<Box<dyn Future<Output = Result<F, BoxError>> + Send>>),
    Serving(#[pin] F),
}

impl<F> std::fmt::Debug for PreConnectFuture<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PreConnectFuture").finish_non_exhaustive()
    }
}

impl<F, R, E> Future for PreConnectFuture<F>
where
    F: Future<Output = Result<R, E>>,
    E: Into<BoxError>,
{
    type Output = Result<R, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().0;
        loop {
            let serving = match state.as_mut().project() {
                StateProjection::Hooks(hooks) => ready!(hooks.as_mut().poll(cx))?,
                StateProjection::Serving(serving) => return serving.poll(cx).map_err(Into::into),
            };
            state.set(PreConnectState::Serving(serving));
        }
    }
}
