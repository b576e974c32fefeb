//! Groups of connections, such as the rooms of a chat.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, OnceLock, Weak};

use futures_core::Stream;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::oneshot;
use tokio::task::coop::consume_budget;

use super::broadcast::{Broadcast, Sending, SlowPeer, charge};
use super::feed::{Feed, JoinError, Opening, Outcome};
use super::group::{Fed, Group, Inner, Source};
use super::shards::{Entered, Shards};
use crate::connection::{ConnectionId, Moment};
use crate::error::ServiceError;
use crate::pipeline::Peer;

/// Groups of connections by key, such as the rooms of a chat, or the channels of publish and
/// subscribe. Clones share the same groups.
///
/// A group begins when its first member [joins](Self::join), and ends when its last member
/// [leaves](Self::leave) or begins to close. A group may have a *feed*: a stream whose frames are
/// sent to all members ([`fed_by`](Self::fed_by)). Such a group also ends when its feed ends. With
/// feeds, a program subscribes to a topic of another server only while one of its own clients wants
/// that topic:
///
/// ```
/// use std::io;
/// use std::time::Duration;
/// use bytes::Bytes;
/// use futures_util::stream::{self, Stream};
/// use tower_tcp::registry::{Groups, JoinError, SlowPeer};
/// use tower_tcp::Peer;
///
/// /// Subscribes at a broker. Dropping the stream unsubscribes.
/// async fn subscribe(topic: String) -> io::Result<impl Stream<Item = Bytes>> {
///     Ok(stream::iter([Bytes::from(topic)]))
/// }
///
/// # async fn example(peer: Peer<Bytes>) -> Result<(), JoinError> {
/// let topics = Groups::fed_by(subscribe, SlowPeer::CloseAfter(Duration::from_secs(5)));
///
/// // In the service of each connection. After this call the peer gets every frame, unless it is
/// // slow.
/// topics.join("news".to_owned(), &peer).await?;
/// # Ok(())
/// # }
/// ```
///
/// A connection may be in many groups. The number of groups is not limited, so limit the number
/// that one connection joins. Each member holds a clone of the key, so limit the length of keys
/// that clients choose, or use a key whose clones share memory, such as `Bytes` or `Arc<str>`.
///
/// A part of the groups is locked while a key is hashed, compared or cloned, so a `K` that calls
/// the groups in its `Hash`, `Eq` or `Clone` can deadlock.
#[doc(alias = "room")]
#[doc(alias = "topic")]
#[doc(alias = "ChannelGroup")]
pub struct Groups<K, T, M = Infallible> {
    inner: Arc<Inner<K, T, M>>,
}

impl<K, T, M> Groups<K, T, M> {
    /// Creates groups without feeds. Use [`broadcast`](Self::broadcast) to send frames.
    pub fn new() -> Self {
        Self::with(None)
    }

    /// Creates groups that each have a feed.
    ///
    /// For each new group, a new task calls `open` with the group's key, and awaits the future that
    /// `open` returns, to get a stream. The task runs on the runtime on which the first member's
    /// [`join`](Self::join) is polled. If that runtime is shut down, the group ends. Each frame of
    /// the stream is sent to all members, as by a [broadcast](super::broadcast) with `slow`. The
    /// next frame is taken from the stream only when that broadcast is done. So no frames are
    /// queued in between, and with [`SlowPeer::Wait`] a slow member delays the stream.
    ///
    /// The stream, or the future that opens it, is dropped when the group ends. If a connection
    /// joins under the same key later, a new group with a new stream begins. The new group's
    /// members get nothing from the previous stream, even if that stream is not dropped yet.
    ///
    /// If the stream ends, cannot be opened, or panics, its group ends: all members leave it, and
    /// their connections stay open. The last frame of the stream can announce this to them. To keep
    /// the members, continue the stream with [`pending`](futures_util::stream::pending).
    pub fn fed_by<F, S, E>(open: impl Fn(K) -> F + Send + Sync + 'static, slow: SlowPeer) -> Self
    where
        F: Future<Output = Result<S, E>> + Send + 'static,
        S: Stream<Item = T> + Send + 'static,
        E: ServiceError,
    {
        let open = move |key| {
            let opening = open(key);
            let opened = async move { opening.await.map(S::boxed).map_err(E::into) };
            opened.boxed()
        };
        Self::with(Some(Source {
            open: Box::new(open),
            slow,
        }))
    }

    fn with(source: Option<Source<K, T>>) -> Self {
        Self {
            inner: Arc::new(Inner {
                groups: Shards::new(),
                source,
                merge: OnceLock::new(),
            }),
        }
    }

    /// Sets a function that merges the frames of a burst, so that each member encodes them as one.
    ///
    /// Most of the cost of a burst is that each frame is cloned and encoded for each member. If
    /// frames are stored encoded, `merge` can append the bytes of one to those of another:
    /// `merge(first, next)` appends `next` to `first` and returns `true`, or returns `false` and
    /// leaves `first` as it is. The merged frame must encode to the bytes of both, in order. It is
    /// cloned for each member.
    ///
    /// `merge` is called only for frames that are sent, one right after the other, to all members
    /// before any member's task runs (see [`broadcast`](Self::broadcast)). So nothing is merged if
    /// the `whom` of a broadcast leaves a member out. If a member's pipeline runs one request at a
    /// time, the frames that this member broadcasts in different requests are not merged either,
    /// because the member's own task takes each frame before its next request begins. Merging helps
    /// if frames come from a feed, from a task of the program, or from connections that are not
    /// members.
    ///
    /// A merged frame is encoded as a whole, even if it exceeds the high mark of a connection's
    /// output. So `merge` should limit the size of the merged frame, for example to 16 KiB. At most
    /// 64 frames are merged into one.
    ///
    /// The function applies to all clones of these groups. Once it is set, further calls of this
    /// method have no effect. By default frames are not merged, because only the program knows how
    /// they are encoded.
    ///
    /// ```
    /// use tower_tcp::registry::Groups;
    ///
    /// /// Encoded events, with all their line endings. The connections' own `Encoder<Events>`
    /// /// appends the bytes to its buffer. (`Lines` would add one more line ending.)
    /// #[derive(Clone)]
    /// struct Events(Vec<u8>);
    ///
    /// let rooms: Groups<String, Events> = Groups::new().merge_with(|first, next| {
    ///     let fits = first.0.len() + next.0.len() <= 16 * 1024;
    ///     if fits {
    ///         first.0.extend_from_slice(&next.0);
    ///     }
    ///     fits
    /// });
    /// # drop(rooms);
    /// ```
    #[must_use]
    pub fn merge_with(self, merge: fn(&mut T, &T) -> bool) -> Self {
        // If it was set before, the earlier function stays.
        let _earlier = self.inner.merge.set(merge);
        self
    }

    /// Returns the number of groups.
    pub fn len(&self) -> usize {
        self.inner.groups.len()
    }

    /// Returns whether there are no groups.
    pub fn is_empty(&self) -> bool {
        self.inner.groups.is_empty()
    }
}

impl<K, T, M> Groups<K, T, M>
where
    K: Hash + Eq,
{
    /// Makes a connection a member of a group, and waits until the group's feed, if any, is open.
    ///
    /// The connection becomes a member at the first poll. It stays a member until it leaves or
    /// begins to close, or until the feed ends. If it is already closing, it does not become a
    /// member, and no error is returned. If it is a member already, the call only waits.
    ///
    /// The wait has no deadline of its own. The function that opens the feed should have a
    /// deadline.
    ///
    /// # Errors
    ///
    /// Returns an error if the feed could not be opened, or if the group ended before its feed was
    /// open: its last member left or began to close, or the runtime of the feed was shut down. The
    /// connection is then not a member.
    ///
    /// # Panics
    ///
    /// Panics if this call begins a group with a feed, and the future is polled outside a tokio
    /// runtime.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future after the first poll only ends the wait: the connection stays a member.
    #[doc(alias = "subscribe")]
    pub async fn join(&self, key: K, peer: &Peer<T, M>) -> Result<(), JoinError>
    where
        K: Clone + Send + 'static,
        T: Clone + Send + 'static,
        M: Send + 'static,
    {
        match self.enter(key, peer) {
            Some(opening) => opening.done().await,
            None => Ok(()),
        }
    }

    /// Inserts a connection, unless it is closing. If the group has a feed, and the connection is a
    /// member now, returns a value that waits until the feed is open.
    fn enter(&self, key: K, peer: &Peer<T, M>) -> Option<Opening>
    where
        K: Clone + Send + 'static,
        T: Clone + Send + 'static,
        M: Send + 'static,
    {
        let id = peer.info().id();
        // Declared before the lock guard, so dropped after unlocking.
        let (own_key, fed_key) = (key.clone(), key.clone());
        let mut shard = self.inner.groups.of(&key);
        if let Some(group) = shard.get(&key)
            && let Some(has) = group.members.get(&id)
            && has.outlasts(peer)
        {
            return group.opening();
        }
        let shared = Arc::downgrade(&self.inner);
        let remove = move || drop(Self::upgrade(&shared).map(|groups| groups.remove(&own_key, id)));
        let entered = match Entered::new(peer, Moment::Closing, remove) {
            Ok(entered) => entered,
            Err(too_late) => {
                drop(shard);
                drop(too_late);
                return None;
            }
        };
        if let Some(group) = shard.get_mut(&key) {
            // After an upgrade, a connection has a new `Peer`, so replace the old one.
            let open = group.open.take();
            let replaced = Arc::make_mut(&mut group.members).insert(id, entered);
            let opening = group.opening();
            drop(shard);
            drop(open);
            drop(replaced.map(Entered::into_peer));
            return opening;
        }
        let (start, started) = oneshot::channel();
        let has_feed = self.inner.source.is_some();
        let feed = has_feed.then(|| Feed::start(move |outcome| Self::feed(started, outcome)));
        let task = feed.as_ref().map(Feed::id);
        let group = Group {
            members: Arc::new(HashMap::from([(id, entered)])),
            open: None,
            feed,
        };
        let opening = group.opening();
        shard.insert(key, group);
        drop(shard);
        // The value is sent to the task after unlocking. If the runtime is shut down, the task is
        // already dropped, so the value is dropped here, and its `Drop` locks the shard.
        drop(task.map(|task| {
            start.send(Fed {
                groups: Arc::downgrade(&self.inner),
                key: fed_key,
                task,
            })
        }));
        opening
    }

    /// Removes a connection from a group. Returns whether it was a member.
    ///
    /// A broadcast that has begun may still send to the connection.
    #[doc(alias = "unsubscribe")]
    pub fn leave<Q>(&self, key: &Q, peer: &Peer<T, M>) -> bool
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let removed = self.remove(key, peer.info().id());
        removed.map(Entered::into_peer).is_some()
    }

    /// Removes a member, and also the group if that was its last member.
    fn remove<Q>(&self, key: &Q, id: ConnectionId) -> Option<Entered<T, M>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let mut shard = self.inner.groups.of(key);
        let group = shard.get_mut(key)?;
        if !group.members.contains_key(&id) {
            return None;
        }
        if group.members.len() > 1 {
            let open = group.open.take();
            let removed = Arc::make_mut(&mut group.members).remove(&id);
            drop(shard);
            drop(open);
            return removed;
        }
        let (_key, ended) = shard.remove_entry(key)?;
        drop(shard);
        ended.members.get(&id).cloned()
    }

    /// Returns the members of a group.
    ///
    /// The members are copied, so no lock is held while the caller uses them.
    pub fn members<Q>(&self, key: &Q) -> Vec<Peer<T, M>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let shard = self.inner.groups.of(key);
        let members = shard.get(key).map(|group| Arc::clone(&group.members));
        drop(shard);
        let members = members.unwrap_or_default();
        members.values().map(|it| it.peer.clone()).collect()
    }

    /// Sends a frame to those members of a group for which `whom` returns `true`, like
    /// [`Registry::broadcast`](super::Registry::broadcast). `whom` gets no key, because the key
    /// is the same for all members.
    ///
    /// Frames that are sent to all members in a burst, before any member's task runs, share memory:
    /// up to 64 of them are stored once for all members, and wake each member once. When a frame is
    /// encoded for a member, the member's connection holds the encoded bytes until its peer has
    /// taken them. The shared frames are locked while they are cloned or
    /// [merged](Self::merge_with). So a `Clone` or a merge function that sends to the same group,
    /// or uses the [`Peer`] of a member, can deadlock.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, some members may have been sent the frame and others not.
    #[doc(alias = "publish")]
    pub async fn broadcast<Q>(
        &self,
        key: &Q,
        frame: T,
        mut whom: impl FnMut(&Peer<T, M>) -> bool,
        slow: SlowPeer,
    ) -> Broadcast
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
        T: Clone,
    {
        let audience = self.inner.groups.of(key).get(key).map(Group::audience);
        let Some(audience) = audience else {
            return Broadcast::default();
        };
        let peers = || audience.members.values().map(|it| &it.peer);
        if let Some(first) = peers().position(|peer| !whom(peer)) {
            let rest = peers().skip(first + 1).filter(|peer| whom(peer));
            let some = peers().take(first).chain(rest);
            let sending = Sending::to_each(some.map(|peer| (peer, frame.clone())));
            return sending.done(slow).await;
        }
        let added = audience.add(&frame);
        if added.is_none() {
            charge(audience.members.len()).await;
        }
        let begin = || self.inner.begin_run(key, &audience.members, &frame);
        let sending = added.unwrap_or_else(begin);
        sending.done(slow).await
    }

    /// Opens the feed of a group, and sends its frames to the members.
    async fn feed(started: oneshot::Receiver<Fed<K, T, M>>, outcome: Outcome)
    where
        K: Clone,
        T: Clone,
    {
        let Ok(fed) = started.await else {
            return;
        };
        let Some((opening, slow)) = fed.open() else {
            return;
        };
        let mut frames = match opening.await {
            Ok(frames) => frames,
            Err(why) => {
                drop(fed);
                outcome.report(Err(why));
                return;
            }
        };
        outcome.report(Ok(()));
        while let Some(frame) = frames.next().await {
            let Some(inner) = fed.groups.upgrade() else {
                return;
            };
            let Some(audience) = fed.audience(&inner) else {
                return;
            };
            let added = audience.add(&frame);
            if added.is_none() {
                charge(audience.members.len()).await;
            }
            let begin = || inner.begin_run(&fed.key, &audience.members, &frame);
            let sending = added.unwrap_or_else(begin);
            // The wait for a slow member must not keep the groups alive.
            drop(inner);
            sending.done(slow).await;
            // A stream that is always ready must not starve other tasks or delay an abort.
            consume_budget().await;
        }
    }

    fn upgrade(inner: &Weak<Inner<K, T, M>>) -> Option<Self> {
        let inner = Weak::upgrade(inner)?;
        Some(Self { inner })
    }
}

impl<K, T, M> Groups<K, T, M>
where
    K: Clone,
{
    /// Returns the keys of all groups.
    ///
    /// The keys are copied, one part of the groups at a time, so no lock is held while the caller
    /// uses them. A group that begins or ends meanwhile may be included or not.
    pub fn keys(&self) -> impl Iterator<Item = K> + '_ {
        self.inner.groups.iter().flat_map(|shard| {
            let keys: Vec<_> = shard.keys().cloned().collect();
            keys
        })
    }
}

impl<K, T, M> Clone for Groups<K, T, M> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<K, T, M> Default for Groups<K, T, M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K, T, M> fmt::Debug for Groups<K, T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Groups")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
