//! Where a connection's service comes from: clones of one, or one made for it.
//!
//! [`Pipeline`](crate::Pipeline) and `Http` carry one of these types as a parameter. Their builders
//! make them; you name them only where you write the type of a pipeline out.

use std::convert::Infallible;
use std::fmt;
use std::future::{Ready, poll_fn, ready};
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project::pin_project;
use tower_service::Service;

use crate::error::BoxError;

/// Serves all connections with one service, a clone of it for each request.
#[derive(Clone, Debug)]
pub struct ClonePerRequest<S>(pub(crate) S);

/// Serves each connection with a service that a make-service makes for it.
#[derive(Clone, Debug)]
pub struct MakePerConnection<K>(pub(crate) K);

/// Serves each connection with a service of requests and messages that a make-service makes for it.
///
/// `M` is the type of the messages. See [`Event`](crate::pipeline::Event).
pub struct MakeEventsPerConnection<K, M>(MakePerConnection<K>, PhantomData<fn(M)>);

impl<K, M> MakeEventsPerConnection<K, M> {
    pub(crate) fn new(make: K) -> Self {
        Self(MakePerConnection(make), PhantomData)
    }

    /// Returns the same without the type of messages, which only the target of the make-service
    /// depends on.
    pub(crate) fn of_any_target(&self) -> &MakePerConnection<K> {
        &self.0
    }
}

impl<K: Clone, M> Clone for MakeEventsPerConnection<K, M> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), PhantomData)
    }
}

impl<K: fmt::Debug, M> fmt::Debug for MakeEventsPerConnection<K, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MakePerConnection(make) = &self.0;
        f.debug_tuple("MakeEventsPerConnection")
            .field(make)
            .finish()
    }
}

mod sealed {
    use super::*;

    /// Makes the service of each connection.
    ///
    /// `Target` is what a make-service is called with: a connection's `Peer`, or its
    /// `ConnectionInfo`.
    #[expect(
        unnameable_types,
        reason = "sealed: a service for all, or one for each"
    )]
    pub trait Maker<Target> {
        type Service;
        type Error: Into<BoxError>;
        type Future: Future<Output = Result<Self::Service, Self::Error>> + Send + 'static;

        /// Makes the service of one connection. `target` is called only by a maker that wants it.
        fn make(&self, target: impl FnOnce() -> Target) -> Self::Future;
    }
}
pub(crate) use sealed::Maker;

impl<Target, S: Clone + Send + 'static> Maker<Target> for ClonePerRequest<S> {
    type Service = S;
    type Error = Infallible;
    type Future = Ready<Result<S, Infallible>>;

    fn make(&self, _target: impl FnOnce() -> Target) -> Self::Future {
        ready(Ok(self.0.clone()))
    }
}

impl<Target, K> Maker<Target> for MakePerConnection<K>
where
    Target: Send + 'static,
    K: Service<Target> + Clone + Send + 'static,
    K::Error: Into<BoxError>,
    K::Future: Send + 'static,
{
    type Service = K::Response;
    type Error = K::Error;
    type Future = Oneshot<K, Target>;

    fn make(&self, target: impl FnOnce() -> Target) -> Self::Future {
        oneshot(self.0.clone(), target())
    }
}

/// Waits until `service` is ready.
pub(crate) async fn readied<S: Service<R>, R>(service: &mut S) -> Result<(), S::Error> {
    poll_fn(|cx| service.poll_ready(cx)).await
}

/// Makes `service` ready, then calls it once, and drops it before the call runs.
pub(crate) fn oneshot<S: Service<R>, R>(service: S, request: R) -> Oneshot<S, R> {
    Oneshot(State::NotReady(service, Some(request)))
}

/// The future of [`oneshot`]: tower's, without that dependency in a public type.
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct Oneshot<S: Service<R>, R>(#[pin] State<S, R>);

#[pin_project(project = StateProjection)]
enum State<S: Service<R>, R> {
    NotReady(S, Option<R>),
    Called(#[pin] S::Future),
}

impl<S: Service<R>, R> fmt::Debug for Oneshot<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Oneshot").finish_non_exhaustive()
    }
}

impl<S: Service<R>, R> Future for Oneshot<S, R> {
    type Output = Result<S::Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().0;
        loop {
            let called = match state.as_mut().project() {
                StateProjection::Called(future) => return future.poll(cx),
                StateProjection::NotReady(service, request) => {
                    std::task::ready!(service.poll_ready(cx))?;
                    match request.take() {
                        Some(request) => service.call(request),
                        None => return Poll::Pending,
                    }
                }
            };
            state.set(State::Called(called));
        }
    }
}
