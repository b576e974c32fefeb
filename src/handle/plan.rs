use std::time::Duration;

use tokio::time::Instant;

/// The times of a shutdown: the durations set in the builder, and the instants computed from them.
/// `Handle::shutdown_within` replaces the deadline if it begins the shutdown. If a shutdown is in
/// progress, the method can only make the deadline earlier.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    lame_duck: Duration,
    deadline: Duration,
    /// `true` if the listener should close at the beginning of the lame-duck phase. It stays open
    /// nevertheless if a supervisor keeps one of its sockets open.
    pub(crate) closes_listener: bool,
    /// The beginning of the lame-duck phase.
    lame_duck_begun: Option<Instant>,
    /// The beginning of the shutdown.
    pub(crate) begun: Option<Instant>,
    /// The end of the lame-duck phase. `None` before the shutdown begins, or if the end is beyond
    /// the clock's range.
    pub(crate) drain_at: Option<Instant>,
    /// The time at which open connections are aborted. `None` before the shutdown begins, or if
    /// that time is beyond the clock's range.
    pub(crate) abort_at: Option<Instant>,
}

impl Plan {
    pub(crate) fn new(lame_duck: Duration, deadline: Duration) -> Self {
        Self {
            lame_duck,
            deadline,
            closes_listener: false,
            lame_duck_begun: None,
            begun: None,
            drain_at: None,
            abort_at: None,
        }
    }

    pub(crate) fn lame_duck(&mut self, time: Duration) {
        self.lame_duck = time;
    }

    pub(crate) fn deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    pub(super) fn begin_lame_duck(&mut self) {
        self.lame_duck_begun.get_or_insert_with(Instant::now);
    }

    /// Begins the shutdown. A later call can only make the deadline earlier. Returns whether the
    /// lame-duck phase is over.
    ///
    /// The deadline of the call that begins the shutdown counts from the end of the lame-duck
    /// phase. If a drain ends that phase early, the deadline counts from that earlier moment. The
    /// deadline of a later call counts from that call.
    pub(super) fn begin_shutdown(&mut self, deadline: Option<Duration>) -> bool {
        let now = Instant::now();
        if self.begun.is_some() {
            let sooner = deadline.and_then(|deadline| now.checked_add(deadline));
            self.abort_at = earliest(self.abort_at, sooner);
            return self.drains(now);
        }
        self.begun = Some(now);
        let lame_duck_begun = *self.lame_duck_begun.get_or_insert(now);
        self.drain_at = lame_duck_begun
            .checked_add(self.lame_duck)
            .map(|at| at.max(now));
        self.deadline = deadline.unwrap_or(self.deadline);
        self.abort_at = self.drain_at.and_then(|at| at.checked_add(self.deadline));
        self.drains(now)
    }

    fn drains(&self, now: Instant) -> bool {
        self.drain_at.is_some_and(|at| at <= now)
    }

    /// Begins a shutdown without a lame-duck phase. If a shutdown is in progress, ends its
    /// lame-duck phase and begins its drain.
    pub(super) fn begin_drain(&mut self) {
        let now = Instant::now();
        if self.drains(now) {
            return;
        }
        self.begun.get_or_insert(now);
        self.drain_at = Some(now);
        self.abort_at = earliest(self.abort_at, now.checked_add(self.deadline));
    }
}

pub(crate) fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    [a, b].into_iter().flatten().min()
}
