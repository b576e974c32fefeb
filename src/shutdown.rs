//! The signals that reach a connection from outside: leave when you can, close now, be gone.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

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
/// Two fixed wakers serve the connection's task and its pipeline (which a layer may have moved to a
/// task of its own), so that waiting costs a resting connection nothing; `Notify` serves the user's.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    raised: AtomicU8,
    pub(crate) task: AtomicWaker,
    pub(crate) engine: StandingWaker,
    users: Notify,
}

impl Signals {
    /// Returns whether it was not raised before.
    pub(crate) fn raise(&self, signal: Signal) -> bool {
        let before = self.raised.fetch_or(signal as u8, Ordering::AcqRel);
        let new = before & signal as u8 == 0;
        if new {
            // Waking takes a waker out, and the task registers once: for the one signal that it acts on.
            if signal == Signal::Abort {
                self.task.wake();
            }
            self.engine.wake();
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

    /// Waits for `signal`.
    pub(crate) async fn raised(&self, signal: Signal) {
        self.users_until(|| self.is_raised(signal).then_some(()))
            .await;
    }

    /// Has those who wait look again.
    pub(crate) fn tell_users(&self) {
        self.users.notify_waiters();
    }

    /// Waits until there is what `look` looks for.
    pub(crate) async fn users_until<R>(&self, look: impl Fn() -> Option<R>) -> R {
        loop {
            let mut told = std::pin::pin!(self.users.notified());
            told.as_mut().enable();
            if let Some(found) = look() {
                return found;
            }
            told.await;
        }
    }
}

/// A waker that waking does not take out: it is set once, not before every wait.
#[derive(Debug, Default)]
pub(crate) struct StandingWaker(Mutex<Option<Waker>>);

impl StandingWaker {
    /// Look at what it wakes for *after* this, or what comes in between is missed.
    pub(crate) fn set(&self, waker: Option<Waker>) {
        let before = std::mem::replace(&mut *self.lock(), waker);
        drop(before);
    }

    pub(crate) fn wake(&self) {
        // Woken without the lock: a waker is foreign code.
        let waker = self.lock().clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Waker>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
