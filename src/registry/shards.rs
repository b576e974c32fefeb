//! A map in parts, each with its own lock, and the entries that registries and groups store.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::connection::{HookId, Moment};
use crate::pipeline::{Peer, TooLate};

/// The number of parts, each with its own lock. With this number, the beginning or end of a
/// connection seldom has to wait for a lock, even if there are 15,000 connections.
const SHARDS: usize = 16;

/// A map in parts, each with its own lock.
pub(super) struct Shards<K, V> {
    shards: [Mutex<HashMap<K, V>>; SHARDS],
    hasher: RandomState,
}

pub(super) type Shard<'a, K, V> = MutexGuard<'a, HashMap<K, V>>;

impl<K, V> Shards<K, V> {
    pub(super) fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::new(),
        }
    }

    /// Iterates over the parts, and locks each in turn.
    pub(super) fn iter(&self) -> impl Iterator<Item = Shard<'_, K, V>> {
        self.shards.iter().map(lock)
    }

    pub(super) fn len(&self) -> usize {
        self.iter().map(|shard| shard.len()).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.iter().all(|shard| shard.is_empty())
    }

    /// Takes all entries.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = (K, V)> {
        let shards = self.shards.iter_mut();
        shards.flat_map(|shard| {
            let shard = shard.get_mut().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(shard)
        })
    }

    /// Locks the part to which a key belongs.
    pub(super) fn of<Q>(&self, key: &Q) -> Shard<'_, K, V>
    where
        K: Borrow<Q>,
        Q: Hash + ?Sized,
    {
        // Any bits would do, because the map of each part has a hasher of its own. The high 32
        // bits fit into a `usize` on every target.
        let shard = (self.hasher.hash_one(key) >> 32) as usize % SHARDS;
        lock(&self.shards[shard])
    }
}

fn lock<V>(mutex: &Mutex<V>) -> MutexGuard<'_, V> {
    // The user's `Hash`, `Eq` and `Clone` run under the lock. If one of them panics, the map is
    // still intact.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An entry: a connection, and the id of the callback that removes the entry.
pub(super) struct Entered<T, M> {
    pub(super) peer: Peer<T, M>,
    removal: HookId,
}

impl<T, M> Clone for Entered<T, M> {
    fn clone(&self) -> Self {
        Self {
            peer: self.peer.clone(),
            removal: self.removal,
        }
    }
}

impl<T, M> Entered<T, M> {
    /// Creates an entry, and registers the callback that removes it. Fails if the moment
    /// `remove_at` is past. The error then contains the callback. The caller drops the callback
    /// after unlocking, because the callback contains the key, and dropping a key can run user
    /// code.
    pub(super) fn new(
        peer: &Peer<T, M>,
        remove_at: Moment,
        remove: impl FnOnce() + Send + 'static,
    ) -> Result<Self, TooLate> {
        let removal = peer.before(remove_at, remove)?;
        Ok(Self {
            peer: peer.clone(),
            removal,
        })
    }

    /// Returns whether this is an entry of the connection of `peer`. After an upgrade to another
    /// pipeline, a connection has a new [`Peer`], but the same id.
    pub(super) fn is_of(&self, peer: &Peer<T, M>) -> bool {
        self.peer.info().id() == peer.info().id()
    }

    /// Returns whether this entry stays if `peer` is entered. It stays if it has this very
    /// [`Peer`]. It also stays if it belongs to the same connection and `peer` is closed. In that
    /// case, either the connection is closing, or `peer` is from before an upgrade and must not
    /// replace a newer [`Peer`].
    pub(super) fn outlasts(&self, peer: &Peer<T, M>) -> bool {
        self.peer.is_same(peer) || self.is_of(peer) && peer.is_closed()
    }

    /// Returns the connection, and cancels the callback that removes the entry. Call this without
    /// holding a lock, because this drops the callback and its key, and dropping a key can run user
    /// code.
    pub(super) fn into_peer(self) -> Peer<T, M> {
        self.peer.forget(self.removal);
        self.peer
    }
}
