//! Sends a frame, or a frame for each connection, to many connections.

use std::time::Duration;

use futures_util::future::join_all;

use super::Registry;
use crate::end::EndReason;
use crate::pipeline::{Peer, TrySendError};

/// The treatment of a peer whose output is above its high mark when a broadcast reaches it.
///
/// A slow peer never delays the others, because they have already been sent the frame. With
/// [`Wait`](Self::Wait) it delays the return of the broadcast. No treatment queues frames without
/// limit. Each connection's memory is bounded by its [high mark](crate::pipeline::Watermarks), one
/// frame above it, and its [queue](crate::pipeline::Limits::push_queue).
///
/// Even a peer that reads all the time is above its mark if more is sent in a burst than it can
/// read. A higher mark lets it receive more of the burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlowPeer {
    /// Waits for the peer, as [`Peer::send`] does, until its output has fallen to the low mark.
    ///
    /// A peer that takes no byte for its [write deadline](crate::deadline::Deadlines::write)
    /// (default: 30 s) is closed. One that takes a few bytes now and then can delay the return for
    /// longer.
    Wait,
    /// Skips the peer, so that it misses this frame.
    Skip,
    /// Skips the peer, so that it misses this frame, and ends its connection with
    /// [`EndReason::SlowReader`] if the peer has taken nothing for this time.
    ///
    /// The time begins with the first broadcast that finds the peer above its mark. It begins again
    /// whenever a broadcast finds that the peer has taken something, however little.
    /// [`Duration::ZERO`] ends the connection at once, so that no connection continues after it has
    /// missed a frame.
    CloseAfter(Duration),
}

/// The outcome of a broadcast: the number of connections that were sent a frame, skipped or closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Broadcast {
    sent: usize,
    skipped: usize,
    closed: usize,
}

impl Broadcast {
    /// Returns the number of connections that were sent a frame.
    pub fn sent(&self) -> usize {
        self.sent
    }

    /// Returns the number of connections that were skipped because they were slow. They stay open.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Returns the number of connections that were closed because they were slow.
    pub fn closed(&self) -> usize {
        self.closed
    }
}

impl<K, T, M> Registry<K, T, M>
where
    K: Clone,
{
    /// Sends a frame to all connections for which `whom` returns `true`.
    ///
    /// A slow peer does not delay the others; `slow` sets its treatment. The frames of one task
    /// arrive in order if the task awaits each broadcast, and each send before it. The frame is
    /// cloned for each connection, so use a type that is cheap to clone (`Bytes`, `Arc`).
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, some connections have been sent the frame and some have not.
    #[doc(alias = "send_all")]
    pub async fn broadcast(
        &self,
        frame: T,
        mut whom: impl FnMut(&K, &Peer<T, M>) -> bool,
        slow: SlowPeer,
    ) -> Broadcast
    where
        T: Clone,
    {
        self.broadcast_with(
            move |key, peer| whom(key, peer).then(|| frame.clone()),
            slow,
        )
        .await
    }

    /// Sends each connection the frame that `pick` returns for it, if any.
    ///
    /// Use it for a frame in each user's own language or format, or one that depends on the
    /// connection. Otherwise it is like [`broadcast`](Self::broadcast).
    ///
    /// ```
    /// use bytes::Bytes;
    /// use tower_tcp::ConnectionId;
    /// use tower_tcp::registry::{Registry, SlowPeer};
    ///
    /// /// Tells the others that somebody came, and the newcomer who is here.
    /// async fn welcome(room: &Registry<ConnectionId, Bytes>, newcomer: ConnectionId) {
    ///     let here = Bytes::from(format!("{} here", room.len()));
    ///     let pick = |id: &_, _: &_| {
    ///         let news = || Bytes::from("somebody came");
    ///         Some(if *id == newcomer { here.clone() } else { news() })
    ///     };
    ///     room.broadcast_with(pick, SlowPeer::Skip).await;
    /// }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, some connections have been sent their frame and some have not.
    pub async fn broadcast_with(
        &self,
        mut pick: impl FnMut(&K, &Peer<T, M>) -> Option<T>,
        slow: SlowPeer,
    ) -> Broadcast {
        let picked = self
            .iter()
            .filter_map(|(key, peer)| pick(&key, &peer).map(|frame| (peer, frame)));
        send_each(picked, slow).await
    }
}

/// Sends a frame to each of these peers, such as the members of a room or the result of a search.
///
/// Otherwise it is like [`Registry::broadcast`].
///
/// ```
/// use bytes::Bytes;
/// use tower_tcp::Peer;
/// use tower_tcp::registry::{SlowPeer, broadcast};
///
/// async fn announce(members: &[Peer<Bytes>], news: Bytes) -> usize {
///     broadcast(members.iter().cloned(), news, SlowPeer::Skip).await.sent()
/// }
/// ```
///
/// # Cancel safety
///
/// If the future is dropped, some connections have been sent the frame and some have not.
pub async fn broadcast<T, M>(
    peers: impl IntoIterator<Item = Peer<T, M>>,
    frame: T,
    slow: SlowPeer,
) -> Broadcast
where
    T: Clone,
{
    let frames = peers.into_iter().map(move |peer| (peer, frame.clone()));
    send_each(frames, slow).await
}

/// Sends each peer its frame, first to all that take it at once, then to the others concurrently.
async fn send_each<T, M>(
    frames: impl Iterator<Item = (Peer<T, M>, T)>,
    slow: SlowPeer,
) -> Broadcast {
    let mut broadcast = Broadcast::default();
    let mut late = Vec::new();
    for (peer, frame) in frames {
        match peer.try_send(frame) {
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

/// The outcome for one peer.
enum Fate {
    Sent,
    Skipped,
    Closed,
    Ended,
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
        SlowPeer::CloseAfter(time) if peer.has_stalled(time) => {
            if peer.abort_because(EndReason::SlowReader) {
                Fate::Closed
            } else {
                Fate::Ended
            }
        }
        SlowPeer::Skip | SlowPeer::CloseAfter(_) => Fate::Skipped,
    }
}
