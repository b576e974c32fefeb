//! Marks errors, so that they close the connection.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use thiserror::Error;
use tower_layer::Layer;
use tower_service::Service;

use crate::error::{BoxError, find_cause};

/// Marks the errors of the inner service, so that they close the connection even if
/// [`Pipeline::shutdown_on_error`](super::Pipeline::shutdown_on_error) is off.
///
/// Outer layers get a [`Shutdown`], whose `source()` is the original error. Only errors from
/// *inside* are marked. For example, the `Elapsed` of a `Timeout` around this layer is not.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShutdownOnErrorLayer;

impl ShutdownOnErrorLayer {
    /// Creates the layer.
    pub const fn new() -> Self {
        Self
    }
}

impl<S> Layer<S> for ShutdownOnErrorLayer {
    type Service = ShutdownOnError<S>;

    fn layer(&self, inner: S) -> ShutdownOnError<S> {
        ShutdownOnError { inner }
    }
}

/// A service whose errors close the connection. See [`ShutdownOnErrorLayer`].
#[derive(Clone, Debug)]
pub struct ShutdownOnError<S> {
    inner: S,
}

impl<S, R> Service<R> for ShutdownOnError<S>
where
    S: Service<R>,
    S::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ShutdownOnErrorFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(marked)
    }

    fn call(&mut self, request: R) -> Self::Future {
        ShutdownOnErrorFuture {
            inner: self.inner.call(request),
        }
    }
}

/// The future of [`ShutdownOnError`].
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct ShutdownOnErrorFuture<F> {
    #[pin]
    inner: F,
}

impl<F, T, E> Future for ShutdownOnErrorFuture<F>
where
    F: Future<Output = Result<T, E>>,
    E: Into<BoxError>,
{
    type Output = Result<T, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(ready!(self.project().inner.poll(cx)).map_err(marked))
    }
}

/// An error that is marked to close the connection. It wraps the service's own error.
#[derive(Debug, Error)]
#[error("closes the connection")]
pub struct Shutdown(#[source] BoxError);

fn marked(err: impl Into<BoxError>) -> BoxError {
    Box::new(Shutdown(err.into()))
}

/// Returns whether an error, or one of its causes, is marked.
pub(super) fn is_shutdown(err: &(dyn std::error::Error + 'static)) -> bool {
    find_cause::<Shutdown>(err).is_some()
}
