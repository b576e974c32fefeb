//! Limits the number of events that begin before a connection's task yields.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::deadline::Moment;

/// The highest value of the maximum number of events in a turn. The maximum begins at [`FEWEST`],
/// and is adapted to the load.
const MOST: i16 = 256;

/// The maximum number of events in a connection's first turn. While many connections are busy, the
/// maximum of later turns falls, but not below this value. If a thousand connections begin at the
/// same time, the first request of each waits only for turns of this length. With a lower value,
/// the system calls of a turn would cost more than its events.
const FEWEST: i16 = 32;

/// If a busy task has waited at least this long for its next turn, the maximum number of events in
/// a turn is halved, but not below [`FEWEST`]. The first request of an idle connection is delayed
/// for about as long as such a task waits, and this delay should stay below 100 ms.
const LONG_WAIT: Duration = Duration::from_millis(60);

/// If a busy task has waited less than this for its next turn, the maximum number of events in a
/// turn is doubled, but not beyond [`MOST`].
const SHORT_WAIT: Duration = Duration::from_millis(15);

/// A turn: the period between two interruptions of the connection's task. An interruption is a wait
/// for an event, or a yield.
///
/// The maximum number of events in a turn keeps one fast peer from delaying the other connections.
/// With a thousand fast peers, a connection waits for the turns of all of them. So turns are short
/// at first. They become longer if the task is polled again soon after a yield, and shorter if it
/// must wait long.
#[derive(Debug)]
pub(super) struct Turn {
    /// The number of events that may still begin in this turn.
    left: i16,
    /// The number of events that may begin in a whole turn.
    most: i16,
    /// The time at which the task yielded, as returned by [`millis`]. `None` once the task is
    /// polled again.
    yielded: Option<NonZeroU32>,
}

impl Turn {
    pub(super) const fn new() -> Self {
        Self {
            left: FEWEST,
            most: FEWEST,
            yielded: None,
        }
    }

    /// Counts an event that begins.
    #[inline]
    pub(super) fn begin(&mut self) {
        self.left -= 1;
    }

    /// Returns whether the task must yield before another event begins.
    #[inline]
    pub(super) fn is_spent(&self) -> bool {
        self.left <= 0
    }

    /// Starts the next turn after a spent one. Returns `false` if the task must yield first; the
    /// next call then returns `true`.
    pub(super) fn renew(&mut self, now: Moment) -> bool {
        let now = millis(now);
        let Some(yielded) = self.yielded.take() else {
            self.yielded = Some(now);
            return false;
        };
        let waited = Duration::from_millis(now.get().wrapping_sub(yielded.get()).into());
        if waited >= LONG_WAIT {
            self.most = (self.most / 2).max(FEWEST);
        } else if waited < SHORT_WAIT {
            self.most = (self.most * 2).min(MOST);
        }
        self.left = self.most;
        true
    }

    /// Ends the turn because the connection waits for an event.
    #[inline]
    pub(super) fn wait(&mut self) {
        self.left = self.most;
        self.yielded = None;
    }
}

/// Returns a moment in milliseconds since the start of the clock. The result has half the size of a
/// `Moment`, which matters because every connection, even an idle one, has a field for it. The
/// result wraps around after 49 days, but only differences are used.
fn millis(moment: Moment) -> NonZeroU32 {
    let millis = moment.since_start().as_millis() as u32;
    NonZeroU32::new(millis).unwrap_or(NonZeroU32::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spends a turn, yields for `waited`, and returns the number of events in that turn.
    fn spend(turn: &mut Turn, waited: Duration) -> i32 {
        // At the clock's start `millis` returns 1, not 0, so a wait from then would be off by one.
        spend_from(turn, Duration::from_secs(1), waited)
    }

    fn spend_from(turn: &mut Turn, start: Duration, waited: Duration) -> i32 {
        let mut begun = 0;
        while !turn.is_spent() {
            turn.begin();
            begun += 1;
        }
        let at = |since| Moment::START.checked_add(since).expect("a moment");
        assert!(!turn.renew(at(start)), "it yields");
        let later = at(start + waited);
        assert!(turn.renew(later), "it has yielded");
        begun
    }

    const LESS_THAN_SHORT: Duration = SHORT_WAIT.saturating_sub(Duration::from_millis(1));

    #[test]
    fn turns_are_longer_while_the_task_is_polled_often_and_shorter_while_rarely() {
        let mut turn = Turn::new();
        let often = [LESS_THAN_SHORT; 4].map(|waited| spend(&mut turn, waited));
        assert_eq!(often, [32, 64, 128, 256]);
        let rarely = [LONG_WAIT; 4].map(|waited| spend(&mut turn, waited));
        assert_eq!(rarely, [256, 128, 64, 32]);
    }

    #[test]
    fn a_wait_of_medium_length_leaves_the_turn_as_it_is() {
        let mut turn = Turn::new();
        spend(&mut turn, LESS_THAN_SHORT);
        for waited in [SHORT_WAIT, LONG_WAIT - Duration::from_millis(1)] {
            assert_eq!(spend(&mut turn, waited), 64);
        }
    }

    #[test]
    fn a_wait_across_the_end_of_the_milliseconds_is_a_wait_like_others() {
        let mut turn = Turn::new();
        let end = Duration::from_millis(u32::MAX.into());
        for (waited, next) in [(LESS_THAN_SHORT, 64), (LONG_WAIT, 32), (SHORT_WAIT, 32)] {
            spend_from(&mut turn, end - Duration::from_millis(5), waited);
            assert_eq!(turn.most, next);
        }
    }

    #[test]
    fn a_wait_for_an_event_ends_the_turn() {
        let mut turn = Turn::new();
        for _ in 0..31 {
            turn.begin();
        }
        turn.wait();
        assert_eq!(spend(&mut turn, SHORT_WAIT), 32);
    }
}
