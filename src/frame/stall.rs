//! Stops decoders that return items without end.

use std::io;

use bytes::BytesMut;

use super::DecoderStalled;

/// The maximum number of items in a row that a decoder may return without consuming input, while
/// the codec around it needs another one. A frame of 1 MiB may consist of as many items.
const ITEMS: u32 = 1024 * 1024;

/// Counts the items that a decoder has returned without consuming input. A codec that skips items
/// would otherwise loop forever around a decoder that never returns `None`.
pub(super) struct Stall {
    items: u32,
    len: usize,
}

impl Stall {
    /// Begins to count, before the first call of the decoder with this input.
    pub(super) fn new(src: &BytesMut) -> Self {
        let (items, len) = (0, src.len());
        Self { items, len }
    }

    /// Counts an item that is not the one that is needed. `src` is the input after the call that
    /// returned the item.
    pub(super) fn count(&mut self, src: &BytesMut) -> io::Result<()> {
        if src.len() != self.len {
            *self = Self::new(src);
            return Ok(());
        }
        self.items += 1;
        if self.items > ITEMS {
            return Err(io::Error::other(DecoderStalled));
        }
        Ok(())
    }
}
