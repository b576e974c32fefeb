//! How a connection ends: flush, shut down writing, linger, and only then let go.
//!
//! A socket that is closed while the peer's bytes lie unread in it, or are still on their way, is *reset*, and the reset can overtake and destroy
//! what was written before: of a reply of 1,000,000 bytes, 49,152 arrived. So an orderly close shuts down writing first
//! (which is TLS's closing word, too) and reads on for a while, throwing away what comes, until the peer has finished as well.
//! [RFC 9112 section 9.6] describes the same for HTTP.
//!
//! [RFC 9112 section 9.6]: https://www.rfc-editor.org/rfc/rfc9112#section-9.6

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::connection::{Connection, ConnectionPhase};
use crate::end::EndReason;

/// How an orderly close is bounded.
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
    /// Sets how long flushing and shutting down writing may take. Default 30 s.
    #[must_use]
    pub fn write(mut self, time: Duration) -> Self {
        self.write = time;
        self
    }

    /// Sets how long to read on for the peer's end. Default 2 s: enough for a reply to cross and be read; a peer that has not
    /// closed by then is not waiting for anything.
    #[must_use]
    pub fn time(mut self, time: Duration) -> Self {
        self.time = time;
        self
    }

    /// Sets how many bytes are thrown away meanwhile. Default 256 KiB: a peer that sends more is not listening.
    #[must_use]
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> Connection<Io> {
    /// Closes in good order: flushes, shuts down writing (under TLS with its closing word), and reads on for a bounded while,
    /// so that what was written is not turned into a reset. A [`Pipeline`](crate::Pipeline) does this by itself; a
    /// service that works on the stream calls it at its end.
    ///
    /// # Errors
    ///
    /// When flushing or shutting down fails or takes longer than the limit. That the peer sends on, resets, or
    /// does not close, is not an error: by then all has been written.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the stream as it is.
    pub async fn close(mut self, linger: Linger) -> io::Result<()> {
        let timer = std::pin::pin!(tokio::time::sleep(linger.write));
        close_by(timer, &mut self, &linger).await
    }
}

/// [Closes](Connection::close) by a timer that is there already. What a closing connection holds is this future, and little else.
pub(crate) fn close_by<Io: AsyncRead + AsyncWrite + Unpin>(
    mut timer: Pin<&mut Sleep>,
    conn: &mut Connection<Io>,
    linger: &Linger,
) -> impl Future<Output = io::Result<()>> {
    conn.life().enter(ConnectionPhase::Closing);
    timer.as_mut().reset(after(linger.write));
    // How much may still be read, once writing is shut down.
    let mut left = None;
    std::future::poll_fn(move |cx| {
        loop {
            if let Some(left) = &mut left {
                // Whether the peer ended or the time did makes no difference to what follows: the stream is dropped.
                let read_on = poll_read_on(conn.get_mut(), left, cx).is_ready();
                return if read_on || timer.as_mut().poll(cx).is_ready() {
                    Poll::Ready(Ok(()))
                } else {
                    Poll::Pending
                };
            }
            // Flushing is part of it: `poll_shutdown` of a stream that buffers has to.
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

/// Returns the end of a time that begins now. One beyond the end of the clock is so far away that it makes no difference.
fn after(time: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    let now = Instant::now();
    now.checked_add(time).unwrap_or_else(|| now + FAR)
}

/// Throws away what comes. Ready when the peer has finished, or has sent all that it may.
fn poll_read_on<Io: AsyncRead + Unpin>(
    io: &mut Io,
    left: &mut usize,
    cx: &mut Context<'_>,
) -> Poll<()> {
    while *left > 0 {
        // On the stack of the poll only: a lingering connection holds no block.
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
