//! What can be done to any codec.

use std::num::NonZeroUsize;

use tokio_util::codec::{Decoder, Encoder};

use super::{Chunks, FilterDecode, FilterEncode, MapDecode, MapEncode, Then};

/// Combinators for codecs.
///
/// Each takes a codec and gives another, named as the combinator of streams that does the same. The side that is not
/// named passes unchanged, items are moved and never cloned, and where the codec encodes one type, so does what is made
/// of it. Errors are those of the codec.
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
/// To a [`Pipeline`](crate::Pipeline) a frame is what the outermost codec returns. So an item that is filtered out is
/// no activity and does not put off [`Limits::idle`](crate::pipeline::Limits::idle); a peer's heartbeats are better
/// given to the service, which answers them with no reply.
///
/// And [`Limits::max_frame`](crate::pipeline::Limits::max_frame) counts all that is decoded at once for one item: the
/// frames of a chunk, and those that were filtered out in front of it, as far as they came together. It has to be
/// large enough for these; what bounds a single frame is then the codec's own limit.
pub trait CodecExt: Decoder + Sized {
    /// Passes each decoded item through a function.
    ///
    /// One that can fail returns a `Result`, which is then the item, so that the service can answer a request that
    /// makes no sense; an error of the codec would end the connection.
    fn map_decode<U, F>(self, f: F) -> MapDecode<Self, F>
    where
        F: FnMut(Self::Item) -> U,
    {
        MapDecode::new(self, f)
    }

    /// Passes each item through a function before it is encoded. The function's argument is what the new codec
    /// encodes, so its type has to be named.
    fn map_encode<T, U, F>(self, f: F) -> MapEncode<Self, F>
    where
        Self: Encoder<U>,
        F: FnMut(T) -> U,
    {
        MapEncode::new(self, f)
    }

    /// Drops the decoded items for which a function returns `false`, and goes on with those behind them.
    fn filter_decode<F>(self, keep: F) -> FilterDecode<Self, F>
    where
        F: FnMut(&Self::Item) -> bool,
    {
        FilterDecode::new(self, keep)
    }

    /// Writes nothing for the items for which a function returns `false`.
    fn filter_encode<T, F>(self, keep: F) -> FilterEncode<Self, F>
    where
        Self: Encoder<T>,
        F: FnMut(&T) -> bool,
    {
        FilterEncode::new(self, keep)
    }

    /// Decodes so many items into one `Vec`, and encodes the items of a `Vec` one after another: all of them, or none
    /// when one of them cannot be encoded.
    ///
    /// What is left at the end of the stream is delivered as a shorter one, and so is what came before an error of
    /// the codec, with the error behind it. A connection that ends in another way, by a deadline or at a drain, drops
    /// what is not a whole chunk.
    ///
    /// Up to `size - 1` items are held while the next ones come: memory for as many frames of the largest size, which a
    /// peer may keep for as long as a pipeline's [`Limits::idle`](crate::pipeline::Limits::idle).
    fn chunks(self, size: NonZeroUsize) -> Chunks<Self> {
        Chunks::new(self, size)
    }

    /// Decodes with a second codec what is in the frames of this one, and encodes into frames of this one what the
    /// second has encoded: one for each item.
    ///
    /// The frames decoded are one stream to the inner codec: its own may begin and end anywhere in them. Where that
    /// stream ends within one of them, that is an error. An item that the inner codec encodes as no bytes is no frame.
    ///
    /// Besides what the codecs hold, at most one frame of the outer codec and an unfinished one of the inner are held,
    /// the latter limited by [`Then::max_frame`]. Both are out of reach for whoever takes over the stream.
    fn then<I>(self, inner: I) -> Then<Self, I>
    where
        Self::Item: AsRef<[u8]>,
    {
        Then::new(self, inner)
    }
}

impl<C: Decoder> CodecExt for C {}
