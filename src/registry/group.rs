//! The state that all clones of a [`Groups`](super::Groups) share.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, OnceLock, Weak};

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use tokio::task::Id;

use super::broadcast::{OpenRun, Sending, SlowPeer};
use super::feed::{Feed, Opening};
use super::shards::{Entered, Shards};
use crate::connection::ConnectionId;
use crate::error::BoxError;
use crate::pipeline::Merge;

pub(super) struct Inner<K, T, M> {
    pub(super) groups: Shards<K, Group<T, M>>,
    pub(super) source: Option<Source<K, T>>,
    pub(super) merge: OnceLock<Merge<T>>,
}

impl<K, T, M> Drop for Inner<K, T, M> {
    /// Cancels the callbacks that remove the members. Otherwise a connection that joins one
    /// short-lived value of groups after another would hold more and more of them.
    fn drop(&mut self) {
        for (_key, group) in self.groups.take_all() {
            group.end();
        }
    }
}

/// The state of one group: its members (at least one) by their [`ConnectionId`], its latest
/// [run](crate::pipeline::Run) of frames, and its feed, if it has one.
pub(super) struct Group<T, M> {
    /// A broadcast holds a reference to this map while it sends, but not the lock. If a member
    /// joins or leaves meanwhile, the map is copied before it is changed.
    pub(super) members: Arc<Members<T, M>>,
    /// The latest run, if it was meant for exactly these members. Broadcasts add frames to it
    /// until it is closed or full.
    pub(super) open: Option<Arc<OpenRun<T, M>>>,
    pub(super) feed: Option<Feed>,
}

pub(super) type Members<T, M> = HashMap<ConnectionId, Entered<T, M>>;

/// Opens the feeds of new groups.
pub(super) struct Source<K, T> {
    pub(super) open: Box<dyn Fn(K) -> Opened<T> + Send + Sync>,
    pub(super) slow: SlowPeer,
}

pub(super) type Opened<T> = BoxFuture<'static, Result<BoxStream<'static, T>, BoxError>>;

impl<T, M> Group<T, M> {
    pub(super) fn opening(&self) -> Option<Opening> {
        self.feed.as_ref().map(Feed::opening)
    }

    /// Cancels the callbacks that remove the members. Call this without holding a lock.
    fn end(self) {
        for it in self.members.values() {
            drop(it.clone().into_peer());
        }
    }

    pub(super) fn audience(&self) -> Audience<T, M> {
        Audience {
            members: Arc::clone(&self.members),
            open: self.open.clone(),
        }
    }
}

/// The members of a group, and its open run, at the beginning of a broadcast.
pub(super) struct Audience<T, M> {
    pub(super) members: Arc<Members<T, M>>,
    open: Option<Arc<OpenRun<T, M>>>,
}

impl<T, M> Audience<T, M> {
    /// Adds a frame to the open run, which sends the frame to all members whose queues hold the
    /// run. [`Sending::done`] sends the frame to the other members. Returns `None` if there is no
    /// run, if the run is closed or full, or if no queue holds the run.
    pub(super) fn add(&self, frame: &T) -> Option<Sending<T, M>>
    where
        T: Clone,
    {
        self.open.as_ref()?.send(frame)
    }
}

impl<K, T, M> Inner<K, T, M>
where
    K: Hash + Eq,
{
    /// Sends a frame, as the first frame of a run, to all members for which this is possible
    /// without waiting. Later broadcasts may add frames to the run.
    pub(super) fn begin_run<Q>(
        &self,
        key: &Q,
        members: &Arc<Members<T, M>>,
        frame: &T,
    ) -> Sending<T, M>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
        T: Clone,
    {
        let merge = self.merge.get().copied();
        let peers = members.values().map(|it| &it.peer);
        let (sending, open) = Sending::begin_run(frame, merge, peers);
        let mut shard = self.groups.of(key);
        let group = shard.get_mut(key);
        // Do not store the run if a member has joined or left meanwhile. In that case, a copy has
        // replaced the map of members.
        let group = group.filter(|group| Arc::ptr_eq(&group.members, members));
        let before = group.and_then(|group| group.open.replace(Arc::new(open)));
        drop(shard);
        drop(before);
        sending
    }
}

/// The group of one feed. A later group with the same key has another task, so `task` distinguishes
/// the two groups. Dropping this value ends the group.
pub(super) struct Fed<K, T, M>
where
    K: Hash + Eq,
{
    pub(super) groups: Weak<Inner<K, T, M>>,
    pub(super) key: K,
    pub(super) task: Id,
}

impl<K, T, M> Fed<K, T, M>
where
    K: Hash + Eq,
{
    pub(super) fn open(&self) -> Option<(Opened<T>, SlowPeer)>
    where
        K: Clone,
    {
        let inner = self.groups.upgrade()?;
        let source = inner.source.as_ref()?;
        Some(((source.open)(self.key.clone()), source.slow))
    }

    fn is(&self, group: &Group<T, M>) -> bool {
        group
            .feed
            .as_ref()
            .is_some_and(|feed| feed.id() == self.task)
    }

    /// Returns the members. Returns `None` if the group has ended.
    pub(super) fn audience(&self, inner: &Inner<K, T, M>) -> Option<Audience<T, M>> {
        let shard = inner.groups.of(&self.key);
        let group = shard.get(&self.key).filter(|group| self.is(group));
        group.map(Group::audience)
    }
}

impl<K, T, M> Drop for Fed<K, T, M>
where
    K: Hash + Eq,
{
    fn drop(&mut self) {
        let Some(inner) = self.groups.upgrade() else {
            return;
        };
        let mut shard = inner.groups.of(&self.key);
        if !shard.get(&self.key).is_some_and(|group| self.is(group)) {
            return;
        }
        let ended = shard.remove_entry(&self.key);
        drop(shard);
        if let Some((_key, group)) = ended {
            group.end();
        }
    }
}
