use std::fmt;

use thiserror::Error;

/// The error of a send or a flush if the connection is closing, was upgraded or has ended. A
/// message to a draining connection fails with this error, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the connection is gone")]
#[doc(alias = "Gone")]
pub struct Closed;

/// The error of a send for which there is no room now, or which the connection no longer accepts.
/// It contains the value that was not sent.
#[derive(Clone, Copy, PartialEq, Eq, Error)]
pub enum TrySendError<V> {
    /// The send would have to wait, or, for `post_after`, too many timers are set.
    #[error("no room for it now")]
    Full(V),
    /// The connection is closing, was upgraded or has ended. A message to a draining connection
    /// fails with this error, too.
    #[error("the connection is gone")]
    Closed(V),
}

impl<V> TrySendError<V> {
    /// Returns the value that was not sent.
    pub fn into_inner(self) -> V {
        match self {
            Self::Full(it) | Self::Closed(it) => it,
        }
    }
}

impl<V> fmt::Debug for TrySendError<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "Full(..)",
            Self::Closed(_) => "Closed(..)",
        })
    }
}
