//! Pseudo-random numbers.

use std::time::Duration;

use super::STEP;

/// A generator whose numbers depend only on its seed (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn size(&mut self, below: u64) -> usize {
        usize::try_from(self.below(below)).unwrap()
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn steps(&mut self, below: u64) -> Duration {
        STEP * u32::try_from(self.below(below)).unwrap()
    }

    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }
}
