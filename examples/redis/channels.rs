//! Publish and subscribe: a group for each channel.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tower_tcp::pipeline::Watermarks;
use tower_tcp::registry::{Groups, SlowPeer};
use tower_tcp::{BoxError, Peer};

use super::resp::{Confirmation, Frame, Message};

/// The channels that have a listener.
pub(crate) struct Channels {
    listeners: Groups<Bytes, Frame>,
    /// The marks of a subscriber's unwritten messages. A subscriber above the high mark is closed
    /// at once, as by the hard limit of Redis, so that it neither delays publishers nor fills
    /// memory.
    marks: Watermarks,
}

impl Channels {
    pub(crate) fn new(marks: Watermarks) -> Self {
        Self {
            listeners: Groups::new(),
            marks,
        }
    }

    /// Sends a message to all listeners. Returns how many received it.
    pub(crate) async fn publish(&self, channel: Bytes, payload: Bytes) -> usize {
        let message = Frame::Message(Arc::new(Message::new(channel.clone(), payload)));
        let slow = SlowPeer::CloseAfter(Duration::ZERO);
        let sent = self.listeners.broadcast(&channel, message, |_| true, slow);
        sent.await.sent()
    }

    /// Returns how many channels there are.
    pub(crate) fn len(&self) -> usize {
        self.listeners.len()
    }
}

/// A listening connection. It leaves its channels by itself when it begins to close.
pub(crate) struct Subscriber {
    all: Arc<Channels>,
    peer: Peer<Frame>,
    /// The marks of the connection before its first subscription, restored after its last.
    usual_marks: Watermarks,
    mine: Mutex<HashSet<Bytes>>,
}

impl Subscriber {
    pub(crate) fn new(all: Arc<Channels>, peer: Peer<Frame>) -> Self {
        Self {
            all,
            usual_marks: peer.watermarks(),
            peer,
            mine: Mutex::default(),
        }
    }

    /// Returns how many channels the connection listens to.
    pub(crate) fn count(&self) -> usize {
        self.mine().len()
    }

    pub(crate) fn channels(&self) -> Vec<Bytes> {
        self.mine().iter().cloned().collect()
    }

    /// Confirms the subscription, then listens. The confirmation is pushed like the messages, so it
    /// precedes the first of them.
    pub(crate) async fn subscribe(&self, channel: Bytes) -> Result<(), BoxError> {
        self.mine().insert(channel.clone());
        self.peer.set_watermarks(self.all.marks);
        let confirmation = Confirmation::Subscribed(channel.clone(), self.count());
        let confirmation = Frame::Confirmation(Box::new(confirmation));
        self.peer.send(confirmation).await?;
        self.all.listeners.join(channel, &self.peer).await?;
        Ok(())
    }

    /// Leaves a channel. Returns how many are left.
    pub(crate) fn unsubscribe(&self, channel: &Bytes) -> usize {
        self.all.listeners.leave(channel, &self.peer);
        self.mine().remove(channel);
        let left = self.count();
        if left == 0 {
            self.peer.set_watermarks(self.usual_marks);
        }
        left
    }

    fn mine(&self) -> MutexGuard<'_, HashSet<Bytes>> {
        self.mine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
