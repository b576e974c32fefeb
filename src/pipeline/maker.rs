//! Where the request service of a connection comes from.

use std::convert::Infallible;
use std::fmt;
use std::future::{Ready, ready};
use std::marker::PhantomData;
use std::task::{Context, Poll};

use tower_service::Service;

use super::event::Requests;
use super::peer::Peer;
use crate::error::BoxError;

/// One service for all connections, a clone of it for each request. Made by [`PipelineBuilder::service`](super::PipelineBuilder::service).
#[derive(Clone, Debug)]
pub struct Shared<S>(pub(super) S);

/// A service made for each connection. Made by [`PipelineBuilder::make_service`](super::PipelineBuilder::make_service).
#[derive(Clone, Debug)]
pub struct Made<K>(pub(super) K);

/// A service of requests and messages made for each connection. Made by
/// [`PipelineBuilder::make_event_service`](super::PipelineBuilder::make_event_service).
pub struct MadeForEvents<K, M>(pub(super) K, pub(super) PhantomData<fn(M)>);

impl<K: Clone, M> Clone for MadeForEvents<K, M> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), PhantomData)
    }
}

impl<K: fmt::Debug, M> fmt::Debug for MadeForEvents<K, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MadeForEvents").field(&self.0).finish()
    }
}

mod sealed {
    use super::*;

    /// Makes services of a connection's events.
    #[expect(
        unnameable_types,
        reason = "sealed: a service for all, or one for each"
    )]
    pub trait Maker<T> {
        type Message: Send + 'static;
        type Made;
        type Service;
        type Error: Into<BoxError>;
        type Future: Future<Output = Result<Self::Made, Self::Error>> + Send;

        /// Makes the service of one connection; `peer` is called only by those who want the handle.
        fn make(&self, peer: impl FnOnce() -> Peer<T, Self::Message>) -> Self::Future;

        /// Makes what was made a service of events.
        fn service(made: Self::Made) -> Self::Service;
    }
}
pub(super) use sealed::Maker;

impl<T, S: Clone + Send> Maker<T> for Shared<S> {
    type Message = Infallible;
    type Made = PerCall<S>;
    type Service = Requests<PerCall<S>>;
    type Error = Infallible;
    type Future = Ready<Result<PerCall<S>, Infallible>>;

    fn make(&self, _peer: impl FnOnce() -> Peer<T>) -> Self::Future {
        ready(Ok(PerCall {
            service: self.0.clone(),
            readied: None,
        }))
    }

    fn service(made: PerCall<S>) -> Self::Service {
        Requests(made)
    }
}

impl<T, K> Maker<T> for Made<K>
where
    T: Send + 'static,
    K: Service<Peer<T>> + Clone + Send + 'static,
    K::Error: Into<BoxError>,
    K::Future: Send,
{
    type Message = Infallible;
    type Made = K::Response;
    type Service = Requests<K::Response>;
    type Error = K::Error;
    type Future = impl_future::Make<K, Peer<T>>;

    fn make(&self, peer: impl FnOnce() -> Peer<T>) -> Self::Future {
        impl_future::Make::new(self.0.clone(), peer())
    }

    fn service(made: K::Response) -> Self::Service {
        Requests(made)
    }
}

impl<T, M, K> Maker<T> for MadeForEvents<K, M>
where
    T: Send + 'static,
    M: Send + 'static,
    K: Service<Peer<T, M>> + Clone + Send + 'static,
    K::Error: Into<BoxError>,
    K::Future: Send,
{
    type Message = M;
    type Made = K::Response;
    type Service = K::Response;
    type Error = K::Error;
    type Future = impl_future::Make<K, Peer<T, M>>;

    fn make(&self, peer: impl FnOnce() -> Peer<T, M>) -> Self::Future {
        impl_future::Make::new(self.0.clone(), peer())
    }

    fn service(made: K::Response) -> Self::Service {
        made
    }
}

mod impl_future {
    use std::pin::Pin;
    use std::task::ready;

    use pin_project::pin_project;

    use super::*;

    /// Makes a make-service ready and calls it: tower's `Oneshot`, without the dependency in a public type.
    #[pin_project(project = MakeProjection)]
    #[expect(
        unnameable_types,
        missing_debug_implementations,
        reason = "the future of a sealed trait"
    )]
    pub enum Make<K: Service<R>, R> {
        NotReady(K, Option<R>),
        Called(#[pin] K::Future),
    }

    impl<K: Service<R>, R> Make<K, R> {
        pub(super) fn new(service: K, request: R) -> Self {
            Self::NotReady(service, Some(request))
        }
    }

    impl<K: Service<R>, R> Future for Make<K, R> {
        type Output = Result<K::Response, K::Error>;

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
            loop {
                let called = match self.as_mut().project() {
                    MakeProjection::Called(future) => return future.poll(cx),
                    MakeProjection::NotReady(service, request) => {
                        ready!(service.poll_ready(cx))?;
                        match request.take() {
                            Some(request) => service.call(request),
                            None => return Poll::Pending,
                        }
                    }
                };
                self.set(Self::Called(called));
            }
        }
    }
}

/// Calls a clone of the service for each request, made ready when the request is at hand.
///
/// So a connection that rests holds nothing of what connections share: a permit of a shared limit, or a place in the
/// queue for one.
#[derive(Clone, Debug)]
pub struct PerCall<S> {
    service: S,
    readied: Option<S>,
}

impl<S, R> Service<R> for PerCall<S>
where
    S: Service<R> + Clone,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        let Self { service, readied } = self;
        readied
            .get_or_insert_with(|| service.clone())
            .poll_ready(cx)
    }

    fn call(&mut self, request: R) -> S::Future {
        match self.readied.take() {
            Some(mut service) => service.call(request),
            // Called without being made ready, which is the caller's mistake: the service says so in its own way.
            None => self.service.clone().call(request),
        }
    }
}
