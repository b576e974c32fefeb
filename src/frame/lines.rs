//! A codec for lines of bytes.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use memchr::memchr;
use thiserror::Error;
use tokio_util::codec::{Decoder, Encoder};

use super::FrameTooLarge;

/// A codec for lines of bytes that end with LF or CRLF. Items do not include the ending.
///
/// The bytes need not be text, because only the ending is interpreted. Decoding a line takes time
/// in proportion to its length, even if it arrives in many pieces. No memory is reserved for bytes
/// that have not arrived.
///
/// # Writing
///
/// Each item is written with an ending: LF, or CRLF for [`Lines::crlf`]. The item itself is written
/// unchanged, so the peer reads an item with line breaks as several lines. A reply of several lines
/// can be written this way. The codec does not check for line breaks, because a check would search
/// every reply. So a service that puts a peer's data into a reply must remove line breaks from the
/// data. A line that this codec has decoded contains no LF, but it may contain a CR.
///
/// # Examples
///
/// ```
/// use bytes::BytesMut;
/// use tokio_util::codec::Decoder;
/// use tower_tcp::frame::Lines;
///
/// let mut lines = Lines::default();
/// let mut input = BytesMut::from("EHLO here\r\nQUIT\nun");
/// assert_eq!(lines.decode(&mut input)?.as_deref(), Some(&b"EHLO here"[..]));
/// assert_eq!(lines.decode(&mut input)?.as_deref(), Some(&b"QUIT"[..]));
/// assert_eq!(lines.decode(&mut input)?, None);
/// # Ok::<_, tower_tcp::frame::LinesError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lines {
    max: usize,
    ending: LineEnding,
    unterminated: Unterminated,
    /// The number of bytes at the beginning of the buffer that contain no LF. They are not searched
    /// again.
    searched: usize,
}

#[derive(Clone, Copy, Debug)]
enum LineEnding {
    Lf,
    CrLf,
}

#[derive(Clone, Copy, Debug)]
enum Unterminated {
    Refused,
    Delivered,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            max: 65_536,
            ending: LineEnding::Lf,
            unterminated: Unterminated::Refused,
            searched: 0,
        }
    }
}

impl Lines {
    /// Creates a codec that writes CRLF. Like every `Lines`, it accepts LF and CRLF when it reads.
    #[must_use]
    pub fn crlf() -> Self {
        Self {
            ending: LineEnding::CrLf,
            ..Self::default()
        }
    }

    /// Sets the maximum length of a line to decode, in bytes on the wire, including its ending.
    /// Zero allows no line at all.
    ///
    /// Default: 65,536. Why: it is far more than line protocols use, and bounds the memory that one
    /// peer can use. When reached: decoding fails as soon as that many bytes have arrived without
    /// an LF. Every later call fails, too, because the beginning of the next line is unknown.
    ///
    /// To allow longer lines in a pipeline, raise
    /// [`Limits::max_frame`](crate::pipeline::Limits::max_frame), too.
    #[must_use]
    pub fn max_line(mut self, bytes: usize) -> Self {
        self.max = bytes;
        self
    }

    /// Makes the codec deliver an unterminated last line at the end of the stream.
    ///
    /// Default: off; such a line is an error. Why: a truncated command must not run.
    #[must_use]
    pub fn deliver_unterminated(mut self) -> Self {
        self.unterminated = Unterminated::Delivered;
        self
    }
}

impl Decoder for Lines {
    type Item = Bytes;
    type Error = LinesError;

    #[inline]
    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, LinesError> {
        // A line whose LF is at index `max` or later is too long.
        let end = src.len().min(self.max);
        let start = self.searched.min(end);
        if let Some(offset) = memchr(b'\n', &src[start..end]) {
            self.searched = 0;
            return Ok(Some(take_line(src, start + offset, 1)));
        }
        self.searched = end;
        if src.len() >= self.max {
            return Err(FrameTooLarge::new(self.max).into());
        }
        Ok(None)
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, LinesError> {
        match self.decode(src)? {
            None if src.is_empty() => Ok(None),
            None => match self.unterminated {
                Unterminated::Refused => Err(LinesError::Io(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the stream ended within a line",
                ))),
                Unterminated::Delivered => {
                    self.searched = 0;
                    Ok(Some(take_line(src, src.len(), 0)))
                }
            },
            line => Ok(line),
        }
    }
}

/// Removes a line of `len` bytes, and the LF after it, from the buffer. Returns the line without a
/// final CR. `lf` is the length of the LF: 1, or 0 for an unterminated line.
#[inline]
fn take_line(src: &mut BytesMut, len: usize, lf: usize) -> Bytes {
    let mut line = src.split_to(len + lf);
    let has_cr = len > 0 && line[len - 1] == b'\r';
    line.truncate(len - usize::from(has_cr));
    line.freeze()
}

// `Lines` must implement `Encoder` for one type only. With two, the compiler could not infer the
// type of the value that a service returns.
impl Encoder<Bytes> for Lines {
    type Error = LinesError;

    #[inline]
    fn encode(&mut self, line: Bytes, dst: &mut BytesMut) -> Result<(), LinesError> {
        dst.reserve(line.len() + 2);
        dst.put_slice(&line);
        match self.ending {
            LineEnding::Lf => dst.put_u8(b'\n'),
            LineEnding::CrLf => dst.put_slice(b"\r\n"),
        }
        Ok(())
    }
}

/// The error of [`Lines`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LinesError {
    /// A line was longer than [`max_line`](Lines::max_line).
    #[error("line too long")]
    TooLong(#[from] FrameTooLarge),
    /// The stream failed, or ended within a line ([`UnexpectedEof`](io::ErrorKind::UnexpectedEof)).
    #[error("cannot read or write lines")]
    Io(#[from] io::Error),
}
