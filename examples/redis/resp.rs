//! The codec. It decodes requests and encodes replies, in RESP2, or in RESP3 once the client has
//! requested it by HELLO. It follows the page "Redis serialization protocol specification".
//!
//! A request is an array of bulk strings, or a line of words. An array is taken out of the input as
//! one slice. No memory is reserved for an announced length, neither for the number of arguments
//! nor for the bytes of an argument. Arrays in requests are not nested.
//!
//! Only the codec knows which replies are already encoded for the peer. So it decides which
//! messages of channels the peer still gets, and in which protocol version.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use memchr::memchr;
use thiserror::Error;
use tokio_util::codec::{Decoder, Encoder};

use super::inline;

/// The maximum number of arguments of a request, as in Redis. Arguments take no memory before they
/// arrive.
const MOST_ARGS: usize = 1024 * 1024;

/// The maximum length of an inline request in bytes, as in Redis.
const LONGEST_LINE: usize = 64 * 1024;

/// The maximum size of a frame of merged messages, in bytes.
const MERGED: usize = 16 * 1024;

/// The maximum number of digits of a length. Redis' limit of a bulk string, 512 MiB, has nine. The
/// maximum also stops the search for the end of a long line of digits.
const DIGITS: usize = 9;

/// A request: the name of a command and its arguments, encoded as bulk strings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// The well-formed bulk strings, one after the other.
    bulks: Bytes,
    len: usize,
}

impl Request {
    /// Creates a request of bulk strings that are known to be well formed.
    pub(super) fn of_bulks(bulks: Bytes, len: usize) -> Self {
        Self { bulks, len }
    }

    /// Returns the number of words, including the name. It is not zero, because the codec ignores
    /// empty requests.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Iterates over the words, the name first.
    pub(crate) fn words(&self) -> Words<'_> {
        Words(&self.bulks)
    }

    /// Returns a word without copying it. The word keeps the input block in memory, so use this
    /// method only for data that is written out soon.
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

/// The error of a malformed request. It is reported to the client, and then the connection ends.
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
    /// The protocol version of replies. It changes when the reply to HELLO is encoded, so earlier
    /// replies are still encoded in the old version.
    version: Version,
    /// The channels that the peer listens to, according to the confirmations encoded so far. Most
    /// peers listen to few channels, and a small tree is searched faster than a hash table.
    channels: BTreeSet<Bytes>,
}

/// The version of the protocol. Requests are the same in both versions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Version {
    #[default]
    Resp2,
    Resp3,
}

/// The progress in parsing the request at the front of the input. Because of it, parsing a request
/// that arrives in many pieces takes linear time.
#[derive(Clone, Copy, Debug, Default)]
enum Begun {
    #[default]
    Nothing,
    /// The first `searched` bytes contain no LF.
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
    /// Creates a codec for requests of at most `max_request` bytes, including their framing.
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
            // An empty request is ignored, as in Redis.
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

/// Parses a length and its CRLF. Returns the length, and the index after the CRLF. Returns `None`
/// if they have not arrived completely.
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
    /// A malformed request is an item, not a codec error, so that it is answered in order.
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
    /// An encoded frame.
    Static(&'static [u8]),
    /// An error. Its text must contain no line break.
    Error(String),
    Integer(i64),
    Bulk(Bytes),
    /// A bulk string shared with the store.
    Value(Arc<[u8]>),
    Null,
    Array(Vec<Self>),
    /// A map. In RESP2 it is encoded as an array of keys and values.
    Map(Vec<(Self, Self)>),
    /// The reply to HELLO, which is the first reply in this version.
    Hello(Version, Box<Self>),
    /// The start of an array. Its items follow, each as a frame of its own, so an array of many
    /// large values is never in the output buffer as a whole.
    Items(usize),
    Confirmation(Box<Confirmation>),
    /// Messages of one channel.
    Messages(Arc<Messages>),
}

/// Confirms a subscription or its end.
#[derive(Clone, Debug)]
pub(crate) enum Confirmation {
    /// The channel, and the number of channels that the connection now listens to.
    Subscribed(Bytes, usize),
    /// The channel, or `None` if there was no subscription, and the number of channels that the
    /// connection still listens to.
    Unsubscribed(Option<Bytes>, usize),
}

/// Published messages of one channel. Their encoding is the same for all subscribers, except for
/// the type in the first byte of each message.
#[derive(Clone, Debug)]
pub(crate) struct Messages {
    channel: Bytes,
    /// The messages, encoded in RESP2.
    encoded: BytesMut,
    /// The index at which each message begins.
    starts: Vec<usize>,
}

impl Messages {
    /// Creates one message.
    pub(crate) fn new(channel: Bytes, payload: Bytes) -> Self {
        let mut encoded = BytesMut::with_capacity(channel.len() + payload.len() + 64);
        let parts = vec![
            Frame::text("message"),
            Frame::Bulk(channel.clone()),
            Frame::Bulk(payload),
        ];
        Frame::Array(parts).encode(Version::Resp2, &mut encoded);
        Self {
            channel,
            encoded,
            starts: vec![0],
        }
    }

    fn encode(&self, version: Version, dst: &mut BytesMut) {
        let first = dst.len();
        dst.put_slice(&self.encoded);
        if version != Version::Resp2 {
            for start in &self.starts {
                dst[first + start] = version.push();
            }
        }
    }
}

impl Frame {
    pub(crate) const OK: Self = Self::Static(b"+OK\r\n");
    pub(crate) const PONG: Self = Self::Static(b"+PONG\r\n");

    /// Creates a bulk string from a constant.
    pub(crate) fn text(text: &'static str) -> Self {
        Self::Bulk(Bytes::from_static(text.as_bytes()))
    }

    /// Appends `next` to `first` if both are messages of the same channel and fit into [`MERGED`]
    /// bytes together. Returns whether it did.
    pub(crate) fn merge(first: &mut Self, next: &Self) -> bool {
        let (Self::Messages(first), Self::Messages(next)) = (first, next) else {
            return false;
        };
        let at = first.encoded.len();
        if first.channel != next.channel || at + next.encoded.len() > MERGED {
            return false;
        }
        let first = Arc::make_mut(first);
        first.encoded.put_slice(&next.encoded);
        first
            .starts
            .extend(next.starts.iter().map(|start| at + start));
        true
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
            Self::Messages(messages) => messages.encode(version, dst),
        }
    }
}

impl Version {
    /// Returns the first byte of frames that are not replies.
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

/// Encodes a type, a number and CRLF. The digits are written by hand, because most replies contain
/// a number, and `write!` would be a third of their cost.
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
            // The peer has left the channel. It would take a message for the reply to its next
            // request.
            Frame::Messages(it) if !self.channels.contains(&it.channel) => return Ok(()),
            Frame::Confirmation(confirmation) => self.keep(confirmation),
            Frame::Hello(version, _) => self.version = *version,
            _ => {}
        }
        frame.encode(self.version, dst);
        Ok(())
    }
}
