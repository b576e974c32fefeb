//! Bytes to frames and back.

use thiserror::Error;

/// A frame was larger than the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("frame larger than {limit} bytes")]
pub struct FrameTooLarge {
    limit: usize,
}

impl FrameTooLarge {
    /// Makes the error for a limit in bytes, for use by codecs: the pipeline then knows why the connection ended.
    pub fn new(limit: usize) -> Self {
        Self { limit }
    }
}
