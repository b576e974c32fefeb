//! The source of a connection's service: either one service, which is cloned for each request, or a
//! make-service, which makes a service for each connection.
//!
//! [`Pipeline`](crate::Pipeline) and `Http` have one of this module's types as a type parameter.
//! [`PipelineBuilder`](crate::pipeline::PipelineBuilder) and the constructors of `Http` create the
//! values. A program names these types only to write out the type of a `Pipeline` or an `Http`.

use std::convert::Infallible;
use std::fmt;
use std::future::{Ready, poll_fn, ready};
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project::pin_project;
use tower_service::Service;

use crate::error::ServiceError;

/// Serves all connections with clones of one service. Each request is served by a new clone.
#[derive(Clone, Debug)]
pub struct ClonePerRequest<S>(pub(crate) S);

/// Serves each connection with a service that a make-service makes for it.
#[derive(Clone, Debug)]
pub struct MakePerConnection<K>(pub(crate) K);

/// Serves each connection with a service that a make-service makes for it. The connection's service
/// takes requests and messages.
///
/// `M` is the type of the messages. See [`Event`](crate::pipeline::Event).
pub struct MakeEventsPerConnection<K, M>(MakePerConnection<K>, PhantomData<fn(M)>);

impl<K, M> MakeEventsPerConnection<K, M> {
    pub(crate) fn new(make: K) -> Self {
        Self(MakePerConnection(make), PhantomData)
    }

    /// Returns the maker without the message type. A `MakePerConnection<K>` does not need `M`,
    /// because `K` takes a `Peer<T, M>`, which already names `M`.
    pub(crate) fn without_messages(&self) -> &MakePerConnection<K> {
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

#[expect(
    unnameable_types,
    reason = "sealed: aliases of bounds, and makers of services"
)]
mod sealed {
    use super::*;

    /// Names `T` as `<S as Known<T>>::Type`, which the compiler can resolve only if it can resolve
    /// `S`.
    ///
    /// Builders name their result in this way, to keep compiler errors short. For `S` they use, for
    /// example, the future of a service. If a builder rejects the service, the compiler can resolve
    /// neither this future nor the result. So it does not report a second error where the result is
    /// used.
    pub trait Known<T> {
        type Type;
    }

    impl<S: ?Sized, T> Known<T> for S {
        type Type = T;
    }

    /// A service that can be cloned for each request.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` is not `Clone`, and one service for all connections is cloned for \
            each request",
        label = "not `Clone`",
        note = "if each connection needs its own, as with a `SessionService`, use `make_service`; \
            if all connections share one, such as a `RateLimit`, put `tower::buffer::BufferLayer` \
            around it"
    )]
    pub trait CloneForRequest: Clone {}

    #[diagnostic::do_not_recommend]
    impl<S: Clone> CloneForRequest for S {}

    /// A service that can be cloned for each connection.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` is not `Clone`, and is cloned for each connection here",
        label = "not `Clone`",
        note = "derive `Clone`, put `tower::buffer::BufferLayer` around it, or move the layer \
            that is not `Clone` (`RateLimit`) outside"
    )]
    pub trait CloneForConnection: Clone {}

    #[diagnostic::do_not_recommend]
    impl<S: Clone> CloneForConnection for S {}

    /// A service that serves the requests of all connections. It converts into `Self::Maker`.
    #[diagnostic::on_unimplemented(
        message = "expected a service of what the codec decodes, `{R}`",
        label = "not a `Service<{R}>`",
        note = "wrap a function in `tower::service_fn`; a service made for each connection is \
            given to `make_service`; a layer of connections goes around the pipeline"
    )]
    pub trait SharedService<R> {
        type Maker;

        fn into_maker(self) -> Self::Maker;
    }

    impl<S, R> SharedService<R> for S
    where
        S: Service<R>,
    {
        type Maker = <S::Future as Known<ClonePerRequest<S>>>::Type;

        fn into_maker(self) -> ClonePerRequest<S> {
            ClonePerRequest(self)
        }
    }

    /// A service that makes the service of each connection. It converts into `Self::Maker`.
    #[diagnostic::on_unimplemented(
        message = "expected a service that makes services, of `{Target}`",
        label = "not a `Service<{Target}>`",
        note = "a make-service is `service_fn(|target: {Target}| ..)`; a service of requests is \
            given to `service`"
    )]
    pub trait MakeService<Target> {
        type Maker;

        fn into_maker(self) -> Self::Maker;
    }

    impl<K, Target> MakeService<Target> for K
    where
        K: Service<Target>,
    {
        type Maker = <K::Future as Known<MakePerConnection<K>>>::Type;

        fn into_maker(self) -> MakePerConnection<K> {
            MakePerConnection(self)
        }
    }

    /// Makes the service of each connection.
    ///
    /// `Target` is the argument of a make-service: a connection's `Peer`, or its `ConnectionInfo`.
    pub trait Maker<Target> {
        type Service;
        type Error: ServiceError;
        type Future: Future<Output = Result<Self::Service, Self::Error>> + Send + 'static;

        /// Makes the service of one connection. `target` returns the argument of a make-service. A
        /// maker that needs no argument does not call `target`.
        fn make(&self, target: impl FnOnce() -> Target) -> Self::Future;
    }
}
pub(crate) use sealed::{
    CloneForConnection, CloneForRequest, Known, MakeService, Maker, SharedService,
};

impl<Target, S: CloneForRequest + Send + 'static> Maker<Target> for ClonePerRequest<S> {
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
    K: Service<Target> + CloneForConnection + Send + 'static,
    K::Error: ServiceError,
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

/// Waits until `service` is ready and calls it once. The service is dropped before the call's
/// future runs.
pub(crate) fn oneshot<S: Service<R>, R>(service: S, request: R) -> Oneshot<S, R> {
    Oneshot(State::NotReady(service, Some(request)))
}

/// The future of `oneshot`. tower has the same future, but using that one here would make tower a
/// public dependency.
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
