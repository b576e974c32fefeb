//! All the deadlines of a connection, on one lazy timer.
//!
//! A deadline that moves later costs nothing: the timer stays as it is armed, and when it fires, what it was armed for is looked at again.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU64;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::task::coop::unconstrained;
use tokio::time::{Instant, Sleep};

use crate::connection::STOOD_STILL;
use crate::deadline::Deadlines;
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

/// How long after it was taken in a connection that has not been heard from stays on at a drain. What its peer has sent may have
/// arrived with it, and the runtime does not know yet; it is a turn of the driver away.
const TAKEN_IN: Duration = Duration::from_millis(50);

/// A moment of one connection's clock: the nanoseconds since it was started, and one. Half of what an `Instant` takes, of which a resting
/// connection would hold five more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Moment(NonZeroU64);

impl Moment {
    const START: Self = Self(NonZeroU64::MIN);

    /// Returns the moment a time later, unless that is beyond the end of the clock.
    fn checked_add(self, time: Duration) -> Option<Self> {
        let nanos = u64::try_from(time.as_nanos()).ok()?;
        self.0.checked_add(nanos).map(Self)
    }

    fn since_start(self) -> Duration {
        Duration::from_nanos(self.0.get() - 1)
    }
}

/// The moments that deadlines count from, and the timer.
#[derive(Debug)]
pub(super) struct Clock {
    timer: Option<Pin<Box<Sleep>>>,
    /// What the connection was waiting for when the timer was last told to wake this task.
    armed_in: Option<(Waiting, bool, bool)>,
    started: Instant,
    retire: Option<Moment>,
    /// The last frame came, or the last request was done. `None` before the first byte.
    active: Option<Moment>,
    frame_begun: Option<Moment>,
    written: Option<Moment>,
    /// Until when deadlines of the peer were put off, the last time.
    put_off: Option<Moment>,
    /// Set during a poll, and turned into times at its end: one look at the clock a poll.
    pub(super) saw_byte: bool,
    saw_activity: bool,
    pub(super) saw_write: bool,
    /// What is in hand was asked by the peer, or some of it: the program's messages to itself keep no connection.
    pub(super) asked: bool,
}

impl Clock {
    pub(super) fn new(accepted_at: Instant, deadlines: &Deadlines) -> Self {
        let started = Instant::now();
        let retire = deadlines.max_age.and_then(|age| {
            let age = age.saturating_add(jitter(deadlines.max_age_jitter));
            Moment::START.checked_add(age.saturating_sub(started - accepted_at))
        });
        Self {
            timer: None,
            armed_in: None,
            started,
            retire,
            active: None,
            frame_begun: None,
            written: None,
            put_off: None,
            saw_byte: false,
            saw_activity: false,
            saw_write: false,
            asked: false,
        }
    }

    /// Before a wait: ready with the reason if a deadline has passed, and without one if a message is due; else wakes the task when that comes.
    pub(super) fn poll(
        &mut self,
        waiting: Waiting,
        writing: bool,
        message: Option<Instant>,
        deadlines: &Deadlines,
        cx: &mut Context<'_>,
    ) -> Poll<Option<EndReason>> {
        let clock = Instant::now();
        let now = self.moment(clock);
        self.note(waiting, writing, now);
        let armed_in = Some((waiting, writing, self.active.is_some()));
        let armed_for = self.timer.as_ref().map(|timer| timer.deadline());
        if self.armed_in == armed_in && message.is_none() && armed_for.is_some_and(|at| clock < at)
        {
            // The same deadlines as then, and each can only have moved later.
            return Poll::Pending;
        }
        self.armed_in = None;
        loop {
            let deadline = self.next(waiting, deadlines).and_then(|(at, reason)| {
                let at = self.forgive(at, reason, now);
                Some((self.started.checked_add(at.since_start())?, Some(reason)))
            });
            let message = message.map(|at| (at, None));
            let next = [deadline, message].into_iter().flatten();
            let Some((at, reason)) = next.min_by_key(|(at, _)| *at) else {
                return Poll::Pending;
            };
            if at <= clock {
                return Poll::Ready(reason);
            }
            let timer = match &mut self.timer {
                Some(timer) => {
                    if timer.deadline() > at || timer.is_elapsed() {
                        timer.as_mut().reset(at);
                    }
                    timer
                }
                none => none.insert(Box::pin(tokio::time::sleep_until(at))),
            };
            // Whatever this turn has cost: a timer that is not looked at for want of budget would not wake.
            if pin!(unconstrained(timer.as_mut())).poll(cx).is_pending() {
                self.armed_in = armed_in;
                return Poll::Pending;
            }
            // It fired for a deadline that has moved since: it is armed anew for what is next.
            if timer.deadline() >= at {
                return Poll::Ready(reason);
            }
        }
    }

    fn moment(&self, at: Instant) -> Moment {
        let moment = Moment::START.checked_add(at - self.started);
        moment.unwrap_or(Moment(NonZeroU64::MAX))
    }

    /// Returns the timer, to be used for something else when there are no more deadlines.
    pub(super) fn timer(&mut self) -> Pin<&mut Sleep> {
        let timer = &mut self.timer;
        timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(Duration::ZERO)))
            .as_mut()
    }

    /// The task is another: the timer has to be told.
    pub(super) fn disarm(&mut self) {
        self.armed_in = None;
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
    fn next(&self, waiting: Waiting, deadlines: &Deadlines) -> Option<(Moment, EndReason)> {
        let after = |from: Option<Moment>, time: Option<Duration>, reason: EndReason| {
            // A time beyond the end of the clock is no deadline.
            Some((from?.checked_add(time?)?, reason))
        };
        let rest = match waiting {
            Waiting::Busy => None,
            Waiting::Making => {
                let started = Some(Moment::START);
                after(started, deadlines.make_service, EndReason::MakeServiceError)
            }
            Waiting::Leaving => after(Some(Moment::START), Some(TAKEN_IN), EndReason::Drained),
            Waiting::InFrame => after(self.frame_begun, deadlines.frame, EndReason::FrameTimeout),
            Waiting::Resting if self.active.is_none() => {
                let started = Some(Moment::START);
                after(started, deadlines.first_byte, EndReason::FirstByteTimeout)
            }
            Waiting::Resting => after(self.active, deadlines.idle, EndReason::IdleTimeout),
        };
        let write = after(self.written, deadlines.write, EndReason::WriteTimeout);
        let retire = self.retire.map(|at| (at, EndReason::MaxAge));
        [rest, write, retire]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }

    /// Puts off, once, what the peer has missed while nobody looked. Returns the deadline as it is now.
    fn forgive(&mut self, at: Moment, reason: EndReason, now: Moment) -> Moment {
        let of_the_peer = matches!(
            reason,
            EndReason::FirstByteTimeout
                | EndReason::FrameTimeout
                | EndReason::IdleTimeout
                | EndReason::WriteTimeout
        );
        if !of_the_peer {
            return at;
        }
        let late = at.checked_add(STOOD_STILL).is_some_and(|late| late < now);
        if late && self.put_off.is_none_or(|until| until <= at) {
            self.put_off = now.checked_add(STOOD_STILL);
        }
        self.put_off.map_or(at, |until| at.max(until))
    }

    /// Returns whether the peer has ever sent anything.
    pub(super) fn has_heard(&self) -> bool {
        self.active.is_some() || self.saw_byte
    }

    /// Takes away the age at which the connection retires: it has begun to.
    pub(super) fn retired(&mut self) {
        self.retire = None;
    }
}

/// Returns a random part of `most`.
fn jitter(most: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8);
    most.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}
