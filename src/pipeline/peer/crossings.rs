use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use super::channel::Channel;

/// The output of a connection crossed one of its [`Watermarks`](crate::pipeline::Watermarks).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// It came up to the high mark.
    High,
    /// It came down to the low mark.
    Low,
}

/// The crossings of a connection's watermarks, each of them once and in turn: high, low, high.
///
/// Made by [`Peer::crossings`](super::Peer::crossings). They are counted, not queued: one who looks
/// seldom finds them all, and nothing is kept for it.
pub struct Crossings<T, M = Infallible> {
    channel: Arc<Channel<T, M>>,
    seen: u64,
}

impl<T, M> Crossings<T, M> {
    pub(super) fn new(channel: Arc<Channel<T, M>>) -> Self {
        // Rounded down to where it was below.
        let seen = channel.lock().crossings & !1;
        Self { channel, seen }
    }

    /// Waits for the next crossing; `None` when there will be no more, because the connection has
    /// ended.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost when it is dropped.
    pub async fn next(&mut self) -> Option<Crossing> {
        loop {
            let mut changed = std::pin::pin!(self.channel.changed.notified());
            changed.as_mut().enable();
            {
                let state = self.channel.lock();
                if self.seen < state.crossings {
                    self.seen += 1;
                    // An odd number of crossings leads up.
                    return Some(if self.seen & 1 == 1 {
                        Crossing::High
                    } else {
                        Crossing::Low
                    });
                }
                if state.ended {
                    return None;
                }
            }
            changed.await;
        }
    }
}

impl<T, M> fmt::Debug for Crossings<T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crossings")
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}
