//! The future of a server, and the task in which it runs.
//!
//! `#[tokio::main]` runs its future on the main thread, which is not one of the runtime's workers.
//! An accept loop there would be woken by a worker whenever a client connects, and would wake a
//! worker for each connection: two switches of threads, which cost more than to accept a connection
//! and serve one line. So outside a task, the accept loop moves into a task of the runtime.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::{JoinError, JoinHandle};
use tracing::Instrument;

use crate::error::Error;
use crate::handle::ServerState;
use crate::signals::Report;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The future of [`Server::serve`](crate::Server::serve). It resolves to a [`Report`] after a
/// shutdown, or to an [`Error`].
///
/// # Cancel safety
///
/// Dropping the future closes the listener and aborts all connections.
#[must_use = "a server serves nobody unless it is awaited or spawned"]
pub struct Serve {
    state: Arc<ServerState>,
    server: Arc<Running>,
    /// The task that polls the server, if it is not polled here.
    task: Option<JoinHandle<Result<Report, Error>>>,
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
            server: Arc::new(Running(Mutex::new(Some(Box::pin(server))))),
            task: None,
            begun: false,
            signal: None,
        }
    }

    /// Shuts the server down when `signal` completes, as [`Handle::shutdown`] does.
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

    /// Moves the server into a task if this future is polled outside a task, on a thread that is
    /// not one of the runtime's workers. A runtime without workers has only that thread.
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
            Some(task) => Poll::Ready(ready!(Pin::new(task).poll(cx)).unwrap_or_else(lost)),
            None => self.server.poll(cx),
        }
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
            // The server itself has dropped this future, so the lock is held. The task drops the
            // server once it has returned.
            if tokio::task::try_id() == Some(task.id()) {
                return;
            }
        }
        self.server.end();
    }
}

/// The server's own future. It is shared with the task that polls it, so that dropping [`Serve`]
/// drops this future before it returns.
struct Running(Mutex<Option<BoxFuture<Result<Report, Error>>>>);

impl Running {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<Report, Error>> {
        match &mut *self.lock() {
            Some(server) => server.as_mut().poll(cx),
            // `Serve` was dropped, and its task is about to be.
            None => Poll::Pending,
        }
    }

    fn end(&self) {
        let server = self.lock().take();
        drop(server);
    }

    fn lock(&self) -> MutexGuard<'_, Option<BoxFuture<Result<Report, Error>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the result for a task that has none, because it panicked or its runtime was shut down.
fn lost(err: JoinError) -> Result<Report, Error> {
    match err.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_cancelled) => Err(Error::Workers(io::Error::other(
            "the runtime was shut down",
        ))),
    }
}
