//! The running server, seen from outside: what it listens on, how many are in, and its end.

mod live;
#[cfg(feature = "metrics")]
mod metrics;

use std::borrow::Borrow;
use std::collections::HashSet;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::admit::ConnectionLimit;
use crate::connection::{Address, ConnectionId, Life};
use crate::end::EndReason;
use crate::signals::{Report, Signal};

pub use live::LiveConnection;

/// Runs a server from outside: pause it, change its limit, shut it down. Cheap to clone.
#[derive(Clone)]
pub struct Handle(pub(crate) Arc<ServerState>);

/// How far a server has come with its end. It only goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    Serving,
    /// Still accepting; connections are told to leave.
    LameDuck,
    /// Connections are told to leave, and nobody else comes in.
    Draining,
    /// Connections are cut off.
    Aborting,
}

impl Phase {
    const ALL: [Self; 4] = [
        Self::Serving,
        Self::LameDuck,
        Self::Draining,
        Self::Aborting,
    ];
}

/// How a shutdown goes, as the server's builder was told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) lame_duck: Duration,
    pub(crate) deadline: Duration,
    /// When open connections are aborted. `None` before the shutdown begins, or if that is never.
    pub(crate) abort_at: Option<Instant>,
}

/// What the server's loop, its connections and its handles have in common.
pub(crate) struct ServerState {
    pub(crate) name: Option<Arc<str>>,
    pub(crate) addresses: Vec<Address>,
    pub(crate) limit: ConnectionLimit,
    phase: AtomicU8,
    paused: AtomicBool,
    watched: AtomicBool,
    plan: Mutex<Plan>,
    table: Table,
    /// Connections that left since the shutdown began.
    left: AtomicUsize,
    /// Connections that were cut off by it.
    cut_off: AtomicUsize,
    #[cfg(feature = "metrics")]
    counts: metrics::Counts,
    /// The server's loop, which wants to know of all that changes here.
    server: AtomicWaker,
    report: Mutex<Option<Report>>,
    reported: Notify,
}

/// Who is connected. Sharded, so that many coming and going do not queue behind one lock.
#[derive(Default)]
struct Table {
    shards: [Mutex<HashSet<Entry>>; 16],
    live: AtomicUsize,
}

/// A connection, known by its number.
struct Entry(Arc<Life>);

impl Borrow<ConnectionId> for Entry {
    fn borrow(&self) -> &ConnectionId {
        &self.0.origin.id
    }
}

impl Hash for Entry {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.origin.id.hash(state);
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.0.origin.id == other.0.origin.id
    }
}

impl Eq for Entry {}

impl Table {
    fn shard(&self, id: ConnectionId) -> MutexGuard<'_, HashSet<Entry>> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "only the low bits are wanted"
        )]
        let shard = id.get() as usize % self.shards.len();
        self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Collected before they are told: what telling wakes may come back for the lock.
    fn all(&self) -> impl Iterator<Item = Arc<Life>> + '_ {
        self.shards.iter().flat_map(|shard| {
            let lives: Vec<_> = shard
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .map(|entry| Arc::clone(&entry.0))
                .collect();
            lives
        })
    }
}

impl Handle {
    pub(crate) fn new(
        name: Option<Arc<str>>,
        addresses: Vec<Address>,
        limit: ConnectionLimit,
        plan: Plan,
    ) -> Self {
        Self(Arc::new(ServerState {
            #[cfg(feature = "metrics")]
            counts: metrics::Counts::new(name.clone()),
            name,
            addresses,
            limit,
            phase: AtomicU8::new(Phase::Serving as u8),
            paused: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            plan: Mutex::new(plan),
            table: Table::default(),
            left: AtomicUsize::new(0),
            cut_off: AtomicUsize::new(0),
            server: AtomicWaker::new(),
            report: Mutex::new(None),
            reported: Notify::new(),
        }))
    }

    /// Returns the addresses the server listens on, with the ports the system chose.
    pub fn local_addrs(&self) -> &[Address] {
        &self.0.addresses
    }

    /// Returns the server's name, if it was given one.
    pub fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    /// Returns the server's limit, to be read or changed.
    pub fn limit(&self) -> &ConnectionLimit {
        &self.0.limit
    }

    /// Returns how many connections are open: accepted, and not ended yet.
    pub fn live(&self) -> usize {
        self.0.live()
    }

    /// Returns the connections that are open: who is here, since when, and what it has done. They are collected in parts, so one that comes or
    /// goes meanwhile may be among them or not. Nothing on the path of a request waits for it.
    ///
    /// Those of one's own naming are found in a [`Registry`](crate::registry::Registry).
    pub fn connections(&self) -> impl Iterator<Item = LiveConnection> + '_ {
        self.0.table.all().map(|life| LiveConnection { life })
    }

    /// Returns one of the open connections.
    pub fn connection(&self, id: ConnectionId) -> Option<LiveConnection> {
        let shard = self.0.table.shard(id);
        shard.get(&id).map(|entry| LiveConnection {
            life: Arc::clone(&entry.0),
        })
    }

    /// Stops accepting, and keeps listening: clients wait in the backlog. Those who are in go on. A shutdown takes in those who wait.
    pub fn pause(&self) {
        self.0.paused.store(true, Ordering::Release);
        self.0.server.wake();
    }

    /// Accepts again.
    pub fn resume(&self) {
        self.0.paused.store(false, Ordering::Release);
        self.0.server.wake();
    }

    /// Begins a graceful shutdown. A second call does nothing.
    ///
    /// Connections finish their requests in progress and close. Connections in the backlog are still accepted, as far as the limit
    /// allows; then the listener closes. Connections that are still open at the deadline (default: 30 s, see
    /// [`ServerBuilder::shutdown_deadline`](crate::ServerBuilder::shutdown_deadline)) are aborted.
    pub fn shutdown(&self) {
        self.0.advance(Phase::LameDuck);
    }

    /// Begins a graceful shutdown with its own deadline. During a shutdown, it can bring the deadline forward, never put it off.
    pub fn shutdown_within(&self, deadline: Duration) {
        self.0.bring_deadline_forward(deadline);
        if !self.0.advance(Phase::LameDuck) {
            self.0.server.wake();
        }
    }

    /// Aborts all connections and ends the server. [`signal::install`](crate::signal::install) does this at a second signal.
    pub fn abort(&self) {
        self.0.advance(Phase::Aborting);
    }

    /// Waits until the server has ended, and returns what its shutdown did.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost: asking again gives the same.
    pub async fn closed(&self) -> Report {
        loop {
            let reported = self.0.reported.notified();
            tokio::pin!(reported);
            reported.as_mut().enable();
            let report = *self.0.report.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(report) = report {
                return report;
            }
            reported.await;
        }
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("name", &self.name())
            .field("addresses", &self.local_addrs())
            .field("live", &self.live())
            .field("phase", &self.0.phase())
            .finish_non_exhaustive()
    }
}

impl ServerState {
    pub(crate) fn phase(&self) -> Phase {
        let phase = self.phase.load(Ordering::SeqCst);
        Phase::ALL
            .into_iter()
            .find(|known| *known as u8 == phase)
            .unwrap_or(Phase::Aborting)
    }

    /// Goes on to a phase. Returns whether it was not there or beyond already.
    pub(crate) fn advance(&self, phase: Phase) -> bool {
        let advanced = self.phase.fetch_max(phase as u8, Ordering::SeqCst) < phase as u8;
        if advanced {
            self.server.wake();
            self.table.all().for_each(|life| self.tell(&life, phase));
        }
        advanced
    }

    pub(crate) fn plan(&self) -> Plan {
        *self.lock_plan()
    }

    /// Fixes when open connections are aborted, counted from the beginning of the shutdown.
    pub(crate) fn fix_deadline(&self, begun: Instant) {
        let mut plan = self.lock_plan();
        let at = begun.checked_add(plan.lame_duck.saturating_add(plan.deadline));
        // A call of `shutdown_within` may have come first.
        plan.abort_at = earliest(plan.abort_at, at);
    }

    fn bring_deadline_forward(&self, deadline: Duration) {
        let mut plan = self.lock_plan();
        if self.phase() == Phase::Serving {
            plan.deadline = deadline;
        } else {
            plan.abort_at = earliest(plan.abort_at, Instant::now().checked_add(deadline));
        }
    }

    fn lock_plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    pub(crate) fn live(&self) -> usize {
        self.table.live.load(Ordering::SeqCst)
    }

    /// Remembers the server's loop. Look at what changed after this.
    pub(crate) fn register_server(&self, waker: &std::task::Waker) {
        self.server.register(waker);
    }

    /// Enters a connection.
    pub(crate) fn enter(&self, life: &Arc<Life>) {
        #[cfg(feature = "metrics")]
        self.count_accept();
        self.table.live.fetch_add(1, Ordering::AcqRel);
        let id = life.origin.id;
        self.table.shard(id).insert(Entry(Arc::clone(life)));
        // After it was entered: whoever advances the phase sees it in the table, or it sees the phase here.
        self.tell(life, self.phase());
    }

    /// Takes a connection out: its task has ended, and the stream is gone.
    pub(crate) fn leave(&self, life: &Life) {
        let id = life.origin.id;
        let was_in = self.table.shard(id).remove(&id);
        if was_in {
            #[cfg(feature = "metrics")]
            self.count_end(life);
            if self.phase() > Phase::Serving {
                self.left.fetch_add(1, Ordering::AcqRel);
            }
            // Both in one order with `watch_ends` and `live`: one of the two sides sees the other.
            self.table.live.fetch_sub(1, Ordering::SeqCst);
            if self.watched.load(Ordering::SeqCst) {
                self.server.wake();
            }
        }
    }

    /// Has every connection's end wake the server's loop from now on: it waits for a descriptor, or for the last to leave.
    /// Look at [`live`](Self::live) after this.
    pub(crate) fn watch_ends(&self, watched: bool) {
        self.watched.store(watched, Ordering::SeqCst);
    }

    fn tell(&self, life: &Life, phase: Phase) {
        match phase {
            Phase::Serving => {}
            Phase::LameDuck | Phase::Draining => {
                life.signals.raise(Signal::Drain);
            }
            Phase::Aborting => self.abort(life, EndReason::Killed),
        }
    }

    fn abort(&self, life: &Life, reason: EndReason) {
        if life.abort(reason) {
            self.cut_off.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Cuts off all that are there.
    pub(crate) fn cut_off(&self, reason: EndReason) {
        self.table.all().for_each(|life| self.abort(&life, reason));
    }

    /// Says what the shutdown did, once: a second call returns the first report. Counted by the connections themselves: some are gone before the server's loop looks.
    pub(crate) fn report(&self, duration: Duration) -> Report {
        let seen = self.live() + self.left.load(Ordering::Acquire);
        let aborted = self.cut_off.load(Ordering::Acquire);
        let report = *self
            .report
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(Report {
                drained: seen.saturating_sub(aborted),
                aborted,
                duration,
            });
        self.reported.notify_waiters();
        report
    }
}

fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    [a, b].into_iter().flatten().min()
}
