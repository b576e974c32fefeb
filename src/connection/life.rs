use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::hooks::{Hook, HookId, Hooks, Moment};
use super::origin::Origin;
use super::phase::ConnectionPhase;
use super::wire::Probe;
use crate::end::{Cause, ConnectionEnded, End, EndReason};
use crate::error::caught;
use crate::signals::{Signal, Signals};

/// The proposed reason and the callbacks of an open connection, or the final [`End`].
enum EndCell {
    Open(Open),
    Ended(End),
}

#[derive(Default)]
struct Open {
    reason: Option<ConnectionEnded>,
    hooks: Hooks,
}

impl Open {
    /// Proposes a reason. Returns the reason that now applies, and the reason that was replaced, if
    /// any. The caller drops the latter after unlocking, because dropping its cause runs user code.
    fn propose(
        &mut self,
        proposed: &ConnectionEnded,
    ) -> (ConnectionEnded, Option<ConnectionEnded>) {
        let first = self.reason.take();
        let (applies, replaced) = match first {
            Some(first) if proposed.reason.is_orderly() || !first.reason.is_orderly() => {
                (first, None)
            }
            first => (proposed.clone(), first),
        };
        (self.reason.insert(applies).clone(), replaced)
    }
}

/// The part of a connection that outlives its stream. It receives the signals, counts bytes and
/// requests, and stores the connection's [`End`].
pub(crate) struct Life {
    pub(crate) origin: Origin,
    pub(crate) signals: Signals,
    /// The socket, while it is open.
    pub(crate) probe: Probe,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    requests: AtomicU64,
    messages_dropped: AtomicU32,
    /// The peer has finished sending. If the connection does not drain and no reason was proposed,
    /// it therefore ends with `PeerClosed` instead of `ServiceClosed`.
    peer_done: AtomicBool,
    /// The last write, flush or shutdown waits for the peer to take output.
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
            messages_dropped: AtomicU32::new(0),
            peer_done: AtomicBool::new(false),
            write_pending: AtomicBool::new(false),
            phase: AtomicU8::new(ConnectionPhase::Serving as u8),
            end: Mutex::new(EndCell::Open(Open::default())),
        }
    }

    /// Adds to a counter that has one writer: the task that owns the stream. So this function needs
    /// no atomic read-modify-write.
    fn add(counter: &AtomicU64, n: usize) {
        let sum = counter.load(Ordering::Relaxed).wrapping_add(n as u64);
        counter.store(sum, Ordering::Relaxed);
    }

    pub(super) fn count_read(&self, bytes: usize) {
        Self::add(&self.bytes_read, bytes);
    }

    /// Subtracts bytes that were counted but will be read, and counted, again.
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

    /// Records the phase. Draining is not recorded, because it follows from the signals.
    pub(crate) fn enter(&self, phase: ConnectionPhase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(crate) fn phase(&self) -> ConnectionPhase {
        let entered = usize::from(self.phase.load(Ordering::Relaxed));
        let entered = ConnectionPhase::ALL.get(entered);
        match entered.copied().unwrap_or(ConnectionPhase::Serving) {
            ConnectionPhase::Serving if self.signals.any() => ConnectionPhase::Draining,
            entered => entered,
        }
    }

    pub(crate) fn count_dropped_messages(&self, messages: usize) {
        let messages = u32::try_from(messages).unwrap_or(u32::MAX);
        self.messages_dropped.fetch_add(messages, Ordering::Relaxed);
    }

    pub(crate) fn peer_is_done(&self) {
        self.peer_done.store(true, Ordering::Relaxed);
    }

    /// Returns whether the peer has finished sending.
    #[cfg(feature = "http")]
    pub(crate) fn is_peer_done(&self) -> bool {
        self.peer_done.load(Ordering::Relaxed)
    }

    /// Records whether the last write, flush or shutdown waits for the peer to take output. The
    /// value rarely changes, so it is stored only when it does.
    #[inline]
    pub(super) fn note_write_pending(&self, pending: bool) {
        if self.write_pending.load(Ordering::Relaxed) != pending {
            self.write_pending.store(pending, Ordering::Relaxed);
        }
    }

    /// Returns whether the last write, flush or shutdown waits for the peer to take output.
    pub(crate) fn is_write_pending(&self) -> bool {
        self.write_pending.load(Ordering::Relaxed)
    }

    fn cell(&self) -> MutexGuard<'_, EndCell> {
        // No user code runs under this lock, so only a failed allocation can poison it.
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Proposes a reason. Returns the reason that now applies.
    ///
    /// The first reason wins, because later ones usually follow from it. But an error replaces an
    /// orderly reason, because an error means that data may have been lost.
    pub(crate) fn set_reason(&self, reason: EndReason, cause: Option<Cause>) -> ConnectionEnded {
        let proposed = ConnectionEnded { reason, cause };
        let (applies, replaced) = match &mut *self.cell() {
            EndCell::Open(open) => open.propose(&proposed),
            EndCell::Ended(end) => (end.why(), None),
        };
        drop_replaced(replaced);
        applies
    }

    /// Proposes a reason because the stream ends now. Returns the reason that then applies.
    ///
    /// If the proposed reason cuts the peer off, closing a TCP socket sends a reset, even if an
    /// earlier reason applies. With a reset, the system frees the socket's memory immediately,
    /// before the connection's permit is returned. No reset is sent if the connection's listener is
    /// a custom one that does not provide the socket, if `SocketOptions::reset_cut_off` is off, or
    /// if the proposed reason is `DrainDeadline` or `Killed` and closing has begun.
    pub(crate) fn ended(&self, ended: ConnectionEnded) -> ConnectionEnded {
        // At a shutdown's deadline, or if the server is aborted, a connection that is already
        // closing is not reset, so that a peer that is still reading gets the output already
        // written.
        let spared = matches!(ended.reason, EndReason::DrainDeadline | EndReason::Killed)
            && self.phase() == ConnectionPhase::Closing;
        if ended.reason.is_cut_off() && !spared {
            self.probe.reset_at_close();
        }
        self.set_reason(ended.reason, ended.cause)
    }

    /// Returns the reason that applies so far, if one was proposed.
    pub(crate) fn proposed(&self) -> Option<ConnectionEnded> {
        match &*self.cell() {
            EndCell::Open(open) => open.reason.clone(),
            EndCell::Ended(end) => Some(end.why()),
        }
    }

    /// Returns the end reason of a connection whose service has completed: the proposed reason, or
    /// else one derived from the signals and the input.
    pub(crate) fn done(&self) -> EndReason {
        let proposed = self.proposed().map(|ended| ended.reason);
        proposed.unwrap_or_else(|| self.unproposed())
    }

    /// Returns the end reason of a connection for which no reason was proposed.
    fn unproposed(&self) -> EndReason {
        if self.signals.is_raised(Signal::Drain) {
            EndReason::Drained
        } else if self.peer_done.load(Ordering::Relaxed) {
            EndReason::PeerClosed
        } else {
            EndReason::ServiceClosed
        }
    }

    /// Closes the connection gracefully, as a drain does, with `ServiceClosed` as the reason. It
    /// raises `Signal::Drain`, because raw services do not notice `Signal::Close`.
    pub(crate) fn close_gracefully(&self) {
        self.set_reason(EndReason::ServiceClosed, None);
        self.signals.raise(Signal::Drain);
    }

    /// Proposes `reason` as the end reason, and aborts the connection. Returns `false` if the
    /// connection was already aborted.
    pub(crate) fn abort(&self, reason: EndReason) -> bool {
        self.ended(reason.into());
        self.signals.raise(Signal::Abort)
    }

    /// Aborts the connection as [`abort`](Self::abort) does, because the server ends. Unless it was
    /// aborted before, the server's report counts it as aborted.
    pub(crate) fn abort_by_server(&self, reason: EndReason) {
        self.ended(reason.into());
        self.signals.abort_by_server();
    }

    /// Records that closing begins: the service is done, and its remaining output is still to be
    /// written. Runs the callbacks for that moment. A second call does nothing.
    pub(crate) fn begin_closing(&self) {
        self.enter(ConnectionPhase::Closing);
        let due = match &mut *self.cell() {
            EndCell::Open(open) if !open.hooks.is_past(Moment::Closing) => {
                let due = open.hooks.take_closing();
                // Most connections have no callbacks.
                (!due.is_empty()).then(|| (self.so_far(open), due))
            }
            _ => return,
        };
        if let Some((end, due)) = due {
            due.run(|hook| self.run(hook, &end));
        }
        self.signals.wake_users();
    }

    /// Returns the provisional end of a connection that is still open.
    fn so_far(&self, open: &Open) -> End {
        let proposed = open.reason.clone();
        self.totals(proposed.unwrap_or_else(|| self.unproposed().into()))
    }

    fn totals(&self, ConnectionEnded { reason, cause }: ConnectionEnded) -> End {
        let nanos = self.origin.accepted_at.elapsed().as_nanos();
        End {
            reason,
            cause,
            nanos: u64::try_from(nanos).unwrap_or(u64::MAX),
            bytes_read: self.bytes_read(),
            bytes_written: self.bytes_written(),
            requests: self.requests(),
            messages_dropped: self.messages_dropped.load(Ordering::Relaxed).into(),
        }
    }

    /// Makes the end final and runs its callbacks. If closing has not begun, first runs the
    /// callbacks for the moment when closing begins. Called when the connection's task ends or is
    /// dropped, and by the accept loop if a panic leaves the connection without a task. A second
    /// call does nothing.
    ///
    /// `outcome` returns the last reason to propose.
    pub(crate) fn finish(&self, outcome: impl FnOnce() -> ConnectionEnded) {
        let outcome = outcome();
        let (end, due, replaced) = {
            let mut cell = self.cell();
            let EndCell::Open(open) = &mut *cell else {
                return;
            };
            let due = open.hooks.take_all();
            let (ended, replaced) = open.propose(&outcome);
            let end = self.totals(ended);
            *cell = EndCell::Ended(end.clone());
            (end, due, replaced)
        };
        if !due.is_empty() {
            due.run(|hook| self.run(hook, &end));
        }
        self.signals.wake_users();
        drop_replaced(replaced);
    }

    /// Waits until `moment` is reached, and returns the end as it is known then.
    pub(crate) async fn reached(&self, moment: Moment) -> End {
        self.signals.users_until(|| self.end_at(moment)).await
    }

    /// Returns the end, once it is final.
    pub(crate) fn end(&self) -> Option<End> {
        self.end_at(Moment::End)
    }

    /// Returns the end as it is known now, if `moment` has been reached.
    fn end_at(&self, moment: Moment) -> Option<End> {
        match &*self.cell() {
            EndCell::Ended(end) => Some(end.clone()),
            EndCell::Open(open) if open.hooks.is_past(moment) => Some(self.so_far(open)),
            EndCell::Open(_) => None,
        }
    }

    /// Runs a callback at a moment, or at once if that moment is past.
    pub(crate) fn on(&self, moment: Moment, hook: impl FnOnce(&Origin, &End) + Send + 'static) {
        if let Err((hook, end)) = self.before(moment, Box::new(hook)) {
            self.run(hook, &end);
        }
    }

    /// Registers a callback to run at `moment`. Fails if that moment is past.
    pub(crate) fn before(&self, moment: Moment, hook: Hook) -> Result<HookId, (Hook, End)> {
        match &mut *self.cell() {
            EndCell::Ended(end) => Err((hook, end.clone())),
            EndCell::Open(open) if open.hooks.is_past(moment) => Err((hook, self.so_far(open))),
            EndCell::Open(open) => Ok(open.hooks.add(moment, hook)),
        }
    }

    /// Removes a callback.
    pub(crate) fn forget(&self, id: HookId) {
        let hook = match &mut *self.cell() {
            EndCell::Open(open) => open.hooks.take(id),
            EndCell::Ended(_) => None,
        };
        // Dropped after unlocking, because dropping it runs user code.
        drop(hook);
    }

    /// Runs one callback, and catches a panic in it, so that the other callbacks still run and the
    /// permit is returned.
    fn run(&self, hook: Hook, end: &End) {
        if caught(|| hook(&self.origin, end)).is_err() {
            tracing::error!(target: "tower_tcp", "a connection's callback panicked");
        }
    }
}

/// Drops a reason that was replaced. Catches a panic of its cause, so that the server still ends
/// other connections, and still removes this one from its table.
fn drop_replaced(replaced: Option<ConnectionEnded>) {
    if caught(|| drop(replaced)).is_err() {
        tracing::error!(target: "tower_tcp", "a connection's error panicked as it was dropped");
    }
}
