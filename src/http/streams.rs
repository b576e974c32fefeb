//! Runs the requests of an HTTP/2 connection in tasks of their own, so that one connection can use
//! all processors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use hyper::rt::Executor;
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::error::Panicked;

/// Spawns the tasks of one HTTP/2 connection for hyper. They are aborted when the connection ends.
///
/// This type is public only because it is a type parameter of hyper's builder in
/// [`Http::configure`](super::Http::configure).
#[derive(Clone, Debug, Default)]
pub struct Streams(Arc<Mutex<JoinSet<()>>>);

/// Aborts the connection's tasks when dropped. Otherwise the `JoinSet` would abort them only when
/// the last [`Streams`] is dropped. But each running request holds a `Streams`, to spawn the task
/// of a tunnel.
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
    /// number of tasks left, and a panic that has ended one of the finished tasks.
    ///
    /// Panics of a service's future and of `poll_frame` of a response's body are caught inside the
    /// task. So the panic is that of other user code, such as the `Drop` of these two.
    pub(super) fn reap(&self, cx: &mut Context<'_>) -> (usize, Option<Panicked>) {
        let mut panicked = None;
        let mut set = self.0.lock();
        while let Poll::Ready(Some(done)) = set.poll_join_next(cx) {
            let payload = done.err().and_then(|err| err.try_into_panic().ok());
            panicked = payload.map(Panicked::new).or(panicked);
        }
        (set.len(), panicked)
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.lock().abort_all();
    }
}
