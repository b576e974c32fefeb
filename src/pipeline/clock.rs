//! What a pipeline waits for, and until when.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use crate::deadline::{Deadlines, Due, Moment, TAKEN_IN, Timer, due, first};
use crate::end::EndReason;

/// What a connection is waiting for, as far as deadlines go; for its peer to take output, besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// For its own service, or for room: not for the peer to send anything.
    Busy,
    /// For the make-service.
    Making,
    /// For a frame to come, with nothing in hand.
    Resting,
    /// For the rest of a frame.
    InFrame,
    /// At a drain, for the runtime to know what the system has of it.
    Leaving,
}

/// What is due: the end of the connection, or a message of the program.
#[derive(Clone, Copy, Debug)]
struct Alarm(Option<EndReason>);

impl Due for Alarm {
    fn is_kept_by_peer(&self) -> bool {
        self.0.is_some_and(|reason| reason.is_kept_by_peer())
    }
}

/// The moments that deadlines count from, and the timer.
#[derive(Debug)]
pub(super) struct Clock {
    timer: Timer,
    /// Before a drain, when the connection retires; in a drain, when that began.
    leaves: Option<Moment>,
    /// The last frame came, or the last request was done. `None` before the first byte.
    active: Option<Moment>,
    frame_begun: Option<Moment>,
    written: Option<Moment>,
    /// How long it may rest, as a moment of a clock that starts when it begins to.
    idle: Option<Moment>,
    /// How the connection waited when the timer was armed: for what, with output, and whether it
    /// has been heard from.
    armed: Option<(Waiting, bool, bool)>,
    /// Set during a poll, and turned into times at its end: one look at the clock a poll.
    pub(super) saw_byte: bool,
    saw_activity: bool,
    pub(super) saw_write: bool,
    /// What is in hand was asked by the peer, or some of it: the program's messages to itself keep
    /// no connection.
    pub(super) asked: bool,
    draining: bool,
}

impl Clock {
    pub(super) fn new(accepted_at: Instant, deadlines: &Deadlines) -> Self {
        let timer = Timer::start();
        Self {
            leaves: timer.age(accepted_at, deadlines.age()),
            timer,
            active: None,
            frame_begun: None,
            written: None,
            idle: idle(deadlines.idle),
            armed: None,
            saw_byte: false,
            saw_activity: false,
            saw_write: false,
            asked: false,
            draining: false,
        }
    }

    /// Before a wait: ready with the reason if a deadline has passed, and without one if a message
    /// is due; else wakes the task when that comes.
    pub(super) fn poll(
        &mut self,
        waiting: Waiting,
        writing: bool,
        message: Option<Instant>,
        deadlines: &Deadlines,
        cx: &mut Context<'_>,
    ) -> Poll<Option<EndReason>> {
        let now = self.timer.now();
        self.note(waiting, writing, now);
        let waits = (waiting, writing, self.active.is_some());
        if message.is_none() && self.armed == Some(waits) && self.timer.fires_after(now) {
            return Poll::Pending;
        }
        let message = message.map(|at| (self.timer.moment(at), Alarm(None)));
        let next = first([self.next(waiting, deadlines), message]);
        self.armed = next.map(|_| waits);
        let Alarm(reason) = ready!(self.timer.poll(next, now, cx));
        self.armed = None;
        Poll::Ready(reason)
    }

    /// Returns the timer, to be used for something else when there are no more deadlines.
    pub(super) fn timer(&mut self) -> Pin<&mut Sleep> {
        self.timer.sleep()
    }

    /// The task is another: the timer has to be told.
    pub(super) fn disarm(&mut self) {
        self.armed = None;
    }

    /// Sets how long the connection may rest from now on, which may be less than before.
    pub(super) fn set_idle(&mut self, time: Option<Duration>) {
        self.idle = idle(time);
        self.armed = None;
    }

    /// Notes that the connection drains: its deadlines are shorter from the first time on.
    pub(super) fn drain(&mut self) {
        if !self.draining {
            self.draining = true;
            self.leaves = Some(self.timer.now());
            self.armed = None;
        }
    }

    /// Returns whether a draining connection that rests may stay for one frame more.
    pub(super) fn awaits_last_frame(&self, deadlines: &Deadlines) -> bool {
        let time = deadlines.drain.last_frame;
        let until = || self.drains_since()?.checked_add(time?);
        time != Some(Duration::ZERO) && until().is_none_or(|until| self.timer.now() < until)
    }

    fn drains_since(&self) -> Option<Moment> {
        self.leaves.filter(|_| self.draining)
    }

    /// A frame is whole: what stands behind it is another.
    pub(super) fn saw_frame(&mut self) {
        self.saw_activity = true;
        self.frame_begun = None;
    }

    /// A call is done, or the stream it answered with.
    #[inline]
    pub(super) fn saw_done(&mut self) {
        self.saw_activity |= self.asked;
    }

    fn note(&mut self, waiting: Waiting, writing: bool, now: Moment) {
        if std::mem::take(&mut self.saw_activity) || (self.active.is_none() && self.saw_byte) {
            self.active = Some(now);
        }
        self.saw_byte = false;
        match waiting {
            Waiting::InFrame => self.frame_begun = self.frame_begun.or(Some(now)),
            // The program's messages to itself give the peer no more time.
            Waiting::Busy if !self.asked => {}
            _ => self.frame_begun = None,
        }
        if !writing {
            self.written = None;
        } else if std::mem::take(&mut self.saw_write) || self.written.is_none() {
            self.written = Some(now);
        }
    }

    /// Returns the deadline that comes first.
    fn next(&self, waiting: Waiting, deadlines: &Deadlines) -> Option<(Moment, Alarm)> {
        let end = |from: Option<Moment>, time, reason| due(from, time, Alarm(Some(reason)));
        let drained = self.drains_since();
        let rest = match waiting {
            Waiting::Busy => None,
            Waiting::Making => {
                let started = Some(Moment::START);
                end(started, deadlines.make_service, EndReason::MakeServiceError)
            }
            Waiting::Leaving => end(Some(Moment::START), Some(TAKEN_IN), EndReason::Drained),
            Waiting::InFrame => {
                let from = self.frame_begun;
                // A frame that is begun in the drain has as long, from then on.
                let late = drained.and_then(|drained| from.map(|from| from.max(drained)));
                first([
                    end(from, deadlines.frame, EndReason::FrameTimeout),
                    end(late, deadlines.drain.frame, EndReason::FrameTimeout),
                ])
            }
            Waiting::Resting if self.active.is_none() => {
                let started = Some(Moment::START);
                end(started, deadlines.first_byte, EndReason::FirstByteTimeout)
            }
            Waiting::Resting => first([
                end(
                    self.active,
                    self.idle.map(Moment::since_start),
                    EndReason::IdleTimeout,
                ),
                end(drained, deadlines.drain.last_frame, EndReason::Drained),
            ]),
        };
        let write = end(self.written, deadlines.write, EndReason::WriteTimeout);
        let retire = self.leaves.filter(|_| !self.draining);
        let retire = retire.map(|at| (at, Alarm(Some(EndReason::MaxAge))));
        first([rest, write, retire])
    }

    /// Returns whether the peer has ever sent anything.
    pub(super) fn has_heard(&self) -> bool {
        self.active.is_some() || self.saw_byte
    }
}

fn idle(time: Option<Duration>) -> Option<Moment> {
    Moment::START.checked_add(time?)
}
