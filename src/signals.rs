//! The signals that reach a connection from outside: leave when you can, close now, be gone.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::coop::has_budget_remaining;

/// What can be asked of one connection, weakest first. Each is raised once and stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Signal {
    /// The server drains: finish what is in hand and leave.
    Drain = 1,
    /// The connection's own service wants it closed in good order.
    Close = 2,
    /// The connection's future is to be dropped as it is.
    Abort = 4,
}

/// The signals raised for one connection, and who is to be woken by them.
///
/// Two standing wakers serve the connection's task and its pipeline (which a layer may have moved to a
/// task of its own), so that waiting costs a resting connection nothing; `Notify` serves the user's.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    raised: AtomicU8,
    wakers: Mutex<Wakers>,
}

/// Waking takes none of them out: they are set once, not before every wait.
#[derive(Debug, Default)]
struct Wakers {
    task: Option<Waker>,
    engine: Option<Waker>,
    /// Made for the first who waits.
    users: Option<Arc<Notify>>,
}

impl Signals {
    /// Has signals wake the connection's task. Look at them *after* this, or what comes in between is missed.
    pub(crate) fn wake_task_with(&self, waker: &Waker) {
        self.lock().task = Some(waker.clone());
    }

    /// Has signals wake the connection's pipeline. Look at them *after* this, too.
    pub(crate) fn wake_engine_with(&self, waker: &Waker) {
        let before = self.lock().engine.replace(waker.clone());
        drop(before);
    }

    /// Returns whether it was not raised before.
    pub(crate) fn raise(&self, signal: Signal) -> bool {
        let before = self.raised.fetch_or(signal as u8, Ordering::AcqRel);
        let new = before & signal as u8 == 0;
        if new {
            // Only this is what the task acts on.
            if signal == Signal::Abort {
                self.wake(|wakers| wakers.task.clone());
            }
            self.wake_engine();
            self.tell_users();
        }
        new
    }

    pub(crate) fn is_raised(&self, signal: Signal) -> bool {
        self.raised.load(Ordering::Acquire) & signal as u8 != 0
    }

    /// Returns whether anything at all was raised: one load for the common case.
    pub(crate) fn any(&self) -> bool {
        self.raised.load(Ordering::Acquire) != 0
    }

    /// Has the pipeline look again.
    pub(crate) fn wake_engine(&self) {
        self.wake(|wakers| wakers.engine.clone());
    }

    /// Waits for `signal`.
    pub(crate) async fn raised(&self, signal: Signal) {
        self.users_until(|| self.is_raised(signal).then_some(()))
            .await;
    }

    /// Has those who wait look again.
    pub(crate) fn tell_users(&self) {
        let users = self.lock().users.clone();
        if let Some(users) = users {
            users.notify_waiters();
        }
    }

    /// Waits until there is what `look` looks for.
    pub(crate) async fn users_until<R>(&self, look: impl Fn() -> Option<R>) -> R {
        let users = Arc::clone(self.lock().users.get_or_insert_default());
        loop {
            let mut told = std::pin::pin!(users.notified());
            told.as_mut().enable();
            if let Some(found) = look() {
                return found;
            }
            told.await;
        }
    }

    /// Wakes without the lock: a waker is foreign code.
    fn wake(&self, whom: impl FnOnce(&Wakers) -> Option<Waker>) {
        let waker = whom(&self.lock());
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Wakers> {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says whether what was pending before is a fact, such as that nothing more has arrived. It is none once the budget of the task's turn is
/// spent, by which tokio has everything wait: then this waits for another turn.
pub(crate) fn poll_looked(cx: &mut Context<'_>) -> Poll<()> {
    if has_budget_remaining() {
        return Poll::Ready(());
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// What a shutdown did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Connections that were open when the shutdown began, or came in after that, and ended by themselves.
    pub drained: usize,
    /// Connections that were cut off, by the deadline or a second shutdown.
    pub aborted: usize,
    /// The time from the beginning of the shutdown to its end.
    pub duration: Duration,
}
