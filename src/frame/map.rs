//! Codecs that convert items.

use bytes::BytesMut;
use tokio_util::codec::{Decoder, Encoder};

use crate::error::{BoxError, ServiceError};

/// A codec that converts decoded items with a function. See
/// [`CodecExt::map_decode`](super::CodecExt::map_decode).
///
/// ```
/// use bytes::BytesMut;
/// use tokio_util::codec::Decoder;
/// use tower_tcp::frame::{CodecExt, Lines};
///
/// let mut lengths = Lines::default().map_decode(|line| line.len());
/// assert_eq!(lengths.decode(&mut BytesMut::from("four\n"))?, Some(4));
/// # Ok::<_, tower_tcp::frame::LinesError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MapDecode<C, F> {
    codec: C,
    f: F,
}

impl<C, F> MapDecode<C, F> {
    pub(super) fn new(codec: C, f: F) -> Self {
        Self { codec, f }
    }
}

impl<C: Decoder, F: FnMut(C::Item) -> U, U> Decoder for MapDecode<C, F> {
    type Item = U;
    type Error = C::Error;

    #[inline]
    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<U>, C::Error> {
        Ok(self.codec.decode(src)?.map(&mut self.f))
    }

    #[inline]
    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<U>, C::Error> {
        Ok(self.codec.decode_eof(src)?.map(&mut self.f))
    }
}

impl<C: Encoder<T>, F, T> Encoder<T> for MapDecode<C, F> {
    type Error = C::Error;

    #[inline]
    fn encode(&mut self, item: T, dst: &mut BytesMut) -> Result<(), C::Error> {
        self.codec.encode(item, dst)
    }
}

/// A codec that converts decoded items with a function that can fail. See
/// [`CodecExt::try_map_decode`](super::CodecExt::try_map_decode).
///
/// ```
/// use bytes::{Bytes, BytesMut};
/// use tokio_util::codec::Decoder;
/// use tower_tcp::BoxError;
/// use tower_tcp::frame::{CodecExt, Lines};
///
/// fn number(line: Bytes) -> Result<u64, BoxError> {
///     Ok(str::from_utf8(&line)?.parse()?)
/// }
///
/// let mut numbers = Lines::default().try_map_decode(number);
/// let mut input = BytesMut::from("4\nfour\n");
/// assert_eq!(numbers.decode(&mut input)?, Some(4));
/// assert!(numbers.decode(&mut input).is_err());
/// # Ok::<_, BoxError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TryMapDecode<C, F> {
    codec: C,
    f: F,
}

impl<C, F> TryMapDecode<C, F> {
    pub(super) fn new(codec: C, f: F) -> Self {
        Self { codec, f }
    }
}

impl<C, F, U, E> Decoder for TryMapDecode<C, F>
where
    C: Decoder<Error: ServiceError>,
    F: FnMut(C::Item) -> Result<U, E>,
    E: ServiceError,
{
    type Item = U;
    type Error = BoxError;

    #[inline]
    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<U>, BoxError> {
        let item = self.codec.decode(src).map_err(Into::into)?;
        item.map(&mut self.f).transpose().map_err(Into::into)
    }

    #[inline]
    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<U>, BoxError> {
        let item = self.codec.decode_eof(src).map_err(Into::into)?;
        item.map(&mut self.f).transpose().map_err(Into::into)
    }
}

impl<C: Encoder<T>, F, T> Encoder<T> for TryMapDecode<C, F> {
    type Error = C::Error;

    #[inline]
    fn encode(&mut self, item: T, dst: &mut BytesMut) -> Result<(), C::Error> {
        self.codec.encode(item, dst)
    }
}

/// A codec that converts items with a function before it encodes them. See
/// [`CodecExt::map_encode`](super::CodecExt::map_encode).
///
/// ```
/// use bytes::{Bytes, BytesMut};
/// use tokio_util::codec::Encoder;
/// use tower_tcp::frame::{CodecExt, Lines};
///
/// let mut numbers = Lines::default().map_encode(|number: u64| Bytes::from(number.to_string()));
/// let mut output = BytesMut::new();
/// numbers.encode(42, &mut output)?;
/// assert_eq!(output, "42\n");
/// # Ok::<_, tower_tcp::frame::LinesError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MapEncode<C, F> {
    codec: C,
    f: F,
}

impl<C, F> MapEncode<C, F> {
    pub(super) fn new(codec: C, f: F) -> Self {
        Self { codec, f }
    }
}

impl<C: Decoder, F> Decoder for MapEncode<C, F> {
    type Item = C::Item;
    type Error = C::Error;

    #[inline]
    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<C::Item>, C::Error> {
        self.codec.decode(src)
    }

    #[inline]
    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<C::Item>, C::Error> {
        self.codec.decode_eof(src)
    }
}

impl<C: Encoder<U>, F: FnMut(T) -> U, T, U> Encoder<T> for MapEncode<C, F> {
    type Error = C::Error;

    #[inline]
    fn encode(&mut self, item: T, dst: &mut BytesMut) -> Result<(), C::Error> {
        self.codec.encode((self.f)(item), dst)
    }
}
