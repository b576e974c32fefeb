//! Runs the requests of an HTTP/2 connection in tasks of their own, so that one connection can use
//! all processors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use hyper::rt::Executor;
use tokio::task::JoinSet;
use tracing::Instrument;

/// Spawns the tasks of one HTTP/2 connection for hyper. They are aborted when the connection ends.
///
/// This type is public only because it is a type parameter of hyper's builder in
/// [`Http::configure`](super::Http::configure).
#[derive(Clone, Debug, Default)]
pub struct Streams(Arc<Mutex<JoinSet<()>>>);

/// Aborts the connection's tasks when dropped. The `JoinSet` alone would abort them only when the
/// last [`Streams`] is dropped, and each running request holds one, to spawn the task of a tunnel.
pub(super) struct Tasks(Streams);

impl Streams {
    fn lock(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F> Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.lock().spawn(future.in_current_span());
    }
}

impl Tasks {
    pub(super) fn new() -> (Self, Streams) {
        let streams = Streams::default();
        (Self(streams.clone()), streams)
    }

    /// Removes finished tasks and registers a wakeup for the next one that finishes. Returns the
    /// number of tasks left.
    pub(super) fn reap(&self, cx: &mut Context<'_>) -> usize {
        let mut set = self.0.lock();
        // The results are ignored, because a handler's panic was already caught inside its task.
        while let Poll::Ready(Some(_)) = set.poll_join_next(cx) {}
        set.len()
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.lock().abort_all();
    }
}
