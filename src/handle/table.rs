use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::connection::{ConnectionId, Life};

/// The table of open connections. It is sharded, so that connections that begin or end at the same
/// time seldom wait for the same lock.
#[derive(Default)]
pub(super) struct Table {
    pub(super) shards: [Mutex<HashSet<Entry>>; 16],
    pub(super) live: AtomicUsize,
}

/// An entry of the table: a connection, identified by its number.
pub(super) struct Entry(pub(super) Arc<Life>);

impl Borrow<ConnectionId> for Entry {
    fn borrow(&self) -> &ConnectionId {
        &self.0.origin.id
    }
}

impl Hash for Entry {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.origin.id.hash(state);
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.0.origin.id == other.0.origin.id
    }
}

impl Eq for Entry {}

impl Table {
    pub(super) fn shard(&self, id: ConnectionId) -> MutexGuard<'_, HashSet<Entry>> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "only the low bits are wanted"
        )]
        let shard = id.get() as usize % self.shards.len();
        self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the open connections, copied shard by shard. So callers hold no lock while they
    /// raise signals, which may wake code that takes the lock again.
    pub(super) fn all(&self) -> impl Iterator<Item = Arc<Life>> + '_ {
        self.shards.iter().flat_map(|shard| {
            let lives: Vec<_> = shard
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .map(|entry| Arc::clone(&entry.0))
                .collect();
            lives
        })
    }
}
