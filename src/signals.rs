//! The signals to a connection (drain, close, abort), and the report of a shutdown.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::coop::has_budget_remaining;

/// A signal to one connection. The variants are listed from the weakest to the strongest. A raised
/// signal stays raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Signal {
    /// Finish requests in progress, then close. Raised by a drain of the server, at the
    /// connection's maximum age, and by `LiveConnection::close`. After an upgrade, `Peer::close`
    /// raises it, too.
    Drain = 1,
    /// Finish calls in progress but begin no more, write pending output, then close. Raised by
    /// `Peer::close`, for example.
    Close = 2,
    /// Drop the connection's future immediately. Raised by `Peer::abort` and at the shutdown
    /// deadline, for example.
    Abort = 4,
}

/// Flag beside the signals: the server has raised [`Signal::Abort`], because it ends.
const BY_SERVER: u8 = 8;

/// The signals raised for one connection, and the wakers to wake when one is raised.
///
/// There is one waker for the connection's task, and one for its hooks, pipeline or HTTP service,
/// because a layer may have moved these to another task. Both stay registered, so an idle
/// connection does not register them again for each wait. Futures that the user holds wait on a
/// `Notify`.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    raised: AtomicU8,
    wakers: Mutex<Wakers>,
}

/// The wakers of one connection. Waking one does not remove it, because a waiter sets its waker
/// once, not before every wait.
#[derive(Debug, Default)]
struct Wakers {
    task: Option<Waker>,
    engine: Option<Waker>,
    /// Wakes the futures that the user holds, such as that of `ConnectionInfo::draining`. Allocated
    /// when the first of them is polled.
    users: Option<Arc<Notify>>,
}

impl Signals {
    /// Sets the waker of the connection's task. Check the signals *after* this call, because a
    /// signal that was raised before does not wake this waker.
    pub(crate) fn wake_task_with(&self, waker: &Waker) {
        self.lock().task = Some(waker.clone());
    }

    /// Sets the waker of the connection's hooks, pipeline or HTTP service. As with
    /// `wake_task_with`, check the signals *after* this call.
    pub(crate) fn wake_engine_with(&self, waker: &Waker) {
        let before = self.lock().engine.replace(waker.clone());
        drop(before);
    }

    /// Raises a signal. Returns `false` if it was raised before.
    pub(crate) fn raise(&self, signal: Signal) -> bool {
        self.raise_with(signal, 0)
    }

    /// Raises [`Signal::Abort`], because the server ends. Does nothing if it was raised before.
    pub(crate) fn abort_by_server(&self) {
        self.raise_with(Signal::Abort, BY_SERVER);
    }

    /// Returns whether [`abort_by_server`](Self::abort_by_server) has raised [`Signal::Abort`].
    pub(crate) fn is_aborted_by_server(&self) -> bool {
        self.raised.load(Ordering::Acquire) & BY_SERVER != 0
    }

    fn raise_with(&self, signal: Signal, flag: u8) -> bool {
        let raise = |raised: u8| {
            let new = raised & signal as u8 == 0;
            new.then_some(raised | signal as u8 | flag)
        };
        let (set, fetch) = (Ordering::AcqRel, Ordering::Acquire);
        let new = self.raised.fetch_update(set, fetch, raise).is_ok();
        if new {
            // The connection's task itself reacts only to `Abort`.
            if signal == Signal::Abort {
                self.wake(|wakers| wakers.task.clone());
            }
            self.wake_engine();
            self.wake_users();
        }
        new
    }

    pub(crate) fn is_raised(&self, signal: Signal) -> bool {
        self.raised.load(Ordering::Acquire) & signal as u8 != 0
    }

    /// Returns whether any signal was raised, with a single load.
    pub(crate) fn any(&self) -> bool {
        self.raised.load(Ordering::Acquire) != 0
    }

    /// Wakes the part of the connection that runs now (its hooks, its pipeline or its HTTP
    /// service), so that it checks its signals and queues.
    pub(crate) fn wake_engine(&self) {
        self.wake(|wakers| wakers.engine.clone());
    }

    /// Waits for `signal`.
    pub(crate) async fn raised(&self, signal: Signal) {
        self.users_until(|| self.is_raised(signal).then_some(()))
            .await;
    }

    /// Wakes the futures that the user holds, so that each checks its condition again.
    pub(crate) fn wake_users(&self) {
        let users = self.lock().users.clone();
        if let Some(users) = users {
            users.notify_waiters();
        }
    }

    /// Waits until `look` returns `Some`.
    pub(crate) async fn users_until<R>(&self, look: impl Fn() -> Option<R>) -> R {
        let users = Arc::clone(self.lock().users.get_or_insert_default());
        loop {
            let mut notified = std::pin::pin!(users.notified());
            notified.as_mut().enable();
            if let Some(found) = look() {
                return found;
            }
            notified.await;
        }
    }

    /// Wakes the waker that `whom` selects. The lock is released first, because waking may run user
    /// code.
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

/// Returns `Ready` if the poll before this call returned `Pending` because there was nothing to
/// read or accept. Once the task's cooperative budget is spent, tokio returns `Pending` even if
/// there is something. In that case, this function returns `Pending`, too, and wakes the task to
/// poll again.
pub(crate) fn poll_looked(cx: &mut Context<'_>) -> Poll<()> {
    if has_budget_remaining() {
        return Poll::Ready(());
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// The result of a shutdown. It counts the connections that were open when the drain began or were
/// accepted during it, by how they ended.
///
/// Its `Display` output looks like `connections: 2 drained, 1 timed out, 0 aborted`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The number of connections that neither timed out nor were aborted by the server. They closed
    /// in good order, or ended for another reason, for example because the peer disconnected, the
    /// service failed, the program aborted them individually
    /// ([`Peer::abort`](crate::Peer::abort)), or their runtime was shut down.
    pub drained: usize,
    /// The number of connections that ended at one of their own deadlines
    /// ([`EndReason::is_timeout`](crate::EndReason::is_timeout)), for example because the peer did
    /// not read its replies. Connections that a broadcast closed because the peer did not read are
    /// counted here, too.
    pub timed_out: usize,
    /// The number of connections that the server aborted: at the shutdown deadline, by
    /// [`Handle::abort`](crate::Handle::abort), or because the future of `serve` was dropped.
    pub aborted: usize,
    /// The time from the beginning of the shutdown to its end. Zero if the server or the future of
    /// `serve` was dropped before the shutdown ended, or if a worker thread could not be started.
    pub duration: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "connections: {} drained, {} timed out, {} aborted",
            self.drained, self.timed_out, self.aborted
        )
    }
}
