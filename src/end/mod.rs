//! The words for every ending: one reason, shared by callback, span, metric and log.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Who ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Initiator {
    /// The peer, by leaving, or by sending what cannot be served.
    Peer,
    /// The user's own service, layer or hook.
    Service,
    /// The library: a limit, a deadline, a shutdown.
    Server,
}

impl Initiator {
    /// Returns the lower-case word used in events and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Service => "service",
            Self::Server => "server",
        }
    }
}

impl fmt::Display for Initiator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

macro_rules! end_reasons {
    ($($(#[$doc:meta])* $name:ident = $word:literal by $who:ident,)*) => {
        /// Why a connection ended. Every connection ends exactly once, with one of these.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum EndReason {
            $($(#[$doc])* $name,)*
        }

        impl EndReason {
            /// Every reason there is, for tables and tests.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Returns the word used in events and metrics; it does not change between releases.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }

            /// Returns who ended it.
            pub fn initiator(self) -> Initiator {
                match self { $(Self::$name => Initiator::$who,)* }
            }
        }
    };
}

end_reasons! {
    /// The peer finished sending, between two frames, and has all its replies.
    PeerClosed = "peer_closed" by Peer,
    /// The peer reset the connection, or went away while being written to.
    PeerReset = "peer_reset" by Peer,
    /// The peer stopped in the middle of a frame, or left TLS without its closing word.
    Truncated = "truncated" by Peer,
    /// A frame was larger than the limit.
    FrameTooLarge = "frame_too_large" by Peer,
    /// The decoder could not read what the peer sent.
    CodecError = "codec_error" by Peer,
    /// Nothing arrived after the connection was made.
    FirstByteTimeout = "first_byte_timeout" by Server,
    /// A frame was begun and not finished in time.
    FrameTimeout = "frame_timeout" by Server,
    /// No frame arrived for too long.
    IdleTimeout = "idle_timeout" by Server,
    /// The peer did not take what was written to it.
    WriteTimeout = "write_timeout" by Server,
    /// The peer did not read what others were sent too, and was not waited for.
    SlowReader = "slow_reader" by Server,
    /// The connection reached its greatest age.
    MaxAge = "max_age" by Server,
    /// The pre-connect hooks were not through in time.
    PreConnectTimeout = "pre_connect_timeout" by Server,
    /// Too many connections were in their pre-connect hooks, and this was the oldest.
    PreConnectEvicted = "pre_connect_evicted" by Server,
    /// The TLS handshake failed.
    TlsHandshakeFailed = "tls_handshake_failed" by Peer,
    /// A pre-connect hook turned the connection away.
    Rejected = "rejected" by Service,
    /// The connection was over the limit and was turned away.
    LimitExceeded = "limit_exceeded" by Server,
    /// A stock `Timeout` layer around the connection service cut it off.
    ServiceTimeout = "service_timeout" by Service,
    /// The service ended it in good order: a closing reply, `Peer::close`, or a raw service that was done.
    ServiceClosed = "service_closed" by Service,
    /// The service aborted it.
    Aborted = "aborted" by Service,
    /// A request failed, and the error policy ends the connection then.
    ServiceError = "service_error" by Service,
    /// The request service's `poll_ready` failed.
    ServiceNotReady = "service_not_ready" by Service,
    /// The make-service failed, or was not done in time.
    MakeServiceError = "make_service_error" by Service,
    /// The encoder refused a reply.
    EncodeError = "encode_error" by Service,
    /// User code panicked.
    Panic = "panic" by Service,
    /// The stream failed otherwise.
    IoError = "io_error" by Peer,
    /// A shutdown let it finish.
    Drained = "drained" by Server,
    /// A shutdown's deadline passed before it had finished.
    DrainDeadline = "drain_deadline" by Server,
    /// The server was stopped at once: a second shutdown, an abort, or its future was dropped.
    Killed = "killed" by Server,
}

impl EndReason {
    /// Returns what an error of the stream means, where its kind says so.
    pub(crate) fn of_io(err: &std::io::Error) -> Option<Self> {
        use std::io::ErrorKind;
        match err.kind() {
            ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::NotConnected
            | ErrorKind::WriteZero
            // The system's: keepalive got no answer, or what was written was not acknowledged.
            | ErrorKind::TimedOut => Some(Self::PeerReset),
            ErrorKind::UnexpectedEof => Some(Self::Truncated),
            _ => None,
        }
    }

    /// Returns whether the connection ended in good order, with nothing lost.
    pub fn is_orderly(self) -> bool {
        matches!(
            self,
            Self::PeerClosed
                | Self::ServiceClosed
                | Self::Drained
                | Self::IdleTimeout
                | Self::FirstByteTimeout
                | Self::MaxAge
        )
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What caused an end, shared between those who are told of it.
pub(crate) type Cause = Arc<dyn StdError + Send + Sync>;

/// How a connection ended: the reason and the totals.
#[derive(Clone, Debug)]
pub struct End {
    pub(crate) reason: EndReason,
    pub(crate) cause: Option<Cause>,
    /// Half of a `Duration`, and centuries still: every connection has the room for its end.
    pub(crate) nanos: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
    pub(crate) requests: u64,
    pub(crate) messages_dropped: u64,
}

impl End {
    /// Returns the reason with its cause.
    pub(crate) fn why(&self) -> ConnectionEnded {
        ConnectionEnded {
            reason: self.reason,
            cause: self.cause.clone(),
        }
    }

    /// Returns why it ended.
    pub fn reason(&self) -> EndReason {
        self.reason
    }

    /// Returns the error behind the reason, if there was one.
    pub fn error(&self) -> Option<&(dyn StdError + Send + Sync + 'static)> {
        self.cause.as_deref()
    }

    /// Returns the time from accept to the end.
    pub fn duration(&self) -> Duration {
        Duration::from_nanos(self.nanos)
    }

    /// Returns the bytes read from the peer by what serves it; under TLS these are plain bytes.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Returns the bytes written to the peer by what serves it; under TLS these are plain bytes.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// Returns the requests that were handed to the service.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Returns the messages that were sent to the service, and were still waiting at the end. Timers that were not due are not among them.
    pub fn messages_dropped(&self) -> u64 {
        self.messages_dropped
    }
}

/// What a connection service of this crate fails with: the reason, and what caused it.
#[derive(Clone, Debug)]
pub struct ConnectionEnded {
    pub(crate) reason: EndReason,
    pub(crate) cause: Option<Cause>,
}

impl fmt::Display for ConnectionEnded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection ended: {}", self.reason)
    }
}

impl StdError for ConnectionEnded {
    /// By hand, because thiserror would name the `Arc` as the source, and nobody could downcast to what is in it.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

impl ConnectionEnded {
    /// An end that has an error behind it.
    pub(crate) fn caused(reason: EndReason, cause: impl Into<crate::error::BoxError>) -> Self {
        Self {
            reason,
            cause: Some(Arc::from(cause.into())),
        }
    }

    /// Returns why it ended.
    pub fn reason(&self) -> EndReason {
        self.reason
    }
}

impl From<EndReason> for ConnectionEnded {
    fn from(reason: EndReason) -> Self {
        Self {
            reason,
            cause: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::find_cause;

    #[test]
    fn the_cause_of_an_end_can_be_found_by_its_type() {
        let err = std::io::Error::from(std::io::ErrorKind::TimedOut);

        let ended = ConnectionEnded::caused(EndReason::IoError, err);

        assert!(find_cause::<std::io::Error>(&ended).is_some());
    }
}
