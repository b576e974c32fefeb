use thiserror::Error;

/// The amounts of pending output, in bytes, at which a connection pauses and resumes.
///
/// When the output rises to the high mark, [`Peer::send`](super::Peer::send) waits, and no more
/// requests begin. When it falls to the low mark, both resume. Because of the distance between the
/// marks, a slow peer does not pause and resume all senders with each frame. One frame may be
/// larger than the high mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "high water mark")]
#[doc(alias = "high_mark")]
#[doc(alias = "low_mark")]
#[doc(alias = "backpressure")]
pub struct Watermarks {
    low: usize,
    high: usize,
}

/// The error for a low mark that is not below the high mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the low mark, {low}, is not below the high mark, {high}")]
pub struct InvalidWatermarks {
    low: usize,
    high: usize,
}

impl Watermarks {
    /// Creates marks from two amounts in bytes. With a low mark of `0`, senders resume only when
    /// all output is written.
    ///
    /// # Errors
    ///
    /// Returns an error if `low` is not below `high`.
    pub const fn new(low: usize, high: usize) -> Result<Self, InvalidWatermarks> {
        if low < high {
            Ok(Self { low, high })
        } else {
            Err(InvalidWatermarks { low, high })
        }
    }

    /// Creates marks with the low mark at a quarter of the high mark. So more output can be
    /// produced while the last quarter is written. A high mark of `0` counts as 1.
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

    /// Returns whether an output of `bytes` counts as above the marks. Between the marks, the
    /// answer is the previous one (`was_above`).
    pub(in crate::pipeline) fn is_above(self, bytes: usize, was_above: bool) -> bool {
        if was_above {
            bytes > self.low
        } else {
            bytes >= self.high
        }
    }
}
