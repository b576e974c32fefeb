//! What is counted of a server, and what a scrape asks of its table.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Entry, Handle, Phase, ServerState, Table};
use crate::accept::AcceptErrorAction;
use crate::bind::accept_queue;
use crate::connection::{ConnectionPhase, Life};
use crate::observe::metrics::{Collected, Meter, Totals};

/// What those connections have done that have ended, and what of it all was told.
pub(super) struct Counts {
    meter: Meter,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    requests: AtomicU64,
    told: Mutex<Totals>,
}

impl Counts {
    pub(super) fn new(server: Option<Arc<str>>) -> Self {
        Self {
            meter: Meter::new(server),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            told: Mutex::default(),
        }
    }

    fn ended(&self) -> Totals {
        Totals {
            bytes_read: self.bytes_read.load(Ordering::Acquire),
            bytes_written: self.bytes_written.load(Ordering::Acquire),
            requests: self.requests.load(Ordering::Acquire),
        }
    }

    /// Returns what came since the last time. A connection that is just going from the table to the ended may be in neither; it is told the
    /// next time, and nothing twice.
    fn news(&self, now: impl FnOnce() -> Totals) -> Totals {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = now();
        let since = |told: &mut u64, now: u64| {
            let news = now.saturating_sub(*told);
            *told += news;
            news
        };
        Totals {
            bytes_read: since(&mut told.bytes_read, now.bytes_read),
            bytes_written: since(&mut told.bytes_written, now.bytes_written),
            requests: since(&mut told.requests, now.requests),
        }
    }
}

impl Table {
    /// Adds up what the open connections have done, and how many are in each phase.
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
    /// Brings those metrics up to date that are read from the server's table: see [`observe`](crate::observe#metrics). To be called before
    /// each scrape, or every few seconds where they are pushed.
    ///
    /// It takes a look at each open connection, some 100 ns long, and holds up none of them. On Linux it also reads the length of the
    /// accept queue, from `/proc/net`.
    pub fn collect_metrics(&self) {
        let server = &*self.0;
        let mut phases = Default::default();
        let moved = server.counts.news(|| {
            // The ended first: a connection that ends meanwhile must not be counted twice.
            let mut totals = server.counts.ended();
            phases = server.table.tally(&mut totals);
            totals
        });
        let draining = server.phase() > Phase::Serving;
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

    pub(crate) fn count_accept_error(&self, error_type: &'static str, action: AcceptErrorAction) {
        self.counts.meter.accept_failed(error_type, action.as_str());
    }

    /// For one that has left the table. Those who see that nobody is left see that all were counted.
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
