//! A stream with the faults of a plan.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::plan::{Fault, Plan};

/// The maximum size, in bytes, of a shortened read. A read is shortened if the caller's buffer has
/// room for more bytes than may pass before the next fault, or than the limit of `pieces`.
const SHORT: usize = 4096;

/// A stream with the faults of a [`Plan`].
///
/// It wraps the server's side of a connection, which is an in-memory stream by default.
///
/// ```
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use tower_tcp::testkit::faults::{Fault, Faulty, Plan};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// let (mut client, server) = tokio::io::duplex(64);
/// let mut server = Faulty::new(server, Plan::new().read(2, Fault::End));
///
/// client.write_all(b"hello").await?;
/// let mut read = String::new();
/// server.read_to_string(&mut read).await?;
/// assert_eq!(read, "he");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Faulty<Io = DuplexStream> {
    io: Io,
    reads: Side,
    writes: Side,
}

impl<Io> Faulty<Io> {
    /// Wraps a stream.
    pub fn new(io: Io, plan: Plan) -> Self {
        let side = |faults: Vec<(u64, Fault)>| Side {
            faults: faults.into(),
            pieces: plan.pieces,
            ..Side::default()
        };
        Self {
            io,
            reads: side(plan.reads),
            writes: side(plan.writes),
        }
    }

    /// Returns the counters of the bytes read and written.
    pub(super) fn passed(&self) -> [Arc<AtomicU64>; 2] {
        [&self.reads, &self.writes].map(|side| Arc::clone(&side.passed))
    }

    /// Returns the wrapped stream.
    pub fn get_ref(&self) -> &Io {
        &self.io
    }
}

/// One direction of a stream.
#[derive(Debug, Default)]
struct Side {
    /// The number of bytes that have passed.
    passed: Arc<AtomicU64>,
    faults: VecDeque<(u64, Fault)>,
    pieces: Option<usize>,
    /// `true` after bytes have passed. If `pieces` is set, this direction yields once before the
    /// next bytes pass.
    full: bool,
    delay: Option<Pin<Box<Sleep>>>,
    last: Option<Fault>,
    /// The task that was last in this direction. It may wait here.
    waits: Option<Waker>,
}

/// The next step of a direction.
enum Step {
    /// At most this many bytes pass.
    Pass(usize),
    End,
    Reset,
}

impl Side {
    fn poll_step(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<Step> {
        self.waits = Some(cx.waker().clone());
        loop {
            if let Some(delay) = &mut self.delay {
                ready!(delay.as_mut().poll(cx));
                self.delay = None;
            }
            match self.last {
                Some(Fault::Reset) => return Poll::Ready(Step::Reset),
                Some(Fault::End) => return Poll::Ready(Step::End),
                Some(_stalled) => return Poll::Pending,
                None => {}
            }
            let until = match self.faults.front() {
                Some((at, _)) => at.saturating_sub(self.passed.load(Ordering::Relaxed)),
                None => u64::MAX,
            };
            if until > 0 {
                let room = usize::try_from(until).unwrap_or(usize::MAX).min(wanted);
                let Some(pieces) = self.pieces else {
                    return Poll::Ready(Step::Pass(room));
                };
                if std::mem::take(&mut self.full) {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                return Poll::Ready(Step::Pass(room.min(pieces)));
            }
            match self.faults.pop_front() {
                Some((_, Fault::Cut)) => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Some((_, Fault::Delay(time))) => self.delay = Some(Box::pin(sleep(time))),
                // `resume_unwind` does not run the panic hook, whose output would hide that of the
                // test.
                Some((_, Fault::Panic)) => resume_unwind(Box::new("a planted panic")),
                Some((_, fault)) => self.last = Some(fault),
                None => {}
            }
        }
    }

    fn pass(&mut self, bytes: usize) {
        self.passed.fetch_add(bytes as u64, Ordering::Relaxed);
        self.full = bytes > 0;
    }

    /// Resets this direction, because the other one was reset.
    fn reset(&mut self) {
        let before = self.last.replace(Fault::Reset);
        self.delay = None;
        // A second reset wakes nobody, or a task that polls both directions would wake itself.
        if before != Some(Fault::Reset)
            && let Some(waits) = self.waits.take()
        {
            waits.wake();
        }
    }
}

fn reset() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl<Io: AsyncRead + Unpin> AsyncRead for Faulty<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let room = match ready!(this.reads.poll_step(cx, buf.remaining())) {
            Step::Pass(room) => room,
            Step::End => return Poll::Ready(Ok(())),
            Step::Reset => {
                this.writes.reset();
                return Poll::Ready(Err(reset()));
            }
        };
        let before = buf.filled().len();
        if room == buf.remaining() {
            ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        } else {
            let mut space = [0; SHORT];
            let mut short = ReadBuf::new(&mut space[..room.min(SHORT)]);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut short))?;
            buf.put_slice(short.filled());
        }
        this.reads.pass(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Faulty<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let room = match ready!(this.writes.poll_step(cx, buf.len())) {
            Step::Pass(room) => room,
            Step::End => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            Step::Reset => {
                this.reads.reset();
                return Poll::Ready(Err(reset()));
            }
        };
        let written = ready!(Pin::new(&mut this.io).poll_write(cx, &buf[..room]))?;
        this.writes.pass(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.writes.last == Some(Fault::Reset) {
            return Poll::Ready(Err(reset()));
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }

    /// Shuts down writing. After [`Fault::Stall`] or [`Fault::End`] in the output, this method
    /// succeeds but does nothing. So after a stall, the peer does not see the end of the stream. A
    /// socket does the same while the peer does not take the pending bytes.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.writes.last {
            Some(Fault::Reset) => return Poll::Ready(Err(reset())),
            Some(_) => return Poll::Ready(Ok(())),
            None => {}
        }
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
