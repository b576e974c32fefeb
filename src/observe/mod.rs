//! What can be seen of a server: spans, events and metrics, under [OpenTelemetry's names] where it has one.
//!
//! It is quiet by default. What peers do, probes and scans included, is counted and said at debug level; what is the program's own fault, or the
//! system's, is said louder. Nothing here costs a request anything unless a layer was put around the request's service.
//!
//! An end has one reason, [`EndReason`], and [`EndReason::as_str`] is its word everywhere: for the callback of
//! [`Connection::on_end`], the span, the event and the metrics. Addresses of peers are in spans and events, and never in metrics, where each
//! would be a series of its own. What peers sent is in neither, save in the texts of errors, and there it is escaped.
//!
//! # Spans
//!
//! | span | level | fields | made by |
//! | --- | --- | --- | --- |
//! | `tcp.connection` | info | `otel.kind` = `server`, `connection.id`, `network.transport`, `network.peer.address`, `network.peer.port`, `network.local.address`, `network.local.port`; at the end `close.reason`, `close.initiator`, and `otel.status_code` = `ERROR` where the closing event is a warning or more | [`ConnectionTraceLayer`] |
//! | `pre_connect` | debug | `otel.kind` = `internal` | [`PreConnectLayer`](crate::preconnect::PreConnectLayer), around its hooks |
//! | `TLS server handshake` | debug | `otel.kind` = `internal`, `tls.protocol.version`, `tls.resumed`, `error.type` as that of the metric | `Tls`, the hook |
//! | `request` | info | `otel.kind` = `server`, `otel.status_code` = `ERROR` if the service failed | [`RequestTraceLayer`], unless told otherwise |
//!
//! Those of hooks, handshakes and requests stand in the connection's. The two of pre-connect are off where the filter stops at info.
//!
//! # Events
//!
//! | event | level | fields | what to do |
//! | --- | --- | --- | --- |
//! | `connection.closed` | by reason, below | `connection.id`, `network.peer.address`, `network.peer.port`, `close.reason`, `close.initiator`, `error`, `duration` (seconds), `bytes_read`, `bytes_written`, `requests`, `messages_dropped` | for `error`: look at the service |
//! | `request.failed` | warn | `connection.id`, `error` | a service error that did not end the connection, because the policy is off, or it was of one stream of HTTP/2: handle it in the service |
//! | `accept.error` | debug | `error`, `error.type` | nothing: that client was gone |
//! | `accept.stalled` | warn | `error`, `error.type` | the process is out of something, mostly descriptors; said once, until it is over |
//! | `accept.resumed` | info | | nothing: it accepts again |
//! | `signal.received` | info | `live` | nothing: a shutdown begins, with so many open |
//! | `a worker's thread is left behind` | warn | | it is blocked: look for what waits or computes without end in a service |
//! | `an on_end callback panicked` | error | | mend the callback; the others have run |
//! | `a socket option could not be set` | debug | `option`, `error` | nothing: that connection is served without it |
//! | `a socket's path is left behind` | debug | `path`, `error` | nothing: the next server replaces it |
//!
//! All spans and events have the target `tower_tcp`. `connection.closed` is an error event for [`EndReason::Panic`]; a warning for what the
//! service did wrong ([`Initiator::Service`] and not in good order, save [`Rejected`](crate::EndReason::Rejected) and [`Aborted`](crate::EndReason::Aborted),
//! which it meant) and for connections cut off by a shutdown's deadline; and a debug event for everything else.
//!
//! # Metrics
//!
//! The feature `metrics` counts through the facade of that name, whose recorder is the program's choice: one for Prometheus, say. It is installed
//! before the first connection comes; without one nothing is counted. `describe_metrics` tells it the units and what each is.
//!
//! | metric | kind, unit | attributes | what to do |
//! | --- | --- | --- | --- |
//! | `tower_tcp.accepted_connections` | counter, connections | `server.name` | compare with `ended_connections`: the difference is live |
//! | `tower_tcp.ended_connections` | counter, connections | `server.name`, `close.reason`, `close.initiator` (`peer`, `service`, `server`) | a rise by `service`: look for warnings; by `peer`: probes, scans, or a client of another version |
//! | `tower_tcp.rejected_connections` | counter, connections | `server.name`, `close.reason` | those of the ended that were not let in: more room, or nothing, if they are unwelcome |
//! | `tower_tcp.connection.duration` | histogram, seconds | `server.name` | mostly very short: probes, or clients that connect for each request |
//! | `tower_tcp.tls_handshake.duration` | histogram, seconds | `tls.protocol.version` (`1.2`, `1.3`) or `error.type` (`truncated` and `peer_reset`: it left, most often a probe; `tls_handshake_failed`; `canceled`: not done in time) | slow: too few processors; failing: certificates, old clients |
//! | `tower_tcp.accept.errors` | counter, errors | `server.name`, `error.type` (the error's name, such as `emfile`; `_OTHER`), `action` (`retry`, `back_off`, `stop`) | any `back_off`: raise the limit of descriptors (`emfile`), add memory |
//! | `tower_tcp.requests.active` | gauge, requests | those given to the layer | rising without end: the service waits for something that does not come |
//! | `tower_tcp.request.duration` | histogram, seconds | those given to the layer; `error.type` (`service_error`; `canceled`: nobody waited any more, or it panicked) | slower than it was: look at the service, and at what it asks |
//! | `tower_tcp.active_connections` | gauge, connections | `server.name`, `phase` (`pre_connect`, `serving`, `draining`, `closing`: [`ConnectionPhase`](crate::ConnectionPhase)) | many `pre_connect`: slow clients, or a flood |
//! | `tower_tcp.connection_limit` | gauge, connections | `server.name` | near to it: raise it, or add servers |
//! | `tower_tcp.accept_queue.length` | gauge, connections | `server.name` | more than a few, for long: at the limit, paused, or stalled. TCP on Linux only |
//! | `tower_tcp.connection.io` | counter, bytes | `server.name`, `direction` (`read`, `write`) | near to what the network carries: more of it, or smaller replies |
//! | `tower_tcp.requests` | counter, requests | `server.name` | its rate is the load: plan for it |
//! | `tower_tcp.drain.remaining` | gauge, connections | `server.name` | while a shutdown waits: not falling means that it will end by its deadline |
//!
//! The first six are recorded as it happens, where connections come and go; those of requests by `RequestMetricsLayer`, around the service that is to
//! be measured. The rest is read from the server's own table when `Handle::collect_metrics` is called: before each scrape, or every few
//! seconds.
//!
//! `server.name` is the name from [`ServerBuilder::name`](crate::ServerBuilder::name), and left out without one. Where a process has several
//! servers, each needs one: gauges without would overwrite each other. Handshakes are not told apart by server: a hook does not know whose it is. Durations of connections want buckets up to hours, those of handshakes and requests of 5 ms to 10 s.
//!
//! [`Connection::on_end`]: crate::Connection::on_end
//! [`EndReason`]: crate::EndReason
//! [`EndReason::as_str`]: crate::EndReason::as_str
//! [`EndReason::Panic`]: crate::EndReason::Panic
//! [`Initiator::Service`]: crate::Initiator::Service
//! [OpenTelemetry's names]: https://opentelemetry.io/docs/specs/semconv/registry/attributes/network/

mod chain;
mod connection;
#[cfg(feature = "tls")]
mod handshake;
#[cfg(feature = "metrics")]
pub(crate) mod metrics;
mod request;

pub(crate) use chain::ErrorChain;
pub use connection::{ConnectionTrace, ConnectionTraceFuture, ConnectionTraceLayer};
#[cfg(feature = "tls")]
pub(crate) use handshake::Handshake;
#[cfg(feature = "metrics")]
pub use metrics::{RequestMetrics, RequestMetricsFuture, RequestMetricsLayer, describe_metrics};
pub use request::{MakeSpan, RequestSpan, RequestTrace, RequestTraceFuture, RequestTraceLayer};

/// OpenTelemetry's integers are signed: of one that is not, its exporters make text.
pub(crate) fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
