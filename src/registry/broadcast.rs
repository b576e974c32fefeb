//! Sends the same frame to many connections, or a different frame to each.

use std::borrow::Borrow;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::coop::consume_budget;

use super::Registry;
use crate::end::EndReason;
use crate::pipeline::{Merge, Peer, Run, TrySendError};

/// The policy for a peer whose output is above its high mark when a broadcast sends to it.
///
/// A slow peer never delays the others, because they have already been sent the frame. With
/// [`Wait`](Self::Wait), a slow peer delays only the return of the broadcast. No policy queues
/// frames without limit: a connection holds output up to its [high
/// mark](crate::pipeline::Watermarks), one more frame, and the frames in its
/// [queue](crate::pipeline::Limits::push_queue). While a reply of several frames or of a stream is
/// encoded, the connection can hold the frames of one more full queue: before each frame of the
/// reply, all queued frames are encoded, even above the high mark, and then the queue can fill
/// again.
///
/// Even a peer that always reads can be above its high mark, if more is sent in a burst than it can
/// read. A higher mark lets the peer receive more of the burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlowPeer {
    /// Waits for the peer, as [`Peer::send`] does, until its output has fallen to the low mark.
    ///
    /// If a peer takes no byte for its [write deadline](crate::deadline::Deadlines::write)
    /// (default: 30 s), its connection ends. A peer that takes a few bytes now and then can delay
    /// the broadcast's return for longer.
    Wait,
    /// Skips the peer, which misses this frame.
    Skip,
    /// Skips the peer, which misses this frame. Also ends its connection with
    /// [`EndReason::SlowReader`] if the peer has taken nothing for this time.
    ///
    /// The time begins with the first broadcast with this policy that finds the peer above its
    /// mark. It restarts when such a broadcast finds that the peer has taken any output.
    /// [`Duration::ZERO`] ends the connection at once, so that no connection continues after it has
    /// missed a frame.
    CloseAfter(Duration),
}

/// The result of a broadcast: how many connections were sent a frame, were skipped, or were closed.
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
    /// A slow peer does not delay the others; `slow` is the policy for slow peers. The frames of
    /// one task arrive in order if the task awaits each broadcast and each send before the next
    /// one. The frame is cloned for each connection, so use a type that is cheap to clone (`Bytes`,
    /// `Arc`).
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, some connections may have been sent the frame and others not.
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
    /// Use this method for frames that depend on the connection, for example frames in each user's
    /// language or format. In all other respects, it is like [`broadcast`](Self::broadcast).
    ///
    /// ```
    /// use bytes::Bytes;
    /// use tower_tcp::ConnectionId;
    /// use tower_tcp::registry::{Registry, SlowPeer};
    ///
    /// /// Tells a newcomer how many are here, and the others that somebody came.
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
    /// If the future is dropped, some connections may have been sent their frame and others not.
    pub async fn broadcast_with(
        &self,
        mut pick: impl FnMut(&K, &Peer<T, M>) -> Option<T>,
        slow: SlowPeer,
    ) -> Broadcast {
        let picked = self
            .iter()
            .filter_map(|(key, peer)| pick(&key, &peer).map(|frame| (peer, frame)));
        Sending::to_each(picked).done(slow).await
    }
}

/// Sends a frame to each of the given peers, for example to those that a search has found.
///
/// In all other respects, it is like [`Registry::broadcast`].
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
/// If the future is dropped, some connections may have been sent the frame and others not.
pub async fn broadcast<T, M>(
    peers: impl IntoIterator<Item = Peer<T, M>>,
    frame: T,
    slow: SlowPeer,
) -> Broadcast
where
    T: Clone,
{
    let frames = peers.into_iter().map(move |peer| (peer, frame.clone()));
    Sending::to_each(frames).done(slow).await
}

/// The number of budget units that tokio gives a task for one turn.
const TURN: usize = 128;
/// The number of sends that cost a task one unit of its budget in tokio. A read from a socket also
/// costs one unit.
const SENDS_PER_UNIT: usize = 16;

/// A broadcast after its first step: frames have been sent to all peers for which this was possible
/// without waiting.
pub(super) struct Sending<T, M> {
    broadcast: Broadcast,
    /// The number of sends that are not yet charged to the task's budget.
    uncharged: usize,
    late: Vec<(Peer<T, M>, T)>,
}

impl<T, M> Default for Sending<T, M> {
    fn default() -> Self {
        Self {
            broadcast: Broadcast::default(),
            uncharged: 0,
            late: Vec::new(),
        }
    }
}

impl<T, M> Sending<T, M> {
    /// Sends each peer its frame, if this is possible without waiting.
    pub(super) fn to_each<P>(frames: impl Iterator<Item = (P, T)>) -> Self
    where
        P: Borrow<Peer<T, M>>,
    {
        let mut sending = Self::default();
        for (peer, frame) in frames {
            sending.uncharged += 1;
            let peer = peer.borrow();
            match peer.try_send(frame) {
                Ok(()) => sending.broadcast.sent += 1,
                Err(TrySendError::Closed(_)) => {}
                Err(TrySendError::Full(frame)) => sending.late.push((peer.clone(), frame)),
            }
        }
        sending
    }

    /// Begins a [run](Run) whose first frame is `frame`, and queues the run for each peer for which
    /// this is possible without waiting. Calling [`done`](Self::done) on the returned `Sending`
    /// sends the frame to the remaining peers, outside of the run. Later broadcasts to the same
    /// peers may add frames to the returned run.
    pub(super) fn begin_run<'a>(
        frame: &T,
        merge: Option<Merge<T>>,
        peers: impl Iterator<Item = &'a Peer<T, M>>,
    ) -> (Self, OpenRun<T, M>)
    where
        T: Clone + 'a,
        M: 'a,
    {
        let run = Arc::new(Run::new(frame.clone(), merge));
        let mut sending = Self::default();
        for peer in peers {
            match peer.try_send_run(&run) {
                Ok(()) => sending.broadcast.sent += 1,
                Err(TrySendError::Closed(())) => {}
                Err(TrySendError::Full(())) => sending.late.push((peer.clone(), frame.clone())),
            }
        }
        let open = OpenRun {
            run: Arc::downgrade(&run),
            sent: sending.broadcast.sent,
            others: sending.late.iter().map(|(peer, _)| peer.clone()).collect(),
        };
        (sending, open)
    }

    /// Sends the frames that could not be sent without waiting. They are sent one after the other,
    /// and each send waits only for a connection's task, not for its peer. Applies the policy
    /// `slow` to peers that are above their high mark. With [`SlowPeer::Wait`], the frames for
    /// these peers are sent last and concurrently, and each of these sends waits for its peer.
    pub(super) async fn done(self, slow: SlowPeer) -> Broadcast {
        let Self {
            mut broadcast,
            uncharged,
            late,
        } = self;
        charge(uncharged).await;
        let mut waiting = Vec::new();
        for (peer, frame) in late {
            consume_budget().await;
            match (peer.offer(frame).await, slow) {
                (Ok(()), _) => broadcast.sent += 1,
                (Err(TrySendError::Closed(_)), _) => {}
                (Err(TrySendError::Full(frame)), SlowPeer::Wait) => waiting.push((peer, frame)),
                (Err(TrySendError::Full(_)), SlowPeer::CloseAfter(time))
                    if peer.has_stalled(time) =>
                {
                    let is_first = peer.abort_because(EndReason::SlowReader);
                    broadcast.closed += usize::from(is_first);
                }
                (Err(TrySendError::Full(_)), _) => broadcast.skipped += 1,
            }
        }
        if !waiting.is_empty() {
            let sends = waiting
                .into_iter()
                .map(async |(peer, frame)| peer.send(frame).await);
            let sent = join_all(sends).await;
            broadcast.sent += sent.iter().filter(|sent| sent.is_ok()).count();
        }
        broadcast
    }
}

/// Charges the task's budget for the sends to `peers` peers, so that a task that broadcasts again
/// and again does not delay other tasks. The charge is at most the budget of one turn.
///
/// The sends of a run are charged before the run begins. Charging may yield, so if they were
/// charged later, the peers' tasks could take the run before more frames are added to it.
pub(super) async fn charge(peers: usize) {
    for _ in 0..peers.div_ceil(SENDS_PER_UNIT).min(TURN) {
        consume_budget().await;
    }
}

/// A [run](Run) to which broadcasts can add frames until it is closed or full.
pub(super) struct OpenRun<T, M> {
    run: Weak<Run<T>>,
    /// The number of peers whose queues received the run.
    sent: usize,
    /// The peers for which the run could not be queued without waiting.
    others: Vec<Peer<T, M>>,
}

impl<T, M> OpenRun<T, M> {
    /// Sends a frame to the peers whose queues hold the run, by adding the frame to the run.
    /// Returns `None` if the run is closed or full, or if no queue holds the run. Otherwise, the
    /// caller must call [`Sending::done`], which sends the frame to the remaining peers.
    pub(super) fn send(&self, frame: &T) -> Option<Sending<T, M>>
    where
        T: Clone,
    {
        if !self.run.upgrade()?.add(frame) {
            return None;
        }
        let others = self.others.iter();
        Some(Sending {
            broadcast: Broadcast {
                sent: self.sent,
                ..Broadcast::default()
            },
            uncharged: 0,
            late: others.map(|it| (it.clone(), frame.clone())).collect(),
        })
    }
}
