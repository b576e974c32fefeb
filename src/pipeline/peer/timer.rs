use std::fmt;

use tokio::time::Instant;

use super::Peer;

/// A message that is sent after a delay. Created by [`Peer::post_after`]. Dropping the `Timer` does
/// not cancel the message.
pub struct Timer<T, M> {
    peer: Peer<T, M>,
    key: (Instant, u64),
}

impl<T, M> Timer<T, M> {
    pub(super) fn new(peer: Peer<T, M>, key: (Instant, u64)) -> Self {
        Self { peer, key }
    }

    /// Returns the time at which the message is due.
    pub fn due(&self) -> Instant {
        self.key.0
    }

    /// Cancels the timer and returns its message. Returns `None` if the message was already taken
    /// for delivery, or was dropped because the connection closed or was upgraded.
    pub fn cancel(self) -> Option<M> {
        self.peer.channel.cancel_timer(self.key)
    }
}

impl<T, M> fmt::Debug for Timer<T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer")
            .field("due", &self.due())
            .finish_non_exhaustive()
    }
}
