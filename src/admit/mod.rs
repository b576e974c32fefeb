//! How many may come in.
//!
//! [`ConnectionLimit`] counts connections exactly, from accept to the end of the connection's task, and can be
//! changed while the server runs. Every [`Server`](crate::Server) has one, which
//! [`Handle::limit`](crate::Handle::limit) gives; as a layer it bounds any other service of connections.
//!
//! Where stock `ConcurrencyLimit` *hands* a freed permit to the first who waits, this one wakes all who wait and lets
//! the first to come take it: an accept loop that waits for a permit and then finds no connection cannot sit on it.
//! It is meant for as many waiters as there are accept loops; for thousands of waiting tasks take the stock one.
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
//! limit.set(0); // admits none from now on; those who are in stay
//! assert_eq!((limit.get(), limit.in_use()), (Some(0), 0));
//! # drop(stack);
//! ```

mod overflow;

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

pub use overflow::{Overflow, OverflowFuture, OverflowLayer};

const UNLIMITED: usize = usize::MAX;

/// A number of connections that may be open at the same time; its clones are the same limit.
#[derive(Clone)]
pub struct ConnectionLimit(Arc<Mutex<LimitState>>);

struct LimitState {
    limit: usize,
    used: usize,
    /// Who may want to look again when a number changes, by service instance. There are as many as accept loops, so they are searched for,
    /// and the room stays: each connection comes by here.
    waiting: Vec<(u64, Waker)>,
    next_instance: u64,
}

impl LimitState {
    fn wait(&mut self, instance: u64, waker: &Waker) {
        let mut waiting = self.waiting.iter_mut();
        match waiting.find(|(known, _)| *known == instance) {
            Some((_, known)) => known.clone_from(waker),
            None => self.waiting.push((instance, waker.clone())),
        }
    }

    fn forget(&mut self, instance: u64) {
        self.waiting.retain(|(known, _)| *known != instance);
    }

    /// Takes those who wait, to be woken without the lock.
    fn take_waiting(&mut self) -> Vec<(u64, Waker)> {
        self.waiting.drain(..).collect()
    }
}

impl ConnectionLimit {
    /// Makes a limit of `n` connections; `0` admits none.
    pub fn new(n: usize) -> Self {
        Self(Arc::new(Mutex::new(LimitState {
            limit: n,
            used: 0,
            waiting: Vec::new(),
            next_instance: 0,
        })))
    }

    /// Makes a limit that admits all, until it is [set](Self::set).
    pub fn unlimited() -> Self {
        Self::new(UNLIMITED)
    }

    /// Changes the limit to `n`, at once: waiting connections are admitted, or a permit reserved but not used is taken
    /// back. Lowering it closes nobody.
    pub fn set(&self, n: usize) {
        let waiting = {
            let mut state = self.lock();
            state.limit = n;
            state.take_waiting()
        };
        wake_all(waiting);
    }

    /// Lifts the limit, at once.
    pub fn set_unlimited(&self) {
        self.set(UNLIMITED);
    }

    /// Returns the limit, or `None` when there is none.
    pub fn get(&self) -> Option<usize> {
        Some(self.lock().limit).filter(|&limit| limit != UNLIMITED)
    }

    /// Returns how many permits are taken. A permit reserved for a connection that is at hand counts.
    pub fn in_use(&self) -> usize {
        self.lock().used
    }

    /// Returns a layer that holds what it wraps to this limit.
    ///
    /// Not for a server's own limit, which is applied already: two layers of one limit take two permits for each connection, and
    /// where it is 1 nobody ever comes in.
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

/// One connection's place; dropping it gives it back.
#[derive(Debug)]
struct Permit(ConnectionLimit);

impl Permit {
    /// Takes a place, if there is one.
    fn take(limit: &ConnectionLimit) -> Option<Self> {
        let mut state = limit.lock();
        let free = state.used < state.limit;
        if free {
            state.used += 1;
        }
        free.then(|| Self(limit.clone()))
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
    /// Gives connections over the limit to `service`, to be told before they go, instead of leaving them in the backlog. The server's
    /// own limit has to be a higher one: at that nothing is accepted, and so nobody is told.
    ///
    /// It has 1 s for each and is given 64 at the same time; those beyond that are closed without a word. They end with
    /// [`EndReason::LimitExceeded`](crate::EndReason::LimitExceeded).
    pub fn overflow<O>(self, service: O) -> OverflowLayer<O> {
        let Self { limit } = self;
        OverflowLayer {
            limit,
            overflow: service,
        }
    }
}

impl<S> Layer<S> for ConnectionLimitLayer {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited::new(inner, self.limit.clone())
    }
}

/// A service of connections that is ready only below a [`ConnectionLimit`].
#[derive(Debug)]
pub struct Limited<S> {
    inner: S,
    limit: ConnectionLimit,
    instance: u64,
    reserved: Option<Permit>,
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
        }
    }

    /// Gives a permit back that was reserved for a connection that was not to be had.
    pub(crate) fn give_back(&mut self) {
        if let Some(permit) = self.reserved.take() {
            // Others may have waited for it; this instance has not.
            self.limit.lock().forget(self.instance);
            drop(permit);
        }
    }
}

impl<S: Clone> Clone for Limited<S> {
    fn clone(&self) -> Self {
        // Readiness, and the permit that goes with it, belongs to one instance.
        Self::new(self.inner.clone(), self.limit.clone())
    }
}

impl<S> Drop for Limited<S> {
    fn drop(&mut self) {
        self.limit.lock().forget(self.instance);
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
        // The inside first: no permit is held while something in there is not ready.
        ready!(self.inner.poll_ready(cx))?;
        let mut state = self.limit.lock();
        // With a permit in hand too, so that lowering the limit can take it back.
        state.wait(self.instance, cx.waker());
        match &self.reserved {
            Some(_) if state.used > state.limit => {
                drop(state);
                self.reserved = None;
                Poll::Pending
            }
            Some(_) => Poll::Ready(Ok(())),
            None if state.used < state.limit => {
                state.used += 1;
                drop(state);
                self.reserved = Some(Permit(self.limit.clone()));
                Poll::Ready(Ok(()))
            }
            None => Poll::Pending,
        }
    }

    fn call(&mut self, conn: C) -> Self::Future {
        // It has what it waited for: another's end need not wake it.
        self.limit.lock().forget(self.instance);
        // Taken first, so that a panic in there gives it back.
        let permit = self.reserved.take();
        LimitedFuture {
            inner: self.inner.call(conn),
            permit,
        }
    }
}

/// The future of [`Limited`]: holds the permit until it is dropped, not just until it is done.
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct LimitedFuture<F> {
    // Dropped in this order: the connection is gone when its place is given back.
    #[pin]
    inner: F,
    permit: Option<Permit>,
}

impl<F> LimitedFuture<F> {
    fn new(inner: F, permit: Permit) -> Self {
        let permit = Some(permit);
        Self { inner, permit }
    }
}

impl<F: Future> Future for LimitedFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().inner.poll(cx)
    }
}
