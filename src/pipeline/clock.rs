//! Enforces the deadlines of a pipeline's connection. Which deadlines apply depends on what the
//! connection currently waits for.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use crate::connection::Life;
use crate::deadline::{
    Blocked, Deadlines, DrainDeadlines, Due, Moment, Pace, TAKEN_IN, Timer, due, first,
};
use crate::end::EndReason;

/// The current wait of a connection. It determines the deadlines that apply. In each of these
/// waits, the connection may also wait for the peer to take output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// Waits for its own service, for the peer to take output, or for the program to resume input
    /// while no received input is held back. No deadline for input applies, even if input is read
    /// meanwhile.
    Busy,
    /// Like `Busy`, but the program has paused input, and received input is held back.
    Paused,
    /// Waits for the make-service.
    Making,
    /// Waits for a frame, with no request in progress.
    Idle,
    /// Waits for the rest of a frame.
    InFrame,
    /// Waits briefly, in a drain, for a connection's first bytes. They may have arrived together
    /// with the connection, although no read has returned any yet.
    DrainSilent,
}

impl Waiting {
    /// Returns the bit of this wait in a set of waits. The same wait with pending output
    /// (`writing`) has another bit.
    fn bit(self, writing: bool) -> u16 {
        1 << (2 * self as u16 + u16::from(writing))
    }
}

/// The longest time for which a draining connection waits for further frames, as a multiple of
/// [`next_frame`](crate::deadline::DrainDeadlines::next_frame).
const NEXT_FRAMES: u32 = 10;

/// The action to take when a deadline has passed or a message is due.
#[derive(Clone, Copy, Debug)]
pub(super) enum Alarm {
    /// Deliver a message that is due.
    Message,
    /// Drain the connection, because of its age.
    MaxAge,
    /// Drop the calls that still run. The connection already has a reason to end.
    LastCalls,
    /// Check the minimum rate, because one of the windows in [`Pace`] has ended.
    /// [`poll_timer`](Clock::poll_timer) handles this alarm and does not return it.
    EndOfWindow,
    /// End the connection.
    End(EndReason),
}

impl Due for Alarm {
    fn is_kept_by_peer(&self) -> bool {
        matches!(self, Self::End(reason) if reason.is_kept_by_peer())
    }
}

/// The moments from which deadlines count, and the timer.
#[derive(Debug)]
pub(super) struct Clock {
    timer: Timer,
    /// Before a drain, the moment when the connection reaches its maximum age. In a drain, the
    /// moment when the drain began.
    drains_at: Option<Moment>,
    /// The moment of the last progress, or `None` before the first one. Progress is the first byte,
    /// a frame, a finished request, the end of a pause, the end of input, or the beginning of a
    /// close. While `has_request` is set, after the end of input, and while the connection closes,
    /// each poll at which output is pending or was written is progress, too.
    active: Option<Moment>,
    frame_begun: Option<Moment>,
    blocked: Blocked,
    pace: Pace,
    /// The idle deadline. This duration is stored as the moment that long after the clock's start,
    /// because a `Moment` has half the size of a `Duration`.
    idle: Option<Moment>,
    /// The set of waits, as bits, for which the timer will fire early enough. Within one wait,
    /// deadlines only move to a later time, so they need not be computed again before the timer
    /// fires.
    armed: u16,
    /// This flag and the next one are set during a poll. At the end of the poll they are converted
    /// to moments, so that the system's clock is read once per poll.
    saw_activity: bool,
    pub(super) saw_write: bool,
    /// `true` while a request of the peer is in progress, or the output contains the reply to a
    /// request. Messages, and frames that the program pushes, do not set this flag, because they do
    /// not keep a connection open.
    pub(super) has_request: bool,
    draining: bool,
    half_closed: bool,
    closes: bool,
}

impl Clock {
    pub(super) fn new(accepted_at: Instant, deadlines: &Deadlines) -> Self {
        let timer = Timer::start();
        Self {
            drains_at: timer.age(accepted_at, deadlines.age()),
            timer,
            active: None,
            frame_begun: None,
            blocked: Blocked::default(),
            pace: Pace::default(),
            idle: idle(deadlines.idle),
            armed: 0,
            saw_activity: false,
            saw_write: false,
            has_request: false,
            draining: false,
            half_closed: false,
            closes: false,
        }
    }

    /// Completes if a deadline has passed or a message is due. Otherwise registers a wakeup for the
    /// next deadline or message, whichever comes first. Called before each wait.
    pub(super) fn poll(
        &mut self,
        waiting: Waiting,
        writing: bool,
        message: Option<Instant>,
        life: &Life,
        deadlines: &Deadlines,
        cx: &mut Context<'_>,
    ) -> Poll<Alarm> {
        let at = Instant::now();
        let now = self.timer.moment(at);
        self.note(waiting, writing, now);
        let is_armed = self.armed & waiting.bit(writing) != 0;
        if message.is_none() && is_armed && !self.timer.is_due(at) {
            return Poll::Pending;
        }
        self.poll_timer((waiting, writing), message, life, deadlines, now, cx)
    }

    /// Computes the deadlines again, and polls the timer. This is a separate function because
    /// [`poll`](Self::poll) rarely needs it.
    #[inline(never)]
    fn poll_timer(
        &mut self,
        (waiting, writing): (Waiting, bool),
        message: Option<Instant>,
        life: &Life,
        deadlines: &Deadlines,
        mut now: Moment,
        cx: &mut Context<'_>,
    ) -> Poll<Alarm> {
        let message = message.map(|at| (self.timer.moment(at), Alarm::Message));
        loop {
            let frame = self.frame_begun.filter(|_| waiting == Waiting::InFrame);
            let sending = self.blocked.begun();
            let rate = deadlines.min_rate;
            let window = match self.pace.check(rate, frame, sending, life, now) {
                Ok(end) => end.map(|end| (end, Alarm::EndOfWindow)),
                Err(reason) => return Poll::Ready(Alarm::End(reason)),
            };
            let next = first([self.next(waiting, life, deadlines), message, window]);
            let before = self.timer.fires_at();
            let polled = self.timer.poll(next, now, cx);
            if self.timer.fires_at() > before {
                // The timer has moved to a later time, so it may miss the deadlines of other waits.
                self.armed = 0;
            }
            if polled.is_pending() {
                self.armed |= waiting.bit(writing);
            }
            let alarm = ready!(polled);
            now = self.timer.now();
            match alarm {
                Alarm::EndOfWindow => {}
                Alarm::End(EndReason::WriteTimeout)
                    if !self.blocked.is_over(life, deadlines.write, now) => {}
                alarm => return Poll::Ready(alarm),
            }
        }
    }

    /// Returns the sleep inside the timer. The graceful close uses it once this clock is no longer
    /// polled.
    pub(super) fn timer(&mut self) -> Pin<&mut Sleep> {
        self.timer.sleep()
    }

    pub(super) fn now(&self) -> Moment {
        self.timer.now()
    }

    /// Makes the next poll register its waker with the timer.
    pub(super) fn disarm(&mut self) {
        self.armed = 0;
    }

    /// Changes the idle deadline. Makes the next poll set the timer again, because the new deadline
    /// may be earlier.
    pub(super) fn set_idle(&mut self, time: Option<Duration>) {
        self.idle = idle(time);
        self.armed = 0;
    }

    /// Records that the connection drains. From the first call on, the deadlines of a drain apply.
    pub(super) fn drain(&mut self) {
        if !self.draining {
            self.draining = true;
            self.drains_at = Some(self.timer.now());
            self.armed = 0;
        }
    }

    /// Returns whether the connection may wait for another frame when it is idle. This is `false`
    /// only in a drain, after the time for further frames is over.
    pub(super) fn allows_next_frame(&self, deadlines: &Deadlines) -> bool {
        let until = self.next_frames_until(deadlines.drain.next_frame);
        until.is_none_or(|until| self.timer.now() < until)
    }

    /// Returns the moment until which a draining, idle connection waits for another frame. Returns
    /// `None` if the connection is not draining, or waits forever (`time` is `None`).
    fn next_frame_until(&self, time: Option<Duration>) -> Option<Moment> {
        let drained = self.drains_since()?;
        let quiet_since = self.active.map_or(drained, |active| active.max(drained));
        let ends = [quiet_since.checked_add(time?), self.next_frames_until(time)];
        ends.into_iter().flatten().min()
    }

    /// Returns the moment after which a draining connection no longer waits for another frame, even
    /// if frames keep arriving. Returns `None` in the same cases as
    /// [`next_frame_until`](Self::next_frame_until).
    fn next_frames_until(&self, time: Option<Duration>) -> Option<Moment> {
        let most = time?.saturating_mul(NEXT_FRAMES);
        self.drains_since()?.checked_add(most)
    }

    fn drains_since(&self) -> Option<Moment> {
        self.drains_at.filter(|_| self.draining)
    }

    /// Returns whether the peer is known to have finished sending.
    pub(super) fn is_half_closed(&self) -> bool {
        self.half_closed
    }

    /// Records that the peer has finished sending.
    pub(super) fn saw_end(&mut self) {
        self.half_closed = true;
        self.saw_activity = true;
        self.armed = 0;
    }

    /// Starts the deadline `last_calls` for the requests that have begun and are not answered yet.
    /// Called when the connection drops the requests that have not begun. Also called when the
    /// connection closes for any reason except a drain of the server or the end of the peer's
    /// input.
    pub(super) fn close(&mut self) {
        self.closes = true;
        self.saw_activity = true;
        self.armed = 0;
    }

    /// Returns whether the deadline `last_calls` has started.
    pub(super) fn closes(&self) -> bool {
        self.closes
    }

    /// Records that a frame is complete. Bytes after it belong to the next frame.
    pub(super) fn saw_frame(&mut self) {
        self.saw_activity = true;
        self.frame_begun = None;
    }

    /// Records that a call is done, or that a reply of several frames or of a stream is completely
    /// encoded.
    #[inline]
    pub(super) fn saw_done(&mut self) {
        self.saw_activity |= self.has_request;
    }

    /// Records that the program has paused input during a wait. The idle time then restarts at the
    /// next wait, and applies from then on even if the peer has not sent its first byte. The
    /// deadlines `half_closed` and `last_calls` run during a pause, unless received input is held
    /// back (see [`Waiting::Paused`]), so once one of them runs, this does nothing.
    pub(super) fn saw_pause(&mut self) {
        self.saw_activity |= !self.half_closed && !self.closes;
    }

    fn note(&mut self, waiting: Waiting, writing: bool, now: Moment) {
        let wrote = std::mem::take(&mut self.saw_write);
        // A peer that takes its reply is not idle. Output of the program alone counts only after
        // the end of input, or while the connection closes.
        let counts = self.half_closed || self.closes || self.has_request;
        self.saw_activity |= counts && (writing || wrote);
        self.has_request &= waiting != Waiting::Idle || writing;
        if std::mem::take(&mut self.saw_activity) && self.active.replace(now).is_none() {
            // After the first progress, other deadlines apply.
            self.armed = 0;
        }
        // During a pause, some deadlines do not run. They restart when the pause ends.
        self.saw_activity = waiting == Waiting::Paused && self.active.is_some();
        match waiting {
            Waiting::InFrame => self.frame_begun = self.frame_begun.or(Some(now)),
            // A message from the program does not give the peer more time for its frame.
            Waiting::Busy if !self.has_request => {}
            _ => self.frame_begun = None,
        }
        self.blocked.note(writing, wrote, now);
    }

    /// Returns the deadline that comes first.
    fn next(
        &self,
        waiting: Waiting,
        life: &Life,
        deadlines: &Deadlines,
    ) -> Option<(Moment, Alarm)> {
        let Deadlines {
            first_byte,
            frame,
            write,
            half_closed,
            last_calls,
            make_service,
            // `self` stores the idle deadline and the age, and `poll_timer` checks the rate.
            idle: _,
            max_age: _,
            max_age_jitter: _,
            min_rate: _,
            // Hooks and HTTP enforce these.
            pre_connect: _,
            body: _,
            upgraded_idle: _,
            drain:
                DrainDeadlines {
                    frame: drain_frame,
                    next_frame,
                    // Hooks, HTTP and raw services enforce these.
                    pre_connect: _,
                    body: _,
                    last_request: _,
                    goodbye: _,
                    stream: _,
                },
        } = *deadlines;
        let end = |from: Option<Moment>, time, reason| due(from, time, Alarm::End(reason));
        let drained = self.drains_since();
        // While output is pending, `write` applies instead of `last_calls` and `half_closed`.
        // During a pause, `last_calls` and `half_closed` do not run.
        let is_pending = !self.blocked.is_blocked() && waiting != Waiting::Paused;
        let pending = self.active.filter(|_| is_pending);
        let rest = match waiting {
            Waiting::Busy => due(
                pending.filter(|_| self.closes),
                last_calls,
                Alarm::LastCalls,
            ),
            Waiting::Paused => None,
            Waiting::Making => {
                let started = Some(Moment::START);
                end(started, make_service, EndReason::MakeServiceError)
            }
            Waiting::DrainSilent => {
                let taken_in = Moment::START.checked_add(TAKEN_IN);
                let until = self.next_frame_until(next_frame);
                let until = until.map(|until| taken_in.map_or(until, |at| at.max(until)));
                let until = until.map(|at| (at, Alarm::End(EndReason::Drained)));
                let started = Some(Moment::START);
                first([until, end(started, first_byte, EndReason::FirstByteTimeout)])
            }
            Waiting::InFrame => {
                let from = self.frame_begun;
                // For a frame that begins during the drain, the time counts from its first byte.
                let late = drained.and_then(|drained| from.map(|from| from.max(drained)));
                first([
                    end(from, frame, EndReason::FrameTimeout),
                    end(late, drain_frame, EndReason::FrameTimeout),
                ])
            }
            Waiting::Idle if self.active.is_none() => {
                let started = Some(Moment::START);
                end(started, first_byte, EndReason::FirstByteTimeout)
            }
            Waiting::Idle => first([
                end(
                    self.active,
                    self.idle.map(Moment::since_start),
                    EndReason::IdleTimeout,
                ),
                self.next_frame_until(next_frame)
                    .map(|at| (at, Alarm::End(EndReason::Drained))),
            ]),
        };
        let left = pending.filter(|_| self.half_closed);
        let left = end(left, half_closed, EndReason::PeerReset);
        let write = self.blocked.next(life, write);
        let write = write.map(|at| (at, Alarm::End(EndReason::WriteTimeout)));
        let retire = self.drains_at.filter(|_| !self.draining);
        let retire = retire.map(|at| (at, Alarm::MaxAge));
        first([rest, left, write, retire])
    }

    /// Records that bytes have arrived. The first bytes of a connection count as progress. Later
    /// bytes count only when they complete a frame.
    pub(super) fn saw_bytes(&mut self) {
        self.saw_activity |= self.active.is_none();
    }

    /// Returns whether there has been any progress: the first byte, the end of input, or the
    /// beginning of the close.
    pub(super) fn has_heard(&self) -> bool {
        self.active.is_some() || self.saw_activity
    }
}

fn idle(time: Option<Duration>) -> Option<Moment> {
    Moment::START.checked_add(time?)
}
