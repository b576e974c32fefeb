use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;

use super::origin::Origin;
use super::phase::ConnectionPhase;
use super::transport::Probe;
use crate::end::{Cause, ConnectionEnded, End, EndReason};
use crate::signals::{Signal, Signals};

/// A callback for the end. It gets the connection's origin as an argument, so that a closure which
/// captures nothing needs no allocation.
type Hook = Box<dyn FnOnce(&Origin, &End) + Send>;

/// The number of a callback, by which it can be removed once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HookId(u64);

/// The reason and the callbacks until the end, and the end itself after it.
enum EndCell {
    Open(Open),
    Ended(End),
}

#[derive(Default)]
struct Open {
    reason: Option<ConnectionEnded>,
    /// In registration order. A removed callback leaves an empty slot until more than half of the
    /// slots are empty: a peer may decide how many there are, so removing one must not cost a
    /// linear search.
    hooks: SmallVec<[(HookId, Option<Hook>); 1]>,
    hooks_empty: usize,
}

impl Open {
    /// Proposes a reason. Returns the one that holds, and the one it replaces: the caller drops
    /// that after unlocking, since its cause is the user's.
    fn propose(
        &mut self,
        proposed: &ConnectionEnded,
    ) -> (ConnectionEnded, Option<ConnectionEnded>) {
        let first = self.reason.take();
        let (holds, replaced) = match first {
            Some(first) if proposed.reason.is_orderly() || !first.reason.is_orderly() => {
                (first, None)
            }
            first => (proposed.clone(), first),
        };
        (self.reason.insert(holds).clone(), replaced)
    }

    fn add(&mut self, hook: Hook) -> HookId {
        // The number of a removed callback may be used again.
        let id = HookId(self.hooks.last().map_or(0, |(HookId(last), _)| last + 1));
        self.hooks.push((id, Some(hook)));
        id
    }

    fn take(&mut self, id: HookId) -> Option<Hook> {
        let at = self.hooks.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        let hook = self.hooks[at].1.take();
        self.hooks_empty += usize::from(hook.is_some());
        if 2 * self.hooks_empty > self.hooks.len() {
            self.hooks.retain(|(_, hook)| hook.is_some());
            self.hooks_empty = 0;
        }
        hook
    }
}

/// The part of a connection that outlives its stream: signals in, totals, and the end out.
pub(crate) struct Life {
    pub(crate) origin: Origin,
    pub(crate) signals: Signals,
    /// The socket, while it is open.
    pub(crate) probe: Probe,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    requests: AtomicU64,
    messages_dropped: AtomicU64,
    /// The peer has finished sending. For a raw service this separates `PeerClosed` from
    /// `ServiceClosed`.
    peer_done: AtomicBool,
    /// The peer does not take what is written to it.
    write_pending: AtomicBool,
    phase: AtomicU8,
    end: Mutex<EndCell>,
}

impl Life {
    pub(super) fn new(origin: Origin, probe: Probe) -> Self {
        Self {
            origin,
            signals: Signals::default(),
            probe,
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            messages_dropped: AtomicU64::new(0),
            peer_done: AtomicBool::new(false),
            write_pending: AtomicBool::new(false),
            phase: AtomicU8::new(ConnectionPhase::Serving as u8),
            end: Mutex::new(EndCell::Open(Open::default())),
        }
    }

    /// Adds without a locked instruction, because each counter has one writer: the task that owns
    /// the stream.
    fn add(counter: &AtomicU64, n: usize) {
        let sum = counter.load(Ordering::Relaxed).wrapping_add(n as u64);
        counter.store(sum, Ordering::Relaxed);
    }

    pub(super) fn count_read(&self, bytes: usize) {
        Self::add(&self.bytes_read, bytes);
    }

    /// Subtracts bytes that were counted and will be read again by another reader.
    pub(crate) fn uncount_read(&self, bytes: usize) {
        let sum = self.bytes_read.load(Ordering::Relaxed);
        let sum = sum.saturating_sub(bytes as u64);
        self.bytes_read.store(sum, Ordering::Relaxed);
    }

    pub(super) fn count_written(&self, bytes: usize) {
        Self::add(&self.bytes_written, bytes);
    }

    pub(crate) fn count_request(&self) {
        Self::add(&self.requests, 1);
    }

    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }

    /// Records the phase. Draining is not recorded: it follows from the signals.
    pub(crate) fn enter(&self, phase: ConnectionPhase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(crate) fn phase(&self) -> ConnectionPhase {
        let entered = self.phase.load(Ordering::Relaxed);
        let entered = ConnectionPhase::ALL
            .iter()
            .find(|known| **known as u8 == entered)
            .copied()
            .unwrap_or(ConnectionPhase::Serving);
        match entered {
            ConnectionPhase::Serving if self.signals.any() => ConnectionPhase::Draining,
            entered => entered,
        }
    }

    pub(crate) fn count_dropped_messages(&self, messages: usize) {
        Self::add(&self.messages_dropped, messages);
    }

    pub(crate) fn peer_is_done(&self) {
        self.peer_done.store(true, Ordering::Relaxed);
    }

    /// Returns whether the peer has finished sending.
    #[cfg(feature = "http")]
    pub(crate) fn is_peer_done(&self) -> bool {
        self.peer_done.load(Ordering::Relaxed)
    }

    /// Records whether the last write, flush or shutdown waits for the peer. The value rarely
    /// changes, so it is only stored if it does.
    #[inline]
    pub(super) fn note_write_pending(&self, pending: bool) {
        if self.write_pending.load(Ordering::Relaxed) != pending {
            self.write_pending.store(pending, Ordering::Relaxed);
        }
    }

    /// Asks the system how much of what was written the peer has not taken. `None` if it does not
    /// tell, or the stream is closed.
    pub(crate) fn unacknowledged(&self) -> Option<u64> {
        self.probe.ask(|transport| transport.unacknowledged())?
    }

    /// Returns whether the peer does not take what is written to it.
    pub(crate) fn is_write_pending(&self) -> bool {
        self.write_pending.load(Ordering::Relaxed)
    }

    fn cell(&self) -> MutexGuard<'_, EndCell> {
        // No user code runs under this lock, so poison can only come from a failed allocation.
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Proposes a reason and returns the one that holds.
    ///
    /// The first reason wins, because what came first is what happened. Only an orderly reason
    /// gives way to one that is not, because then something was lost.
    ///
    /// A peer that is cut off has no more use for what the system still holds for it. So the
    /// socket's close becomes a reset, and its memory is free when the connection's place is.
    pub(crate) fn set_reason(&self, reason: EndReason, cause: Option<Cause>) -> ConnectionEnded {
        if reason.is_cut_off() {
            let _closed_before = self.probe.ask(|transport| transport.reset_at_close());
        }
        let proposed = ConnectionEnded { reason, cause };
        let (holds, replaced) = match &mut *self.cell() {
            EndCell::Open(open) => open.propose(&proposed),
            EndCell::Ended(end) => (end.why(), None),
        };
        drop(replaced);
        holds
    }

    /// Returns the reason that holds, once there is one.
    pub(crate) fn proposed(&self) -> Option<ConnectionEnded> {
        match &*self.cell() {
            EndCell::Open(open) => open.reason.clone(),
            EndCell::Ended(end) => Some(end.why()),
        }
    }

    /// Returns why a connection ends whose service has completed: the proposed reason, or else what
    /// the signals and the stream tell.
    pub(crate) fn done(&self) -> EndReason {
        match self.proposed() {
            Some(ended) => ended.reason,
            None if self.signals.is_raised(Signal::Drain) => EndReason::Drained,
            None if self.peer_done.load(Ordering::Relaxed) => EndReason::PeerClosed,
            None => EndReason::ServiceClosed,
        }
    }

    /// Closes the connection gracefully, as a drain does, with `ServiceClosed` as the reason.
    /// Unlike `Signal::Close`, raw services see this too.
    pub(crate) fn leave(&self) {
        self.set_reason(EndReason::ServiceClosed, None);
        self.signals.raise(Signal::Drain);
    }

    /// Proposes `reason` and aborts the connection. Returns `false` if it was aborted before.
    pub(crate) fn abort(&self, reason: EndReason) -> bool {
        self.set_reason(reason, None);
        self.signals.raise(Signal::Abort)
    }

    /// Settles the end and runs the callbacks. Only the connection's task calls this; a second call
    /// does nothing.
    ///
    /// The reason in `outcome` is the last one proposed.
    pub(crate) fn finish(&self, outcome: impl FnOnce() -> ConnectionEnded) {
        let outcome = outcome();
        let (end, hooks, _replaced) = {
            let mut cell = self.cell();
            let EndCell::Open(open) = &mut *cell else {
                return;
            };
            let hooks = std::mem::take(&mut open.hooks);
            let (ConnectionEnded { reason, cause }, replaced) = open.propose(&outcome);
            let nanos = self.origin.accepted_at.elapsed().as_nanos();
            let end = End {
                reason,
                cause,
                nanos: u64::try_from(nanos).unwrap_or(u64::MAX),
                bytes_read: self.bytes_read(),
                bytes_written: self.bytes_written(),
                requests: self.requests(),
                messages_dropped: self.messages_dropped.load(Ordering::Relaxed),
            };
            *cell = EndCell::Ended(end.clone());
            (end, hooks, replaced)
        };
        for hook in hooks.into_iter().filter_map(|(_, hook)| hook) {
            self.run(hook, &end);
        }
        self.signals.tell_users();
    }

    /// Waits for the end.
    pub(crate) async fn ended(&self) -> End {
        self.signals.users_until(|| self.end()).await
    }

    pub(crate) fn end(&self) -> Option<End> {
        match &*self.cell() {
            EndCell::Open(_) => None,
            EndCell::Ended(end) => Some(end.clone()),
        }
    }

    pub(crate) fn on_end(&self, hook: impl FnOnce(&Origin, &End) + Send + 'static) {
        if let Err((hook, end)) = self.before_end(Box::new(hook)) {
            self.run(hook, &end);
        }
    }

    /// Registers a callback, unless the connection has ended.
    pub(crate) fn before_end(&self, hook: Hook) -> Result<HookId, (Hook, End)> {
        match &mut *self.cell() {
            EndCell::Open(open) => Ok(open.add(hook)),
            EndCell::Ended(end) => Err((hook, end.clone())),
        }
    }

    /// Removes a callback.
    pub(crate) fn forget(&self, id: HookId) {
        let hook = match &mut *self.cell() {
            EndCell::Open(open) => open.take(id),
            EndCell::Ended(_) => None,
        };
        // Dropped without the lock, because it is user code.
        drop(hook);
    }

    /// Runs one callback. A panic in it must not keep the other callbacks, or the permit, waiting.
    fn run(&self, hook: Hook, end: &End) {
        if catch_unwind(AssertUnwindSafe(|| hook(&self.origin, end))).is_err() {
            tracing::error!(target: "tower_tcp", "an on_end callback panicked");
        }
    }
}
