//! Codecs that filter items.

use bytes::BytesMut;
use tokio_util::codec::{Decoder, Encoder};

use super::stall::Stall;

/// A codec that drops some decoded items. See
/// [`CodecExt::filter_decode`](super::CodecExt::filter_decode).
///
/// ```
/// use bytes::BytesMut;
/// use tokio_util::codec::Decoder;
/// use tower_tcp::frame::{CodecExt, Lines};
///
/// let mut lines = Lines::default().filter_decode(|line| !line.is_empty());
/// assert_eq!(lines.decode(&mut BytesMut::from("\n\nline\n"))?.as_deref(), Some(&b"line"[..]));
/// # Ok::<_, tower_tcp::frame::LinesError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct FilterDecode<C, F> {
    codec: C,
    keep: F,
}

impl<C, F> FilterDecode<C, F> {
    pub(super) fn new(codec: C, keep: F) -> Self {
        Self { codec, keep }
    }
}

impl<C: Decoder, F: FnMut(&C::Item) -> bool> Decoder for FilterDecode<C, F> {
    type Item = C::Item;
    type Error = C::Error;

    #[inline]
    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<C::Item>, C::Error> {
        // `None` means that nothing more can be decoded. So a dropped item does not yield `None`;
        // the next item is decoded instead.
        let mut stall = Stall::new(src);
        while let Some(item) = self.codec.decode(src)? {
            if (self.keep)(&item) {
                return Ok(Some(item));
            }
            stall.count(src)?;
        }
        Ok(None)
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<C::Item>, C::Error> {
        let mut stall = Stall::new(src);
        while let Some(item) = self.codec.decode_eof(src)? {
            if (self.keep)(&item) {
                return Ok(Some(item));
            }
            stall.count(src)?;
        }
        Ok(None)
    }
}

impl<C: Encoder<T>, F, T> Encoder<T> for FilterDecode<C, F> {
    type Error = C::Error;

    #[inline]
    fn encode(&mut self, item: T, dst: &mut BytesMut) -> Result<(), C::Error> {
        self.codec.encode(item, dst)
    }
}

/// A codec that encodes only some items. See
/// [`CodecExt::filter_encode`](super::CodecExt::filter_encode).
///
/// ```
/// use bytes::{Bytes, BytesMut};
/// use tokio_util::codec::Encoder;
/// use tower_tcp::frame::{CodecExt, Lines};
///
/// let mut lines = Lines::default().filter_encode(|line: &Bytes| !line.is_empty());
/// let mut output = BytesMut::new();
/// lines.encode(Bytes::new(), &mut output)?;
/// lines.encode(Bytes::from("line"), &mut output)?;
/// assert_eq!(output, "line\n");
/// # Ok::<_, tower_tcp::frame::LinesError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct FilterEncode<C, F> {
    codec: C,
    keep: F,
}

impl<C, F> FilterEncode<C, F> {
    pub(super) fn new(codec: C, keep: F) -> Self {
        Self { codec, keep }
    }
}

impl<C: Decoder, F> Decoder for FilterEncode<C, F> {
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

impl<C: Encoder<T>, F: FnMut(&T) -> bool, T> Encoder<T> for FilterEncode<C, F> {
    type Error = C::Error;

    #[inline]
    fn encode(&mut self, item: T, dst: &mut BytesMut) -> Result<(), C::Error> {
        if (self.keep)(&item) {
            self.codec.encode(item, dst)
        } else {
            Ok(())
        }
    }
}
