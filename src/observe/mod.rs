//! Spans, events and metrics of a server, under [OpenTelemetry names] where they exist.
//!
//! A server logs little by default. Actions of peers, including probes and scans, are counted, and
//! logged at debug or trace level. Faults of the program or the system that need action are logged
//! at higher levels. A request has no span and its duration is not measured, unless a layer is
//! added around the service. If a service fails and the connection continues, the error is logged
//! at warn level, even without a layer.
//!
//! Each connection ends with one [`EndReason`], which is passed to [`Connection::on_end`]. The
//! connection's span, its closing event and the metrics contain the reason's name,
//! [`EndReason::as_str`]. Peer addresses are in spans and events, but never in metrics, where each
//! address would create a new time series. Other data from peers appears only in the texts of
//! errors, with control characters escaped.
//!
//! # Spans
//!
//! | span | level | fields | made by |
//! | --- | --- | --- | --- |
//! | `tcp.connection` | info | `otel.kind` = `server`, `connection.id`, `network.transport`, `network.peer.address`, `network.peer.port`, `network.local.address`, `network.local.port`; after the hooks `client.address`, `client.port`, if a hook has set them; at the end `close.reason`, `close.initiator`, and `otel.status_code` = `ERROR` if the closing event is a warning or error | [`ConnectionTraceLayer`] |
//! | `pre_connect` | debug | `otel.kind` = `internal` | [`PreConnectLayer`](crate::preconnect::PreConnectLayer), around its hooks |
//! | `TLS server handshake` | debug | `otel.kind` = `internal`, `tls.protocol.version`, `tls.resumed`, `error.type` as in the metric | the hook `Tls` |
//! | `request` | info | `otel.kind` = `server`, `otel.status_code` = `ERROR` if the service failed | [`RequestTraceLayer`], unless `make_span_with` sets another span |
//!
//! The spans `pre_connect` and `request` are children of the connection's span. The span of a TLS
//! handshake is a child of `pre_connect`. A filter at info level disables `pre_connect` and `TLS
//! server handshake`.
//!
//! # Events
//!
//! | event | level | fields | what to do |
//! | --- | --- | --- | --- |
//! | `connection.closed` | by reason, below | `connection.id`, `network.peer.address`, `network.peer.port`, `client.address` and `client.port` as in the span, `close.reason`, `close.initiator`, `error`, `duration` (seconds), `bytes_read`, `bytes_written` (under TLS, both count only decrypted data, without the handshake), `requests`, `messages_dropped` | if the level is warn or error and the field `error` is set: check the service |
//! | `connection.denied` | trace | `network.peer.address`, `network.peer.port` | nothing: [`ServerBuilder::address_filter`](crate::ServerBuilder::address_filter) denied the address. There is no other event for this connection |
//! | `request.failed` | warn, or debug if the peer broke off the body of an HTTP/2 request | `connection.id`, `error` | if the level is warn: handle the error in the service. The error did not end the connection, because `shutdown_on_error` is off, or because the error concerns only one HTTP/2 stream |
//! | `accept.error` | debug | `error`, `error.type` | nothing: the next accept is tried at once. Usually the error concerns only one connection, for example one whose client has disconnected |
//! | `accept.stalled` | warn | `error`, `error.type` | provide the resource that the process lacks, usually file descriptors; not logged again before `accept.resumed` |
//! | `accept.resumed` | info | | nothing: the server accepts again |
//! | `signal.received` | info | `live` | nothing: the first signal begins a shutdown, and the second aborts all connections; `live` is the number of open connections |
//! | `process.replaced` | info | `pid` | nothing: the new process serves, and this one drains |
//! | `process.not_replaced` | error | `error` | read the standard error of the new process, if one was started; this process continues as before |
//! | `systemd was not notified` | warn | `error` | check that `NOTIFY_SOCKET` names a socket that this process may use |
//! | `a worker thread did not stop` | warn | | the thread is blocked: find the service that blocks or never stops computing |
//! | `a connection's callback panicked` | error | | fix the callback; other callbacks are not affected |
//! | `a connection's error panicked as it was dropped` | error | | fix the `Drop` of the error; the connection is not affected |
//! | `a socket option could not be set` | debug | `option`, `error` | nothing: the connection is served without it |
//! | `a socket file was not removed` | debug | `path`, `error` | nothing: the next server replaces it |
//!
//! All spans and events have the target `tower_tcp`. [`ConnectionTraceLayer`] emits
//! `connection.closed`. The level of this event is:
//!
//! - error for [`EndReason::Panic`];
//! - warn for other faults of the service, and for connections aborted at a shutdown's deadline.
//!   The faults of the service are the reasons with [`Initiator::Service`] that are not
//!   [orderly](crate::EndReason::is_orderly), except [`Rejected`](crate::EndReason::Rejected) and
//!   [`Aborted`](crate::EndReason::Aborted), which are intended;
//! - debug for everything else.
//!
//! Dependencies log under their own targets. rustls logs only if a crate of the program enables the
//! feature `logging` of rustls, which is a default feature. Then rustls warns of malformed input
//! from peers. The HTTP/2 library h2 warns when a peer resets streams in rapid succession. In a
//! filter of `tracing-subscriber`, the directives `rustls=error,h2=error` silence these warnings.
//!
//! # Metrics
//!
//! With the feature `metrics`, the library records metrics through the `metrics` facade. The
//! program chooses the recorder, for example one for Prometheus, and installs it before it creates
//! a `RequestMetricsLayer` and before the first connection arrives. Without a recorder nothing is
//! recorded. `describe_metrics` registers the units and descriptions. The example `observe` serves
//! the metrics to Prometheus at `/metrics`. The repository's folder `contrib` has alert rules for
//! Prometheus and a dashboard for Grafana.
//!
//! | metric | kind, unit | attributes | what to do |
//! | --- | --- | --- | --- |
//! | `tower_tcp.accepted_connections` | counter, connections | `server.name` | compare with `ended_connections`: the difference is the number of open connections |
//! | `tower_tcp.ended_connections` | counter, connections | `server.name`, `close.reason`, `close.initiator` (`peer`, `service`, `server`) | a rise by `service`: check the warnings; by `peer`: probes, scans, or a client with another version of the protocol |
//! | `tower_tcp.rejected_connections` | counter, connections | `server.name`, `close.reason` | the ended connections that were not admitted: raise the limits, or do nothing if these connections are unwelcome |
//! | `tower_tcp.connection.duration` | histogram, seconds | `server.name` | mostly very short: probes, or clients that connect for each request. Connections that `address_filter` denies are not recorded |
//! | `tower_tcp.tls_handshake.duration` | histogram, seconds | `tls.protocol.version` (`1.2`, `1.3`) or `error.type` (`truncated` and `peer_reset`: the peer left, usually a probe; `tls_handshake_failed`; `canceled`: dropped before it completed, usually at its deadline) | slow: too few processors; failing: certificates, old clients |
//! | `tower_tcp.accept.errors` | counter, errors | `server.name`, `error.type` (the error's name, such as `emfile`, or `_OTHER` for errors that the library does not name), `action` (`retry`, `back_off`, `stop`) | any `back_off`: raise the limit of file descriptors (`emfile`), or add memory |
//! | `tower_tcp.requests.active` | gauge, requests | as given to the layer | rising without end: the service waits for an event that never happens |
//! | `tower_tcp.request.duration` | histogram, seconds | as given to the layer; `error.type` (`service_error`; `canceled`: the call was dropped or panicked) | slower than before: check the service and its backends |
//! | `tower_tcp.active_connections` | gauge, connections | `server.name`, `phase` (`pre_connect`, `serving`, `draining`, `closing`: [`ConnectionPhase`](crate::ConnectionPhase)) | many in `pre_connect`: slow clients, or a flood |
//! | `tower_tcp.connection_limit` | gauge, connections | `server.name` | `active_connections` close to the limit: raise the limit, or add servers. Infinite without a limit |
//! | `tower_tcp.accept_queue.length` | gauge, connections | `server.name` | high for long: the server is at its limit, paused, or stalled. Only for TCP on Linux |
//! | `tower_tcp.connection.io` | counter, bytes | `server.name`, `direction` (`read`, `write`) | close to the network's capacity: add capacity, or shrink replies |
//! | `tower_tcp.requests` | counter, requests | `server.name` | its rate is the load: use it for capacity planning |
//! | `tower_tcp.drain.remaining` | gauge, connections | `server.name` | not falling during a shutdown: the remaining connections will be aborted at the deadline |
//!
//! The first six metrics are recorded when a connection begins or ends, a handshake ends, or an
//! accept fails. A `RequestMetricsLayer` around a service records `requests.active` and
//! `request.duration`. The last six are recorded when the program calls `Handle::collect_metrics`,
//! which reads the counters of all open connections. Call it before each scrape, or every few
//! seconds.
//!
//! `server.name` is the name set by [`ServerBuilder::name`](crate::ServerBuilder::name); without a
//! name there is no such attribute. If a process has several servers, each needs a name, or their
//! gauges overwrite each other. Handshakes have no `server.name`, because a hook does not know its
//! server.
//!
//! Choose histogram buckets of up to several hours for the durations of connections, and from 5 ms
//! to 10 s for those of handshakes and requests.
//!
//! [`Connection::on_end`]: crate::Connection::on_end
//! [`EndReason`]: crate::EndReason
//! [`EndReason::as_str`]: crate::EndReason::as_str
//! [`EndReason::Panic`]: crate::EndReason::Panic
//! [`Initiator::Service`]: crate::Initiator::Service
//! [OpenTelemetry names]: https://opentelemetry.io/docs/specs/semconv/registry/attributes/network/

mod chain;
mod connection;
#[cfg(feature = "tls")]
mod handshake;
#[cfg(feature = "metrics")]
pub(crate) mod metrics;
mod request;

pub(crate) use chain::ErrorChain;
pub use connection::{ConnectionTrace, ConnectionTraceFuture, ConnectionTraceLayer};
pub(crate) use connection::{denied, record_client};
#[cfg(feature = "tls")]
pub(crate) use handshake::Handshake;
#[cfg(feature = "metrics")]
pub use metrics::{RequestMetrics, RequestMetricsFuture, RequestMetricsLayer, describe_metrics};
pub use request::{MakeSpan, RequestSpan, RequestTrace, RequestTraceFuture, RequestTraceLayer};

/// Converts a count to a signed integer, because `tracing-opentelemetry` records an unsigned one as
/// text.
pub(crate) fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
