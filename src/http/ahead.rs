//! Reads some input ahead of hyper. The first bytes of a request are read before hyper is set up.
//! While a request is answered, later input is read to notice that the peer disconnects.
//!
//! This crate sets hyper's `half_close`, which turns off hyper's own detection of a disconnect.
//! That detection does not see an end of input behind unparsed bytes. It would also cancel the
//! request of a peer that has finished sending and still waits for its response.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, ReadBuf};

use super::progress::Progress;
use crate::bind::Departing;
use crate::connection::Connection;

/// The maximum number of bytes to read ahead while a request is answered. If that many unread bytes
/// precede the end of input, the end is noticed only on a socket, through [`Departing`].
const AHEAD: usize = 512;

/// The maximum number of bytes that one read takes before hyper is set up. The head of almost every
/// request is smaller.
const FIRST: usize = 4096;

/// The first bytes of an HTTP/2 connection ([RFC 9113 section
/// 3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The protocol that the first bytes belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    Http1,
    Http2,
}

/// The input that was read ahead. hyper reads it later.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    bytes: Bytes,
    /// The end of input, or the error that cut off the input.
    end: Option<io::Result<()>>,
    watch: Watch,
}

#[derive(Debug, Default)]
enum Watch {
    /// The socket is not watched.
    #[default]
    Unwatched,
    /// The socket is watched. Boxed to keep `Watch` small, because an idle connection watches
    /// nothing.
    Watching(Box<Departing>),
    /// There is no socket to watch, or no free descriptor to watch it with.
    Blind,
}

impl Ahead {
    /// Copies into `buf` the bytes that were read ahead, or returns the end of input, which
    /// may be an error. Returns `None` if neither is left.
    #[inline]
    pub(super) fn read(&mut self, buf: &mut ReadBuf<'_>) -> Option<io::Result<()>> {
        if self.bytes.is_empty() {
            return self.end.take();
        }
        let n = self.bytes.len().min(buf.remaining());
        buf.put_slice(&self.bytes[..n]);
        self.bytes.advance(n);
        if self.bytes.is_empty() {
            // Frees the memory.
            self.bytes = Bytes::new();
        }
        Some(Ok(()))
    }

    /// Returns whether input, or its end, has been read ahead and waits for hyper.
    pub(super) fn has_input(&self) -> bool {
        !self.bytes.is_empty() || self.end.is_some()
    }

    /// Puts back bytes that hyper has read and not used.
    pub(super) fn put_back(&mut self, bytes: &[u8]) {
        let bytes = behind_empty_lines(bytes);
        if !bytes.is_empty() {
            self.bytes = Bytes::from([bytes, &self.bytes[..]].concat());
        }
    }

    fn append(&mut self, read: &[u8]) {
        self.bytes = if self.bytes.is_empty() {
            Bytes::copy_from_slice(read)
        } else {
            Bytes::from([&self.bytes[..], read].concat())
        };
    }

    /// Waits for the first bytes of a request or for the end of input, and completes with the
    /// protocol. hyper reads these bytes later.
    ///
    /// Only the first bytes of a connection can select HTTP/2.
    pub(super) fn poll_first<Io>(
        &mut self,
        conn: &mut Connection<Io>,
        cx: &mut Context<'_>,
    ) -> Poll<First>
    where
        Io: AsyncRead + Unpin,
    {
        loop {
            if self.has_input() {
                let n = self.bytes.len().min(PREFACE.len());
                let may_be_http2 = conn.life().requests() == 0 && self.bytes[..n] == PREFACE[..n];
                match may_be_http2 {
                    true if n == PREFACE.len() => return Poll::Ready(First::Http2),
                    true if self.end.is_none() => {}
                    _ => return Poll::Ready(First::Http1),
                }
            }
            let mut block = [MaybeUninit::uninit(); FIRST];
            let mut buf = ReadBuf::uninit(&mut block);
            let read = ready!(Pin::new(&mut *conn).poll_read(cx, &mut buf));
            let mut filled = buf.filled();
            if filled.is_empty() {
                self.end = Some(read);
            } else if conn.life().requests() > 0 {
                filled = behind_empty_lines(filled);
            }
            if !filled.is_empty() {
                self.append(filled);
            }
        }
    }

    /// Stops watching the socket. A watch holds a second descriptor, which would keep the socket
    /// open after the stream is dropped.
    pub(super) fn unwatch(&mut self) {
        self.watch = Watch::Unwatched;
    }

    /// Completes with an error once the peer can no longer be reached. If the peer has finished
    /// sending, also records that in the connection's `Life`.
    ///
    /// While the service holds an unread body, nothing is read ahead, because hyper would otherwise
    /// get the body in small pieces. A disconnect is then noticed only if the socket can be
    /// watched.
    pub(super) fn poll_gone<Io>(
        &mut self,
        conn: &mut Connection<Io>,
        progress: &Progress,
        cx: &mut Context<'_>,
    ) -> Poll<io::Error>
    where
        Io: AsyncRead + Unpin,
    {
        if self.may_read_ahead() && !progress.has_unread_bodies() {
            match ready!(self.poll_read_ahead(conn, cx)) {
                // hyper may be waiting for this input, so it has to be polled again.
                Ok(()) => {
                    progress.is_reading.store(false, Ordering::Relaxed);
                    cx.waker().wake_by_ref();
                }
                Err(err) => return Poll::Ready(err),
            }
        }
        if matches!(self.watch, Watch::Unwatched) {
            let peer = Departing::of(&conn.life().probe).map(Box::new);
            self.watch = peer.map_or(Watch::Blind, Watch::Watching);
        }
        let Watch::Watching(peer) = &self.watch else {
            return Poll::Pending;
        };
        if !conn.life().is_peer_done() && peer.poll_finished(cx).is_ready() {
            conn.life().peer_is_done();
        }
        ready!(peer.poll_gone(cx));
        Poll::Ready(io::ErrorKind::ConnectionReset.into())
    }

    /// Returns whether to read ahead in order to notice that the peer disconnects. If the socket
    /// can be watched, reading ahead stops once bytes are buffered, because [`Departing`] notices a
    /// disconnect without reading, and more bytes would only cost memory. If no socket can be
    /// watched, up to [`AHEAD`] bytes are read.
    fn may_read_ahead(&self) -> bool {
        let max = if matches!(self.watch, Watch::Blind) {
            AHEAD
        } else {
            1
        };
        self.end.is_none() && self.bytes.len() < max
    }

    fn poll_read_ahead<Io>(
        &mut self,
        conn: &mut Connection<Io>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>>
    where
        Io: AsyncRead + Unpin,
    {
        let mut block = [MaybeUninit::uninit(); AHEAD];
        let mut buf = ReadBuf::uninit(&mut block[self.bytes.len()..]);
        let read = ready!(Pin::new(&mut *conn).poll_read(cx, &mut buf));
        if !buf.filled().is_empty() {
            self.append(buf.filled());
            return Poll::Ready(Ok(()));
        }
        match read {
            // `UnexpectedEof` counts as the end of input, so a request that has arrived whole is
            // answered even if the TLS stream ended without `close_notify`.
            Err(err) if err.kind() != io::ErrorKind::UnexpectedEof => Poll::Ready(Err(err)),
            end => {
                conn.life().peer_is_done();
                self.end = Some(end);
                Poll::Ready(Ok(()))
            }
        }
    }
}

/// Returns the input without the empty lines at its beginning. hyper ignores empty lines before a
/// request, so they do not begin one.
fn behind_empty_lines(bytes: &[u8]) -> &[u8] {
    let lines = bytes
        .iter()
        .take_while(|byte| matches!(byte, b'\r' | b'\n'));
    &bytes[lines.count()..]
}
