//! Joins a decoder and an encoder.

use bytes::BytesMut;
use tokio_util::codec::{Decoder, Encoder};

/// A codec made of a decoder `D` for the input and an encoder `E` for the output.
///
/// ```
/// use tokio_util::codec::BytesCodec;
/// use tower_tcp::frame::{InOut, Lines};
///
/// // Commands are lines, replies are raw bytes.
/// let codec = InOut::new(Lines::default(), BytesCodec::new());
/// # let _ = codec;
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct InOut<D, E> {
    decoder: D,
    encoder: E,
}

impl<D, E> InOut<D, E> {
    /// Joins a decoder and an encoder.
    pub fn new(decoder: D, encoder: E) -> Self {
        Self { decoder, encoder }
    }
}

impl<D: Decoder, E> Decoder for InOut<D, E> {
    type Item = D::Item;
    type Error = D::Error;

    #[inline]
    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<D::Item>, D::Error> {
        self.decoder.decode(src)
    }

    #[inline]
    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<D::Item>, D::Error> {
        self.decoder.decode_eof(src)
    }
}

impl<D, E: Encoder<T>, T> Encoder<T> for InOut<D, E> {
    type Error = E::Error;

    #[inline]
    fn encode(&mut self, item: T, dst: &mut BytesMut) -> Result<(), E::Error> {
        self.encoder.encode(item, dst)
    }
}
