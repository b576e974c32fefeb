//! Stops decoders that return items without end.

use std::io;

use super::DecoderStalled;

/// The maximum number of items in a row that a decoder may return without consuming input, while
/// the codec around it needs another one. A frame of 1 MiB may consist of as many items.
const ITEMS: u32 = 1024 * 1024;

/// Counts the items that a decoder has returned without consuming input. A codec that skips items
/// would otherwise loop forever around a decoder that never returns `None`.
#[derive(Default)]
pub(super) struct Stall(u32);

impl Stall {
    /// Counts an item that is not the one that is needed. `before` and `after` are the lengths of
    /// the input around the call that returned it.
    pub(super) fn count(&mut self, before: usize, after: usize) -> io::Result<()> {
        if after != before {
            self.0 = 0;
            return Ok(());
        }
        self.0 += 1;
        if self.0 > ITEMS {
            return Err(io::Error::other(DecoderStalled));
        }
        Ok(())
    }
}
