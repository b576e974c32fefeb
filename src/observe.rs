//! What can be seen of a server: one span and one closing event for each connection, and a few events of the server's own.
//!
//! | event | level | fields | what to do |
//! | --- | --- | --- | --- |
//! | `connection.closed` | by reason, below | those of the span, `close.reason`, `close.initiator`, `error`, `duration` (seconds), `bytes_read`, `bytes_written`, `requests`, `messages_dropped` | for `error`: look at the service |
//! | `request.failed` | warn | `connection.id`, `error` | a service error while the policy is off: handle it in the service |
//! | `accept.error` | debug | `error` | nothing: that client was gone |
//! | `accept.stalled` | warn | `error` | the process is out of something, mostly descriptors; said once, until it is over |
//! | `accept.resumed` | info | | |
//! | `signal.received` | info | `live` | |
//! | `a worker's thread is left behind` | warn | | it is blocked: look for what waits or computes without end in a service |
//! | `an on_end callback panicked` | error | | mend the callback; the others have run |
//! | `a socket option could not be set` | debug | `option`, `error` | nothing: that connection is served without it |
//! | `a socket's path is left behind` | debug | `path`, `error` | nothing: the next server replaces it |
//!
//! All have the target `tower_tcp`. `connection.closed` is an error event for [`EndReason::Panic`]; a warning for what the service did wrong
//! ([`Initiator::Service`] and not in good order, save [`Rejected`](EndReason::Rejected) and [`Aborted`](EndReason::Aborted), which it meant)
//! and for connections cut off by a shutdown's deadline; and a debug event for everything else: what peers do, probes and scans
//! included, is counted, not shouted.
//!
//! The span, `tcp.connection`, is at info level and has [OpenTelemetry's names]: `connection.id`, `network.transport`,
//! `network.peer.address`, `network.peer.port`, `network.local.address`, `network.local.port`, and `otel.kind`, which is `server`.
//!
//! [OpenTelemetry's names]: https://opentelemetry.io/docs/specs/semconv/registry/attributes/network/

use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;
use tracing::{Level, Span};

use crate::connection::{Address, Connection, ConnectionInfo, Origin};
use crate::end_reason::{End, EndReason, Initiator};

/// Puts each connection in a span, and says how it ended. See the [module docs](self).
///
/// Put it outside of all that should be seen in the span. The closing event comes from the connection itself, so it is the same, and
/// comes exactly once, whatever the layers around it do.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConnectionTraceLayer;

impl ConnectionTraceLayer {
    /// Makes the layer.
    pub const fn new() -> Self {
        Self
    }
}

impl<S> Layer<S> for ConnectionTraceLayer {
    type Service = ConnectionTrace<S>;

    fn layer(&self, inner: S) -> ConnectionTrace<S> {
        ConnectionTrace { inner }
    }
}

/// A connection service whose connections are seen. See [`ConnectionTraceLayer`].
#[derive(Clone, Debug)]
pub struct ConnectionTrace<S> {
    inner: S,
}

impl<Io, S> Service<Connection<Io>> for ConnectionTrace<S>
where
    S: Service<Connection<Io>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ConnectionTraceFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, conn: Connection<Io>) -> Self::Future {
        let span = span(conn.info());
        if span.is_disabled() {
            // There is nothing to hold on to until then.
            conn.life().on_end(closed);
        } else {
            let at_end = span.clone();
            let closed = move |origin: &Origin, end: &End| at_end.in_scope(|| closed(origin, end));
            conn.life().on_end(closed);
        }
        let inner = span.in_scope(|| self.inner.call(conn));
        ConnectionTraceFuture { inner, span }
    }
}

/// An address in OpenTelemetry's two parts: this, and its port.
fn address(address: &Address) -> String {
    match address.tcp() {
        Some(addr) => addr.ip().to_string(),
        None => address.to_string(),
    }
}

fn port(address: &Address) -> Option<u16> {
    address.tcp().map(|addr| addr.port())
}

fn span(info: &ConnectionInfo) -> Span {
    let span = tracing::info_span!(
        target: "tower_tcp",
        "tcp.connection",
        otel.kind = "server",
        connection.id = info.id().get(),
        network.transport = info.local().transport(),
        network.peer.address = tracing::field::Empty,
        network.peer.port = tracing::field::Empty,
        network.local.address = tracing::field::Empty,
        network.local.port = tracing::field::Empty,
    );
    if !span.is_disabled() {
        span.record("network.peer.address", address(info.peer()))
            .record("network.peer.port", port(info.peer()));
        span.record("network.local.address", address(info.local()))
            .record("network.local.port", port(info.local()));
    }
    span
}

fn level(reason: EndReason) -> Level {
    match reason {
        EndReason::Panic => Level::ERROR,
        EndReason::DrainDeadline => Level::WARN,
        // A hook or a limit that turns a peer away does its work.
        EndReason::Rejected | EndReason::Aborted | EndReason::ServiceClosed => Level::DEBUG,
        other if other.initiator() == Initiator::Service => Level::WARN,
        _ => Level::DEBUG,
    }
}

/// The closing event. It names the peer itself, since a filter may have dropped the span.
fn closed(origin: &Origin, end: &End) {
    macro_rules! closed {
        ($level:expr) => {
            tracing::event!(
                target: "tower_tcp",
                $level,
                connection.id = origin.id.get(),
                network.peer.address = address(&origin.peer),
                network.peer.port = port(&origin.peer),
                close.reason = end.reason().as_str(),
                close.initiator = end.reason().initiator().as_str(),
                error = end.error().map(Chain).map(tracing::field::display),
                duration = end.duration().as_secs_f64(),
                bytes_read = end.bytes_read(),
                bytes_written = end.bytes_written(),
                requests = end.requests(),
                messages_dropped = end.messages_dropped(),
                "connection.closed"
            )
        };
    }
    // A level is part of an event's static description.
    match level(end.reason()) {
        Level::ERROR => closed!(Level::ERROR),
        Level::WARN => closed!(Level::WARN),
        _ => closed!(Level::DEBUG),
    }
}

/// An error with its causes, on one line: what comes from a peer may hold control characters, and is escaped.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn std::error::Error + Send + Sync + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.to_string().escape_debug())?;
        let mut source = self.0.source();
        while let Some(err) = source {
            write!(f, ": {}", err.to_string().escape_debug())?;
            source = err.source();
        }
        Ok(())
    }
}

/// The future of [`ConnectionTrace`].
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct ConnectionTraceFuture<F> {
    #[pin]
    inner: F,
    span: Span,
}

impl<F: Future> Future for ConnectionTraceFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let _entered = this.span.enter();
        this.inner.poll(cx)
    }
}
