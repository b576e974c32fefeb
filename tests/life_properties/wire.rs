//! The protocol of the test: its requests, its frames and their codec.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio_util::codec::{Decoder, Encoder};

use super::record::Conn;

/// The framing of the first pipeline, and of the pipeline it upgrades to: lines, and frames with a
/// length prefix.
pub(crate) const LINES: usize = 0;
pub(crate) const PREFIXED: usize = 1;
/// After both: a raw service, which has no frames.
pub(crate) const RAW: usize = 2;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Request {
    /// The action, its delay and its count; the rest makes the request unique.
    Command(String),
    /// Bytes after a change of the codec's mode.
    Block(Vec<u8>),
}

/// A frame that the server writes. If `block` is not zero, the decoder takes that many bytes as the
/// next request.
pub(crate) struct Out {
    pub(crate) conn: Arc<Conn>,
    pub(crate) leg: usize,
    pub(crate) tag: Tag,
    pub(crate) block: usize,
}

/// Identifies a frame within its leg. The length of its text follows from its numbers, so a missing
/// part is noticed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tag {
    pub(crate) kind: Kind,
    /// The call it answers, or the task that pushed it.
    pub(crate) of: usize,
    pub(crate) n: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Reply,
    LastReply,
    Push,
    Farewell,
}

impl Tag {
    pub(crate) fn text(self) -> String {
        let Self { kind, of, n } = self;
        let kind = match kind {
            Kind::Reply => 'r',
            Kind::LastReply => 'l',
            Kind::Push => 'p',
            Kind::Farewell => 'f',
        };
        let rest = if (of + n).is_multiple_of(17) {
            700
        } else {
            (of * 7 + n * 13) % 40
        };
        format!("{kind}.{of}.{n}.{}", "x".repeat(rest))
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let kind = match parts.next()? {
            "r" => Kind::Reply,
            "l" => Kind::LastReply,
            "p" => Kind::Push,
            "f" => Kind::Farewell,
            _ => return None,
        };
        let of = parts.next()?.parse().ok()?;
        let n = parts.next()?.parse().ok()?;
        Some(Self { kind, of, n }).filter(|tag| tag.text() == text)
    }
}

pub(crate) fn put_frame(leg: usize, text: &str, buf: &mut impl BufMut) {
    if leg == PREFIXED {
        buf.put_u16(u16::try_from(text.len()).unwrap());
        buf.put_slice(text.as_bytes());
    } else {
        buf.put_slice(text.as_bytes());
        buf.put_u8(b'\n');
    }
}

pub(crate) fn take_frame(leg: usize, buf: &mut BytesMut) -> Option<BytesMut> {
    if leg == PREFIXED {
        let len = usize::from(u16::from_be_bytes(buf.get(..2)?.try_into().unwrap()));
        if buf.len() < 2 + len {
            return None;
        }
        buf.advance(2);
        return Some(buf.split_to(len));
    }
    let end = buf.iter().position(|byte| *byte == b'\n')?;
    let line = buf.split_to(end);
    buf.advance(1);
    Some(line)
}

/// A codec of commands, and of the block that follows a change of mode.
pub(crate) struct Modal {
    pub(crate) leg: usize,
    pub(crate) block: usize,
}

impl Decoder for Modal {
    type Item = Request;
    type Error = io::Error;

    fn decode(&mut self, buf: &mut BytesMut) -> io::Result<Option<Request>> {
        if self.block > 0 {
            if buf.len() < self.block {
                return Ok(None);
            }
            let block = buf.split_to(std::mem::take(&mut self.block));
            return Ok(Some(Request::Block(block.to_vec())));
        }
        let Some(frame) = take_frame(self.leg, buf) else {
            return Ok(None);
        };
        match String::from_utf8(frame.to_vec()) {
            Ok(command) => Ok(Some(Request::Command(command))),
            Err(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl Encoder<Out> for Modal {
    type Error = io::Error;

    fn encode(&mut self, out: Out, buf: &mut BytesMut) -> io::Result<()> {
        let before = buf.len();
        put_frame(self.leg, &out.tag.text(), buf);
        self.block = self.block.max(out.block);
        out.conn.log().encoded(&out, buf.len() - before);
        Ok(())
    }
}

/// A stream that records how much is written to it.
pub(crate) struct Watched {
    pub(crate) io: DuplexStream,
    pub(crate) conn: Arc<Conn>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.conn.log().wrote(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
