//! Enforces the deadlines of a connection whose stream is used by a raw service, or by the task
//! that has the upgraded stream. To do so, it watches the connection's byte counters.

use std::task::{Context, Poll, ready};
use std::time::Duration;

use super::blocked::Blocked;
use super::pace::{MinRate, Pace};
use super::timer::{Due, Moment, Timer, due, first};
use super::{Deadlines, DrainDeadlines};
use crate::connection::{ConnectionInfo, Life};
use crate::end::{ConnectionEnded, EndReason};
use crate::signals::Signal;

/// The current user of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Borrower {
    /// A raw service, which may have moved the stream to another task.
    Service,
    /// The task that received an upgraded stream.
    Upgraded,
}

/// The number of checks per deadline, and per window of `min_rate`. The reads and writes of another
/// task do not wake the watch, so it checks the byte counters. A connection therefore ends late by
/// at most about a quarter of the deadline, or by 1 ms if that is more. The write deadline of an
/// HTTP/2 connection is checked equally often.
const LOOKS: u32 = 4;

/// Returns the time from one check to the next, for a deadline or a window of length `time`.
pub(crate) fn between_looks(time: Duration) -> Duration {
    (time / LOOKS).max(Duration::from_millis(1))
}

#[derive(Clone, Copy, Debug)]
enum Alarm {
    End(EndReason),
    /// Begin to drain the connection, which has reached its maximum age.
    Retire,
    Look,
}

impl Due for Alarm {
    fn is_kept_by_peer(&self) -> bool {
        matches!(self, Self::End(reason) if reason.is_kept_by_peer())
    }
}

/// The moments from which deadlines count, and the timer.
#[derive(Debug)]
pub(crate) struct Watch {
    timer: Timer,
    borrower: Borrower,
    retire: Option<Moment>,
    /// The moment when the connection began to drain because of its age. If that was before the
    /// watch began, this is the beginning of the watch.
    retired: Option<Moment>,
    /// The sum of bytes read and written when the watch began.
    before: u64,
    /// The sum of bytes read and written, and the moment of its last change.
    moved: (u64, Moment),
    /// The number of bytes that had been written at the last check.
    written: u64,
    blocked: Blocked,
    pace: Pace,
}

impl Watch {
    pub(crate) fn new(info: &ConnectionInfo, borrower: Borrower, deadlines: &Deadlines) -> Self {
        let timer = Timer::start();
        let moved = moved(&info.life);
        Self {
            borrower,
            retire: timer.age(info.accepted_at(), deadlines.age()),
            timer,
            retired: is_retired(&info.life).then_some(Moment::START),
            before: moved,
            moved: (moved, Moment::START),
            written: info.life.bytes_written(),
            blocked: Blocked::default(),
            pace: Pace::default(),
        }
    }

    /// Completes with the end reason if a deadline has passed. Otherwise registers a wakeup. At the
    /// maximum age, begins to drain the connection, but does not complete. Called before each wait.
    pub(crate) fn poll(
        &mut self,
        life: &Life,
        deadlines: &Deadlines,
        cx: &mut Context<'_>,
    ) -> Poll<EndReason> {
        loop {
            let now = self.timer.now();
            self.note(life, now);
            let sending = self.blocked.begun();
            let rate = deadlines.min_rate;
            let window = self.pace.check(rate, None, sending, life, now);
            let window = match window {
                Ok(end) => end.map(|end| (end, Alarm::Look)),
                Err(reason) => return Poll::Ready(reason),
            };
            let next = first([self.next(now, life, deadlines), window]);
            match ready!(self.timer.poll(next, now, cx)) {
                Alarm::End(EndReason::WriteTimeout)
                    if !self
                        .blocked
                        .is_over(life, deadlines.write, self.timer.now()) => {}
                Alarm::End(reason) => return Poll::Ready(reason),
                Alarm::Look => {}
                Alarm::Retire => {
                    self.retire = None;
                    if !life.signals.is_raised(Signal::Drain) {
                        self.retired = Some(now);
                        life.set_reason(EndReason::MaxAge, None);
                        life.signals.raise(Signal::Drain);
                    }
                }
            }
        }
    }

    fn note(&mut self, life: &Life, now: Moment) {
        let moved = moved(life);
        if moved != self.moved.0 {
            self.moved = (moved, now);
        }
        let written = life.bytes_written();
        let wrote = std::mem::replace(&mut self.written, written) != written;
        self.blocked.note(life.is_write_pending(), wrote, now);
    }

    /// Returns the deadline or check that comes first.
    fn next(&self, now: Moment, life: &Life, deadlines: &Deadlines) -> Option<(Moment, Alarm)> {
        let Deadlines {
            first_byte,
            idle,
            write,
            upgraded_idle,
            // `self` stores the age with its random part.
            max_age: _,
            max_age_jitter: _,
            // `self.pace` enforces this, from the first check that finds pending output.
            min_rate,
            // Hooks enforce this.
            pre_connect: _,
            // Only the service knows its frames and its calls.
            frame: _,
            body: _,
            half_closed: _,
            last_calls: _,
            make_service: _,
            drain:
                DrainDeadlines {
                    stream,
                    // Hooks enforce this.
                    pre_connect: _,
                    // Only the service knows its frames.
                    frame: _,
                    body: _,
                    last_request: _,
                    next_frame: _,
                    goodbye: _,
                },
        } = *deadlines;
        let (moved, since) = self.moved;
        let (rest, reason) = if self.borrower == Borrower::Upgraded {
            (upgraded_idle, EndReason::IdleTimeout)
        } else if moved == self.before {
            (first_byte, EndReason::FirstByteTimeout)
        } else {
            (idle, EndReason::IdleTimeout)
        };
        let look = |time: Option<Duration>| {
            let time = time.filter(|time| !time.is_zero())?;
            due(now, between_looks(time), Alarm::Look)
        };
        first([
            due(since, rest, Alarm::End(reason)),
            self.blocked
                .next(life, write)
                .map(|at| (at, Alarm::End(EndReason::WriteTimeout))),
            self.retire.map(|at| (at, Alarm::Retire)),
            due(self.retired, stream, Alarm::End(EndReason::MaxAge)),
            look(rest),
            look(write),
            look(min_rate.map(MinRate::window)),
        ])
    }
}

/// Returns whether the connection drains because of its age.
fn is_retired(life: &Life) -> bool {
    let by_age = |ended: ConnectionEnded| ended.reason == EndReason::MaxAge;
    life.signals.is_raised(Signal::Drain) && life.proposed().is_some_and(by_age)
}

fn moved(life: &Life) -> u64 {
    life.bytes_read().wrapping_add(life.bytes_written())
}
