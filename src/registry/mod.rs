//! Tables of connections by your own keys, such as user names, and groups of connections, such as
//! the rooms of a chat.
//!
//! The server has a table of all its connections. A [`Registry`] holds some of them under the
//! program's keys. The program inserts an entry, usually in the make-service or when the peer has
//! logged in. The registry removes the entry when the connection begins to close, for whatever
//! reason ([`ConnectionInfo::on_closing`](crate::ConnectionInfo::on_closing)), so the key is free
//! while the last output is written. A service call that still runs delays the removal; to free a
//! key sooner, use `remove` or `replace`. A registry created by
//! [`until_end`](Registry::until_end) removes the entry at the connection's end instead. No entry
//! outlives its connection.
//!
//! A program may have several registries, such as one of users and one of operators. For the rooms
//! of a chat or the channels of publish and subscribe, use [`Groups`].
//!
//! ```
//! use std::time::Duration;
//! use bytes::Bytes;
//! use tower::service_fn;
//! use tower_tcp::frame::Lines;
//! use tower_tcp::registry::{Registry, SlowPeer};
//! use tower_tcp::{BoxError, Peer, Pipeline};
//!
//! // Sends every line to all other connections, except slow ones.
//! let everybody = Registry::new();
//! let slow = SlowPeer::CloseAfter(Duration::from_secs(5));
//! let make = service_fn(move |peer: Peer<Bytes>| {
//!     let everybody = everybody.clone();
//!     async move {
//!         let me = peer.info().id();
//!         everybody.insert(me, &peer)?;
//!         Ok::<_, BoxError>(service_fn(move |line: Bytes| {
//!             let everybody = everybody.clone();
//!             async move {
//!                 everybody.broadcast(line, |id, _| *id != me, slow).await;
//!                 Ok::<_, BoxError>(None::<Bytes>)
//!             }
//!         }))
//!     }
//! });
//! let pipeline = Pipeline::new(Lines::default).make_service(make);
//! # drop(pipeline);
//! ```
//!
//! # A second login
//!
//! [`insert`](Registry::insert) rejects a key that another connection has.
//! [`replace`](Registry::replace) gives the key to the new connection, and returns the old
//! connection. When the old connection closes, the new entry stays:
//!
//! ```
//! # use bytes::Bytes;
//! # use tower_tcp::Peer;
//! # use tower_tcp::registry::Registry;
//! fn log_in(users: &Registry<String, Bytes>, name: String, peer: &Peer<Bytes>) {
//!     if let Some(earlier) = users.replace(name, peer) {
//!         earlier.close_because("logged in elsewhere");
//!     }
//! }
//! ```
//!
//! To remove a connection's own entry, use [`remove_peer`](Registry::remove_peer), because
//! [`remove`](Registry::remove) could remove the entry of a later login.

mod broadcast;
mod feed;
mod group;
mod groups;
mod shards;

use std::borrow::Borrow;
use std::convert::Infallible;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Weak};

use thiserror::Error;

use crate::connection::Moment;
use crate::pipeline::{Peer, TooLate};
use shards::{Entered, Shard, Shards};

pub use broadcast::{Broadcast, SlowPeer, broadcast};
pub use feed::JoinError;
pub use groups::Groups;

/// The error of an insert under a key that another connection has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the key is taken")]
pub struct KeyTaken;

/// A table of connections by key. Clones share the same entries. See the [module docs](self).
///
/// `T` and `M` are the types of frames and messages of its [`Peer`]s. A part of the registry is
/// locked while a key is hashed, compared or cloned, so a `K` that calls the registry in its
/// `Hash`, `Eq` or `Clone` can deadlock. The `Drop` of a key runs without a lock.
#[doc(alias = "alias")]
#[doc(alias = "session")]
pub struct Registry<K, T, M = Infallible> {
    inner: Arc<Inner<K, T, M>>,
}

struct Inner<K, T, M> {
    entries: Shards<K, Entered<T, M>>,
    /// The moment at which a connection's entries are removed.
    remove_at: Moment,
}

impl<K, T, M> Drop for Inner<K, T, M> {
    /// Cancels the callbacks that remove the entries. Otherwise a connection that is entered in one
    /// short-lived registry after another would hold more and more of them.
    fn drop(&mut self) {
        for (_key, entered) in self.entries.take_all() {
            drop(entered.into_peer());
        }
    }
}

impl<K, T, M> Registry<K, T, M> {
    /// Creates an empty registry. Entries are removed when their connections begin to close.
    pub fn new() -> Self {
        Self::removing_at(Moment::Closing)
    }

    /// Creates an empty registry. Entries are removed at the end of their connections, when the
    /// stream is closed and the reason for the end is final.
    ///
    /// So a connection keeps its key while it writes its last output and lingers. Use such a
    /// registry if the key must not be free during that time.
    pub fn until_end() -> Self {
        Self::removing_at(Moment::End)
    }

    fn removing_at(remove_at: Moment) -> Self {
        Self {
            inner: Arc::new(Inner {
                entries: Shards::new(),
                remove_at,
            }),
        }
    }

    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.inner.entries.len()
    }

    /// Returns whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.inner.entries.is_empty()
    }
}

impl<K, T, M> Registry<K, T, M>
where
    K: Hash + Eq,
{
    /// Inserts a connection under a key that no other connection has.
    ///
    /// The entry is removed when the connection begins to close, or at its end if the registry was
    /// created by [`until_end`](Self::until_end). If that moment is already past and no other
    /// connection has the key, nothing is inserted, and no error is returned. One connection may
    /// have several keys, in one registry or in many. Inserting a connection again under its own
    /// key changes nothing, except that the entry gets the new [`Peer`] of an upgraded connection.
    ///
    /// # Errors
    ///
    /// Returns [`KeyTaken`] if another connection has the key.
    #[doc(alias = "register")]
    #[doc(alias = "alias_set")]
    pub fn insert(&self, key: K, peer: &Peer<T, M>) -> Result<(), KeyTaken>
    where
        K: Clone + Send + 'static,
        T: Send + 'static,
        M: Send + 'static,
    {
        // Declared before the lock guard, so dropped after unlocking.
        let own_key = key.clone();
        let shard = self.inner.entries.of(&key);
        match shard.get(&key) {
            Some(has) if has.outlasts(peer) => return Ok(()),
            Some(has) if !has.is_of(peer) => return Err(KeyTaken),
            _ => {}
        }
        drop(self.put(shard, key, own_key, peer));
        Ok(())
    }

    /// Inserts a connection under a key, and returns the connection that had the key before.
    ///
    /// The key is never free in between. The returned connection stays open, and its end does not
    /// remove the new entry. Close the returned connection if each user is allowed one connection.
    ///
    /// Returns `None` if the key was free. Also returns `None` if the connection of `peer` already
    /// has the key. Nothing changes then, except that the entry gets the new [`Peer`] of an
    /// upgraded connection. If the connection of `peer` is already closing, returns `None` and
    /// changes nothing. In a registry created by [`until_end`](Self::until_end), a closing
    /// connection can still be inserted until its end.
    #[doc(alias = "takeover")]
    #[doc(alias = "kick")]
    pub fn replace(&self, key: K, peer: &Peer<T, M>) -> Option<Peer<T, M>>
    where
        K: Clone + Send + 'static,
        T: Send + 'static,
        M: Send + 'static,
    {
        // Declared before the lock guard, so dropped after unlocking.
        let own_key = key.clone();
        let shard = self.inner.entries.of(&key);
        let has = shard.get(&key);
        if has.is_some_and(|has| has.outlasts(peer)) {
            return None;
        }
        let is_own = has.is_some_and(|has| has.is_of(peer));
        let replaced = self.put(shard, key, own_key, peer);
        replaced.filter(|_| !is_own)
    }

    /// Inserts a connection under a key, and returns the [`Peer`] that had the key before. It can
    /// be a `Peer` of the same connection, from before an upgrade. Changes nothing, and returns
    /// `None`, if the connection is already past the moment at which its entries are removed.
    fn put(
        &self,
        mut shard: Shard<'_, K, Entered<T, M>>,
        key: K,
        own_key: K,
        peer: &Peer<T, M>,
    ) -> Option<Peer<T, M>>
    where
        K: Send + 'static,
        T: Send + 'static,
        M: Send + 'static,
    {
        match self.entered(own_key, peer) {
            Ok(entered) => {
                // The old entry is removed first, because an insert alone would keep the old key
                // and drop the new one.
                let replaced = shard.remove_entry(&key);
                shard.insert(key, entered);
                drop(shard);
                let (_key, replaced) = replaced?;
                Some(replaced.into_peer())
            }
            Err(too_late) => {
                drop(shard);
                drop(too_late);
                None
            }
        }
    }

    /// Creates an entry, and registers the callback that removes the entry when the connection
    /// begins to close or ends, depending on `remove_at`.
    fn entered(&self, key: K, peer: &Peer<T, M>) -> Result<Entered<T, M>, TooLate>
    where
        K: Send + 'static,
        T: Send + 'static,
        M: Send + 'static,
    {
        // A weak reference, because the registry may be dropped before the connection.
        let shared = Arc::downgrade(&self.inner);
        let id = peer.info().id();
        let remove = move || {
            let registry = Self {
                inner: Weak::upgrade(&shared)?,
            };
            // Remove the entry only if it still belongs to this connection. `replace` or `remove`
            // may have taken it while this callback was about to run.
            registry.remove_if(&key, |entered| entered.peer.info().id() == id)
        };
        Entered::new(peer, self.inner.remove_at, move || drop(remove()))
    }

    /// Removes the entry of a key, and returns its connection. The connection stays open. A
    /// broadcast that has begun may still send to it.
    pub fn remove<Q>(&self, key: &Q) -> Option<Peer<T, M>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let (_key, removed) = self.remove_if(key, |_| true)?;
        Some(removed.into_peer())
    }

    /// Removes the entry of a key if it belongs to the connection of `peer`. Returns whether an
    /// entry was removed.
    ///
    /// Use this method to remove a connection's own entry, because another connection may have
    /// [replaced](Self::replace) that entry.
    pub fn remove_peer<Q>(&self, key: &Q, peer: &Peer<T, M>) -> bool
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let removed = self.remove_if(key, |entered| entered.is_of(peer));
        removed.map(|(_key, it)| it.into_peer()).is_some()
    }

    /// Removes the entry of a key if `condition` returns `true` for it. Returns the entry with its
    /// key, so that they are dropped after the lock is released.
    fn remove_if<Q>(
        &self,
        key: &Q,
        condition: impl FnOnce(&Entered<T, M>) -> bool,
    ) -> Option<(K, Entered<T, M>)>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let mut shard = self.inner.entries.of(key);
        if condition(shard.get(key)?) {
            shard.remove_entry(key)
        } else {
            None
        }
    }

    /// Returns the connection that has the key. As with `HashMap::get`, a `str` finds the entry of
    /// a `String` key.
    #[doc(alias = "alias_resolve")]
    pub fn get<Q>(&self, key: &Q) -> Option<Peer<T, M>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.inner
            .entries
            .of(key)
            .get(key)
            .map(|entered| entered.peer.clone())
    }

    /// Closes the connection that has the key, gracefully. Returns whether there is one.
    pub fn close<Q>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.get(key).map(|peer| peer.close()).is_some()
    }
}

impl<K, T, M> Registry<K, T, M>
where
    K: Clone,
{
    /// Returns all entries.
    ///
    /// The entries are copied, one part of the registry at a time, so no lock is held while the
    /// caller uses them. A connection that is inserted or removed meanwhile may be included or not.
    pub fn iter(&self) -> impl Iterator<Item = (K, Peer<T, M>)> + '_ {
        self.inner.entries.iter().flat_map(|shard| {
            let entries: Vec<_> = shard
                .iter()
                .map(|(key, entered)| (key.clone(), entered.peer.clone()))
                .collect();
            entries
        })
    }

    /// Closes the connections of all entries for which `whom` returns `true`, gracefully. Returns
    /// the number of these entries.
    pub fn close_where(&self, mut whom: impl FnMut(&K, &Peer<T, M>) -> bool) -> usize {
        self.iter()
            .filter(|(key, peer)| whom(key, peer))
            .map(|(_, peer)| peer.close())
            .count()
    }
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
