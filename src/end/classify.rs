//! Maps errors to [`EndReason`]s. The modules share these functions, so that they do not map the
//! same error to different reasons.
//!
//! | error of | classified by |
//! | --- | --- |
//! | a stream | [`EndReason::of_io`] |
//! | a pipeline's decoder, in `decode` | [`EndReason::of_decoder`] |
//! | hyper | `EndReason::of_hyper` |
//! | a connection's stack | [`EndReason::of_stack`] |
//!
//! An error of a service, a layer, a hook or a make-service may contain a [`ConnectionEnded`]. Then
//! [`ConnectionEnded::of`] takes the reason from it. There are two exceptions: an error of the
//! `poll_ready` of a pipeline's service, and an error of an HTTP/2 request, which ends only its
//! stream.

use std::error::Error as StdError;
use std::io;

use thiserror::Error;
use tokio_util::codec::{AnyDelimiterCodecError, LengthDelimitedCodecError, LinesCodecError};
use tower::load_shed::error::Overloaded;
use tower::timeout::error::Elapsed;

use super::{ConnectionEnded, EndReason};
use crate::error::{BoxError, find_cause};

/// The error for a frame that is larger than the codec or the pipeline allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("frame larger than {limit} bytes")]
pub struct FrameTooLarge {
    limit: usize,
}

impl FrameTooLarge {
    /// Creates the error for a limit in bytes. If a decoder's `decode` returns it, the connection
    /// ends with [`EndReason::FrameTooLarge`](crate::EndReason::FrameTooLarge). If `decode_eof`
    /// returns it, the reason is [`EndReason::Truncated`](crate::EndReason::Truncated), as for any
    /// error of `decode_eof` except [`DecoderStalled`]. If an encoder returns it, the reason is
    /// [`EndReason::EncodeError`](crate::EndReason::EncodeError), as for any error of an encoder.
    pub fn new(limit: usize) -> Self {
        Self { limit }
    }
}

/// The error for a decoder that keeps returning frames without consuming input. The connection ends
/// with [`EndReason::CodecError`](crate::EndReason::CodecError).
///
/// A decoder may split one frame into many, and so return frames without consuming input: up to
/// 65,536 in a row, or up to the number of bytes in
/// [`max_frame`](crate::pipeline::Limits::max_frame) if that is more. A codec around the decoder
/// may skip items, as [`FilterDecode`](crate::frame::FilterDecode) does. The decoder may return up
/// to 1,048,576 such items in a row without consuming input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the decoder returned too many frames in a row without taking input")]
#[non_exhaustive]
pub struct DecoderStalled;

impl EndReason {
    /// Classifies an error of the stream, if its kind is specific enough.
    pub(crate) fn of_io(err: &io::Error) -> Option<Self> {
        use io::ErrorKind;
        match err.kind() {
            ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::NotConnected
            | ErrorKind::WriteZero
            // The system reports this if a keepalive probe or written data was not acknowledged.
            | ErrorKind::TimedOut => Some(Self::PeerReset),
            ErrorKind::UnexpectedEof => Some(Self::Truncated),
            _ => None,
        }
    }

    /// Classifies an error of a decoder of this crate, of tokio-util, or of the user.
    pub(crate) fn of_decoder(err: &(dyn StdError + 'static)) -> Self {
        let too_large = find_cause::<FrameTooLarge>(err).is_some()
            || find_cause::<LengthDelimitedCodecError>(err).is_some()
            || find_cause::<LinesCodecError>(err)
                .is_some_and(|err| matches!(err, LinesCodecError::MaxLineLengthExceeded))
            || find_cause::<AnyDelimiterCodecError>(err)
                .is_some_and(|err| matches!(err, AnyDelimiterCodecError::MaxChunkLengthExceeded));
        if too_large {
            Self::FrameTooLarge
        } else {
            Self::CodecError
        }
    }

    /// Classifies an error of a connection's stack that does not contain a [`ConnectionEnded`].
    pub(crate) fn of_stack(err: &(dyn StdError + 'static)) -> Self {
        if find_cause::<Elapsed>(err).is_some() {
            return Self::ServiceTimeout;
        }
        if find_cause::<Overloaded>(err).is_some() {
            return Self::LimitExceeded;
        }
        find_cause::<io::Error>(err)
            .and_then(Self::of_io)
            .unwrap_or(Self::ServiceError)
    }
}

impl ConnectionEnded {
    /// Converts an error. The reason is that of the first `ConnectionEnded` in the chain of causes,
    /// or `otherwise` if there is none.
    #[cold]
    pub(crate) fn of(err: BoxError, otherwise: EndReason) -> Self {
        match err.downcast::<Self>() {
            Ok(ended) => *ended,
            Err(err) => {
                let reason = find_cause::<Self>(&*err).map_or(otherwise, Self::reason);
                Self::new(reason, err)
            }
        }
    }
}

/// The state of an HTTP connection when it failed. hyper's error does not contain this state.
#[cfg(feature = "http")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct HttpProgress {
    /// A request is in progress.
    pub(crate) is_busy: bool,
    /// HTTP/2 only: a `GOAWAY` has told the peer that too many small data frames are unread.
    pub(crate) has_unread_data: bool,
    /// The peer has finished sending.
    pub(crate) is_peer_done: bool,
}

/// Returns whether the connection ended with `ENHANCE_YOUR_CALM`. h2 sends it if too many small
/// data frames are unread, or if the peer causes excessive load in another way, for example by many
/// resets. This crate does not depend on h2, so it recognizes the error by its text.
#[cfg(feature = "http")]
fn is_excessive_load(err: &hyper::Error) -> bool {
    let cause = StdError::source(err).map(ToString::to_string);
    cause.is_some_and(|cause| cause.contains("excessive load"))
}

#[cfg(feature = "http")]
impl EndReason {
    /// Classifies an error of hyper's connection that does not contain a [`ConnectionEnded`].
    pub(crate) fn of_hyper(err: &(dyn StdError + 'static), progress: HttpProgress) -> Self {
        let of_io = || {
            let reason = Self::of_io(find_cause::<io::Error>(err)?);
            // If the peer has finished sending, the stream did not fail, but hyper reached the end
            // of input within an HTTP/2 frame.
            let cut_off = || progress.is_peer_done.then_some(Self::Truncated);
            Some(reason.or_else(cut_off).unwrap_or(Self::IoError))
        };
        let Some(hyper) = find_cause::<hyper::Error>(err) else {
            // The first bytes of a connection are read without hyper, so an error there is not a
            // `hyper::Error`.
            return of_io().unwrap_or(Self::ServiceError);
        };
        if hyper.is_user() {
            Self::ServiceError
        } else if hyper.is_parse_too_large() {
            Self::FrameTooLarge
        } else if hyper.is_parse() {
            Self::CodecError
        } else if hyper.is_incomplete_message() {
            if progress.is_busy {
                // The peer left before the response.
                Self::PeerReset
            } else {
                Self::Truncated
            }
        } else if progress.has_unread_data && is_excessive_load(hyper) {
            Self::UnreadData
        } else if hyper.is_timeout() {
            // An HTTP/2 ping was not answered.
            Self::PeerReset
        } else {
            of_io().unwrap_or(Self::CodecError)
        }
    }

    /// Classifies hyper's error of the body of an HTTP/1 request, which a service has passed on as
    /// its own error.
    pub(crate) fn of_request_body(err: &hyper::Error) -> Self {
        match find_cause::<io::Error>(err).map(io::Error::kind) {
            // The kinds that hyper's decoder of chunks uses.
            Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => Self::CodecError,
            // The peer left before the response.
            _ => Self::PeerReset,
        }
    }

    /// Returns whether the reason is a failure of the stream.
    pub(crate) fn is_of_stream(self) -> bool {
        matches!(self, Self::PeerReset | Self::Truncated | Self::IoError)
    }
}
