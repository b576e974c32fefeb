use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use super::channel::Channel;

/// An event: a connection's output has crossed one of its
/// [`Watermarks`](crate::pipeline::Watermarks).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// The output has risen to the high mark.
    High,
    /// The output has fallen to the low mark.
    Low,
}

/// A sequence of events, one for each time a connection's output crosses a watermark. The two marks
/// alternate, beginning with the high mark. Created by [`Peer::crossings`](super::Peer::crossings).
///
/// Crossings are counted, not queued. So a program that calls [`next`](Self::next) late misses
/// none, and events take no memory while they wait.
pub struct Crossings<T, M = Infallible> {
    channel: Arc<Channel<T, M>>,
    seen: u64,
}

impl<T, M> Crossings<T, M> {
    pub(super) fn new(channel: Arc<Channel<T, M>>) -> Self {
        // An odd count is rounded down, so that the crossing of the high mark is the first event.
        let seen = channel.lock().crossings & !1;
        Self { channel, seen }
    }

    /// Waits for the next crossing. Returns `None` once there is no more output to watch, because
    /// the connection closes or was upgraded.
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
                    // The first crossing is of the high mark, and the marks alternate.
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
