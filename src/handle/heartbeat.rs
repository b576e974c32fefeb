//! A sign of life of the server's loop.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Handle, ServerState};

/// The heartbeats that were asked for, and the number of them that the loop has answered.
#[derive(Default)]
pub(super) struct Heartbeat {
    asked: AtomicU64,
    answered: AtomicU64,
}

impl Handle {
    /// Waits until the server's accept loop takes a turn, which it begins at once unless it is
    /// stuck. Returns `false` if the server has ended instead.
    ///
    /// A loop that waits takes turns, too: at the limit, during a pause, for a layer that is not
    /// ready, and during a drain. A loop is stuck if the connection stack, a layer around it, an
    /// [`address_filter`](crate::ServerBuilder::address_filter) or a listener blocks its thread, or
    /// if its runtime has no thread left to run it. It takes no turn before the future of
    /// [`serve`](crate::Server::serve) is polled.
    ///
    /// [`health::is_live`](crate::health::is_live) adds a deadline.
    ///
    /// # Cancel safety
    ///
    /// A later call waits for a turn of its own.
    pub fn heartbeat(&self) -> impl Future<Output = bool> + Send + use<> {
        let handle = self.clone();
        async move {
            let state = &*handle.0;
            let asked = state.heartbeat.asked.fetch_add(1, Ordering::SeqCst) + 1;
            state.server.wake();
            let answered = || {
                let answered = state.heartbeat.answered.load(Ordering::SeqCst) >= asked;
                let has_ended = state.reported().is_some();
                (answered || has_ended).then_some(!has_ended)
            };
            state.advanced_until(answered).await
        }
    }
}

impl ServerState {
    /// Answers the heartbeats that were asked for. Only the server's loop calls this.
    pub(super) fn answer_heartbeats(&self) {
        let asked = self.heartbeat.asked.load(Ordering::SeqCst);
        if asked != self.heartbeat.answered.load(Ordering::Relaxed) {
            self.heartbeat.answered.store(asked, Ordering::SeqCst);
            self.advanced.notify_waiters();
        }
    }
}
