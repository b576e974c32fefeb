//! The span of a connection, and its closing event.

use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;
use tracing::field::Empty;
use tracing::instrument::{Instrument, Instrumented};
use tracing::{Level, Span};

use super::{ErrorChain, signed};
use crate::connection::{Address, Connection, ConnectionInfo, Moment, Origin};
use crate::end::{End, EndReason, Initiator};

/// Puts each connection in a span and emits its closing event. See the [module docs](super).
///
/// Put the layer around all layers and services whose events belong in the span. The layer emits
/// the closing event exactly once for each connection that reaches it, whatever the other layers
/// do.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConnectionTraceLayer;

impl ConnectionTraceLayer {
    /// Creates the layer.
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

/// A connection service with a span for each connection. See [`ConnectionTraceLayer`].
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
            // Without a span, the callback captures nothing, so boxing it allocates no memory.
            conn.life().on(Moment::End, closed);
        } else {
            let at_end = span.clone();
            conn.life()
                .on(Moment::End, move |origin: &Origin, end: &End| {
                    at_end.in_scope(|| closed(origin, end));
                    ended(&at_end, end.reason());
                });
        }
        let inner = span.in_scope(|| self.inner.call(conn));
        ConnectionTraceFuture {
            inner: inner.instrument(span),
        }
    }
}

/// Returns an address without its port, because OpenTelemetry has another attribute for the port.
fn address(address: &Address) -> String {
    match address.tcp() {
        Some(addr) => addr.ip().to_string(),
        None => address.to_string(),
    }
}

fn port(address: &Address) -> Option<i64> {
    address.tcp().map(|addr| addr.port().into())
}

fn span(info: &ConnectionInfo) -> Span {
    tracing::info_span!(
        target: "tower_tcp",
        "tcp.connection",
        otel.kind = "server",
        otel.status_code = Empty,
        connection.id = signed(info.id().get()),
        network.transport = info.local_addr().transport(),
        network.peer.address = address(info.peer_addr()),
        network.peer.port = port(info.peer_addr()),
        network.local.address = address(info.local_addr()),
        network.local.port = port(info.local_addr()),
        client.address = Empty,
        client.port = Empty,
        close.reason = Empty,
        close.initiator = Empty,
    )
}

/// Records the client's address in the current span, if a hook has set the address. The current
/// span must be that of the connection.
pub(crate) fn record_client(origin: &Origin) {
    let Some(client_addr) = origin.vouched_client_addr() else {
        return;
    };
    let span = Span::current();
    span.record("client.address", address(client_addr));
    if let Some(port) = port(client_addr) {
        span.record("client.port", port);
    }
}

fn level(reason: EndReason) -> Level {
    match reason {
        EndReason::Panic => Level::ERROR,
        EndReason::DrainDeadline => Level::WARN,
        // The program intends these ends.
        EndReason::Rejected | EndReason::Aborted | EndReason::ServiceClosed => Level::DEBUG,
        other if other.initiator() == Initiator::Service => Level::WARN,
        _ => Level::DEBUG,
    }
}

/// Records the reason and the initiator of the end in the span. This happens after the closing
/// event, which would otherwise contain these fields twice.
fn ended(span: &Span, reason: EndReason) {
    span.record("close.reason", reason.as_str())
        .record("close.initiator", reason.initiator().as_str());
    if level(reason) <= Level::WARN {
        span.record("otel.status_code", "ERROR");
    }
}

/// Emits the closing event. The event contains the peer's address, because a filter may have
/// disabled the span.
fn closed(origin: &Origin, end: &End) {
    let client_addr = origin.vouched_client_addr();
    macro_rules! closed {
        ($level:expr) => {
            tracing::event!(
                target: "tower_tcp",
                $level,
                connection.id = signed(origin.id.get()),
                network.peer.address = address(&origin.peer_addr),
                network.peer.port = port(&origin.peer_addr),
                client.address = client_addr.map(address),
                client.port = client_addr.and_then(port),
                close.reason = end.reason().as_str(),
                close.initiator = end.reason().initiator().as_str(),
                error = end.error().map(ErrorChain).map(tracing::field::display),
                duration = end.duration().as_secs_f64(),
                bytes_read = signed(end.bytes_read()),
                bytes_written = signed(end.bytes_written()),
                requests = signed(end.requests()),
                messages_dropped = signed(end.messages_dropped()),
                "connection.closed"
            )
        };
    }
    // The level is part of an event's static metadata, so each level needs a call of the macro.
    match level(end.reason()) {
        Level::ERROR => closed!(Level::ERROR),
        Level::WARN => closed!(Level::WARN),
        _ => closed!(Level::DEBUG),
    }
}

/// Emits the event for a connection that was closed at accept because its address is denied.
pub(crate) fn denied(peer_addr: &Address) {
    tracing::trace!(
        target: "tower_tcp",
        {
            network.peer.address = address(peer_addr),
            network.peer.port = port(peer_addr)
        },
        "connection.denied"
    );
}

/// The future of [`ConnectionTrace`].
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct ConnectionTraceFuture<F> {
    #[pin]
    inner: Instrumented<F>,
}

impl<F: Future> Future for ConnectionTraceFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().inner.poll(cx)
    }
}
