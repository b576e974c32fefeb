//! Detects decoders that return item after item without consuming input.

use std::io;

use bytes::BytesMut;

use super::DecoderStalled;

/// The maximum number of items in a row that a codec may take from the decoder inside it, in one
/// call and while the decoder consumes no input. An item with which the codec's call returns is not
/// counted. The number is so high because a decoder may consume a frame of 1 MiB and then return
/// one item per byte.
const ITEMS: u32 = 1024 * 1024;

/// Counts the items that a decoder has returned without consuming input. Without this count, a
/// codec that skips or joins items could loop forever around a decoder that never returns `None`.
pub(super) struct Stall {
    items: u32,
    len: usize,
}

impl Stall {
    /// Begins a count. `src` is the input before the next call of the decoder.
    pub(super) fn new(src: &BytesMut) -> Self {
        let (items, len) = (0, src.len());
        Self { items, len }
    }

    /// Counts an item that the decoder returned. The codec around the decoder calls this if it may
    /// need a further item before it can return one of its own. `src` is the input after the call
    /// that returned the item. Fails if the decoder has stalled.
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
