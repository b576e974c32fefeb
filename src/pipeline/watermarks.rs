use thiserror::Error;

/// Between which amounts of unwritten output, in bytes, a connection holds back.
///
/// At the high mark [`Peer::send`](super::Peer::send) begins to wait and no more requests are
/// begun; at the low mark all that goes on. In between, what holds is what held before, so that a
/// peer that reads slowly does not have everybody wait and go on for every frame. One frame may be
/// larger than the mark: it is taken whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "high water mark")]
#[doc(alias = "high_mark")]
#[doc(alias = "low_mark")]
#[doc(alias = "backpressure")]
pub struct Watermarks {
    low: usize,
    high: usize,
}

/// A low mark that is not below the high one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the low mark, {low}, is not below the high mark, {high}")]
pub struct InvalidWatermarks {
    low: usize,
    high: usize,
}

impl Watermarks {
    /// Makes marks of two amounts in bytes. A low mark of `0` waits until everything is written.
    ///
    /// # Errors
    ///
    /// When `low` is not below `high`.
    pub const fn new(low: usize, high: usize) -> Result<Self, InvalidWatermarks> {
        if low < high {
            Ok(Self { low, high })
        } else {
            Err(InvalidWatermarks { low, high })
        }
    }

    /// Makes marks with the low one at a quarter of the high one: while that quarter is written
    /// there is time for more to come. `0` counts as 1.
    pub const fn below(high: usize) -> Self {
        let high = if high == 0 { 1 } else { high };
        Self {
            low: high / 4,
            high,
        }
    }

    /// Returns the low mark.
    pub const fn low(self) -> usize {
        self.low
    }

    /// Returns the high mark.
    pub const fn high(self) -> usize {
        self.high
    }

    /// Returns whether `bytes` are above, coming from above or not.
    pub(in crate::pipeline) fn is_above(self, bytes: usize, was_above: bool) -> bool {
        if was_above {
            bytes > self.low
        } else {
            bytes >= self.high
        }
    }
}
