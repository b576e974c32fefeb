use std::io;

#[cfg(feature = "metrics")]
use tokio::time::Instant;
use tracing::Span;
use tracing::field::Empty;

use crate::end::EndReason;

/// One TLS handshake. When dropped, it records its outcome in its span, and its duration in the
/// metrics.
pub(crate) struct Handshake {
    span: Span,
    #[cfg(feature = "metrics")]
    begun: Instant,
    outcome: HandshakeOutcome,
}

/// The outcome of a handshake, recorded when the [`Handshake`] is dropped.
#[derive(Clone, Copy)]
enum HandshakeOutcome {
    /// The handshake completed, with this version of TLS.
    Done(&'static str),
    /// The handshake failed or was dropped, with this `error.type`.
    Failed(&'static str),
}

impl Handshake {
    pub(crate) fn begin() -> Self {
        Self {
            span: tracing::debug_span!(
                target: "tower_tcp",
                "TLS server handshake",
                otel.kind = "internal",
                tls.protocol.version = Empty,
                tls.resumed = Empty,
                error.type = Empty,
            ),
            #[cfg(feature = "metrics")]
            begun: Instant::now(),
            // This outcome remains if the handshake is dropped before it completes, for example
            // because its deadline passes, because the connection is evicted or aborted, or because
            // the server is dropped.
            outcome: HandshakeOutcome::Failed("canceled"),
        }
    }

    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    pub(crate) fn done(mut self, version: &'static str, resumed: bool) {
        self.span.record("tls.resumed", resumed);
        self.outcome = HandshakeOutcome::Done(version);
    }

    pub(crate) fn failed(mut self, err: &io::Error) {
        let reason = EndReason::of_io(err).unwrap_or(EndReason::TlsHandshakeFailed);
        self.outcome = HandshakeOutcome::Failed(reason.as_str());
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let (field, word) = match self.outcome {
            HandshakeOutcome::Done(version) => ("tls.protocol.version", version),
            HandshakeOutcome::Failed(why) => ("error.type", why),
        };
        self.span.record(field, word);
        #[cfg(feature = "metrics")]
        super::metrics::handshake(field, word, self.begun.elapsed());
    }
}
