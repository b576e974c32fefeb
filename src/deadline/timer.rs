//! One lazy timer for all the deadlines of a connection.
//!
//! Moving a deadline to a later time costs nothing: the timer stays armed as it is, and when it
//! fires, its owner computes the earliest deadline again. The owner knows which deadlines apply,
//! because it knows what the connection waits for.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU64;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project::pin_project;
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::end::EndReason;

/// The delay that shows that the process was stopped, suspended or starved. If a deadline is
/// noticed more than this long after it has passed, the peer may have met it, because the runtime
/// may fire timers before it reads the socket. The deadline is then extended once, to `STALL` after
/// the moment when it was noticed.
pub(super) const STALL: Duration = Duration::from_millis(50);

/// A moment on one connection's clock: nanoseconds since the clock's start, plus one.
///
/// It has half the size of an `Instant`. That matters because an idle connection holds several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(NonZeroU64);

impl Moment {
    pub(crate) const START: Self = Self(NonZeroU64::MIN);

    /// Returns the moment that is `time` after this one. Returns `None`, which means no deadline,
    /// if that moment is beyond the end of the clock.
    pub(crate) fn checked_add(self, time: Duration) -> Option<Self> {
        let nanos = u64::try_from(time.as_nanos()).ok()?;
        self.0.checked_add(nanos).map(Self)
    }

    pub(crate) fn since_start(self) -> Duration {
        Duration::from_nanos(self.0.get() - 1)
    }
}

/// Returns the deadline that is `time` after `from`, paired with `what`. Returns `None` if `from`
/// or `time` is `None`, or if the deadline is beyond the end of the clock.
pub(crate) fn due<D>(
    from: impl Into<Option<Moment>>,
    time: impl Into<Option<Duration>>,
    what: D,
) -> Option<(Moment, D)> {
    Some((from.into()?.checked_add(time.into()?)?, what))
}

/// Returns the deadline that comes first.
///
/// Always inlined, so that the array of deadlines is never stored. The caller then compares one
/// deadline after the other.
#[inline(always)]
pub(crate) fn first<D: Copy, const N: usize>(
    deadlines: [Option<(Moment, D)>; N],
) -> Option<(Moment, D)> {
    deadlines.iter().copied().fold(None, earlier)
}

#[inline(always)]
fn earlier<D>(one: Option<(Moment, D)>, other: Option<(Moment, D)>) -> Option<(Moment, D)> {
    match (&one, &other) {
        (Some((one_at, _)), Some((other_at, _))) if other_at < one_at => other,
        (None, _) => other,
        _ => one,
    }
}

/// The action to take when a deadline passes.
pub(crate) trait Due {
    /// Returns whether the peer can meet this deadline by sending or reading. Such a deadline is
    /// extended if the process could not run for a while (see [`STALL`]).
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
    /// Created when the first deadline is set. Boxed, because many connections never need it.
    alarm: Option<Pin<Box<Alarm>>>,
}

#[pin_project]
#[derive(Debug)]
struct Alarm {
    #[pin]
    sleep: Sleep,
    /// The moment to which the peer's deadlines were last extended.
    extended_to: Option<Moment>,
}

impl Timer {
    /// Starts the clock.
    pub(crate) fn start() -> Self {
        Self {
            started: Instant::now(),
            alarm: None,
        }
    }

    /// Returns the moment when a connection accepted at `accepted_at` reaches `age`.
    pub(crate) fn age(&self, accepted_at: Instant, age: Option<Duration>) -> Option<Moment> {
        let before = self.started.saturating_duration_since(accepted_at);
        Moment::START.checked_add(age?.saturating_sub(before))
    }

    pub(crate) fn now(&self) -> Moment {
        self.moment(Instant::now())
    }

    /// Returns `at` as a moment. A time before the start becomes the start.
    pub(crate) fn moment(&self, at: Instant) -> Moment {
        Moment::START
            .checked_add(at.saturating_duration_since(self.started))
            .unwrap_or(Moment(NonZeroU64::MAX))
    }

    /// Returns whether the time for which the timer is armed has come. If not, an armed timer will
    /// wake the task that polled it last.
    #[inline]
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.fires_at().is_some_and(|at| at <= now)
    }

    /// Returns the time at which the timer fires or fired, if it was ever armed.
    #[inline]
    pub(crate) fn fires_at(&self) -> Option<Instant> {
        self.alarm.as_ref().map(|alarm| alarm.sleep.deadline())
    }

    /// Completes if the deadline `next` has passed and is not extended (see [`STALL`]). Otherwise
    /// registers a wakeup for it. The owner calls this before each wait, with its earliest
    /// deadline.
    pub(crate) fn poll<D: Due>(
        &mut self,
        next: Option<(Moment, D)>,
        now: Moment,
        cx: &mut Context<'_>,
    ) -> Poll<D> {
        let Some((at, due)) = next else {
            return Poll::Pending;
        };
        let at = self.extend(at, &due, now);
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
        // This poll ignores tokio's budget, because a timer that is not polled for lack of budget
        // would not register a wakeup.
        while pin!(unconstrained(sleep.as_mut())).poll(cx).is_ready() {
            if sleep.deadline() >= at {
                return Poll::Ready(due);
            }
            // The timer fired for a deadline that has moved to a later time.
            sleep.as_mut().reset(at);
        }
        Poll::Pending
    }

    /// Returns the sleep inside the timer, for a caller that resets this sleep directly.
    pub(crate) fn sleep(&mut self) -> Pin<&mut Sleep> {
        let started = self.started;
        self.alarm(started).project().sleep
    }

    fn alarm(&mut self, at: Instant) -> Pin<&mut Alarm> {
        let alarm = self.alarm.get_or_insert_with(|| {
            Box::pin(Alarm {
                sleep: sleep_until(at),
                extended_to: None,
            })
        });
        alarm.as_mut()
    }

    /// Extends a deadline once, if the peer may have met it while the process could not run (see
    /// [`STALL`]). Returns the deadline to use.
    fn extend(&mut self, at: Moment, due: &impl Due, now: Moment) -> Moment {
        if !due.is_kept_by_peer() {
            return at;
        }
        let extended_to = self.alarm.as_ref().and_then(|alarm| alarm.extended_to);
        let late = at.checked_add(STALL).is_some_and(|late| late < now);
        if late && extended_to.is_none_or(|until| until <= at) {
            let until = now.checked_add(STALL);
            *self.alarm(self.started).project().extended_to = until;
            return until.map_or(at, |until| at.max(until));
        }
        extended_to.map_or(at, |until| at.max(until))
    }
}

/// Returns the instant that is `time` from now, or one in the far future if that is beyond the end
/// of the clock.
pub(crate) fn after(time: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    let now = Instant::now();
    now.checked_add(time).unwrap_or_else(|| now + FAR)
}

/// Returns a random time of at most `most`.
pub(crate) fn jitter(most: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8);
    most.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}
