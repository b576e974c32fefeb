use thiserror::Error;

/// The amounts of pending output, in bytes, at which a connection stops and resumes producing
/// output.
///
/// When the output rises to the high mark, [`Peer::send`](super::Peer::send) waits, and the service
/// gets no more requests or messages, except one for which `poll_ready` has already been called.
/// When the output falls to the low mark, sends, requests and messages resume. Because of the
/// distance between the marks, a slow peer does not pause and resume all senders with each frame. A
/// single frame may be larger than the high mark. The high mark is at most `u32::MAX` bytes (almost
/// 4 GiB), and the low mark at most one byte less. Larger amounts are reduced to these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "high water mark")]
#[doc(alias = "high_mark")]
#[doc(alias = "low_mark")]
#[doc(alias = "backpressure")]
pub struct Watermarks {
    // On 64-bit systems, `u32` has half the size of `usize`. That matters because each connection
    // holds its marks.
    low: u32,
    high: u32,
}

/// The maximum of a mark, in bytes.
const MAX: usize = u32::MAX as usize;

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
            Ok(Self::capped(low, high))
        } else {
            Err(InvalidWatermarks { low, high })
        }
    }

    /// Creates marks with the low mark at a quarter of the high mark. So more output can be
    /// produced while the last quarter is written. A high mark of `0` counts as 1.
    pub const fn below(high: usize) -> Self {
        let high = if high == 0 { 1 } else { high };
        Self::capped(high / 4, high)
    }

    /// Creates marks. `low` must be below `high`. Marks above the maximum are reduced, and `low`
    /// stays below `high`.
    const fn capped(low: usize, high: usize) -> Self {
        let high = if high < MAX { high } else { MAX };
        let low = if low < high { low } else { high - 1 };
        Self {
            low: low as u32,
            high: high as u32,
        }
    }

    /// Returns the low mark.
    pub const fn low(self) -> usize {
        self.low as usize
    }

    /// Returns the high mark.
    pub const fn high(self) -> usize {
        self.high as usize
    }

    /// Returns whether an output of `bytes` counts as above the marks. Between the marks, the
    /// answer is the previous one (`was_above`).
    pub(in crate::pipeline) fn is_above(self, bytes: usize, was_above: bool) -> bool {
        if was_above {
            bytes > self.low()
        } else {
            bytes >= self.high()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_above_the_maximum_count_as_the_maximum() {
        let marks = Watermarks::new(usize::MAX - 1, usize::MAX).expect("low is below high");
        assert_eq!((marks.low(), marks.high()), (MAX - 1, MAX));
        let marks = Watermarks::below(usize::MAX);
        assert_eq!((marks.low(), marks.high()), (MAX - 1, MAX));
        assert!(!marks.is_above(MAX - 1, false) && marks.is_above(MAX, false));
    }

    #[test]
    fn amounts_up_to_the_maximum_are_kept() {
        let marks = Watermarks::new(0, MAX).expect("low is below high");
        assert_eq!((marks.low(), marks.high()), (0, MAX));
        let marks = Watermarks::below(64 * 1024);
        assert_eq!((marks.low(), marks.high()), (16 * 1024, 64 * 1024));
    }
}
