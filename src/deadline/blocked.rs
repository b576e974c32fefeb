//! Measures for how long a peer has taken none of the output that is pending for it.
//!
//! The server's own writes do not show that time. A socket whose buffer was full can be written
//! again only once a third of the buffer is free, and a slow reader may need longer than the write
//! deadline to read so much. So this code asks the system [`LOOKS`] times per deadline how many
//! bytes the peer has taken. It asks only while output is pending. On systems other than Linux, and
//! with a custom listener that does not provide the socket, it cannot ask, and only writes count.

use std::time::Duration;

use super::timer::Moment;
use crate::connection::{Life, Sent};

/// The number of checks per write deadline. Each check asks the system how many bytes the peer has
/// taken. So a connection ends late by at most a sixteenth of the deadline, or by 1 ms if that is
/// more.
pub(crate) const LOOKS: u32 = 16;

/// Returns the time from one check to the next, for a write deadline of `time`.
pub(crate) fn between_write_looks(time: Duration) -> Duration {
    (time / LOOKS).max(Duration::from_millis(1))
}

/// Records when output became pending, and since when the peer has taken none of it.
///
/// It is empty while no output is pending. The state is boxed, because most connections never wait
/// for their peer.
#[derive(Debug, Default)]
pub(crate) struct Blocked(Option<Box<Wait>>);

#[derive(Debug)]
struct Wait {
    begun: Moment,
    since: Moment,
    looked: Moment,
    sent: Option<Sent>,
}

impl Blocked {
    /// Returns whether output is pending.
    pub(crate) fn is_blocked(&self) -> bool {
        self.0.is_some()
    }

    /// Returns the moment at which output became pending. Unlike the moment from which the write
    /// deadline counts, this moment stays the same when the peer takes a part of the output.
    pub(crate) fn begun(&self) -> Option<Moment> {
        self.0.as_ref().map(|wait| wait.begun)
    }

    /// Records whether output is pending, and whether any was written since the last call.
    #[inline]
    pub(crate) fn note(&mut self, waits: bool, wrote: bool, now: Moment) {
        if waits || self.is_blocked() {
            self.note_wait(waits, wrote, now);
        }
    }

    fn note_wait(&mut self, waits: bool, wrote: bool, now: Moment) {
        let wait = Wait {
            begun: now,
            since: now,
            looked: now,
            sent: None,
        };
        match &mut self.0 {
            before if !waits => *before = None,
            Some(before) if wrote => {
                let begun = before.begun;
                **before = Wait { begun, ..wait };
            }
            Some(_) => {}
            none => *none = Some(Box::new(wait)),
        }
    }

    /// Returns the moment at which to check next whether the write deadline, `time`, has passed.
    pub(crate) fn next(&self, life: &Life, time: Option<Duration>) -> Option<Moment> {
        let (wait, time) = (self.0.as_ref()?, time?);
        let end = wait.since.checked_add(time);
        if !life.probe.knows() {
            return end;
        }
        let look = wait.looked.checked_add(between_write_looks(time));
        end.into_iter().chain(look).min()
    }

    /// Asks the system whether the peer has taken bytes. Returns whether the peer has taken none
    /// for `time`.
    pub(crate) fn is_over(&mut self, life: &Life, time: Option<Duration>, now: Moment) -> bool {
        let (Some(wait), Some(time)) = (&mut self.0, time) else {
            return false;
        };
        let sent = life.probe.sent();
        let before = std::mem::replace(&mut wait.sent, sent);
        wait.looked = now;
        // The first check has no earlier number to compare with. It restarts the time, because the
        // peer may have taken something since output became pending.
        if sent.is_some_and(|sent| before.is_none_or(|before| sent.is_beyond(before))) {
            wait.since = now;
        }
        wait.since.checked_add(time).is_some_and(|end| end <= now)
    }
}
