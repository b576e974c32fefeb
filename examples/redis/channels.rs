//! Publish and subscribe: a group for each channel.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tower_tcp::pipeline::Watermarks;
use tower_tcp::registry::{Groups, SlowPeer};
use tower_tcp::{BoxError, Peer};

use super::resp::{Confirmation, Frame, Messages};

/// The channels that have a listener.
pub(crate) struct Channels {
    listeners: Groups<Bytes, Frame>,
    /// The watermarks of a subscriber's output. A subscriber above the high mark is closed at once,
    /// as at the hard limit of Redis, so that it neither delays publishers nor fills memory.
    marks: Watermarks,
}

impl Channels {
    pub(crate) fn new(marks: Watermarks) -> Self {
        Self {
            listeners: Groups::new().merge_with(Frame::merge),
            marks,
        }
    }

    /// Sends a message to all listeners. Returns how many it was sent to.
    pub(crate) async fn publish(&self, channel: Bytes, payload: Bytes) -> usize {
        let message = Frame::Messages(Arc::new(Messages::new(channel.clone(), payload)));
        let slow = SlowPeer::CloseAfter(Duration::ZERO);
        let sent = self.listeners.broadcast(&channel, message, |_| true, slow);
        sent.await.sent()
    }

    /// Returns the number of channels.
    pub(crate) fn len(&self) -> usize {
        self.listeners.len()
    }
}

/// A connection that listens to channels. The groups remove it when it begins to close.
pub(crate) struct Subscriber {
    all: Arc<Channels>,
    peer: Peer<Frame>,
    mine: Mutex<HashSet<Bytes>>,
}

impl Subscriber {
    pub(crate) fn new(all: Arc<Channels>, peer: Peer<Frame>) -> Self {
        Self {
            all,
            peer,
            mine: Mutex::default(),
        }
    }

    /// Returns the number of channels that the connection listens to.
    pub(crate) fn count(&self) -> usize {
        self.mine().len()
    }

    pub(crate) fn channels(&self) -> Vec<Bytes> {
        self.mine().iter().cloned().collect()
    }

    /// Confirms the subscription, then joins the channel. The confirmation is sent through the same
    /// queue as messages, so it arrives before the first message.
    pub(crate) async fn subscribe(&self, channel: Bytes) -> Result<(), BoxError> {
        self.mine().insert(channel.clone());
        self.peer.set_watermarks(self.all.marks);
        let confirmation = Confirmation::Subscribed(channel.clone(), self.count());
        let confirmation = Frame::Confirmation(Box::new(confirmation));
        self.peer.send(confirmation).await?;
        self.all.listeners.join(channel, &self.peer).await?;
        Ok(())
    }

    /// Leaves a channel. Returns how many channels the connection still listens to.
    ///
    /// The connection keeps the watermarks of a subscriber. If they were lowered here, unread
    /// messages could put the output above the mark, and a `PUBLISH` that still counts this
    /// connection as a listener would close it as a slow reader.
    pub(crate) fn unsubscribe(&self, channel: &Bytes) -> usize {
        self.all.listeners.leave(channel, &self.peer);
        self.mine().remove(channel);
        self.count()
    }

    fn mine(&self) -> MutexGuard<'_, HashSet<Bytes>> {
        self.mine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
