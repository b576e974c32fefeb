//! The codec: requests from bytes, replies to bytes. RESP2, and RESP3 once HELLO has asked for it,
//! after the page "Redis serialization protocol specification".
//!
//! A request is an array of bulk strings, or a line of words. It is taken out of the input as one
//! slice. Nothing is reserved for an announced length, neither for the number of arguments nor for
//! the bytes of one. Arrays do not nest in requests.
//!
//! Only the codec knows which replies are already encoded for the peer. So it decides which
//! messages of channels the peer still gets, and in which version of the protocol.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use memchr::memchr;
use thiserror::Error;
use tokio_util::codec::{Decoder, Encoder};

use super::inline;

/// The most arguments of a request, as in redis. They cost nothing before they arrive.
const MOST_ARGS: usize = 1024 * 1024;

/// The longest inline request, as in redis.
const LONGEST_LINE: usize = 64 * 1024;

/// The most digits of a length. No limit needs more, and it stops the search for the end of a long
/// line of digits.
const DIGITS: usize = 9;

/// A request: a name and its arguments, in the form in which they arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// The bulk strings, one after the other, well formed.
    bulks: Bytes,
    len: usize,
}

impl Request {
    /// Creates a request of bulk strings that are known to be well formed.
    pub(super) fn of_bulks(bulks: Bytes, len: usize) -> Self {
        Self { bulks, len }
    }

    /// Returns the number of words, the name included. Never zero.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Iterates over the words, the name first.
    pub(crate) fn words(&self) -> Words<'_> {
        Words(&self.bulks)
    }

    /// Shares a word without copying. The word keeps the input block alive, so use this for what is
    /// soon written out.
    pub(crate) fn share(&self, word: &[u8]) -> Bytes {
        self.bulks.slice_ref(word)
    }
}

/// The words of a request.
#[derive(Clone)]
pub(crate) struct Words<'a>(&'a [u8]);

impl<'a> Iterator for Words<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        let (len, start) = length(self.0, 1).ok()??;
        let (word, rest) = self.0.get(start..)?.split_at_checked(len)?;
        self.0 = rest.get(2..)?;
        Some(word)
    }
}

/// The fault of a request. The connection ends after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum ProtocolError {
    #[error("invalid multibulk length")]
    ArrayLength,
    #[error("invalid bulk length")]
    BulkLength,
    #[error("expected '$', got '{}'", [*.0].escape_ascii())]
    NotBulk(u8),
    #[error("expected CRLF behind a bulk string")]
    Unterminated,
    #[error("unbalanced quotes in request")]
    Quotes,
    #[error("too big inline request")]
    LineTooLong,
    #[error("too big request")]
    TooLarge,
}

/// The codec of one connection.
#[derive(Debug)]
pub(crate) struct Resp {
    max_request: usize,
    begun: Begun,
    /// The version of replies. A reply to HELLO changes it as it is encoded, so the replies before
    /// it are still in the old version.
    version: Version,
    /// The channels that the peer has been told it listens to. Most listen to few, which a tree
    /// finds sooner than a hash.
    channels: BTreeSet<Bytes>,
}

/// The version of the protocol. Requests are the same in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Version {
    #[default]
    Resp2,
    Resp3,
}

/// The part of the request at the front of the input that has been parsed. A request in many pieces
/// thus takes linear time.
#[derive(Clone, Copy, Debug, Default)]
enum Begun {
    #[default]
    Nothing,
    /// This many bytes contain no LF.
    Line { searched: usize },
    Array {
        len: usize,
        /// The start of the bulk strings.
        body: usize,
        /// The start of the first incomplete bulk string.
        at: usize,
        left: usize,
    },
}

impl Resp {
    /// Creates a codec for requests of at most `max_request` bytes, their framing included.
    pub(crate) fn new(max_request: usize) -> Self {
        Self {
            max_request,
            begun: Begun::Nothing,
            version: Version::default(),
            channels: BTreeSet::new(),
        }
    }

    fn keep(&mut self, confirmation: &Confirmation) {
        match confirmation {
            Confirmation::Subscribed(channel, _) => {
                self.channels.insert(channel.clone());
            }
            Confirmation::Unsubscribed(Some(channel), _) => {
                self.channels.remove(channel);
            }
            Confirmation::Unsubscribed(None, _) => {}
        }
    }

    fn request(&mut self, src: &mut BytesMut) -> Result<Option<Request>, ProtocolError> {
        loop {
            let request = match self.begun {
                Begun::Nothing => match src.first() {
                    None => return Ok(None),
                    Some(b'*') => {
                        let Some((len, body)) =
                            length(src, 1).map_err(|_| ProtocolError::ArrayLength)?
                        else {
                            return Ok(None);
                        };
                        if len > MOST_ARGS {
                            return Err(ProtocolError::ArrayLength);
                        }
                        let (at, left) = (body, len);
                        self.begun = Begun::Array {
                            len,
                            body,
                            at,
                            left,
                        };
                        continue;
                    }
                    Some(_) => {
                        self.begun = Begun::Line { searched: 0 };
                        continue;
                    }
                },
                Begun::Line { searched } => self.line(src, searched)?,
                Begun::Array {
                    len,
                    body,
                    at,
                    left,
                } => self.array(src, len, body, at, left)?,
            };
            let Some(request) = request else {
                return Ok(None);
            };
            self.begun = Begun::Nothing;
            // An empty request is ignored, as in redis.
            if request.len > 0 {
                return Ok(Some(request));
            }
        }
    }

    fn line(
        &mut self,
        src: &mut BytesMut,
        searched: usize,
    ) -> Result<Option<Request>, ProtocolError> {
        let longest = LONGEST_LINE.min(self.max_request);
        let end = src.len().min(longest);
        let Some(offset) = memchr(b'\n', &src[searched..end]) else {
            if src.len() >= longest {
                return Err(ProtocolError::LineTooLong);
            }
            self.begun = Begun::Line { searched: end };
            return Ok(None);
        };
        let line = src.split_to(searched + offset);
        src.advance(1);
        inline::parse(line.strip_suffix(b"\r").unwrap_or(&line)).map(Some)
    }

    #[inline]
    fn array(
        &mut self,
        src: &mut BytesMut,
        len: usize,
        body: usize,
        mut at: usize,
        mut left: usize,
    ) -> Result<Option<Request>, ProtocolError> {
        while left > 0 {
            let Some(end) = self.bulk(src, at)? else {
                self.begun = Begun::Array {
                    len,
                    body,
                    at,
                    left,
                };
                return Ok(None);
            };
            at = end;
            left -= 1;
        }
        let mut bulks = src.split_to(at).freeze();
        bulks.advance(body);
        Ok(Some(Request::of_bulks(bulks, len)))
    }

    /// Returns the end of the bulk string at `at`, if it is complete.
    #[inline]
    fn bulk(&self, src: &[u8], at: usize) -> Result<Option<usize>, ProtocolError> {
        match src.get(at) {
            None => return Ok(None),
            Some(b'$') => {}
            Some(&other) => return Err(ProtocolError::NotBulk(other)),
        }
        let Some((len, start)) = length(src, at + 1).map_err(|_| ProtocolError::BulkLength)? else {
            return Ok(None);
        };
        if len > self.max_request {
            return Err(ProtocolError::BulkLength);
        }
        // The length is checked before the bytes arrive, so the input never holds more than the
        // limit of one request.
        let end = start + len + 2;
        if end > self.max_request {
            return Err(ProtocolError::TooLarge);
        }
        match src.get(end - 2..end) {
            None => Ok(None),
            Some(b"\r\n") => Ok(Some(end)),
            Some(_) => Err(ProtocolError::Unterminated),
        }
    }
}

struct NotLength;

/// Parses a length and its CRLF. Returns the length, and where the rest begins.
#[inline]
fn length(src: &[u8], start: usize) -> Result<Option<(usize, usize)>, NotLength> {
    let mut length = 0;
    let Some(digits) = src.get(start..) else {
        return Ok(None);
    };
    for (i, &byte) in digits.iter().enumerate() {
        match byte {
            b'0'..=b'9' if i < DIGITS => length = 10 * length + usize::from(byte - b'0'),
            b'\r' if i > 0 => {
                return match digits.get(i + 1) {
                    None => Ok(None),
                    Some(b'\n') => Ok(Some((length, start + i + 2))),
                    Some(_) => Err(NotLength),
                };
            }
            _ => return Err(NotLength),
        }
    }
    Ok(None)
}

impl Decoder for Resp {
    /// A malformed request is an item, not a codec error, so it is answered in its turn.
    type Item = Result<Request, ProtocolError>;
    type Error = io::Error;

    #[inline]
    fn decode(&mut self, src: &mut BytesMut) -> io::Result<Option<Self::Item>> {
        let request = match self.request(src) {
            Ok(None) if src.len() > self.max_request => Err(ProtocolError::TooLarge),
            request => request,
        };
        if request.is_err() {
            // The start of the next request is unknown.
            self.begun = Begun::Nothing;
            src.clear();
        }
        Ok(request.transpose())
    }
}

/// A reply, or a frame pushed to a subscriber.
#[derive(Clone, Debug)]
pub(crate) enum Frame {
    /// The bytes on the wire.
    Static(&'static [u8]),
    /// The text must contain no line break.
    Error(String),
    Integer(i64),
    Bulk(Bytes),
    /// A bulk string shared with the store.
    Value(Arc<[u8]>),
    Null,
    Array(Vec<Self>),
    /// In RESP2 an array of keys and values.
    Map(Vec<(Self, Self)>),
    /// The reply to HELLO, which is the first in this version.
    Hello(Version, Box<Self>),
    /// The start of an array. Its items follow, each as a frame of its own, so an array of many
    /// large values is never in memory as a whole.
    Items(usize),
    Confirmation(Box<Confirmation>),
    Message(Arc<Message>),
}

/// Confirms a subscription or its end.
#[derive(Clone, Debug)]
pub(crate) enum Confirmation {
    /// The channel, and how many the connection now listens to.
    Subscribed(Bytes, usize),
    /// The channel, or none if there was none, and how many are left.
    Unsubscribed(Option<Bytes>, usize),
}

/// A published message. Its bytes on the wire are the same for all subscribers, except for the type
/// at their front.
#[derive(Debug)]
pub(crate) struct Message {
    channel: Bytes,
    /// Without the type.
    encoded: Bytes,
}

impl Message {
    pub(crate) fn new(channel: Bytes, payload: Bytes) -> Self {
        let mut encoded = BytesMut::new();
        let parts = vec![
            Frame::text("message"),
            Frame::Bulk(channel.clone()),
            Frame::Bulk(payload),
        ];
        Frame::Array(parts).encode(Version::Resp2, &mut encoded);
        Self {
            channel,
            encoded: encoded.freeze().slice(1..),
        }
    }
}

impl Frame {
    pub(crate) const OK: Self = Self::Static(b"+OK\r\n");
    pub(crate) const PONG: Self = Self::Static(b"+PONG\r\n");

    /// Creates a bulk string of a text that is part of the program.
    pub(crate) fn text(text: &'static str) -> Self {
        Self::Bulk(Bytes::from_static(text.as_bytes()))
    }

    /// Creates an integer from a count.
    pub(crate) fn count(n: usize) -> Self {
        Self::Integer(i64::try_from(n).unwrap_or(i64::MAX))
    }

    fn encode(&self, version: Version, dst: &mut BytesMut) {
        match self {
            Self::Static(bytes) => dst.put_slice(bytes),
            Self::Error(text) => {
                dst.put_u8(b'-');
                dst.put_slice(text.as_bytes());
                dst.put_slice(b"\r\n");
            }
            Self::Integer(n) => put_number(dst, b':', *n),
            Self::Bulk(bytes) => put_bulk(dst, bytes),
            Self::Value(bytes) => put_bulk(dst, bytes),
            Self::Null => dst.put_slice(match version {
                Version::Resp2 => b"$-1\r\n",
                Version::Resp3 => b"_\r\n",
            }),
            Self::Array(frames) => {
                put_length(dst, b'*', frames.len());
                for frame in frames {
                    frame.encode(version, dst);
                }
            }
            Self::Map(entries) => {
                match version {
                    Version::Resp2 => put_length(dst, b'*', 2 * entries.len()),
                    Version::Resp3 => put_length(dst, b'%', entries.len()),
                }
                for (key, value) in entries {
                    key.encode(version, dst);
                    value.encode(version, dst);
                }
            }
            Self::Hello(version, told) => told.encode(*version, dst),
            Self::Items(count) => put_length(dst, b'*', *count),
            Self::Confirmation(confirmation) => confirmation.encode(version, dst),
            Self::Message(message) => {
                dst.put_u8(version.push());
                dst.put_slice(&message.encoded);
            }
        }
    }
}

impl Version {
    /// Returns the type of frames that are not replies.
    fn push(self) -> u8 {
        match self {
            Self::Resp2 => b'*',
            Self::Resp3 => b'>',
        }
    }
}

impl Confirmation {
    fn encode(&self, version: Version, dst: &mut BytesMut) {
        let (kind, channel, count) = match self {
            Self::Subscribed(channel, count) => ("subscribe", Some(channel), *count),
            Self::Unsubscribed(channel, count) => ("unsubscribe", channel.as_ref(), *count),
        };
        put_length(dst, version.push(), 3);
        put_bulk(dst, kind.as_bytes());
        match channel {
            Some(name) => put_bulk(dst, name),
            None => Frame::Null.encode(version, dst),
        }
        Frame::count(count).encode(version, dst);
    }
}

/// Encodes a bulk string.
pub(super) fn put_bulk(dst: &mut BytesMut, bytes: &[u8]) {
    dst.reserve(bytes.len() + 16);
    put_length(dst, b'$', bytes.len());
    dst.put_slice(bytes);
    dst.put_slice(b"\r\n");
}

fn put_length(dst: &mut BytesMut, kind: u8, length: usize) {
    put_number(dst, kind, i64::try_from(length).unwrap_or(i64::MAX));
}

/// Encodes a frame that begins with a number. Written by hand, because every reply has one, and
/// `write!` would be a third of the cost.
#[inline]
fn put_number(dst: &mut BytesMut, kind: u8, n: i64) {
    // The type, a sign, 19 digits, CRLF.
    let mut text = [0; 23];
    let mut at = text.len() - 2;
    text[at..].copy_from_slice(b"\r\n");
    let mut rest = n.unsigned_abs();
    loop {
        at -= 1;
        text[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if n < 0 {
        at -= 1;
        text[at] = b'-';
    }
    at -= 1;
    text[at] = kind;
    dst.put_slice(&text[at..]);
}

impl Encoder<Frame> for Resp {
    type Error = io::Error;

    #[inline]
    fn encode(&mut self, frame: Frame, dst: &mut BytesMut) -> io::Result<()> {
        match &frame {
            // The peer has left the channel. It would take this message for the reply to its next
            // request.
            Frame::Message(message) if !self.channels.contains(&message.channel) => return Ok(()),
            Frame::Confirmation(confirmation) => self.keep(confirmation),
            Frame::Hello(version, _) => self.version = *version,
            _ => {}
        }
        frame.encode(self.version, dst);
        Ok(())
    }
}
