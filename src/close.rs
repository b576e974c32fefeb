//! How a connection ends: flush, shut down writing, linger, and only then let go.
//!
//! A socket that is closed while the peer's bytes lie unread in it, or are still on their way, is *reset*, and the reset can overtake and destroy
//! what was written before: of a reply of 1,000,000 bytes, 49,152 arrived. So an orderly close shuts down writing first
//! (which is TLS's closing word, too) and reads on for a while, throwing away what comes, until the peer has finished as well.
//! [RFC 9112 section 9.6] describes the same for HTTP.
//!
//! [RFC 9112 section 9.6]: https://www.rfc-editor.org/rfc/rfc9112#section-9.6

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::connection::{Connection, ConnectionPhase};
use crate::end_reason::EndReason;

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
        self.life().enter(ConnectionPhase::Closing);
        // Flushing is part of it: `poll_shutdown` of a stream that buffers has to.
        let Ok(shut_down) = tokio::time::timeout(linger.write, self.shutdown()).await else {
            self.ended(EndReason::WriteTimeout.into());
            return Err(io::ErrorKind::TimedOut.into());
        };
        shut_down?;
        read_on(&mut self, linger).await;
        Ok(())
    }
}

async fn read_on<Io: AsyncRead + Unpin>(conn: &mut Connection<Io>, linger: Linger) {
    let (io, mut left) = (conn.get_mut(), linger.bytes);
    let to_the_end = async {
        // On the stack of the poll only: this state is what a lingering connection holds.
        while left > 0 {
            match std::future::poll_fn(|cx| discard(io, left, cx)).await {
                Ok(n) if n > 0 => left -= n,
                _ => break,
            }
        }
    };
    // Whether the peer ended or the time did makes no difference to what follows: the stream is dropped.
    let _either_way = tokio::time::timeout(linger.time, to_the_end).await;
}

fn discard<Io: AsyncRead + Unpin>(
    io: &mut Io,
    at_most: usize,
    cx: &mut std::task::Context<'_>,
) -> std::task::Poll<io::Result<usize>> {
    let mut block = [std::mem::MaybeUninit::uninit(); 4096];
    let room = at_most.min(block.len());
    let mut buf = tokio::io::ReadBuf::uninit(&mut block[..room]);
    std::task::ready!(std::pin::Pin::new(io).poll_read(cx, &mut buf))?;
    std::task::Poll::Ready(Ok(buf.filled().len()))
}
