//! Codecs, which convert bytes to frames and back.
//!
//! A codec is a [`Decoder`](tokio_util::codec::Decoder) of requests and an
//! [`Encoder`](tokio_util::codec::Encoder) of replies. Each connection gets a codec of its own.
//! This module contains the codecs [`Lines`] and [`Block`], and [`InOut`], which joins a decoder
//! and an encoder. For length-prefixed frames and raw bytes, use the codecs of
//! [`tokio_util::codec`].
//!
//! [`CodecExt`] adapts any codec: it maps and filters items, groups frames, and nests one codec in
//! the frames of another. With the feature `serde`, the codec `Serde` reads and writes
//! length-prefixed documents, as JSON by default.

mod block;
mod chunks;
mod codec_ext;
mod filter;
mod in_out;
mod lines;
mod map;
#[cfg(feature = "serde")]
mod serde;
mod stall;
mod then;
mod within;

pub use block::{Block, BlockError};
pub use chunks::Chunks;
pub use codec_ext::CodecExt;
pub use filter::{FilterDecode, FilterEncode};
pub use in_out::InOut;
pub use lines::{Lines, LinesError};
pub use map::{MapDecode, MapEncode, TryMapDecode};
#[cfg(feature = "serde")]
pub use serde::{Format, Json, RecoverableSerde, Serde, SerdeError};
pub use then::{Then, ThenError};

pub use crate::end::{DecoderStalled, FrameTooLarge};
