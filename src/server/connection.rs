//! The life of one connection, from accept to its end.
//!
//! ```text
//!  workers            the connection's runtime        chosen before the accept
//!  bind::Listener     poll_readable, poll_accept      a stream and two addresses
//!  accept_loop        readable -> ready -> accept     Connection::new, entered in the table
//!  ── call ──         the user's stack, in the loop   a panic here ends this connection
//!  Task (this file)   spawned on that runtime         everything below runs in it
//!    admit            ConnectionLimit                 holds a permit until its future is dropped
//!    observe          ConnectionTraceLayer            the span; `on_end` logs `connection.closed`
//!    preconnect       hooks: deadline, budget         TLS, your checks; may replace the stream
//!    pipeline         engine, make-service, calls     frames in, requests, replies, frames out
//!    close            flush, shut down, linger        ends in good order
//!  settle             stream and permit are dropped   one reason, decided here; then `on_end`
//!  Leaving            dropped with the task           removed from the server's table
//! ```

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use pin_project::pin_project;

use crate::connection::Life;
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked, caught};
use crate::handle::ServerState;
use crate::signals::Signal;

/// A connection in the server's table.
///
/// Dropping this value makes the connection's end final, and removes the connection from the table.
/// That is the last step of a connection, however it ends.
pub(super) struct Leaving {
    life: Arc<Life>,
    server: Arc<ServerState>,
}

impl Leaving {
    pub(super) fn enter(life: Arc<Life>, server: Arc<ServerState>) -> Self {
        server.enter(&life);
        Self { life, server }
    }

    pub(super) fn settle(&self, outcome: Outcome) {
        self.life.finish(|| outcome.reason(&self.life));
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        // `settle` does nothing if the end is already final. Otherwise, the task was dropped
        // because its runtime is shutting down.
        self.settle(Outcome::Dropped);
        self.server.leave(&self.life);
    }
}

/// The outcome of the connection service's future.
pub(super) enum Outcome {
    Done,
    Failed(ConnectionEnded),
    Panicked(Panicked),
    Dropped,
}

impl Outcome {
    /// Returns the end that this outcome proposes for the connection. The proposal applies if no
    /// end was proposed before, or if the earlier end is orderly and the proposed one is not.
    fn reason(self, life: &Life) -> ConnectionEnded {
        match self {
            Self::Done => life.done().into(),
            Self::Failed(ended) => ended,
            Self::Panicked(panicked) => ConnectionEnded::new(EndReason::Panic, panicked),
            Self::Dropped => EndReason::Killed.into(),
        }
    }
}

/// Converts the error of a connection service to the end that it proposes.
fn failed(err: impl Into<BoxError>) -> ConnectionEnded {
    let err = err.into();
    let otherwise = EndReason::of_stack(&*err);
    ConnectionEnded::of(err, otherwise)
}

/// The task of one connection.
#[pin_project]
pub(super) struct Task<F> {
    // Fields are dropped in the order of their declaration: the stream and the permit first, then
    // the entry in the table.
    #[pin]
    service: Option<F>,
    leaving: Leaving,
    registered: bool,
    /// Counts the connection on its runtime.
    _counted: Arc<()>,
}

impl<F> Task<F> {
    // Inlined, because the service's future may be large, and would otherwise be copied once more.
    #[inline(always)]
    pub(super) fn new(service: F, leaving: Leaving, counted: Arc<()>) -> Self {
        Self {
            service: Some(service),
            leaving,
            registered: false,
            _counted: counted,
        }
    }
}

impl<F, R, E> Future for Task<F>
where
    F: Future<Output = Result<R, E>>,
    E: Into<BoxError>,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let signals = &this.leaving.life.signals;
        if !std::mem::replace(this.registered, true) {
            // Setting the waker once is enough, because the waker of a spawned task never changes.
            signals.wake_task_with(cx.waker());
        }
        let outcome = if signals.is_raised(Signal::Abort) {
            Outcome::Dropped
        } else {
            let Some(service) = this.service.as_mut().as_pin_mut() else {
                return Poll::Ready(());
            };
            // Inside `caught`, the response is dropped and the error is converted and searched,
            // because that may run user code.
            match caught(|| service.poll(cx).map_ok(drop).map_err(failed)) {
                Ok(Poll::Pending) => return Poll::Pending,
                Ok(Poll::Ready(Ok(()))) => Outcome::Done,
                Ok(Poll::Ready(Err(ended))) => Outcome::Failed(ended),
                Err(panicked) => Outcome::Panicked(panicked),
            }
        };
        let dropped = caught(|| this.service.set(None));
        this.leaving.settle(match (dropped, outcome) {
            (Err(panicked), Outcome::Done | Outcome::Dropped) => Outcome::Panicked(panicked),
            (_, outcome) => outcome,
        });
        Poll::Ready(())
    }
}
