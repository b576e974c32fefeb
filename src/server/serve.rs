//! The future of a server, and the task in which it runs.
//!
//! `#[tokio::main]` runs its future on the main thread, which is not one of the runtime's workers.
//! An accept loop there would be woken by a worker whenever a client connects, and would wake a
//! worker for each connection. These two thread switches cost a tenth to a third of a short
//! connection's CPU time. So outside a task, the accept loop moves into a task of the runtime.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread::{self, ThreadId};
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::{JoinError, JoinHandle};
use tracing::Instrument;

use crate::error::Error;
use crate::handle::{Phase, ServerState};
use crate::signals::Report;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The future of [`Server::serve`](crate::Server::serve). It resolves to a [`Report`] after a
/// shutdown, or to an [`Error`].
///
/// # Cancel safety
///
/// Dropping the future closes the listener and aborts all connections. If another thread polls the
/// accept loop at that moment, for example in a call of the stack, the drop blocks until that poll
/// returns, for at most 1 s. If the poll takes longer, the listener is closed when it returns. So
/// do not drop the future while holding a lock that the stack takes.
#[must_use = "a server serves nobody unless it is awaited or spawned"]
pub struct Serve {
    state: Arc<ServerState>,
    server: Arc<Running>,
    /// The task that polls the server. `None` if [`Serve`] itself polls the server.
    task: Option<JoinHandle<Result<Report, Error>>>,
    /// Set by the first poll, which chooses where the server runs.
    begun: bool,
    signal: Option<BoxFuture<()>>,
}

impl Serve {
    pub(super) fn new(
        state: Arc<ServerState>,
        server: impl Future<Output = Result<Report, Error>> + Send + 'static,
    ) -> Self {
        Self {
            state,
            server: Arc::new(Running::new(Box::pin(server))),
            task: None,
            begun: false,
            signal: None,
        }
    }

    /// Shuts the server down when `signal` completes, as [`Handle::shutdown`] does. The signal is
    /// polled only when this future is polled. A second call replaces the signal.
    ///
    /// [`Handle::shutdown`]: crate::Handle::shutdown
    #[doc(alias = "graceful_shutdown")]
    pub fn with_graceful_shutdown(
        mut self,
        signal: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        self.signal = Some(Box::pin(signal));
        self
    }

    /// Moves the server into a task of a multi-thread runtime if this future is polled outside a
    /// task, on a thread that is not one of the runtime's workers. Does not move the server if the
    /// runtime is a current-thread runtime, because such a runtime has no workers.
    fn begin(&mut self) {
        if let Ok(runtime) = Handle::try_current()
            && runtime.runtime_flavor() == RuntimeFlavor::MultiThread
            && tokio::task::try_id().is_none()
        {
            let server = Arc::clone(&self.server);
            let polled = std::future::poll_fn(move |cx| server.poll(cx));
            // The span of a connection is a child of the span around `Server::serve`.
            self.task = Some(runtime.spawn(polled.in_current_span()));
        }
    }
}

impl fmt::Debug for Serve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serve").finish_non_exhaustive()
    }
}

impl Future for Serve {
    type Output = Result<Report, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(signal) = &mut self.signal
            && signal.as_mut().poll(cx).is_ready()
        {
            self.signal = None;
            self.state.shutdown(None);
        }
        if !std::mem::replace(&mut self.begun, true) {
            self.begin();
        }
        match &mut self.task {
            Some(task) => {
                let ended = ready!(Pin::new(task).poll(cx));
                Poll::Ready(ended.unwrap_or_else(|err| {
                    self.server.end(&self.state);
                    lost(err)
                }))
            }
            None => self.server.poll(cx),
        }
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
            self.server.end(&self.state);
        }
    }
}

/// The longest time for which dropping [`Serve`] waits for another thread that polls the server.
/// The accept loop yields after 16 connections, so a poll takes far less time than this. It takes
/// longer only if user code in the loop blocks, such as the stack's `call` or `poll_ready`, for
/// example because it waits for a lock that the dropping thread holds.
const DROP_WAIT: Duration = Duration::from_secs(1);

/// The server's future, shared between [`Serve`] and the task that polls it. So dropping [`Serve`]
/// can drop this future without waiting until the runtime drops the task.
struct Running {
    slot: Mutex<Slot>,
    /// Notified at the end of a poll during which [`end`](Self::end) was called.
    dropped: Condvar,
}

#[derive(Default)]
struct Slot {
    /// The server's future. A poll takes it out of the slot, so that no lock is held while the
    /// user's code runs.
    server: Option<BoxFuture<Result<Report, Error>>>,
    /// The thread that polls the future now. If [`Running::end`] is called on this thread, it must
    /// not wait for the poll to end. Comparing task ids instead would miss some such calls, because
    /// tokio changes the current task id while it drops a task's output.
    polled_by: Option<ThreadId>,
    /// Set by [`Running::end`]. After that, a poll drops the future instead of putting it back.
    ended: bool,
}

impl Running {
    fn new(server: BoxFuture<Result<Report, Error>>) -> Self {
        let slot = Slot {
            server: Some(server),
            ..Slot::default()
        };
        Self {
            slot: Mutex::new(slot),
            dropped: Condvar::new(),
        }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<Report, Error>> {
        let mut polling = {
            let mut slot = self.lock();
            slot.polled_by = Some(thread::current().id());
            Polling {
                server: slot.server.take(),
                running: self,
            }
        };
        match &mut polling.server {
            Some(server) => server.as_mut().poll(cx),
            // `Serve` was dropped, and its task is about to be.
            None => Poll::Pending,
        }
    }

    /// Drops the future. If a thread is polling the future, that thread drops it after the poll.
    /// Unless that thread is the caller's, this method waits for the drop, for at most
    /// [`DROP_WAIT`].
    fn end(&self, state: &ServerState) {
        let mut slot = self.lock();
        slot.ended = true;
        let server = slot.server.take();
        if server.is_none() && slot.polled_by.is_some() {
            // The loop accepts no more, even before its poll returns.
            drop(slot);
            state.advance(Phase::Aborting);
            slot = self.lock();
            let is_polled = |slot: &mut Slot| {
                let by = slot.polled_by;
                by.is_some_and(|thread| thread != thread::current().id())
            };
            let waited = self.dropped.wait_timeout_while(slot, DROP_WAIT, is_polled);
            slot = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(slot);
        drop(server);
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A poll of the server's future. After the poll, the future is put back into the slot, or dropped
/// if [`Running::end`] was called meanwhile.
struct Polling<'a> {
    server: Option<BoxFuture<Result<Report, Error>>>,
    running: &'a Running,
}

impl Drop for Polling<'_> {
    fn drop(&mut self) {
        let mut slot = self.running.lock();
        if !slot.ended {
            slot.server = self.server.take();
            slot.polled_by = None;
            return;
        }
        drop(slot);
        self.server = None;
        self.running.lock().polled_by = None;
        self.running.dropped.notify_all();
    }
}

/// Resumes the panic of a task that panicked. Returns an error for a task that was dropped because
/// its runtime was shut down.
fn lost(err: JoinError) -> Result<Report, Error> {
    match err.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_cancelled) => Err(Error::Workers(io::Error::other(
            "the runtime was shut down",
        ))),
    }
}
