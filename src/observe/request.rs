//! Puts each request in a span.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;
use tracing::Span;
use tracing::field::Empty;
use tracing::instrument::{Instrument, Instrumented};

/// Creates the span of a request. Implemented for every `Fn(&Request) -> Span`.
pub trait MakeSpan<R> {
    /// Creates the span. If the connection has a span, that span is current during the call, and
    /// becomes the parent of the new span.
    fn make_span(&self, request: &R) -> Span;
}

impl<R, F: Fn(&R) -> Span> MakeSpan<R> for F {
    fn make_span(&self, request: &R) -> Span {
        self(request)
    }
}

/// Creates the span `request`, without any content of the request.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestSpan;

impl<R> MakeSpan<R> for RequestSpan {
    fn make_span(&self, _request: &R) -> Span {
        tracing::info_span!(
            target: "tower_tcp",
            "request",
            otel.kind = "server",
            otel.status_code = Empty
        )
    }
}

/// Puts each request in a span, which ends when the service's response is ready.
///
/// The layer works for any protocol. For HTTP, use `TraceLayer` of `tower-http`, which also records
/// the method, the URI and the status.
///
/// ```
/// use bytes::Bytes;
/// use tower::ServiceBuilder;
/// use tower_tcp::BoxError;
/// use tower_tcp::observe::RequestTraceLayer;
///
/// let by_verb = |line: &Bytes| {
///     let verb = line.split(|byte| *byte == b' ').next().unwrap_or_default();
///     tracing::info_span!(
///         "request",
///         otel.kind = "server",
///         verb = %verb.escape_ascii(),
///         otel.status_code = tracing::field::Empty,
///     )
/// };
/// let service = ServiceBuilder::new()
///     .layer(RequestTraceLayer::new().make_span_with(by_verb))
///     .service_fn(|line: Bytes| async move { Ok::<_, BoxError>(line) });
/// # drop(service);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestTraceLayer<M = RequestSpan> {
    make_span: M,
}

impl RequestTraceLayer {
    /// Creates the layer with the default span, [`RequestSpan`].
    pub const fn new() -> Self {
        Self {
            make_span: RequestSpan,
        }
    }
}

impl<M> RequestTraceLayer<M> {
    /// Sets the function that creates the spans.
    ///
    /// If the span has a field `otel.status_code`, the field is set to `ERROR` when the service
    /// fails.
    pub fn make_span_with<N>(self, make_span: N) -> RequestTraceLayer<N> {
        RequestTraceLayer { make_span }
    }
}

impl<S, M: Clone> Layer<S> for RequestTraceLayer<M> {
    type Service = RequestTrace<S, M>;

    fn layer(&self, inner: S) -> RequestTrace<S, M> {
        let make_span = self.make_span.clone();
        RequestTrace { inner, make_span }
    }
}

/// A service with a span for each request. See [`RequestTraceLayer`].
#[derive(Clone, Debug)]
pub struct RequestTrace<S, M = RequestSpan> {
    inner: S,
    make_span: M,
}

impl<R, S, M> Service<R> for RequestTrace<S, M>
where
    S: Service<R>,
    M: MakeSpan<R>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = RequestTraceFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let span = self.make_span.make_span(&request);
        let inner = span.in_scope(|| self.inner.call(request));
        RequestTraceFuture {
            inner: inner.instrument(span),
        }
    }
}

/// The future of [`RequestTrace`].
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct RequestTraceFuture<F> {
    #[pin]
    inner: Instrumented<F>,
}

impl<F, R, E> Future for RequestTraceFuture<F>
where
    F: Future<Output = Result<R, E>>,
{
    type Output = Result<R, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut inner = self.project().inner;
        let answer = ready!(inner.as_mut().poll(cx));
        if answer.is_err() {
            inner.span().record("otel.status_code", "ERROR");
        }
        Poll::Ready(answer)
    }
}
