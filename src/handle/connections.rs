//! The table of open connections as part of the server's state: adds, removes, signals and aborts
//! connections, and reports how they ended.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::table::Entry;
use super::{Phase, ServerState};
use crate::connection::Life;
use crate::end::EndReason;
use crate::signals::{Report, Signal};

impl ServerState {
    /// Adds a connection to the table.
    pub(crate) fn enter(&self, life: &Arc<Life>) {
        #[cfg(feature = "metrics")]
        self.count_accept();
        self.entered.fetch_add(1, Ordering::AcqRel);
        self.table.live.fetch_add(1, Ordering::AcqRel);
        let id = life.origin.id;
        self.table.shard(id).insert(Entry(Arc::clone(life)));
        // The phase is read after the insert. So if a phase begins at the same time, either
        // `advance` finds the connection in the table, or this call finds the new phase.
        self.signal_phase(life, self.phase());
    }

    /// Removes a connection from the table. Called as the connection's last step, after its end is
    /// final.
    pub(crate) fn leave(&self, life: &Life) {
        let id = life.origin.id;
        let was_in = self.table.shard(id).remove(&id);
        if was_in {
            #[cfg(feature = "metrics")]
            self.count_end(life);
            self.count_left(life);
            // These two accesses, and those in `watch_ends` and `live`, are sequentially
            // consistent, so the loop cannot miss the end of the last connection: either the loop
            // sees the new count, or this code sees that the loop watches.
            self.table.live.fetch_sub(1, Ordering::SeqCst);
            if self.watched.load(Ordering::SeqCst) {
                self.server.wake();
            }
        }
    }

    fn count_left(&self, life: &Life) {
        // The phase is checked first, because most connections leave before the drain, and only in
        // the drain does it matter how a connection ended.
        let count = if self.phase() < Phase::Draining {
            &self.left_before
        } else if timed_out(life) {
            &self.timed_out
        } else if life.signals.is_aborted_by_server() {
            return;
        } else {
            &self.drained
        };
        count.fetch_add(1, Ordering::AcqRel);
    }

    /// Sets whether the end of a connection wakes the server's loop. The loop needs to be woken
    /// while it waits for a free file descriptor, or for the last connection to end. Check
    /// [`live`](Self::live) *after* this call. If it is checked before, an end between the check
    /// and this call is missed.
    pub(crate) fn watch_ends(&self, watched: bool) {
        self.watched.store(watched, Ordering::SeqCst);
    }

    pub(super) fn signal_phase(&self, life: &Life, phase: Phase) {
        match phase {
            Phase::Serving | Phase::LameDuck => {}
            Phase::Draining => {
                life.signals.raise(Signal::Drain);
            }
            Phase::Aborting => abort(life, EndReason::Killed),
        }
    }

    /// Aborts every open connection.
    pub(crate) fn abort_all(&self, reason: EndReason) {
        self.table.all().for_each(|life| abort(&life, reason));
    }

    /// Returns the report of the shutdown. The first call computes it from counters, and later
    /// calls return the same report. [`enter`](Self::enter) and [`leave`](Self::leave) update the
    /// counters. The server's loop could not, because connections may end between the beginning of
    /// the drain and the loop's next run.
    ///
    /// A connection that was in the table during the drain counts as aborted, unless it is counted
    /// as drained or timed out. Aborted connections have no counter of their own, because other
    /// threads may still abort and remove them while the report is made.
    pub(crate) fn report(&self, duration: Duration) -> Report {
        let drained = self.drained.load(Ordering::Acquire);
        let timed_out = self.timed_out.load(Ordering::Acquire);
        let left_before = self.left_before.load(Ordering::Acquire);
        let entered = self.entered.load(Ordering::Acquire);
        let seen = entered.wrapping_sub(left_before);
        let report = *self
            .report
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(Report {
                drained,
                timed_out,
                aborted: seen.saturating_sub(drained + timed_out),
                duration,
            });
        self.advanced.notify_waiters();
        report
    }

    pub(super) fn reported(&self) -> Option<Report> {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns whether a connection counts as timed out in the report.
fn timed_out(life: &Life) -> bool {
    // An aborted connection does not count as timed out, even if it was about to end at a deadline.
    // `SlowReader` is an exception, because a broadcast aborts the connection of a slow peer with
    // this reason.
    let reason = life.end().map(|end| end.reason());
    let is_aborted = life.signals.is_raised(Signal::Abort);
    reason.is_some_and(|reason| {
        reason == EndReason::SlowReader || (reason.is_timeout() && !is_aborted)
    })
}

/// Aborts a connection because the server does not wait for it any longer.
fn abort(life: &Life, reason: EndReason) {
    // A connection whose end is final may still be in the table. It is not aborted.
    if life.end().is_none() {
        life.abort_by_server(reason);
    }
}
