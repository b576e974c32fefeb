use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use super::channel::Channel;

/// A crossing of one of a connection's [`Watermarks`](crate::pipeline::Watermarks) by its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// The output has risen to the high mark.
    High,
    /// The output has fallen to the low mark.
    Low,
}

/// The crossings of a connection's watermarks, each once and in turn: high, low, high.
///
/// Created by [`Peer::crossings`](super::Peer::crossings). Crossings are counted, not queued, so a
/// slow reader sees all of them at no cost in memory.
pub struct Crossings<T, M = Infallible> {
    channel: Arc<Channel<T, M>>,
    seen: u64,
}

impl<T, M> Crossings<T, M> {
    pub(super) fn new(channel: Arc<Channel<T, M>>) -> Self {
        // Rounded down to the last crossing after which the output was below its mark.
        let seen = channel.lock().crossings & !1;
        Self { channel, seen }
    }

    /// Waits for the next crossing. Returns `None` once the connection has ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no crossing.
    pub async fn next(&mut self) -> Option<Crossing> {
        loop {
            let mut changed = std::pin::pin!(self.channel.changed.notified());
            changed.as_mut().enable();
            {
                let state = self.channel.lock();
                if self.seen < state.crossings {
                    self.seen += 1;
                    // After an odd number of crossings the output is above.
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
