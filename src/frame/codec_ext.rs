//! Combinators for any codec.

use std::num::NonZeroUsize;

use tokio_util::codec::{Decoder, Encoder};

use super::{Chunks, FilterDecode, FilterEncode, MapDecode, MapEncode, Then};

/// Combinators for codecs.
///
/// Each method takes a codec and returns another one. A method that changes only decoding leaves
/// encoding as it is, and the other way around. Items are moved, never cloned. If the codec encodes
/// a single type, so does the new one. Errors are those of the original codec, except in [`Then`],
/// which has two codecs.
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
/// A [`Pipeline`](crate::Pipeline) counts the items of the outermost codec as frames. So an item
/// that is filtered out is no activity, and does not extend
/// [`Deadlines::idle`](crate::deadline::Deadlines::idle). Pass a peer's heartbeats to the service
/// instead, which can answer them with `Reply::none`.
///
/// [`Limits::max_frame`](crate::pipeline::Limits::max_frame) applies to all bytes that one call of
/// the decoder takes for an item: the frames of a chunk, and frames that are filtered out in front
/// of an item, as far as they arrived together. Set `max_frame` large enough for all of these, and
/// limit single frames in the codec itself.
pub trait CodecExt: Decoder + Sized {
    /// Maps each decoded item by a function.
    ///
    /// If the function can fail, let it return a `Result`, which becomes the item. The service can
    /// then answer an invalid request, whereas an error of the codec would end the connection.
    fn map_decode<U, F>(self, f: F) -> MapDecode<Self, F>
    where
        F: FnMut(Self::Item) -> U,
    {
        MapDecode::new(self, f)
    }

    /// Maps each item by a function before encoding it.
    ///
    /// The new codec encodes the type of the function's argument, so name that type in the closure.
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

    /// Encodes nothing for the items for which a function returns `false`.
    fn filter_encode<T, F>(self, keep: F) -> FilterEncode<Self, F>
    where
        Self: Encoder<T>,
        F: FnMut(&T) -> bool,
    {
        FilterEncode::new(self, keep)
    }

    /// Decodes `size` items into one `Vec`, and encodes the items of a `Vec` in order. If one item
    /// cannot be encoded, nothing is written.
    ///
    /// At the end of the stream, the remaining items are delivered as a shorter `Vec`. The same
    /// happens before an error of the codec. A connection that ends in another way, by a deadline
    /// or a drain, drops an incomplete chunk.
    ///
    /// Up to `size - 1` items are held until the next ones arrive. They can take the memory of as
    /// many frames of the largest size, and a peer may hold that memory for as long as the
    /// pipeline's [`Deadlines::idle`](crate::deadline::Deadlines::idle).
    fn chunks(self, size: NonZeroUsize) -> Chunks<Self> {
        Chunks::new(self, size)
    }

    /// Decodes the content of this codec's frames with an inner codec, and writes each item of the
    /// inner codec as one frame of this one.
    ///
    /// The inner codec sees the contents of the frames as one stream, so its own frames may begin
    /// and end anywhere in them. It is an error if the stream ends within an inner frame. An item
    /// that the inner codec encodes to no bytes is not written.
    ///
    /// Besides the state of both codecs, at most one outer frame and one incomplete inner frame are
    /// held. [`Then::max_frame`] limits the latter. After an [upgrade](crate::Pipeline::on_upgrade)
    /// these bytes are lost: the next service does not get them.
    fn then<I>(self, inner: I) -> Then<Self, I>
    where
        Self::Item: AsRef<[u8]>,
    {
        Then::new(self, inner)
    }
}

impl<C: Decoder> CodecExt for C {}
