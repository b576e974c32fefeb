//! Closes a connection in good order: flush, shut down writing, linger, close.
//!
//! If a socket is closed while input is unread or still on its way, the system sends a *reset*. The
//! reset can destroy data that was already written but not yet read by the peer. In a test, only
//! 49,152 bytes of a reply of 1,000,000 bytes arrived. So an orderly close first shuts down
//! writing, which under TLS sends `close_notify`. Then it reads and discards input until the peer
//! has closed as well, or until the peer has acknowledged everything and the [time to
//! linger](Linger::time) is over. The [number of bytes](Linger::bytes) to discard is limited, too.
//! [RFC 9112 section 9.6] describes the same procedure for HTTP.
//!
//! [RFC 9112 section 9.6]: https://www.rfc-editor.org/rfc/rfc9112#section-9.6

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::connection::{Connection, Sent};
use crate::deadline::{Deadlines, MinRate, Moment, Pace, Timer, after, between_write_looks};
use crate::end::EndReason;

/// The limits of an orderly close.
#[derive(Clone, Copy, Debug)]
pub struct Linger {
    write: Duration,
    time: Duration,
    bytes: usize,
    min_rate: Option<MinRate>,
    /// The minimum rate from the deadlines of a pipeline or of `Http`. It applies if `min_rate` is
    /// not set.
    min_rate_of_deadlines: Option<MinRate>,
}

impl Default for Linger {
    fn default() -> Self {
        Self {
            write: Duration::from_secs(30),
            time: Duration::from_secs(2),
            bytes: 256 * 1024,
            min_rate: None,
            min_rate_of_deadlines: None,
        }
    }
}

impl Linger {
    /// Sets how long the remaining output may be pending without the peer taking a byte of it. The
    /// time applies while the connection flushes and shuts down writing, and then until the peer
    /// has acknowledged all output.
    ///
    /// Only Linux reports acknowledgements, and only for sockets of this crate's listeners.
    /// Elsewhere this time limits flushing and shutting down as a whole.
    ///
    /// Default: 30 s, as for [`Deadlines::write`](crate::deadline::Deadlines::write). A change of
    /// that deadline does not change this one. Why: a peer that does not read must not keep its
    /// connection open. When reached: the connection ends with
    /// [`WriteTimeout`](EndReason::WriteTimeout).
    #[must_use]
    pub fn write(mut self, time: Duration) -> Self {
        self.write = time;
        self
    }

    /// Sets how long to wait for the peer to close, once it has acknowledged all output.
    ///
    /// Where acknowledgements are not reported (see [`write`](Self::write)), all output counts as
    /// acknowledged once writing is shut down.
    ///
    /// Default: 2 s. Why: in that time a peer can read the last output and close. When reached: the
    /// socket is closed.
    #[must_use]
    pub fn time(mut self, time: Duration) -> Self {
        self.time = time;
        self
    }

    /// Sets the maximum number of bytes to read and discard while waiting for the peer to close.
    ///
    /// Default: 256 KiB. Why: a socket's receive buffer seldom holds more, and a peer that sends
    /// more does not react to the close. When reached: no more is read, and the socket is closed
    /// once the peer has acknowledged all output.
    #[must_use]
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    /// Sets the minimum rate at which the peer must take the remaining output. `None` restores the
    /// default.
    ///
    /// Default: none for a raw service. A pipeline and `Http` use their
    /// [`Deadlines::min_rate`](crate::deadline::Deadlines::min_rate), which is none by default.
    /// Why: slow peers exist, and only the program knows how slow they may be. When the peer is
    /// slower: the connection ends with [`SlowReader`](EndReason::SlowReader).
    #[must_use]
    pub fn min_rate(mut self, rate: impl Into<Option<MinRate>>) -> Self {
        self.min_rate = rate.into();
        self
    }

    /// Takes the minimum rate from the deadlines of a pipeline or of `Http`. It applies if
    /// [`min_rate`](Self::min_rate) is not set.
    pub(crate) fn with_deadlines(mut self, deadlines: &Deadlines) -> Self {
        self.min_rate_of_deadlines = deadlines.min_rate;
        self
    }

    /// Returns how long to linger, once writing is shut down, before checking for the first time
    /// whether the peer has taken all output. If it has already taken all, this is the whole time
    /// to linger.
    fn first_look(&self, sent: Option<Sent>) -> Duration {
        if has_all(sent) { self.time } else { SHORT }
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> Connection<Io> {
    /// Closes the connection in good order.
    ///
    /// It flushes, shuts down writing (under TLS with `close_notify`), and then reads for a limited
    /// time, so that no reset destroys the last output. A [`Pipeline`](crate::Pipeline) does this
    /// by itself. A raw service should call this method at its end.
    ///
    /// # Errors
    ///
    /// Returns an error if flushing or shutting down fails, and a
    /// [`TimedOut`](io::ErrorKind::TimedOut) error if the peer takes nothing for [`Linger::write`]
    /// or takes less than [`Linger::min_rate`]. Once the peer has taken everything, the close
    /// succeeds, even if the peer sends more, resets, or does not close.
    ///
    /// # Panics
    ///
    /// Panics if polled outside a tokio runtime with time enabled.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the stream at once.
    pub async fn close(mut self, linger: Linger) -> io::Result<()> {
        let timer = std::pin::pin!(tokio::time::sleep(linger.write));
        close_by(timer, &mut self, &linger, false).await
    }
}

/// Closes a connection like [`Connection::close`], but with an existing timer. If input has ended
/// (`at_eof`), this function does not read, because a read would be a needless system call. The
/// future must be small, because it is most of the memory that a closing connection holds.
pub(crate) fn close_by<Io: AsyncRead + AsyncWrite + Unpin>(
    mut timer: Pin<&mut Sleep>,
    conn: &mut Connection<Io>,
    linger: &Linger,
    at_eof: bool,
) -> impl Future<Output = io::Result<()>> {
    conn.life().begin_closing();
    let mut step = Step::ShutDown(if at_eof { 0 } else { linger.bytes });
    // Allocated only when the close must wait. Most closes need not wait, because the peer has
    // closed already.
    let mut wait: Option<Box<Wait>> = None;
    std::future::poll_fn(move |cx| {
        loop {
            match &mut step {
                // This also flushes, because `poll_shutdown` of a buffered stream must do so.
                Step::ShutDown(discard) => {
                    if let Poll::Ready(shut_down) = Pin::new(&mut *conn).poll_shutdown(cx) {
                        shut_down?;
                        step = Step::Discard(*discard);
                        if let Some(wait) = &mut wait {
                            wait.since = Instant::now();
                            wait.next = Some(linger.first_look(wait.sent));
                        }
                        continue;
                    }
                }
                Step::Discard(left) => {
                    if poll_read_on(conn.get_mut(), left, cx).is_ready() {
                        let sent = conn.life().probe.sent();
                        if has_all(sent) {
                            return Poll::Ready(Ok(()));
                        }
                        step = Step::Look;
                        if let Some(wait) = &mut wait {
                            wait.note(sent);
                            wait.look = SHORT;
                            wait.next = Some(SHORT);
                        }
                    }
                }
                Step::Look => {}
            }
            let wait = wait.get_or_insert_with(|| {
                let sent = conn.life().probe.sent();
                let next = match step {
                    Step::ShutDown(_) => between_write_looks(linger.write),
                    Step::Discard(_) | Step::Look => linger.first_look(sent),
                };
                Box::new(Wait::new(sent, next))
            });
            if let Some(next) = wait.next.take() {
                timer.as_mut().reset(after(next));
            }
            ready!(timer.as_mut().poll(cx));
            wait.note(conn.life().probe.sent());
            let now = wait.clock.now();
            let has_all = has_all(wait.sent);
            let sending = matches!(step, Step::ShutDown(_)) || !has_all;
            let sending = sending.then_some(Moment::START);
            let pace = &mut wait.pace;
            let rate = linger.min_rate.or(linger.min_rate_of_deadlines);
            let window = match pace.check(rate, None, sending, conn.life(), now) {
                Ok(end) => end.map(|end| end.since_start().saturating_sub(now.since_start())),
                Err(reason) => {
                    conn.ended(reason.into());
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
            };
            let waited = wait.since.elapsed();
            let often = between_write_looks(linger.write);
            let (longest, look) = match step {
                Step::ShutDown(_) => (linger.write, often),
                Step::Discard(_) if has_all => (linger.time, linger.time),
                Step::Look if has_all => return Poll::Ready(Ok(())),
                Step::Discard(_) | Step::Look => {
                    wait.look = (2 * wait.look).min(often);
                    (linger.write, wait.look)
                }
            };
            if waited < longest {
                let look = look.min(longest - waited);
                wait.next = Some(window.map_or(look, |window| window.min(look)));
            } else if has_all && !matches!(step, Step::ShutDown(_)) {
                return Poll::Ready(Ok(()));
            } else {
                conn.ended(EndReason::WriteTimeout.into());
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
    })
}

/// The first wait before a check whether the peer has taken all output. It begins when writing has
/// been shut down, and again when the last input has been discarded, if the peer has not taken all
/// output by then. Each further wait is twice as long as the one before it, up to
/// [`between_write_looks`] of [`Linger::write`]. [`Linger::time`] counts from the check that finds
/// that all output was taken, so it begins late by at most the last wait.
const SHORT: Duration = Duration::from_millis(10);

/// The steps of a close.
enum Step {
    /// Flush and shut down writing. After that, discard up to this many bytes of input.
    ShutDown(usize),
    /// Read and discard up to this many bytes of input, so that none is unread when the socket is
    /// closed.
    Discard(usize),
    /// Check from time to time whether the peer has taken all output. Nothing more is read, because
    /// the peer has finished sending, a read has failed, or enough bytes were discarded. If the
    /// socket were closed now, unread input could cause a reset, which loses the remaining output.
    /// Without unread input, the system would send it, but [`Linger::write`] would not apply.
    Look,
}

/// The state of a wait for the peer: how much of the output the peer has taken, as far as the
/// system reports it, and the time of the next check.
struct Wait {
    sent: Option<Sent>,
    /// The time from which [`Linger::write`] and [`Linger::time`] count. It is the latest of these:
    /// the beginning of the wait; the shutdown of writing, if it was completed during the wait; and
    /// the last check that found that the peer had taken output.
    since: Instant,
    clock: Timer,
    pace: Pace,
    /// The current interval between checks whether the peer has taken all output. [`SHORT`]
    /// explains how it grows.
    look: Duration,
    /// The time until the next check, if the timer is not set for it yet.
    next: Option<Duration>,
}

impl Wait {
    fn new(sent: Option<Sent>, next: Duration) -> Self {
        Self {
            sent,
            since: Instant::now(),
            clock: Timer::start(),
            pace: Pace::default(),
            look: SHORT,
            next: Some(next),
        }
    }

    /// Records whether the peer has taken output since the last check.
    fn note(&mut self, sent: Option<Sent>) {
        let before = std::mem::replace(&mut self.sent, sent);
        if let (Some(sent), Some(before)) = (sent, before)
            && sent.is_beyond(before)
        {
            self.since = Instant::now();
        }
    }
}

/// Returns whether the peer has taken all output, as far as the system reports it.
fn has_all(sent: Option<Sent>) -> bool {
    sent.is_none_or(|sent| sent.left == 0)
}

/// Reads and discards input. Completes when the peer has closed, the stream has failed, or `left`
/// bytes were read.
fn poll_read_on<Io: AsyncRead + Unpin>(
    io: &mut Io,
    left: &mut usize,
    cx: &mut Context<'_>,
) -> Poll<()> {
    while *left > 0 {
        // The buffer is on the stack, so that a lingering connection does not hold one.
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
