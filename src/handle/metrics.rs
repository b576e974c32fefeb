//! The counters of a server, and the values that are collected from its table of connections.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::table::{Entry, Table};
use super::{Handle, Phase, ServerState};
use crate::accept::AcceptErrorAction;
use crate::bind::accept_queue;
use crate::connection::{ConnectionPhase, Life};
use crate::observe::metrics::{Collected, Meter, Totals};

/// The totals of closed connections, and the totals reported so far.
pub(super) struct Counts {
    meter: Meter,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    requests: AtomicU64,
    reported: Mutex<Totals>,
}

impl Counts {
    pub(super) fn new(server: Option<Arc<str>>) -> Self {
        Self {
            meter: Meter::new(server),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            reported: Mutex::default(),
        }
    }

    fn ended(&self) -> Totals {
        Totals {
            bytes_read: self.bytes_read.load(Ordering::Acquire),
            bytes_written: self.bytes_written.load(Ordering::Acquire),
            requests: self.requests.load(Ordering::Acquire),
        }
    }

    /// Returns the growth of the totals since the last collection. A connection that closes during
    /// a collection may be reported one collection late, but never twice.
    fn unreported(&self, now: impl FnOnce() -> Totals) -> Totals {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let now = now();
        let since = |reported: &mut u64, now: u64| {
            let new = now.saturating_sub(*reported);
            *reported += new;
            new
        };
        Totals {
            bytes_read: since(&mut reported.bytes_read, now.bytes_read),
            bytes_written: since(&mut reported.bytes_written, now.bytes_written),
            requests: since(&mut reported.requests, now.requests),
        }
    }
}

impl Table {
    /// Adds the totals of the open connections to `totals`. Returns the number of open connections
    /// in each phase.
    fn tally(&self, totals: &mut Totals) -> [usize; ConnectionPhase::ALL.len()] {
        let mut phases = [0; ConnectionPhase::ALL.len()];
        for shard in &self.shards {
            let lives = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for Entry(life) in lives.iter() {
                phases[life.phase() as usize] += 1;
                totals.bytes_read += life.bytes_read();
                totals.bytes_written += life.bytes_written();
                totals.requests += life.requests();
            }
        }
        phases
    }
}

impl Handle {
    /// Records the server's current values: the open connections in each phase, the bytes and
    /// requests of all connections, the connection limit, the length of the accept queue (only for
    /// TCP on Linux), and the number of connections that a drain still waits for. The other
    /// [metrics](crate::observe#metrics) are recorded as events happen. Call this before each
    /// scrape, or every few seconds if metrics are pushed.
    ///
    /// This method reads the counters of each open connection, which takes about 150 ns per
    /// connection and does not block open connections. It reads the length of the accept queue from
    /// `/proc/net/tcp` and `/proc/net/tcp6`.
    pub fn collect_metrics(&self) {
        let server = &*self.0;
        let mut phases = Default::default();
        let moved = server.counts.unreported(|| {
            // The totals of closed connections are read first, so that a connection that closes
            // meanwhile is not counted twice.
            let mut totals = server.counts.ended();
            phases = server.table.tally(&mut totals);
            totals
        });
        let draining = server.phase() >= Phase::Draining;
        server.counts.meter.collected(&Collected {
            phases,
            limit: server.limit.get(),
            accept_queue: accept_queue(&server.addresses),
            drain_remaining: if draining { server.live() } else { 0 },
            moved,
        });
    }
}

impl ServerState {
    pub(super) fn count_accept(&self) {
        self.counts.meter.accepted();
    }

    pub(crate) fn count_denied(&self) {
        self.counts.meter.denied();
    }

    pub(crate) fn count_accept_error(&self, error_type: &'static str, action: AcceptErrorAction) {
        self.counts.meter.accept_failed(error_type, action.as_str());
    }

    /// Counts a closed connection. Runs before `live` is decremented, so when `live` is 0 every
    /// connection has been counted.
    pub(super) fn count_end(&self, life: &Life) {
        let add = |sum: &AtomicU64, n| sum.fetch_add(n, Ordering::AcqRel);
        add(&self.counts.bytes_read, life.bytes_read());
        add(&self.counts.bytes_written, life.bytes_written());
        add(&self.counts.requests, life.requests());
        if let Some(end) = life.end() {
            self.counts.meter.ended(&end);
        }
    }
}
