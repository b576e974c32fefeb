//! The end of a connection: one reason, the same in callbacks, spans, metrics and events.

mod classify;
mod reason;

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "http")]
pub(crate) use classify::HttpProgress;
pub use classify::{DecoderStalled, FrameTooLarge};
pub use reason::{EndReason, Initiator};

/// The cause of an end, shared between all readers of it.
pub(crate) type Cause = Arc<dyn StdError + Send + Sync>;

/// The end of a connection: its reason and its totals.
#[derive(Clone, Debug)]
pub struct End {
    pub(crate) reason: EndReason,
    pub(crate) cause: Option<Cause>,
    /// The time from accept to the end, in nanoseconds. A `u64` takes half the space of a
    /// `Duration`, which matters because every connection reserves memory for its end.
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

    /// Returns the reason.
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

    /// Returns the number of bytes that the service read from the peer. Under TLS, decrypted bytes
    /// are counted.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Returns the number of bytes that the service wrote to the peer. Under TLS, bytes are counted
    /// before encryption.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// Returns the number of requests passed to the service.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Returns the number of messages that were still queued for the service at the end. Delayed
    /// messages ([`Peer::post_after`](crate::Peer::post_after)) that were not due yet are not
    /// counted.
    pub fn messages_dropped(&self) -> u64 {
        self.messages_dropped
    }
}

/// The reason a connection ended, with its cause. The crate's own connection services fail with
/// this error. Your own code can fail with it, too, to choose a connection's end reason (see
/// [`new`](Self::new)).
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
    // Written by hand, because thiserror would return the `Arc` as the source, and no downcast
    // would find the error inside the `Arc`.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

impl ConnectionEnded {
    /// Creates the error from a reason and the error that caused the end. For an end without a
    /// cause, convert the reason: `ConnectionEnded::from(EndReason::Rejected)`.
    ///
    /// If a hook, a layer, a connection service or a make-service fails with this error, or with
    /// one that has it among its causes, the connection ends with this reason. The same applies to
    /// a call of the request service in a [`Pipeline`](crate::Pipeline), even if
    /// [`shutdown_on_error`](crate::Pipeline::shutdown_on_error) is off. Errors of a codec, or of
    /// the `poll_ready` of a pipeline's request service, do not choose the reason. In
    /// [`Http`](crate::http::Http), the error of a request service chooses the reason over HTTP/1;
    /// over HTTP/2 such an error ends only its stream.
    ///
    /// Any reason is allowed. Sensible ones are those for a peer that breaks the rules
    /// ([`CodecError`](EndReason::CodecError), [`Rejected`](EndReason::Rejected),
    /// [`LimitExceeded`](EndReason::LimitExceeded)), and
    /// [`ServiceClosed`](EndReason::ServiceClosed) for an orderly end. The reason is reported in
    /// events and metrics, and determines the level of the connection's closing event. In a
    /// pipeline, the replies due before the failed call's reply are still sent, but there is no
    /// [farewell](crate::Pipeline::farewell). With [`Aborted`](EndReason::Aborted),
    /// [`DrainDeadline`](EndReason::DrainDeadline), [`Killed`](EndReason::Killed),
    /// [`SlowReader`](EndReason::SlowReader) or [`WriteTimeout`](EndReason::WriteTimeout),
    /// unwritten output is dropped, including those replies.
    ///
    /// The predicate of tower's `Filter` around a connection service may return this error, too, as
    /// in this example. If the predicate returns an error of your own type instead, the connection
    /// ends with [`ServiceError`](EndReason::ServiceError).
    ///
    /// ```
    /// use tower::ServiceBuilder;
    /// use tower_tcp::bind::Socket;
    /// use tower_tcp::{BoxError, Connection, ConnectionEnded, EndReason};
    ///
    /// let stack = ServiceBuilder::new()
    ///     .filter(|conn: Connection<Socket>| match conn.info().client_addr().tcp() {
    ///         Some(addr) if addr.ip().is_loopback() => Ok(conn),
    ///         _ => Err(ConnectionEnded::new(EndReason::Rejected, "not from here")),
    ///     })
    ///     .service_fn(|conn: Connection<Socket>| async move { Ok::<_, BoxError>(drop(conn)) });
    /// # drop(stack);
    /// ```
    pub fn new(reason: EndReason, cause: impl Into<crate::error::BoxError>) -> Self {
        Self {
            reason,
            cause: Some(Arc::from(cause.into())),
        }
    }

    /// Returns the reason.
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

        let ended = ConnectionEnded::new(EndReason::IoError, err);

        assert!(find_cause::<std::io::Error>(&ended).is_some());
    }
}
