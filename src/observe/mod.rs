//! What can be seen of a server: spans and events, under [OpenTelemetry's names] where it has one.
//!
//! It is quiet by default. What peers do, probes and scans included, is counted and said at debug level; what is the program's own fault, or the
//! system's, is said louder. Nothing here costs a request anything unless a layer was put around the request's service.
//!
//! An end has one reason, [`EndReason`], and [`EndReason::as_str`] is its word everywhere: for the callback of
//! [`Connection::on_end`], the span and the event. What peers sent is in neither, save in the texts of errors, and there it is
//! escaped.
//!
//! # Spans
//!
//! | span | level | fields | made by |
//! | --- | --- | --- | --- |
//! | `tcp.connection` | info | `otel.kind` = `server`, `connection.id`, `network.transport`, `network.peer.address`, `network.peer.port`, `network.local.address`, `network.local.port`; at the end `close.reason`, `close.initiator`, and `otel.status_code` = `ERROR` where the closing event is a warning or more | [`ConnectionTraceLayer`] |
//! | `pre_connect` | debug | `otel.kind` = `internal` | [`PreConnectLayer`](crate::preconnect::PreConnectLayer), around its hooks |
//! | `TLS server handshake` | debug | `otel.kind` = `internal`, `tls.protocol.version`, `tls.resumed`, `error.type` (`truncated` and `peer_reset`: it left, most often a probe; `tls_handshake_failed`; `canceled`: not done in time) | `Tls`, the hook |
//! | `request` | info | `otel.kind` = `server`, `otel.status_code` = `ERROR` if the service failed | [`RequestTraceLayer`], unless told otherwise |
//!
//! Those of hooks, handshakes and requests stand in the connection's. The two of pre-connect are off where the filter stops at info.
//!
//! # Events
//!
//! | event | level | fields | what to do |
//! | --- | --- | --- | --- |
//! | `connection.closed` | by reason, below | `connection.id`, `network.peer.address`, `network.peer.port`, `close.reason`, `close.initiator`, `error`, `duration` (seconds), `bytes_read`, `bytes_written`, `requests`, `messages_dropped` | for `error`: look at the service |
//! | `request.failed` | warn | `connection.id`, `error` | a service error while the policy is off: handle it in the service |
//! | `accept.error` | debug | `error`, `error.type` | nothing: that client was gone |
//! | `accept.stalled` | warn | `error`, `error.type` | the process is out of something, mostly descriptors; said once, until it is over |
//! | `accept.resumed` | info | | |
//! | `signal.received` | info | `live` | |
//! | `a worker's thread is left behind` | warn | | it is blocked: look for what waits or computes without end in a service |
//! | `an on_end callback panicked` | error | | mend the callback; the others have run |
//! | `a socket option could not be set` | debug | `option`, `error` | nothing: that connection is served without it |
//! | `a socket's path is left behind` | debug | `path`, `error` | nothing: the next server replaces it |
//!
//! All spans and events have the target `tower_tcp`. `connection.closed` is an error event for [`EndReason::Panic`]; a warning for what the
//! service did wrong ([`Initiator::Service`] and not in good order, save [`Rejected`](crate::EndReason::Rejected) and [`Aborted`](crate::EndReason::Aborted),
//! which it meant) and for connections cut off by a shutdown's deadline; and a debug event for everything else.
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
mod request;

pub(crate) use chain::Chain;
pub use connection::{ConnectionTrace, ConnectionTraceFuture, ConnectionTraceLayer};
#[cfg(feature = "tls")]
pub(crate) use handshake::Handshake;
pub use request::{MakeSpan, RequestSpan, RequestTrace, RequestTraceFuture, RequestTraceLayer};
