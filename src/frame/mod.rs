//! Bytes to frames and back.
//!
//! A codec is a [`Decoder`](tokio_util::codec::Decoder) of requests and an [`Encoder`](tokio_util::codec::Encoder) of
//! replies; each connection gets its own. Here are [`Lines`] and [`Block`], and [`InOut`] to join two of which each
//! does one half. Length-prefixed frames and bare bytes are in [`tokio_util::codec`].

mod block;
mod in_out;
mod input;
mod lines;
mod output;
mod scratch;

use thiserror::Error;

pub use block::{Block, BlockError};
pub use in_out::InOut;
pub(crate) use input::Input;
pub use lines::{Lines, LinesError};
pub(crate) use output::Output;

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
