//! A layer that applies another layer to requests but not to messages.

use std::fmt;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::event::Event;
use crate::error::BoxError;

/// Applies a layer to the requests of a service of [`Event`]s. Messages bypass the layer and go
/// directly to the service.
///
/// Use it for a layer that should apply only to the peer's requests, such as a timeout, a rate
/// limit, or a trace of requests. A layer for all events can be used directly, because a service of
/// events is an ordinary service.
///
/// ```
/// use std::convert::Infallible;
/// use std::time::Duration;
/// use bytes::Bytes;
/// use tower::limit::RateLimitLayer;
/// use tower::{ServiceBuilder, service_fn};
/// use tower_tcp::frame::Lines;
/// use tower_tcp::pipeline::{Event, RequestsOnlyLayer};
/// use tower_tcp::{Peer, Pipeline};
///
/// let make = service_fn(|_: Peer<Bytes, Bytes>| async {
///     // Limits the peer to ten lines a second. Messages of the program do not count.
///     let rate = RateLimitLayer::new(10, Duration::from_secs(1));
///     let events = service_fn(|event: Event<Bytes, Bytes>| async move {
///         match event {
///             Event::Request(line) => Ok::<_, Infallible>(line),
///             Event::Message(news) => Ok(news),
///         }
///     });
///     let rate = RequestsOnlyLayer::<_, Bytes>::new(rate); // `Bytes`: the messages
///     let limited = ServiceBuilder::new().layer(rate).service(events);
///     Ok::<_, Infallible>(limited)
/// });
/// let pipeline = Pipeline::new(Lines::default).make_event_service(make);
/// # drop(pipeline);
/// ```
///
/// # Readiness
///
/// The service is ready when both the layered service and the service inside it are ready. Until
/// then messages wait, too, because `poll_ready` does not know which kind of event comes next. The
/// call goes to the instance that is ready, never to a clone.
///
/// If the layer is a limit that connections share, a connection that gets only messages holds a
/// permit until its next request. Put such a limit around all events instead.
///
/// Two layers of tower do not work as usual here. `Buffer` calls its service from a task of its
/// own, while messages reach the same service from the connection's task. So a message can use up
/// the readiness that `Buffer` waited for. Put `Buffer` around all events instead. `LoadShed` works
/// only with a limit that the same `RequestsOnlyLayer` applies. If the service itself is not ready,
/// `LoadShed` seldom rejects a request, because all events wait until the service is ready.
pub struct RequestsOnlyLayer<L, M> {
    layer: L,
    messages: PhantomData<fn(M)>,
}

impl<L, M> RequestsOnlyLayer<L, M> {
    /// Creates a layer that applies `layer` only to requests.
    pub fn new(layer: L) -> Self {
        Self {
            layer,
            messages: PhantomData,
        }
    }
}

impl<S, L, M> Layer<S> for RequestsOnlyLayer<L, M>
where
    L: Layer<Beneath<S, M>>,
{
    type Service = RequestsOnly<S, L::Service, M>;

    fn layer(&self, service: S) -> Self::Service {
        let shared = Arc::new(Mutex::new(Guarded {
            service,
            ready: false,
        }));
        RequestsOnly {
            layered: self.layer.layer(Beneath {
                shared: Arc::clone(&shared),
                messages: PhantomData,
            }),
            beneath: Beneath {
                shared,
                messages: PhantomData,
            },
        }
    }
}

impl<L: Clone, M> Clone for RequestsOnlyLayer<L, M> {
    fn clone(&self) -> Self {
        Self::new(self.layer.clone())
    }
}

impl<L: fmt::Debug, M> fmt::Debug for RequestsOnlyLayer<L, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RequestsOnlyLayer")
            .field(&self.layer)
            .finish()
    }
}

/// A service that passes requests to the layered service `N`, and messages to `S`. Created by
/// [`RequestsOnlyLayer`].
///
/// It is not `Clone`, because a clone would share the service `S`, and its calls could use up the
/// readiness that the original has waited for.
pub struct RequestsOnly<S, N, M> {
    layered: N,
    beneath: Beneath<S, M>,
}

impl<S, N, R, M> Service<Event<R, M>> for RequestsOnly<S, N, M>
where
    S: Service<Event<R, M>, Error: Into<BoxError>>,
    N: Service<R, Response = S::Response, Error: Into<BoxError>>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = RequestsOnlyFuture<N::Future, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        ready!(self.layered.poll_ready(cx)).map_err(Into::into)?;
        // The layered service may be ready without having polled the service inside.
        self.beneath.lock().poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, event: Event<R, M>) -> Self::Future {
        RequestsOnlyFuture(match event {
            Event::Request(request) => Called::Request(self.layered.call(request)),
            message @ Event::Message(_) => Called::Message(self.beneath.lock().call(message)),
        })
    }
}

impl<S, N: fmt::Debug, M> fmt::Debug for RequestsOnly<S, N, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestsOnly")
            .field("layered", &self.layered)
            .finish_non_exhaustive()
    }
}

/// The service to which [`RequestsOnlyLayer`] applies its layer. It takes requests, and passes them
/// as [`Event`]s to the service that also gets the messages.
pub struct Beneath<S, M> {
    shared: Arc<Mutex<Guarded<S>>>,
    messages: PhantomData<fn(M)>,
}

/// The shared service, and whether it has returned ready since its last call.
struct Guarded<S> {
    service: S,
    ready: bool,
}

impl<S> Guarded<S> {
    fn poll_ready<E>(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>>
    where
        S: Service<E>,
    {
        if !self.ready {
            ready!(self.service.poll_ready(cx))?;
            self.ready = true;
        }
        Poll::Ready(Ok(()))
    }

    fn call<E>(&mut self, event: E) -> S::Future
    where
        S: Service<E>,
    {
        self.ready = false;
        self.service.call(event)
    }
}

impl<S, M> Beneath<S, M> {
    fn lock(&self) -> MutexGuard<'_, Guarded<S>> {
        // A poisoned lock is ignored. After a panic of the service, the pipeline decides whether to
        // call it again, as without this layer.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S, R, M> Service<R> for Beneath<S, M>
where
    S: Service<Event<R, M>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.lock().poll_ready(cx)
    }

    fn call(&mut self, request: R) -> S::Future {
        self.lock().call(Event::Request(request))
    }
}

impl<S, M> fmt::Debug for Beneath<S, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Beneath").finish_non_exhaustive()
    }
}

/// The future of [`RequestsOnly`].
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct RequestsOnlyFuture<R, M>(#[pin] Called<R, M>);

#[pin_project(project = CalledProj)]
#[derive(Debug)]
enum Called<R, M> {
    Request(#[pin] R),
    Message(#[pin] M),
}

impl<R, M, A, E, F> Future for RequestsOnlyFuture<R, M>
where
    R: Future<Output = Result<A, E>>,
    M: Future<Output = Result<A, F>>,
    E: Into<BoxError>,
    F: Into<BoxError>,
{
    type Output = Result<A, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().0.project() {
            CalledProj::Request(future) => future.poll(cx).map_err(Into::into),
            CalledProj::Message(future) => future.poll(cx).map_err(Into::into),
        }
    }
}
