//! The locked parts of a table of keys, and the entries of connections in it.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::connection::{HookId, Moment};
use crate::pipeline::{Peer, TooLate};

/// The number of locks over which the entries are spread, so that 15,000 connections that begin and
/// end seldom wait for one lock.
const SHARDS: usize = 16;

/// A map in parts, each with a lock of its own.
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

    /// Locks one part after the other.
    pub(super) fn iter(&self) -> impl Iterator<Item = Shard<'_, K, V>> {
        self.shards.iter().map(lock)
    }

    pub(super) fn len(&self) -> usize {
        self.iter().map(|shard| shard.len()).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.iter().all(|shard| shard.is_empty())
    }

    /// Locks the part of a key.
    pub(super) fn of<Q>(&self, key: &Q) -> Shard<'_, K, V>
    where
        K: Borrow<Q>,
        Q: Hash + ?Sized,
    {
        // The high bits, because the low ones choose the bucket within the shard's map.
        let shard = (self.hasher.hash_one(key) >> 32) as usize % SHARDS;
        lock(&self.shards[shard])
    }
}

fn lock<V>(mutex: &Mutex<V>) -> MutexGuard<'_, V> {
    // The user's `Hash`, `Eq` and `Clone` run under the lock. If one panics, the map is still
    // whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection, and the callback that removes it.
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
    /// Creates an entry that its connection removes. If that moment is already past, returns the
    /// callback, which the caller drops after unlocking, because it contains the key.
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

    /// Returns the connection, which no longer removes the entry. Called without a lock, because
    /// the callback contains the key.
    pub(super) fn into_peer(self) -> Peer<T, M> {
        self.peer.forget(self.removal);
        self.peer
    }
}
