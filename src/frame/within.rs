//! One limit for what a decoder takes for a frame.

use bytes::BytesMut;
use tokio_util::codec::Decoder;

use super::FrameTooLarge;

/// Decodes the next item out of frames that are at most `max` bytes each.
///
/// The decoder is shown `max` bytes at a time and the rest when it has taken some, so that what counts is a frame, not
/// how many of them came together nor how many the decoder takes for one item.
#[inline]
pub(crate) fn decode_within<D: Decoder>(
    max: usize,
    decoder: &mut D,
    src: &mut BytesMut,
) -> Result<Result<Option<D::Item>, D::Error>, FrameTooLarge> {
    loop {
        if src.len() <= max {
            return Ok(decoder.decode(src));
        }
        let beyond = src.split_off(max);
        let decoded = decoder.decode(src);
        let has_taken = src.len() < max;
        // Free, unless the decoder has moved what it was shown.
        src.unsplit(beyond);
        match decoded {
            Ok(None) if has_taken => {}
            Ok(None) => return Err(FrameTooLarge::new(max)),
            decoded => return Ok(decoded),
        }
    }
}
