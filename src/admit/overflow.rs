//! Answers rejected connections before they are closed.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::sealed::Admission;
use super::{ConnectionLimit, LimitedFuture};
use crate::connection::Connection;
use crate::end::EndReason;
use crate::error::{BoxError, ServiceError};
use crate::make::{CloneForConnection, oneshot};

/// The time that the overflow service has for a connection. It is enough to write a short message,
/// but not to wait for a slow peer.
const TIME: Duration = Duration::from_secs(1);

/// The maximum number of connections that the overflow service serves at the same time. Further
/// rejected connections are closed immediately, to bound the cost of a flood.
const MOST: usize = 64;

/// Applies a limit or a filter, and passes the connections that it rejects to another service.
/// Created by [`ConnectionLimitLayer::overflow`](super::ConnectionLimitLayer::overflow),
/// [`AddressFilter::overflow`](super::AddressFilter::overflow) and `PerClient::overflow`.
#[derive(Clone, Debug)]
pub struct OverflowLayer<O, L = ConnectionLimit> {
    limit: L,
    overflow: O,
}

pub(super) fn layer<O, L>(limit: L, overflow: O) -> OverflowLayer<O, L> {
    OverflowLayer { limit, overflow }
}

impl<S, O: Clone, L: Clone> Layer<S> for OverflowLayer<O, L> {
    type Service = Overflow<S, O, L>;

    fn layer(&self, inner: S) -> Overflow<S, O, L> {
        let Self { limit, overflow } = self.clone();
        Overflow {
            inner,
            is_inner_ready: false,
            limit,
            overflow,
            serving: Arc::default(),
        }
    }
}

/// A connection service that passes rejected connections to another service. See [`OverflowLayer`].
#[derive(Debug)]
pub struct Overflow<S, O, L = ConnectionLimit> {
    inner: S,
    is_inner_ready: bool,
    limit: L,
    overflow: O,
    /// The number of connections that `overflow` serves now.
    serving: Arc<AtomicUsize>,
}

impl<S: Clone, O: Clone, L: Clone> Clone for Overflow<S, O, L> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            // A clone is not ready.
            is_inner_ready: false,
            limit: self.limit.clone(),
            overflow: self.overflow.clone(),
            serving: Arc::clone(&self.serving),
        }
    }
}

/// A connection that the overflow service serves. It is counted until this value is dropped.
struct Serving(Arc<AtomicUsize>);

impl Serving {
    fn begin(count: &Arc<AtomicUsize>) -> Option<Self> {
        let begun = Self(Arc::clone(count));
        (count.fetch_add(1, Ordering::AcqRel) < MOST).then_some(begun)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<Io, S, O, L> Service<Connection<Io>> for Overflow<S, O, L>
where
    Io: Send + 'static,
    L: Admission,
    S: Service<Connection<Io>>,
    S::Error: ServiceError,
    O: Service<Connection<Io>> + CloneForConnection + Send + 'static,
    O::Error: ServiceError,
    O::Future: Send,
{
    type Response = Option<S::Response>;
    type Error = BoxError;
    type Future = OverflowFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        // At the limit the inner service is not polled, so it does not reserve anything.
        if !self.is_inner_ready && self.limit.has_room() {
            ready!(self.inner.poll_ready(cx)).map_err(Into::into)?;
            self.is_inner_ready = true;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, conn: Connection<Io>) -> Self::Future {
        // The permit is not taken in `poll_ready` but here, so that no permit is reserved without a
        // connection.
        let admitted = if self.is_inner_ready {
            self.limit.admit(conn.info())
        } else {
            // `poll_ready` found the limit reached, so the inner service was not polled.
            Err(EndReason::LimitExceeded.into())
        };
        match admitted {
            Ok(permit) => {
                self.is_inner_ready = false;
                let inside = LimitedFuture::new(self.inner.call(conn), permit);
                return OverflowFuture(Either::Inside(inside));
            }
            Err(ended) => drop(conn.ended(ended)),
        }
        let overflow = self.overflow.clone();
        let serving = Serving::begin(&self.serving);
        let over = Box::pin(async move {
            if serving.is_some() {
                // The connection already has its end reason, so an error or a timeout here is
                // ignored.
                let _ignored = tokio::time::timeout(TIME, oneshot(overflow, conn)).await;
            }
        });
        OverflowFuture(Either::Over(over))
    }
}

/// The future of [`Overflow`]. Its output is `Ok(None)` for a rejected connection.
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct OverflowFuture<F>(#[pin] Either<F>);

#[pin_project(project = Projection)]
enum Either<F> {
    Inside(#[pin] LimitedFuture<F>),
    Over(Pin<Box<dyn Future<Output = ()> + Send>>),
}

impl<F> std::fmt::Debug for OverflowFuture<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OverflowFuture").finish_non_exhaustive()
    }
}

impl<F, R, E> Future for OverflowFuture<F>
where
    F: Future<Output = Result<R, E>>,
    E: Into<BoxError>,
{
    type Output = Result<Option<R>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().0.project() {
            Projection::Inside(inner) => inner.poll(cx).map_ok(Some).map_err(Into::into),
            Projection::Over(over) => {
                ready!(over.as_mut().poll(cx));
                Poll::Ready(Ok(None))
            }
        }
    }
}
