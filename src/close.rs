//! Closes a connection in good order: flush, shut down writing, linger, close.
//!
//! A socket that is closed with unread input, or with input still on its way, is *reset*. The reset
//! can overtake and destroy data written before: of a reply of 1,000,000 bytes, 49,152 arrived. So
//! an orderly close first shuts down writing, which under TLS sends `close_notify`. Then it reads
//! and discards input for a limited time, until the peer has closed as well. [RFC 9112 section 9.6]
//! describes the same for HTTP.
//!
//! [RFC 9112 section 9.6]: https://www.rfc-editor.org/rfc/rfc9112#section-9.6

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::connection::Connection;
use crate::deadline::after;
use crate::end::EndReason;

/// The bounds of an orderly close.
#[derive(Clone, Copy, Debug)]
pub struct Linger {
    write: Duration,
    time: Duration,
    bytes: usize,
}

impl Default for Linger {
    fn default() -> Self {
        Self {
            write: Duration::from_secs(30),
            time: Duration::from_secs(2),
            bytes: 256 * 1024,
        }
    }
}

impl Linger {
    /// Sets the time for flushing and shutting down writing.
    ///
    /// Default: 30 s, like [`Deadlines::write`](crate::deadline::Deadlines::write). Why: a peer
    /// that does not read must not keep its connection open. When reached: the connection ends with
    /// [`WriteTimeout`](EndReason::WriteTimeout).
    #[must_use]
    pub fn write(mut self, time: Duration) -> Self {
        self.write = time;
        self
    }

    /// Sets the time to wait for the peer to close.
    ///
    /// Default: 2 s. Why: a reply can cross the network and be read in that time. When reached: the
    /// socket is closed.
    #[must_use]
    pub fn time(mut self, time: Duration) -> Self {
        self.time = time;
        self
    }

    /// Sets the number of bytes to read and discard while waiting for the peer to close.
    ///
    /// Default: 256 KiB. Why: it is as much as fits in a socket's buffer on most systems, and a
    /// peer that sends more does not react to the close. When reached: the socket is closed.
    #[must_use]
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> Connection<Io> {
    /// Closes the connection in good order.
    ///
    /// It flushes, shuts down writing (under TLS with `close_notify`), and reads for a limited
    /// time, so that a reset does not destroy data written before. A [`Pipeline`](crate::Pipeline)
    /// does this by itself. A service that works on the stream calls it at its end.
    ///
    /// # Errors
    ///
    /// Returns an error if flushing or shutting down fails, or takes longer than [`Linger::write`]
    /// ([`TimedOut`](io::ErrorKind::TimedOut)). After that all data is written, so it is no error
    /// if the peer sends more, resets, or does not close.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the stream as it is.
    pub async fn close(mut self, linger: Linger) -> io::Result<()> {
        let timer = std::pin::pin!(tokio::time::sleep(linger.write));
        close_by(timer, &mut self, &linger).await
    }
}

/// [Closes](Connection::close) with a timer that exists already. A closing connection holds this
/// future and little else.
pub(crate) fn close_by<Io: AsyncRead + AsyncWrite + Unpin>(
    mut timer: Pin<&mut Sleep>,
    conn: &mut Connection<Io>,
    linger: &Linger,
) -> impl Future<Output = io::Result<()>> {
    conn.life().begin_closing();
    timer.as_mut().reset(after(linger.write));
    // The number of bytes that may still be read, once writing is shut down.
    let mut left = None;
    std::future::poll_fn(move |cx| {
        loop {
            if let Some(left) = &mut left {
                // The end of input and the end of the time lead to the same: the stream is dropped.
                let read_on = poll_read_on(conn.get_mut(), left, cx).is_ready();
                return if read_on || timer.as_mut().poll(cx).is_ready() {
                    Poll::Ready(Ok(()))
                } else {
                    Poll::Pending
                };
            }
            // This flushes too: `poll_shutdown` of a buffered stream has to.
            match Pin::new(&mut *conn).poll_shutdown(cx) {
                Poll::Ready(shut_down) => shut_down?,
                Poll::Pending => {
                    ready!(timer.as_mut().poll(cx));
                    conn.ended(EndReason::WriteTimeout.into());
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
            }
            timer.as_mut().reset(after(linger.time));
            left = Some(linger.bytes);
        }
    })
}

/// Discards input. Ready when the peer has closed or failed, or when `left` bytes were read.
fn poll_read_on<Io: AsyncRead + Unpin>(
    io: &mut Io,
    left: &mut usize,
    cx: &mut Context<'_>,
) -> Poll<()> {
    while *left > 0 {
        // On the stack of the poll, so that a lingering connection holds no buffer.
        let mut block = [MaybeUninit::uninit(); 4096];
        let room = block.len().min(*left);
        let mut buf = ReadBuf::uninit(&mut block[..room]);
        let read = ready!(Pin::new(&mut *io).poll_read(cx, &mut buf));
        match (read, buf.filled().len()) {
            (Ok(()), n) if n > 0 => *left -= n,
            _ => break,
        }
    }
    Poll::Ready(())
}
