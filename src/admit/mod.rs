//! Limits connections by number, address and rate, and each client's requests by rate.
//!
//! | type | limits |
//! | --- | --- |
//! | [`ConnectionLimit`] | the number of open connections of one or more servers |
//! | [`AddressFilter`] | the addresses that may connect, by your own function |
//! | `AccessList` | the networks that may connect; can be replaced while the server runs |
//! | `Bans` | the addresses that may connect; each ban ends after a time |
//! | `PerClient` | the number of open connections of each client, and the rate at which it connects |
//! | `ClientRate` | the rate of each client's requests |
//!
//! The last four types need the feature `per-client`. `PerClient` and `ClientRate` identify a
//! client by [`ConnectionInfo::client_addr`]. `AccessList` and `Bans` can be converted into an
//! [`AddressFilter`]. As a pre-connect hook, or as the layer that [`AddressFilter::overflow`]
//! returns, a filter uses the client's address. As a server's
//! [`address_filter`](crate::ServerBuilder::address_filter) it uses the peer's address instead. The
//! two addresses are the same unless a hook has read a proxy's header. The module `proxy` shows how
//! to combine such a hook with these types.
//!
//! The metric `tower_tcp.rejected_connections` counts the connections that were not admitted, by
//! reason. See [`observe`](crate::observe).
//!
//! # The limit of a server
//!
//! [`ConnectionLimit`] counts connections exactly, from accept to the end of the connection's task.
//! The limit can be changed while the server runs. Every [`Server`](crate::Server) has a
//! `ConnectionLimit`, which [`Handle::limit`](crate::Handle::limit) returns. As a layer, a
//! `ConnectionLimit` limits any connection service.
//!
//! tower's `ConcurrencyLimit` assigns a freed permit to the first waiter. `ConnectionLimit` wakes
//! all waiters, and the first one that polls takes the permit. So no permit is assigned to an
//! accept loop while it waits for a connection. `ConnectionLimit` is made for a few waiters, one
//! for each accept loop. If thousands of tasks wait, use `ConcurrencyLimit`.
//!
//! ```
//! use tower::ServiceBuilder;
//! use tower_tcp::admit::ConnectionLimit;
//! # use tower_tcp::{BoxError, Connection, bind::Socket};
//!
//! let limit = ConnectionLimit::new(10_000);
//! let stack = ServiceBuilder::new()
//!     .layer(limit.layer())
//!     .service_fn(|conn: Connection<Socket>| async move { Ok::<_, BoxError>(drop(conn)) });
//! limit.set(0); // admits no more connections; open ones stay
//! assert_eq!((limit.get(), limit.in_use()), (Some(0), 0));
//! # drop(stack);
//! ```

#[cfg(feature = "per-client")]
mod bans;
#[cfg(feature = "per-client")]
mod client;
#[cfg(feature = "per-client")]
mod client_rate;
mod filter;
#[cfg(feature = "per-client")]
mod list;
mod overflow;
#[cfg(feature = "per-client")]
mod per_client;

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::connection::ConnectionInfo;
use crate::end::{ConnectionEnded, EndReason};
use sealed::{Admission, Permit};

#[cfg(feature = "per-client")]
pub use bans::Bans;
#[cfg(feature = "per-client")]
pub use client_rate::{ClientRate, ClientRateLayer, ClientRateLimit};
pub use filter::{AddressDenied, AddressFilter, Verdict};
#[cfg(feature = "per-client")]
pub use list::{AccessList, AccessRules};
pub use overflow::{Overflow, OverflowFuture, OverflowLayer};
#[cfg(feature = "per-client")]
pub use per_client::{OverClientLimit, PerClient};

const UNLIMITED: usize = usize::MAX;

/// A limit on the number of open connections. Clones share the limit and its count.
#[derive(Clone)]
#[doc(alias = "max_connections")]
#[doc(alias = "Semaphore")]
#[doc(alias = "ConcurrencyLimit")]
pub struct ConnectionLimit(Arc<Mutex<LimitState>>);

struct LimitState {
    limit: usize,
    used: usize,
    /// The waiters to wake when the limit is changed or a permit is returned, each with the number
    /// of its service instance. There is one waiter for each accept loop, so a linear search is
    /// fast enough. Every connection uses this vector, so its allocation is kept.
    waiting: Vec<(u64, Waker)>,
    next_instance: u64,
}

impl LimitState {
    /// Registers a waker. Returns the earlier waker of the instance, if it is another one. The
    /// caller drops that waker after unlocking, because dropping it may run user code.
    fn wait(&mut self, instance: u64, waker: &Waker) -> Option<Waker> {
        let mut waiting = self.waiting.iter_mut();
        match waiting.find(|(known, _)| *known == instance) {
            Some((_, known)) if known.will_wake(waker) => None,
            Some((_, known)) => Some(std::mem::replace(known, waker.clone())),
            None => {
                self.waiting.push((instance, waker.clone()));
                None
            }
        }
    }

    /// Removes and returns the waker of an instance. The caller drops it after unlocking.
    fn forget(&mut self, instance: u64) -> Option<Waker> {
        let mut waiting = self.waiting.iter();
        let at = waiting.position(|(known, _)| *known == instance)?;
        Some(self.waiting.remove(at).1)
    }

    /// Takes all wakers, so that the caller can wake them after unlocking.
    fn take_waiting(&mut self) -> Vec<(u64, Waker)> {
        self.waiting.drain(..).collect()
    }
}

impl ConnectionLimit {
    /// Creates a limit of `n` connections. `0` admits none.
    pub fn new(n: usize) -> Self {
        Self(Arc::new(Mutex::new(LimitState {
            limit: n,
            used: 0,
            waiting: Vec::new(),
            next_instance: 0,
        })))
    }

    /// Creates a limit that admits every connection, until [`set`](Self::set) changes it.
    pub fn unlimited() -> Self {
        Self::new(UNLIMITED)
    }

    /// Changes the limit to `n`, with immediate effect.
    ///
    /// A higher limit admits waiting connections. A lower limit closes no open connection. But
    /// while more permits are in use than the new limit allows, a ready service loses the permit
    /// that it has reserved for its next connection.
    pub fn set(&self, n: usize) {
        let waiting = {
            let mut state = self.lock();
            state.limit = n;
            state.take_waiting()
        };
        wake_all(waiting);
    }

    /// Removes the limit and admits waiting connections.
    pub fn set_unlimited(&self) {
        self.set(UNLIMITED);
    }

    /// Returns the limit, or `None` if there is none.
    pub fn get(&self) -> Option<usize> {
        Some(self.lock().limit).filter(|&limit| limit != UNLIMITED)
    }

    /// Returns the number of permits in use. A permit that a ready service has reserved for its
    /// next connection counts as in use.
    pub fn in_use(&self) -> usize {
        self.lock().used
    }

    /// Returns a layer that applies this limit to the service it wraps.
    ///
    /// Do not use this layer for a server's own limit, because the server already applies that
    /// limit. Each connection would take two permits, and a limit of 1 would admit none.
    pub fn layer(&self) -> ConnectionLimitLayer {
        ConnectionLimitLayer {
            limit: self.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LimitState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ConnectionLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionLimit")
            .field("limit", &self.get())
            .field("in_use", &self.in_use())
            .finish()
    }
}

fn wake_all(waiting: Vec<(u64, Waker)>) {
    waiting.into_iter().for_each(|(_, waker)| waker.wake());
}

#[expect(unnameable_types, reason = "sealed")]
mod sealed {
    use super::{ConnectionEnded, ConnectionInfo, ConnectionLimit};

    /// Admits connections, or rejects them with a reason.
    pub trait Admission {
        /// Returns `false` if no connection can be admitted now.
        fn has_room(&self) -> bool {
            true
        }

        /// Admits a connection, or returns the reason for rejecting it. The permit, if there is
        /// one, must be held while the connection is served.
        fn admit(&self, conn: &ConnectionInfo) -> Result<Option<Permit>, ConnectionEnded>;
    }

    /// A permit for one connection. Dropping it returns it to the limit.
    #[derive(Debug)]
    pub struct Permit(pub(super) ConnectionLimit);

    #[diagnostic::on_unimplemented(
        message = "a `ConnectionLimit` is not a layer: call its method `layer`",
        label = "`ConnectionLimit` in place of a layer",
        note = "`.layer(limit.layer())` limits the connections of the service behind it"
    )]
    pub trait BehindLimitLayer {}
}

/// Exists only to make `.layer(limit)` a compiler error that says to write `.layer(limit.layer())`.
/// No type meets the bound.
#[doc(hidden)]
impl<S: sealed::BehindLimitLayer> Layer<S> for ConnectionLimit {
    type Service = S;

    fn layer(&self, inner: S) -> S {
        inner
    }
}

impl Admission for ConnectionLimit {
    fn has_room(&self) -> bool {
        let state = self.lock();
        state.used < state.limit
    }

    fn admit(&self, _conn: &ConnectionInfo) -> Result<Option<Permit>, ConnectionEnded> {
        let mut state = self.lock();
        if state.used >= state.limit {
            return Err(EndReason::LimitExceeded.into());
        }
        state.used += 1;
        drop(state);
        Ok(Some(Permit(self.clone())))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.0.lock();
            state.used -= 1;
            state.take_waiting()
        };
        wake_all(waiting);
    }
}

/// Applies a [`ConnectionLimit`]. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct ConnectionLimitLayer {
    limit: ConnectionLimit,
}

impl ConnectionLimitLayer {
    /// Returns a layer that passes connections over the limit to `service`, instead of leaving them
    /// in the backlog.
    ///
    /// `service` can tell the peer why the connection is rejected, as
    /// [`Pipeline::reject`](crate::Pipeline::reject) does. `service` has 1 s for each connection,
    /// and gets at most 64 connections at a time. Further connections over the limit are closed at
    /// once. All connections over the limit end with [`EndReason::LimitExceeded`].
    ///
    /// The server's own limit must be higher than the limit of this layer. While the server is at
    /// its own limit, it accepts nothing, so `service` gets no connections.
    pub fn overflow<O>(self, service: O) -> OverflowLayer<O> {
        overflow::layer(self.limit, service)
    }
}

impl<S> Layer<S> for ConnectionLimitLayer {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited::new(inner, self.limit.clone())
    }
}

/// A connection service that is ready only if it has reserved a permit of its [`ConnectionLimit`].
#[derive(Debug)]
pub struct Limited<S> {
    inner: S,
    limit: ConnectionLimit,
    instance: u64,
    reserved: Option<Permit>,
    /// `true` if the inner service's `poll_ready` has returned `Pending` since the service was last
    /// called, even if the service has become ready after that.
    queued: bool,
}

impl<S> Limited<S> {
    fn new(inner: S, limit: ConnectionLimit) -> Self {
        let instance = {
            let mut state = limit.lock();
            state.next_instance += 1;
            state.next_instance
        };
        Self {
            inner,
            limit,
            instance,
            reserved: None,
            queued: false,
        }
    }

    /// Returns whether the inner service returned `Pending` from `poll_ready` and has not been
    /// called since. The inner service may then be in a queue, such as that of tower's
    /// `ConcurrencyLimit`. Only a call removes it from the queue.
    pub(crate) fn is_queued(&self) -> bool {
        self.queued
    }

    fn forget(&self) {
        let forgotten = self.limit.lock().forget(self.instance);
        drop(forgotten);
    }

    /// Gives the reserved permit, if there is one, back to the limit. The service is then no longer
    /// ready.
    pub(crate) fn give_back(&mut self) {
        if let Some(permit) = self.reserved.take() {
            // Dropping the permit wakes all waiting instances. `self` need not be woken.
            self.forget();
            drop(permit);
        }
    }
}

impl<S: Clone> Clone for Limited<S> {
    fn clone(&self) -> Self {
        // A clone is not ready, and has no permit.
        Self::new(self.inner.clone(), self.limit.clone())
    }
}

impl<S> Drop for Limited<S> {
    fn drop(&mut self) {
        self.forget();
    }
}

impl<S, C> Service<C> for Limited<S>
where
    S: Service<C>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = LimitedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        // Declared before the lock guard, so dropped after unlocking.
        let _earlier;
        let mut state = self.limit.lock();
        // An instance that has reserved a permit also registers, so that a lower limit can revoke
        // the permit.
        _earlier = state.wait(self.instance, cx.waker());
        match &self.reserved {
            Some(_) if state.used > state.limit => {
                drop(state);
                self.reserved = None;
                return Poll::Pending;
            }
            Some(_) => drop(state),
            None if state.used < state.limit => {
                state.used += 1;
                drop(state);
                self.reserved = Some(Permit(self.limit.clone()));
            }
            // At the limit the inner service is not polled, so it does not reserve anything.
            None => return Poll::Pending,
        }
        // Cleared before the poll, so that an inner service that panics no longer counts as queued.
        let was_queued = std::mem::take(&mut self.queued);
        let polled = self.inner.poll_ready(cx);
        self.queued = was_queued || polled.is_pending();
        if !matches!(polled, Poll::Ready(Ok(()))) {
            // No permit is held while the inner service is not ready.
            self.give_back();
        }
        polled
    }

    fn call(&mut self, conn: C) -> Self::Future {
        // This instance has its permit and no longer waits, so the end of another connection need
        // not wake it.
        self.forget();
        self.queued = false;
        // The permit is moved out of `self` before the call, so that a panic in the call drops it.
        let permit = self.reserved.take();
        LimitedFuture {
            inner: self.inner.call(conn),
            permit,
        }
    }
}

/// The future of [`Limited`]. The permit is returned when this future is dropped, not when it
/// completes.
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct LimitedFuture<F> {
    // The fields are dropped in this order: first the future with the connection, then the permit.
    #[pin]
    inner: F,
    permit: Option<Permit>,
}

impl<F> LimitedFuture<F> {
    fn new(inner: F, permit: Option<Permit>) -> Self {
        Self { inner, permit }
    }
}

impl<F: Future> Future for LimitedFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().inner.poll(cx)
    }
}
