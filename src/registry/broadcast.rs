use futures_util::future::join_all;

use super::Registry;
use crate::end::EndReason;
use crate::pipeline::{Peer, TrySendError};

/// What to do with a peer whose output is above its high mark, when something is sent to many.
///
/// Nobody waits for it but who asked for that: the others have been sent the frame before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlowPeer {
    /// Wait for it, as [`Peer::send`] does: at most for its [write deadline](crate::deadline::Deadlines::write), 30 s.
    Wait,
    /// Go without: it misses this frame.
    Skip,
    /// End its connection at once, with [`EndReason::SlowReader`].
    Close,
}

/// What became of a frame that was sent to many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Broadcast {
    sent: usize,
    skipped: usize,
    closed: usize,
}

impl Broadcast {
    /// Returns to how many connections it was sent.
    pub fn sent(&self) -> usize {
        self.sent
    }

    /// Returns how many did not get it because they were slow, and go on.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Returns how many were ended because they were slow.
    pub fn closed(&self) -> usize {
        self.closed
    }
}

/// What became of it at one of them.
enum Fate {
    Sent,
    Skipped,
    Closed,
    Ended,
}

impl<K, T, M> Registry<K, T, M>
where
    K: Clone,
    T: Clone,
{
    /// Sends a frame to all connections that `whom` picks. A slow one holds up no other: `slow` says what is done with it.
    ///
    /// Each gets what one task broadcasts in its order, behind what was sent to it before. The frame is cloned for each, so
    /// something that is shared (`Bytes`, `Arc`) serves best.
    ///
    /// # Cancel safety
    ///
    /// When it is dropped, some have been sent the frame and some not.
    pub async fn broadcast(
        &self,
        frame: T,
        mut whom: impl FnMut(&K, &Peer<T, M>) -> bool,
        slow: SlowPeer,
    ) -> Broadcast {
        let mut broadcast = Broadcast::default();
        let mut late = Vec::new();
        // Those that take it at once come first.
        for (_, peer) in self.iter().filter(|(key, peer)| whom(key, peer)) {
            match peer.try_send(frame.clone()) {
                Ok(()) => broadcast.sent += 1,
                Err(TrySendError::Closed(_)) => {}
                Err(TrySendError::Full(frame)) => late.push(send(peer, frame, slow)),
            }
        }
        for fate in join_all(late).await {
            match fate {
                Fate::Sent => broadcast.sent += 1,
                Fate::Skipped => broadcast.skipped += 1,
                Fate::Closed => broadcast.closed += 1,
                Fate::Ended => {}
            }
        }
        broadcast
    }
}

async fn send<T, M>(peer: Peer<T, M>, frame: T, slow: SlowPeer) -> Fate {
    let frame = match peer.offer(frame).await {
        Ok(()) => return Fate::Sent,
        Err(TrySendError::Closed(_)) => return Fate::Ended,
        Err(TrySendError::Full(frame)) => frame,
    };
    match slow {
        SlowPeer::Wait => match peer.send(frame).await {
            Ok(()) => Fate::Sent,
            Err(_closed) => Fate::Ended,
        },
        SlowPeer::Skip => Fate::Skipped,
        SlowPeer::Close if peer.abort_because(EndReason::SlowReader) => Fate::Closed,
        SlowPeer::Close => Fate::Ended,
    }
}
