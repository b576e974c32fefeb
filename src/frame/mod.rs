//! Bytes to frames and back.
//!
//! A codec is a [`Decoder`](tokio_util::codec::Decoder) of requests and an [`Encoder`](tokio_util::codec::Encoder) of
//! replies; each connection gets its own. Here are [`Lines`] and [`Block`], and [`InOut`] to join two of which each
//! does one half. Length-prefixed frames and bare bytes are in [`tokio_util::codec`].
//! [`CodecExt`] has what can be done to any of them: map and filter what is read or written, read several frames at a
//! time, and put one codec into the frames of another. With the feature `serde`, `Serde` reads and writes documents.

mod block;
mod chunks;
mod codec_ext;
mod filter;
mod in_out;
mod input;
mod lines;
mod map;
mod output;
mod scratch;
#[cfg(feature = "serde")]
mod serde;
mod then;
mod within;

use thiserror::Error;

pub use block::{Block, BlockError};
pub use chunks::Chunks;
pub use codec_ext::CodecExt;
pub use filter::{FilterDecode, FilterEncode};
pub use in_out::InOut;
pub(crate) use input::Input;
pub use lines::{Lines, LinesError};
pub use map::{MapDecode, MapEncode};
pub(crate) use output::Output;
#[cfg(feature = "serde")]
pub use serde::{Format, Json, RecoverableSerde, Serde, SerdeError};
pub use then::{Then, ThenError};

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
