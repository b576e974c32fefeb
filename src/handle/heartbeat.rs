//! Heartbeats, which show that the server's loop still runs.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Handle, ServerState};

/// The number of heartbeats that were requested, and the number that the loop has answered.
#[derive(Default)]
pub(super) struct Heartbeat {
    requested: AtomicU64,
    answered: AtomicU64,
}

impl Handle {
    /// Wakes the server's accept loop, and waits until the loop has run. A loop that is not stuck
    /// runs at once. Returns `true` if the loop has run, and `false` if the server has ended.
    ///
    /// A waiting loop is not stuck: it also runs when the server is at its connection limit, during
    /// a pause, during a drain, and while a layer is not ready. The loop is stuck if its thread is
    /// blocked, or if no thread of its runtime is free. The thread can be blocked by a service or
    /// layer of the connection stack, by an
    /// [`address_filter`](crate::ServerBuilder::address_filter), by the policy of
    /// [`on_accept_error`](crate::ServerBuilder::on_accept_error), or by a listener. Before the
    /// future of [`serve`](crate::Server::serve) is first polled, the loop does not run, so this
    /// method waits.
    ///
    /// [`health::is_live`](crate::health::is_live) adds a deadline.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect on other calls.
    pub fn heartbeat(&self) -> impl Future<Output = bool> + Send + use<> {
        let handle = self.clone();
        async move {
            let state = &*handle.0;
            let requested = state.heartbeat.requested.fetch_add(1, Ordering::SeqCst) + 1;
            state.server.wake();
            let answered = || {
                let answered = state.heartbeat.answered.load(Ordering::SeqCst) >= requested;
                let has_ended = state.reported().is_some();
                (answered || has_ended).then_some(!has_ended)
            };
            state.advanced_until(answered).await
        }
    }
}

impl ServerState {
    /// Answers the requested heartbeats. Only the server's loop calls this.
    pub(super) fn answer_heartbeats(&self) {
        let requested = self.heartbeat.requested.load(Ordering::SeqCst);
        if requested != self.heartbeat.answered.load(Ordering::Relaxed) {
            self.heartbeat.answered.store(requested, Ordering::SeqCst);
            self.advanced.notify_waiters();
        }
    }
}
