//! An encrypted stream that holds no buffers while it is idle.

use std::cell::Cell;
use std::fmt;
use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::rustls::{CommonState, Error};

use super::records::Records;

/// The minimum number of bytes to ask for in a read. A read asks for as many bytes as the reader's
/// buffer has room for, plus `OVERHEAD`, but for at least `LEAST_READ` and at most `LARGEST_READ`
/// bytes.
const LEAST_READ: usize = 4 * 1024;
/// The maximum number of bytes to read at once.
const LARGEST_READ: usize = 64 * 1024;

/// The maximum number of bytes that a record without padding has besides its content: header,
/// nonce, type and tag.
const OVERHEAD: usize = 32;

/// The maximum number of bytes to encrypt at once. So while the peer does not read, at most this
/// many bytes of content are pending.
const LARGEST_WRITE: usize = 64 * 1024;

/// The maximum size, in bytes, of a record's content.
const RECORD: usize = 16 * 1024;

/// Memory that the connections of a thread share. Each connection uses it only during a call.
#[derive(Default)]
struct Scratch {
    records: Vec<u8>,
    gathered: Vec<u8>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

impl Scratch {
    /// Runs `f` with the thread's `Scratch`. If `f` uses another `TlsStream`, that stream gets a
    /// new `Scratch`.
    fn with<T>(f: impl FnOnce(&mut Self) -> T) -> T {
        // A thread that is ending no longer has this memory. In that case, new memory is allocated,
        // and freed afterwards.
        let mut scratch = SCRATCH.try_with(Cell::take).unwrap_or_default();
        let done = f(&mut scratch);
        let _ended = SCRATCH.try_with(|place| place.set(scratch));
        done
    }
}

/// The server's side of a TLS connection over a stream. Created by [`Tls`](super::Tls).
///
/// An idle connection holds no buffers. Records are decrypted and encrypted in memory that the
/// connections of a thread share. Besides the state of its session, a connection holds only an
/// incomplete record or handshake message (about 18 KiB at most), decrypted bytes that did not fit
/// into the reader's buffer (at most 22 KiB), and pending records (at most 64 KiB of content).
///
/// A write waits until all earlier records are written. It then encrypts up to 64 KiB and returns,
/// even if the peer does not take the new records yet. So flush the stream afterwards. Shutting
/// down sends `close_notify`. Reading fails with [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if
/// the stream ends without the peer's `close_notify`, because an attacker may have cut off the
/// data. Reading an invalid record fails with [`InvalidData`](io::ErrorKind::InvalidData), caused
/// by a [`rustls::Error`](super::rustls::Error), and the peer gets an alert.
///
/// Keying material cannot be exported from this stream, because rustls's unbuffered API, which the
/// stream uses, does not support it. A protocol that binds authentication to the TLS channel ([RFC
/// 9266](https://www.rfc-editor.org/rfc/rfc9266)) needs a hook of your own, which returns the
/// stream of tokio-rustls.
///
/// # Cancel safety
///
/// Dropping the future of a single `read` or `write` loses no data, because all state is in the
/// stream.
pub struct TlsStream<Io> {
    io: Io,
    records: Records,
}

impl<Io> TlsStream<Io> {
    pub(super) fn new(io: Io, records: Records) -> Self {
        Self { io, records }
    }

    /// Returns the underlying stream and the session. The parameters of the session are also in
    /// [`TlsInfo`](super::TlsInfo), one of the connection's facts.
    pub fn get_ref(&self) -> (&Io, &CommonState) {
        (&self.io, self.records.session())
    }

    pub(super) fn into_io(self) -> Io {
        self.io
    }

    /// Returns the error that ended the session, if any.
    pub(super) fn failed(&self) -> Option<io::Error> {
        self.records.failed().map(invalid)
    }

    /// Discards the records that are not written yet.
    pub(super) fn discard_output(&mut self) {
        let n = self.records.output().len();
        self.records.wrote(n);
    }

    /// Decrypts bytes that the caller has already read.
    pub(super) fn receive(&mut self, input: &mut [u8]) {
        self.records.receive(input, &mut ReadBuf::new(&mut []));
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> TlsStream<Io> {
    /// Reads once, and decrypts the bytes. Returns `false` at the end of the stream.
    pub(super) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<bool>> {
        let room = (to.remaining() + OVERHEAD).clamp(LEAST_READ, LARGEST_READ);
        Scratch::with(|scratch| {
            if scratch.records.len() < room {
                scratch.records.resize(room, 0);
            }
            let mut input = ReadBuf::new(&mut scratch.records[..room]);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut input))?;
            let input = input.filled_mut();
            if input.is_empty() {
                return Poll::Ready(Ok(false));
            }
            let had_no_output = self.records.output().is_empty();
            self.records.receive(input, to);
            // Try to send any answer of the session, such as an alert. If other output is pending,
            // the task that writes that output sends the answer, too.
            if had_no_output {
                _ = self.poll_send(cx);
            }
            Poll::Ready(Ok(true))
        })
    }

    /// Writes the pending records.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.records.output().is_empty() {
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, self.records.output()))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.records.wrote(n);
        }
        Poll::Ready(Ok(()))
    }

    /// Encrypts at most `LARGEST_WRITE` bytes, and writes as much as the stream takes. The rest
    /// becomes pending output. Returns the number of bytes that were encrypted.
    fn encrypt(
        &mut self,
        bytes: &[u8],
        records: &mut Vec<u8>,
        cx: &mut Context<'_>,
    ) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(LARGEST_WRITE)];
        if self.records.is_closed() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let n = self.records.encrypt(bytes, records).map_err(invalid)?;
        let mut left = &records[..n];
        // After a write that fails or panics, nothing more may be sent, because a part of the
        // records would be missing.
        self.records.set_closed(true);
        while !left.is_empty() && self.records.output().is_empty() {
            match Pin::new(&mut self.io).poll_write(cx, left)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(n) => left = &left[n..],
                Poll::Pending => break,
            }
        }
        self.records.set_closed(false);
        if !left.is_empty() {
            self.records.output().extend_from_slice(left);
        }
        Ok(bytes.len())
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        loop {
            this.records.take_plain(buf);
            if buf.filled().len() > before || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if let Some(err) = this.failed() {
                return Poll::Ready(Err(err));
            }
            if this.records.is_ended() {
                return Poll::Ready(Ok(()));
            }
            if !ready!(this.poll_receive(cx, buf))? {
                let truncated = "the peer ended the stream without close_notify";
                let truncated = io::Error::new(io::ErrorKind::UnexpectedEof, truncated);
                return Poll::Ready(Err(truncated));
            }
        }
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_send(cx))?;
        Poll::Ready(Scratch::with(|scratch| {
            self.encrypt(buf, &mut scratch.records, cx)
        }))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut full = bufs.iter().filter(|buf| !buf.is_empty());
        let first: &[u8] = full.next().map_or(&[], |first| first);
        if first.len() >= RECORD || full.next().is_none() {
            return self.poll_write(cx, first);
        }
        ready!(self.poll_send(cx))?;
        // Small buffers share a record.
        Poll::Ready(Scratch::with(|scratch| {
            let mut gathered = mem::take(&mut scratch.gathered);
            gathered.clear();
            for buf in bufs {
                let room = RECORD - gathered.len();
                gathered.extend_from_slice(&buf[..buf.len().min(room)]);
            }
            let written = self.encrypt(&gathered, &mut scratch.records, cx);
            scratch.gathered = gathered;
            written
        }))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.records.close();
        ready!(self.poll_send(cx))?;
        match ready!(Pin::new(&mut self.io).poll_shutdown(cx)) {
            // The peer has already ended the connection.
            Err(err) if err.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            done => Poll::Ready(done),
        }
    }
}

impl<Io: AsRawFd> AsRawFd for TlsStream<Io> {
    fn as_raw_fd(&self) -> RawFd {
        self.io.as_raw_fd()
    }
}

impl<Io: fmt::Debug> fmt::Debug for TlsStream<Io> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream")
            .field("io", &self.io)
            .finish_non_exhaustive()
    }
}

/// Converts the session's error to an `io::Error` of kind `InvalidData`.
pub(super) fn invalid(err: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, err)
}
