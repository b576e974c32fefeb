//! Limits the frame size of any decoder.

use bytes::BytesMut;
use tokio_util::codec::Decoder;

use super::FrameTooLarge;

/// Decodes the next item, and limits each frame to `max` bytes.
///
/// The decoder gets at most `max` bytes at a time. If `src` contains more bytes than that, but the
/// decoder returns no item, there are two cases. If the decoder consumed any bytes, it is called
/// again. If it consumed none, the frame is too large. So the limit applies to each frame, not to
/// the sum of the frames that arrived together or that make up one item.
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
        // This does not copy, unless the decoder has reallocated the buffer.
        src.unsplit(beyond);
        match decoded {
            Ok(None) if has_taken => {}
            Ok(None) => return Err(FrameTooLarge::new(max)),
            decoded => return Ok(decoded),
        }
    }
}
