//! Combinators for any codec.

use std::num::NonZeroUsize;

use tokio_util::codec::{Decoder, Encoder};

use super::{Chunks, FilterDecode, FilterEncode, MapDecode, MapEncode, Then, TryMapDecode};
use crate::error::ServiceError;

/// Combinators for codecs.
///
/// Each method takes a codec and returns another one. A method that changes decoding does not
/// change encoding, and vice versa, unless its description says so. Items are moved, never cloned.
/// If the codec encodes a single type, so does the new one, except that [`Then`] encodes the types
/// that its inner codec encodes. The new codec has the error type of the original one, with two
/// exceptions: [`Then`] has an error type of its own, because it combines two codecs, and
/// [`TryMapDecode`] decodes with a [`BoxError`](crate::BoxError).
///
/// ```no_run
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use tower_tcp::frame::{CodecExt, Lines};
/// use tower_tcp::{Pipeline, Server};
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), tower_tcp::Error> {
/// // Numbers, one a line; lines that begin with `#` are comments.
/// let codec = || {
///     Lines::default()
///         .filter_decode(|line| !line.starts_with(b"#"))
///         .map_decode(|line| str::from_utf8(&line).ok()?.parse::<u64>().ok())
///         .map_encode(|sum: u64| Bytes::from(sum.to_string()))
/// };
/// let double = tower::service_fn(|number: Option<u64>| async move {
///     Ok::<_, Infallible>(number.map(|number| 2 * number))
/// });
/// Server::bind("127.0.0.1:7000").await?.serve(Pipeline::new(codec).service(double)).await?;
/// # Ok(())
/// # }
/// ```
///
/// # In a pipeline
///
/// To a [`Pipeline`](crate::Pipeline), each item that the combined codec returns is a frame. So an
/// item that is filtered out does not restart
/// [`Deadlines::idle`](crate::deadline::Deadlines::idle). Do not filter out a peer's heartbeats.
/// Pass them to the service, which can answer them with `Reply::none`.
///
/// [`Limits::max_frame`](crate::pipeline::Limits::max_frame) is compared with the bytes that one
/// call of `decode` consumes before it returns an item. If several frames arrived together, one
/// call can consume many of them: all frames of one `Vec` ([`chunks`](Self::chunks)), the dropped
/// frames before the item ([`filter_decode`](Self::filter_decode)), and all outer frames that
/// contain parts of one inner frame ([`then`](Self::then)). So set `max_frame` large enough for all
/// of these, and limit a single frame in the codec itself.
pub trait CodecExt: Decoder + Sized {
    /// Converts each decoded item with a function.
    ///
    /// If the function can fail, let it return a `Result`, which becomes the item. Then the service
    /// can answer an invalid request. If an invalid request is to end the connection instead, use
    /// [`try_map_decode`](Self::try_map_decode).
    fn map_decode<U, F>(self, f: F) -> MapDecode<Self, F>
    where
        F: FnMut(Self::Item) -> U,
    {
        MapDecode::new(self, f)
    }

    /// Converts each decoded item with a function that can fail. Its error becomes an error of the
    /// codec.
    ///
    /// So in a pipeline, the connection ends with [`CodecError`](crate::EndReason::CodecError), or
    /// with [`FrameTooLarge`](crate::EndReason::FrameTooLarge) if the error has a
    /// [`FrameTooLarge`](super::FrameTooLarge) among its causes. Requests before the invalid one
    /// are still answered. If the invalid item was completed only by the end of the stream, the
    /// reason is [`Truncated`](crate::EndReason::Truncated), as for any error of a codec at the end
    /// of the stream except [`DecoderStalled`](super::DecoderStalled).
    ///
    /// If the function is a closure that uses `?`, state its error type, such as
    /// [`BoxError`](crate::BoxError).
    fn try_map_decode<U, E, F>(self, f: F) -> TryMapDecode<Self, F>
    where
        Self::Error: ServiceError,
        F: FnMut(Self::Item) -> Result<U, E>,
        E: ServiceError,
    {
        TryMapDecode::new(self, f)
    }

    /// Converts each item with a function before encoding it.
    ///
    /// The new codec encodes values of the type that the function takes, so state that type in the
    /// closure.
    fn map_encode<T, U, F>(self, f: F) -> MapEncode<Self, F>
    where
        Self: Encoder<U>,
        F: FnMut(T) -> U,
    {
        MapEncode::new(self, f)
    }

    /// Drops the decoded items for which a function returns `false`.
    fn filter_decode<F>(self, keep: F) -> FilterDecode<Self, F>
    where
        F: FnMut(&Self::Item) -> bool,
    {
        FilterDecode::new(self, keep)
    }

    /// Does not encode the items for which a function returns `false`.
    fn filter_encode<T, F>(self, keep: F) -> FilterEncode<Self, F>
    where
        Self: Encoder<T>,
        F: FnMut(&T) -> bool,
    {
        FilterEncode::new(self, keep)
    }

    /// Groups `size` decoded items into one `Vec`, and encodes the items of a `Vec` in order. If
    /// one item cannot be encoded, nothing is written.
    ///
    /// At the end of the stream, and before an error of the codec, the remaining items are
    /// delivered as a shorter `Vec`. If the connection ends in another way, for example at a
    /// deadline or in a drain, an incomplete chunk is dropped.
    ///
    /// Up to `size - 1` items wait in memory for the next ones. A peer can make the codec hold that
    /// many frames of the largest size, for as long as the pipeline's
    /// [`Deadlines::idle`](crate::deadline::Deadlines::idle).
    fn chunks(self, size: NonZeroUsize) -> Chunks<Self> {
        Chunks::new(self, size)
    }

    /// Nests an inner codec in the frames of this one. The inner codec decodes the contents of this
    /// codec's frames. Each item that the inner codec encodes becomes one frame of this codec.
    ///
    /// The inner codec gets the contents of the frames as one stream, so its own frames may begin
    /// and end anywhere in them. It is an error if the stream ends within an inner frame. If the
    /// inner codec encodes an item to no bytes, no frame is written.
    ///
    /// Besides the state of both codecs, the new codec holds at most one outer frame and one
    /// incomplete inner frame. [`Then::max_frame`] limits the latter. After an
    /// [upgrade](crate::Pipeline::on_upgrade) these bytes are lost: the next service does not get
    /// them.
    fn then<I>(self, inner: I) -> Then<Self, I>
    where
        Self::Item: AsRef<[u8]>,
    {
        Then::new(self, inner)
    }
}

impl<C: Decoder> CodecExt for C {}
