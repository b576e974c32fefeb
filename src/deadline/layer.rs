//! Deadlines for a raw connection service.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::Deadlines;
use super::watch::{Borrower, Watch};
use crate::connection::{Connection, Life};
use crate::end::ConnectionEnded;
use crate::error::BoxError;

/// Enforces deadlines on a raw connection service, by watching the byte counters of its connection.
///
/// A [`Pipeline`](crate::Pipeline) and HTTP enforce their deadlines themselves. Use this layer for
/// a service that reads and writes the stream itself, and for a service that takes over a stream by
/// [`on_upgrade`](crate::Pipeline::on_upgrade). The layer enforces
///
/// - [`first_byte`](Deadlines::first_byte), until something is read or written;
/// - [`idle`](Deadlines::idle), while nothing is read or written;
/// - [`write`](Deadlines::write), while a write is pending and the peer takes nothing;
/// - [`min_rate`](Deadlines::min_rate), while a write is pending;
/// - [`max_age`](Deadlines::max_age) with [`max_age_jitter`](Deadlines::max_age_jitter), at which
///   the connection [drains](crate::Connection::draining); by default, it ends after another
///   [30 s](super::DrainDeadlines::stream).
///
/// To end a connection at a deadline, the layer drops the service's future, and the stream with it.
/// So keep the stream in the service's future. If the service moves the stream to another task,
/// that task still has the stream after the deadline. The other task's reads and writes do not wake
/// the layer, so it checks the counters four times per deadline. A deadline may then be enforced
/// late, by at most about a quarter of its time.
///
/// If the service abandons a write, for example at a timeout of its own, the write counts as
/// pending until the next write or flush completes. The layer cannot distinguish it from a write
/// that still waits.
///
/// ```
/// use std::time::Duration;
/// use tokio::io::copy_bidirectional;
/// use tokio::net::TcpStream;
/// use tower::{ServiceBuilder, service_fn};
/// use tower_tcp::bind::Socket;
/// use tower_tcp::deadline::{DeadlineLayer, Deadlines};
/// use tower_tcp::{BoxError, Connection};
///
/// let proxy = service_fn(|mut conn: Connection<Socket>| async move {
///     let mut to = TcpStream::connect("127.0.0.1:7001").await?;
///     copy_bidirectional(&mut conn, &mut to).await?;
///     Ok::<_, BoxError>(())
/// });
/// let deadlines = Deadlines::default().idle(Duration::from_secs(300));
/// let stack = ServiceBuilder::new().layer(DeadlineLayer::new(deadlines)).service(proxy);
/// # drop(stack);
/// ```
#[derive(Clone, Debug)]
pub struct DeadlineLayer(Arc<Deadlines>);

impl DeadlineLayer {
    /// Creates the layer with `deadlines`.
    pub fn new(deadlines: Deadlines) -> Self {
        Self(Arc::new(deadlines))
    }
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline {
            inner,
            deadlines: Arc::clone(&self.0),
        }
    }
}

/// A connection service with deadlines. Created by [`DeadlineLayer`].
#[derive(Clone, Debug)]
pub struct Deadline<S> {
    inner: S,
    deadlines: Arc<Deadlines>,
}

impl<Io, S> Service<Connection<Io>> for Deadline<S>
where
    S: Service<Connection<Io>>,
    S::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = DeadlineFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, conn: Connection<Io>) -> DeadlineFuture<S::Future> {
        let deadlines = Arc::clone(&self.deadlines);
        DeadlineFuture {
            watch: Watch::new(conn.info(), Borrower::Service, &deadlines),
            life: Arc::clone(conn.life()),
            deadlines,
            service: Some(self.inner.call(conn)),
        }
    }
}

/// The future of [`Deadline`].
#[pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct DeadlineFuture<F> {
    #[pin]
    service: Option<F>,
    watch: Watch,
    life: Arc<Life>,
    deadlines: Arc<Deadlines>,
}

impl<F> std::fmt::Debug for DeadlineFuture<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeadlineFuture").finish_non_exhaustive()
    }
}

impl<F, R, E> Future for DeadlineFuture<F>
where
    F: Future<Output = Result<R, E>>,
    E: Into<BoxError>,
{
    type Output = Result<R, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some(service) = this.service.as_mut().as_pin_mut() else {
            return Poll::Pending;
        };
        // The service is polled first, so that a service that is done in time does not fail because
        // its task was polled late.
        if let Poll::Ready(done) = service.poll(cx) {
            return Poll::Ready(done.map_err(Into::into));
        }
        let reason = std::task::ready!(this.watch.poll(this.life, this.deadlines, cx));
        let ended = this.life.ended(reason.into());
        this.service.set(None);
        Poll::Ready(Err(ConnectionEnded::into(ended)))
    }
}
