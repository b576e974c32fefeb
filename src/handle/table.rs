use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::connection::{ConnectionId, Life};

/// The table of open connections. It is sharded, so that connections that begin or end at the same
/// time seldom wait for the same lock.
#[derive(Default)]
pub(super) struct Table {
    pub(super) shards: [Mutex<Shard>; 16],
    pub(super) live: AtomicUsize,
}

type Shard = HashSet<Entry, BuildHasherDefault<NumberHasher>>;

/// Hashes a connection's number with one multiplication. The server chooses the numbers, so no peer
/// can provoke collisions. The standard hasher protects against them, but at ten times the cost.
#[derive(Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        /// 2^64 divided by the golden ratio. Multiples of this number, modulo 2^64, are spread
        /// evenly.
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
        self.0 = (self.0 ^ number).wrapping_mul(SPREAD);
    }

    fn finish(&self) -> u64 {
        // The set uses the lowest bits and the highest ones. The numbers of a shard have their
        // lowest bits in common, and so do their products, because the multiplication spreads bits
        // only upwards. The rotation makes the upper half of the product the lower one.
        self.0.rotate_left(32)
    }
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
    pub(super) fn shard(&self, id: ConnectionId) -> MutexGuard<'_, Shard> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_shard_are_spread_evenly_over_its_buckets() {
        const BUCKETS: usize = 4096;
        for shard in 0..16 {
            let mut low = [0_u8; BUCKETS];
            let mut high = [0_u16; 128];
            for number in (shard..).step_by(16).take(BUCKETS) {
                let mut hasher = NumberHasher::default();
                hasher.write_u64(number);
                let hash = hasher.finish();
                low[hash as usize % BUCKETS] += 1;
                high[(hash >> 57) as usize] += 1;
            }
            let most = low.iter().max();
            assert!(most <= Some(&3), "{most:?} numbers in one bucket");
            let most = high.iter().max();
            assert!(most <= Some(&64), "{most:?} numbers with one tag");
        }
    }
}
