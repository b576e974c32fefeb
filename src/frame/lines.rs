//! Lines of bytes.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use memchr::memchr;
use thiserror::Error;
use tokio_util::codec::{Decoder, Encoder};

use super::FrameTooLarge;

/// Lines of bytes that end with LF or CRLF, without their ending.
///
/// The bytes need not be text; nothing but the ending is looked at. A line takes linear time in whatever pieces it
/// comes, and nothing is reserved ahead of the bytes that came.
///
/// # Writing
///
/// Each item is written with an ending after it: LF, or CRLF for [`Lines::crlf`]. What stands in the item is written
/// as it is, so one that contains line breaks is several lines to the peer. That is how a reply of several lines is
/// written at once, and not checked, since a check would cost every reply a search: whoever puts a peer's words into
/// a reply takes the line breaks out of them. (A line that was read here has no LF, but may have a CR.)
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
    /// How much of the buffer holds no LF, so that no byte is searched twice.
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
    /// Makes lines that are written with CRLF. They are read with either, as always.
    #[must_use]
    pub fn crlf() -> Self {
        Self {
            ending: LineEnding::CrLf,
            ..Self::default()
        }
    }

    /// Sets the longest line to read, in bytes on the wire with its ending: 65,536, which is far beyond what line
    /// protocols use and bounds what one peer can make the server keep. Zero admits no line at all.
    ///
    /// A longer one is an error as soon as so many bytes have come without an LF. The error stays: every later call
    /// returns it again, since where the next line begins is not known.
    #[must_use]
    pub fn max_line(mut self, bytes: usize) -> Self {
        self.max = bytes;
        self
    }

    /// Delivers what stands without an ending at the end of the stream as the last line. By default that is an error,
    /// so that a command that was cut in half is not run.
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
        // An LF at `max` or behind it ends a line that is too long.
        let end = src.len().min(self.max);
        let start = self.searched.min(end);
        if let Some(offset) = memchr(b'\n', &src[start..end]) {
            self.searched = 0;
            let line = take_line(src, start + offset);
            src.advance(1);
            return Ok(Some(line));
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
                    Ok(Some(take_line(src, src.len())))
                }
            },
            line => Ok(line),
        }
    }
}

/// Takes the bytes up to `end` out of the buffer, and returns them without the CR at their end.
#[inline]
fn take_line(src: &mut BytesMut, end: usize) -> Bytes {
    let mut line = src.split_to(end);
    if line.last() == Some(&b'\r') {
        line.truncate(end - 1);
    }
    line.freeze()
}

// The only one: with a second, a service that returns a plain value would have to name its type.
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

/// What [`Lines`] fails with.
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
