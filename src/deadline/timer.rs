//! One lazy timer for all the deadlines of a connection.
//!
//! A deadline that moves later costs nothing: the timer stays armed as it is, and when it fires,
//! its owner looks again. What a connection waits for, and so which deadline comes first, is its
//! owner's to know.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU64;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project::pin_project;
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::end::EndReason;

/// A deadline that is noticed this late passed while the process stood still: stopped, suspended,
/// or starved. The peer may have done its part meanwhile, and the runtime, which may fire timers
/// first, does not know yet. So it is put off once, for as long again.
const STOOD_STILL: Duration = Duration::from_millis(50);

/// A moment of one connection's clock: the nanoseconds since the clock's start, plus one.
///
/// It is half of an `Instant`, and a resting connection holds several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(NonZeroU64);

impl Moment {
    pub(crate) const START: Self = Self(NonZeroU64::MIN);

    /// Returns the moment `time` later, unless that is beyond the end of the clock: then it is no
    /// deadline.
    pub(crate) fn checked_add(self, time: Duration) -> Option<Self> {
        let nanos = u64::try_from(time.as_nanos()).ok()?;
        self.0.checked_add(nanos).map(Self)
    }

    pub(crate) fn since_start(self) -> Duration {
        Duration::from_nanos(self.0.get() - 1)
    }
}

/// Returns a deadline, if there is a time and a moment from which it counts.
pub(crate) fn due<D>(
    from: impl Into<Option<Moment>>,
    time: impl Into<Option<Duration>>,
    what: D,
) -> Option<(Moment, D)> {
    Some((from.into()?.checked_add(time.into()?)?, what))
}

/// Returns the deadline that comes first.
pub(crate) fn first<D>(
    deadlines: impl IntoIterator<Item = Option<(Moment, D)>>,
) -> Option<(Moment, D)> {
    deadlines.into_iter().flatten().min_by_key(|(at, _)| *at)
}

/// What a deadline brings about.
pub(crate) trait Due {
    /// Returns whether the peer can keep this deadline by what it sends or reads: then it is put
    /// off when the process stood still.
    fn is_kept_by_peer(&self) -> bool;
}

impl Due for EndReason {
    fn is_kept_by_peer(&self) -> bool {
        matches!(
            self,
            Self::PreConnectTimeout
                | Self::FirstByteTimeout
                | Self::FrameTimeout
                | Self::BodyTimeout
                | Self::IdleTimeout
                | Self::WriteTimeout
        )
    }
}

/// The clock and the timer of a connection.
#[derive(Debug)]
pub(crate) struct Timer {
    started: Instant,
    /// Made for the first deadline. Boxed: many connections never need it.
    alarm: Option<Pin<Box<Alarm>>>,
}

#[pin_project]
#[derive(Debug)]
struct Alarm {
    #[pin]
    sleep: Sleep,
    /// Until when deadlines of the peer were put off, the last time.
    put_off: Option<Moment>,
}

impl Timer {
    /// Starts the clock.
    pub(crate) fn start() -> Self {
        Self {
            started: Instant::now(),
            alarm: None,
        }
    }

    /// Returns when a connection that was accepted at `accepted_at` has reached `age`.
    pub(crate) fn age(&self, accepted_at: Instant, age: Option<Duration>) -> Option<Moment> {
        let before = self.started.saturating_duration_since(accepted_at);
        Moment::START.checked_add(age?.saturating_sub(before))
    }

    pub(crate) fn now(&self) -> Moment {
        self.moment(Instant::now())
    }

    /// Returns the moment of `at`. One before the start is the start.
    pub(crate) fn moment(&self, at: Instant) -> Moment {
        Moment::START
            .checked_add(at.saturating_duration_since(self.started))
            .unwrap_or(Moment(NonZeroU64::MAX))
    }

    /// Returns whether the timer will fire later than `now`, and so wakes whoever polled it last.
    ///
    /// While a connection waits as it did then, its deadlines can only have moved later: it need
    /// not look at them before.
    #[inline]
    pub(crate) fn fires_after(&self, now: Moment) -> bool {
        let alarm = self.alarm.as_ref();
        alarm.is_some_and(|alarm| self.moment(alarm.sleep.deadline()) > now)
    }

    /// Before a wait: ready if `next`, the deadline that comes first, has passed, else wakes the
    /// task when it does.
    pub(crate) fn poll<D: Due>(
        &mut self,
        next: Option<(Moment, D)>,
        now: Moment,
        cx: &mut Context<'_>,
    ) -> Poll<D> {
        let Some((at, due)) = next else {
            return Poll::Pending;
        };
        let at = self.forgive(at, &due, now);
        if at <= now {
            return Poll::Ready(due);
        }
        let Some(at) = self.started.checked_add(at.since_start()) else {
            return Poll::Pending;
        };
        let mut sleep = self.alarm(at).project().sleep;
        if sleep.deadline() > at || sleep.is_elapsed() {
            sleep.as_mut().reset(at);
        }
        // Whatever this turn has cost: a timer that is not looked at for want of budget would not
        // wake.
        while pin!(unconstrained(sleep.as_mut())).poll(cx).is_ready() {
            if sleep.deadline() >= at {
                return Poll::Ready(due);
            }
            // It fired for a deadline that has moved since.
            sleep.as_mut().reset(at);
        }
        Poll::Pending
    }

    /// Returns the timer itself, for what has only one deadline.
    pub(crate) fn sleep(&mut self) -> Pin<&mut Sleep> {
        let started = self.started;
        self.alarm(started).project().sleep
    }

    fn alarm(&mut self, at: Instant) -> Pin<&mut Alarm> {
        let alarm = self.alarm.get_or_insert_with(|| {
            Box::pin(Alarm {
                sleep: sleep_until(at),
                put_off: None,
            })
        });
        alarm.as_mut()
    }

    /// Puts a deadline off, once, if the peer may have kept it while nobody looked. Returns the
    /// deadline as it is now.
    fn forgive(&mut self, at: Moment, due: &impl Due, now: Moment) -> Moment {
        if !due.is_kept_by_peer() {
            return at;
        }
        let put_off = self.alarm.as_ref().and_then(|alarm| alarm.put_off);
        let late = at.checked_add(STOOD_STILL).is_some_and(|late| late < now);
        if late && put_off.is_none_or(|until| until <= at) {
            let until = now.checked_add(STOOD_STILL);
            *self.alarm(self.started).project().put_off = until;
            return until.map_or(at, |until| at.max(until));
        }
        put_off.map_or(at, |until| at.max(until))
    }
}

/// Returns the end of a time that begins now. One beyond the end of the clock is so far away that
/// it makes no difference.
pub(crate) fn after(time: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    let now = Instant::now();
    now.checked_add(time).unwrap_or_else(|| now + FAR)
}

/// Returns a random part of `most`, another each time.
pub(crate) fn jitter(most: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8);
    most.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}
