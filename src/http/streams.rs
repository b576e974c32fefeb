//! The tasks of a connection: HTTP/2 runs each request in one of its own, so that those of one peer can use all processors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use hyper::rt::Executor;
use tokio::task::JoinSet;
use tracing::Instrument;

/// What hyper runs a connection's tasks by. They end with the connection, in whatever way that ends.
///
/// It is named here only as the parameter of hyper's builder, in [`Http::configure`](super::Http::configure).
#[derive(Clone, Debug, Default)]
pub struct Streams(Arc<Mutex<JoinSet<()>>>);

/// Aborts the tasks when it is dropped. (The tasks hold the set themselves, to run more.)
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

    /// Lets go of those that are done, and has the connection's task woken when the next one is. Returns how many are left.
    pub(super) fn reap(&self, cx: &mut Context<'_>) -> usize {
        let mut set = self.0.lock();
        // A handler's panic was caught inside, and an aborted task has nothing to say.
        while let Poll::Ready(Some(_)) = set.poll_join_next(cx) {}
        set.len()
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.lock().abort_all();
    }
}
