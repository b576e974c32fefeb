//! Connections by a name of your own: a user, a room's member, a subscriber.
//!
//! The server keeps a table of its connections; a [`Registry`] is a view of some of them under the program's keys. An entry is made by the
//! program, most often in the make-service or when the peer has said who it is, and taken out by the connection's end, whatever that
//! was. So there are no entries of the dead to be cleared away.
//!
//! A program may have as many registries as it has kinds of names: one of users, one for each room.
//!
//! ```
//! use bytes::Bytes;
//! use tower::service_fn;
//! use tower_tcp::frame::Lines;
//! use tower_tcp::registry::{Registry, SlowPeer};
//! use tower_tcp::{BoxError, Peer, Pipeline};
//!
//! // Every line goes to everybody else.
//! let everybody = Registry::new();
//! let make = service_fn(move |peer: Peer<Bytes>| {
//!     let everybody = everybody.clone();
//!     async move {
//!         let me = peer.info().id();
//!         everybody.insert(me, &peer)?;
//!         Ok::<_, BoxError>(service_fn(move |line: Bytes| {
//!             let everybody = everybody.clone();
//!             async move {
//!                 everybody.broadcast(line, |id, _| *id != me, SlowPeer::Close).await;
//!                 Ok::<_, BoxError>(None::<Bytes>)
//!             }
//!         }))
//!     }
//! });
//! let pipeline = Pipeline::new(Lines::default).make_service(make);
//! # drop(pipeline);
//! ```

mod broadcast;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use thiserror::Error;

use crate::connection::HookId;
use crate::pipeline::Peer;

pub use broadcast::{Broadcast, SlowPeer};

/// How many locks the entries are under: with 15,000 connections that come and go, few meet at one.
const SHARDS: usize = 16;

/// Another connection has the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the key is taken")]
pub struct KeyTaken;

/// Connections by a key. Clones are of the same registry. See the [module docs](self).
///
/// `T` and `M` are those of its [`Peer`]s. A part of the registry is locked while a key is hashed, compared, cloned or dropped: a
/// `K` that comes back to it then waits for ever.
pub struct Registry<K, T, M = Infallible> {
    inner: Arc<Shards<K, T, M>>,
}

struct Shards<K, T, M> {
    shards: [Mutex<HashMap<K, Entered<T, M>>>; SHARDS],
    hasher: RandomState,
}

/// A connection, and the callback that takes it out at its end.
struct Entered<T, M> {
    peer: Peer<T, M>,
    at_end: HookId,
}

type Shard<'a, K, T, M> = MutexGuard<'a, HashMap<K, Entered<T, M>>>;

impl<K, T, M> Registry<K, T, M> {
    /// Makes an empty one.
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Shards {
                shards: std::array::from_fn(|_| Mutex::default()),
                hasher: RandomState::new(),
            }),
        }
    }

    /// Returns how many connections are entered.
    pub fn len(&self) -> usize {
        self.shards().map(|shard| shard.len()).sum()
    }

    /// Returns whether none is.
    pub fn is_empty(&self) -> bool {
        self.shards().all(|shard| shard.is_empty())
    }

    fn shards(&self) -> impl Iterator<Item = Shard<'_, K, T, M>> {
        self.inner.shards.iter().map(lock)
    }
}

impl<K, T, M> Registry<K, T, M>
where
    K: Hash + Eq,
{
    /// Enters a connection. It is taken out when it ends, with the end already settled and its stream gone; a connection that has ended is
    /// not entered at all.
    ///
    /// One connection may have several keys, in one registry or in many.
    ///
    /// # Errors
    ///
    /// [`KeyTaken`] when the key is another connection's.
    pub fn insert(&self, key: K, peer: &Peer<T, M>) -> Result<(), KeyTaken>
    where
        K: Clone + Send + 'static,
        T: Send + 'static,
        M: Send + 'static,
    {
        let entry = key.clone();
        let mut shard = self.shard(&key);
        match shard.entry(entry) {
            Entry::Occupied(taken) if taken.get().peer.is_same(peer) => {}
            Entry::Occupied(_) => return Err(KeyTaken),
            Entry::Vacant(free) => {
                // The registry may be gone before the connection.
                let shared = Arc::downgrade(&self.inner);
                let id = peer.info().id();
                let take_out = move || {
                    let registry = Self {
                        inner: Weak::upgrade(&shared)?,
                    };
                    // Unless the key is another's by now: this may be about to run while it is taken back.
                    registry.remove_if(&key, |entered| entered.peer.info().id() == id)
                };
                if let Some(at_end) = peer.before_end(move |_end| drop(take_out())) {
                    free.insert(Entered {
                        peer: peer.clone(),
                        at_end,
                    });
                }
            }
        }
        Ok(())
    }

    /// Takes a connection out, which goes on without it. What is being broadcast at this moment may still reach it.
    pub fn remove(&self, key: &K) -> Option<Peer<T, M>> {
        let Entered { peer, at_end } = self.remove_if(key, |_| true)?;
        peer.forget(at_end);
        Some(peer)
    }

    fn remove_if(
        &self,
        key: &K,
        condition: impl FnOnce(&Entered<T, M>) -> bool,
    ) -> Option<Entered<T, M>> {
        let mut shard = self.shard(key);
        if condition(shard.get(key)?) {
            shard.remove(key)
        } else {
            None
        }
    }

    /// Returns the connection that has the key.
    pub fn get(&self, key: &K) -> Option<Peer<T, M>> {
        self.shard(key).get(key).map(|entered| entered.peer.clone())
    }

    /// Closes the connection that has the key in good order. Returns whether there is one.
    pub fn close(&self, key: &K) -> bool {
        self.get(key).map(|peer| peer.close()).is_some()
    }

    fn shard(&self, key: &K) -> Shard<'_, K, T, M> {
        // Not the low bits: by them the shard's own map goes.
        let shard = (self.inner.hasher.hash_one(key) >> 32) as usize % SHARDS;
        lock(&self.inner.shards[shard])
    }
}

impl<K, T, M> Registry<K, T, M>
where
    K: Clone,
{
    /// Returns the connections that are entered. They are collected shard by shard, so that nothing is locked while they are looked at: one
    /// that comes or goes meanwhile may be among them or not.
    pub fn iter(&self) -> impl Iterator<Item = (K, Peer<T, M>)> + '_ {
        self.shards().flat_map(|shard| {
            let entries: Vec<_> = shard
                .iter()
                .map(|(key, entered)| (key.clone(), entered.peer.clone()))
                .collect();
            entries
        })
    }

    /// Closes those connections in good order that `whom` picks. Returns how many that were.
    pub fn close_where(&self, mut whom: impl FnMut(&K, &Peer<T, M>) -> bool) -> usize {
        self.iter()
            .filter(|(key, peer)| whom(key, peer))
            .map(|(_, peer)| peer.close())
            .count()
    }
}

fn lock<V>(mutex: &Mutex<V>) -> MutexGuard<'_, V> {
    // The user's `Hash`, `Eq` and `Clone` run under it; the map is whole all the same.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K, T, M> Clone for Registry<K, T, M> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<K, T, M> Default for Registry<K, T, M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K, T, M> fmt::Debug for Registry<K, T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
