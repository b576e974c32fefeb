//! Why a connection ended, out of what hyper says of it.

use std::error::Error as StdError;
use std::io;

use super::requests::Progress;
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, find_cause};

pub(super) fn classify(err: BoxError, progress: &Progress) -> ConnectionEnded {
    ConnectionEnded::caused(reason(&*err, progress), err)
}

fn reason(err: &(dyn StdError + 'static), progress: &Progress) -> EndReason {
    if let Some(ended) = find_cause::<ConnectionEnded>(err) {
        return ended.reason();
    }
    let of_io = || {
        let io = find_cause::<io::Error>(err)?;
        let told = EndReason::of_io(io);
        // The stream has not failed: hyper met its end within a frame of HTTP/2.
        let cut_off = || {
            progress
                .life()
                .is_peer_done()
                .then_some(EndReason::Truncated)
        };
        Some(told.or_else(cut_off).unwrap_or(EndReason::IoError))
    };
    let Some(hyper) = find_cause::<hyper::Error>(err) else {
        // The first bytes are read without hyper.
        return of_io().unwrap_or(EndReason::ServiceError);
    };
    if hyper.is_user() {
        EndReason::ServiceError
    } else if hyper.is_parse_too_large() {
        EndReason::FrameTooLarge
    } else if hyper.is_parse() {
        EndReason::CodecError
    } else if hyper.is_incomplete_message() {
        if progress.is_busy() {
            // It did not stay for the answer.
            EndReason::PeerReset
        } else {
            EndReason::Truncated
        }
    } else if hyper.is_timeout() {
        // An HTTP/2 ping was not answered.
        EndReason::PeerReset
    } else {
        of_io().unwrap_or(EndReason::CodecError)
    }
}

/// Returns whether it was the stream that failed.
pub(super) fn is_of_stream(reason: EndReason) -> bool {
    matches!(
        reason,
        EndReason::PeerReset | EndReason::Truncated | EndReason::IoError
    )
}
