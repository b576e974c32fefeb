//! Groups frames into chunks.

use std::mem;
use std::num::NonZeroUsize;

use bytes::BytesMut;
use tokio_util::codec::{Decoder, Encoder};

use super::stall::Stall;

/// A codec whose items are chunks of several frames. See
/// [`CodecExt::chunks`](super::CodecExt::chunks).
///
/// ```
/// use std::num::NonZeroUsize;
/// use bytes::BytesMut;
/// use tokio_util::codec::Decoder;
/// use tower_tcp::frame::{CodecExt, Lines};
///
/// const TWO: NonZeroUsize = NonZeroUsize::new(2).unwrap();
///
/// let mut pairs = Lines::default().chunks(TWO);
/// let mut input = BytesMut::from("name\nann\nname\n");
/// assert_eq!(pairs.decode(&mut input)?.unwrap(), ["name", "ann"]);
/// assert_eq!(pairs.decode(&mut input)?, None);
/// assert_eq!(pairs.decode_eof(&mut input)?.unwrap(), ["name"]);
/// # Ok::<_, tower_tcp::frame::LinesError>(())
/// ```
#[derive(Debug)]
pub struct Chunks<C: Decoder> {
    codec: C,
    size: NonZeroUsize,
    held: Vec<C::Item>,
    failed: Option<Failed<C::Error>>,
}

/// An error of the codec. It is kept until the items decoded before it are delivered.
#[derive(Debug)]
enum Failed<E> {
    Reading(E),
    AtEnd(E),
}

impl<C: Decoder> Chunks<C> {
    pub(super) fn new(codec: C, size: NonZeroUsize) -> Self {
        Self {
            codec,
            size,
            // Memory is allocated as items arrive, not in advance.
            held: Vec::new(),
            failed: None,
        }
    }

    /// Adds an item to the chunk. Returns the chunk if it is now complete.
    #[inline]
    fn push(&mut self, item: C::Item) -> Option<Vec<C::Item>> {
        self.held.push(item);
        (self.held.len() == self.size.get()).then(|| mem::take(&mut self.held))
    }

    /// Returns the held items, if there are any.
    fn leftover(&mut self) -> Option<Vec<C::Item>> {
        (!self.held.is_empty()).then(|| mem::take(&mut self.held))
    }
}

impl<C: Decoder> Decoder for Chunks<C> {
    type Item = Vec<C::Item>;
    type Error = C::Error;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Vec<C::Item>>, C::Error> {
        match self.failed.take() {
            Some(Failed::Reading(err)) => return Err(err),
            // An error at the end is kept for the next `decode_eof`, because callers distinguish
            // the errors of `decode_eof` from those of `decode`.
            at_end => self.failed = at_end,
        }
        let mut stall = Stall::new(src);
        loop {
            match self.codec.decode(src) {
                Ok(Some(item)) => {
                    if let Some(chunk) = self.push(item) {
                        return Ok(Some(chunk));
                    }
                    if let Err(err) = stall.count(src) {
                        self.failed = Some(Failed::Reading(err.into()));
                        return Ok(self.leftover());
                    }
                }
                Ok(None) => return Ok(None),
                Err(err) => {
                    let Some(chunk) = self.leftover() else {
                        return Err(err);
                    };
                    self.failed = Some(Failed::Reading(err));
                    return Ok(Some(chunk));
                }
            }
        }
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<Vec<C::Item>>, C::Error> {
        if let Some(Failed::Reading(err) | Failed::AtEnd(err)) = self.failed.take() {
            return Err(err);
        }
        let mut stall = Stall::new(src);
        loop {
            match self.codec.decode_eof(src) {
                Ok(Some(item)) => {
                    if let Some(chunk) = self.push(item) {
                        return Ok(Some(chunk));
                    }
                    if let Err(err) = stall.count(src) {
                        self.failed = Some(Failed::AtEnd(err.into()));
                        return Ok(self.leftover());
                    }
                }
                Ok(None) => return Ok(self.leftover()),
                Err(err) => {
                    let Some(chunk) = self.leftover() else {
                        return Err(err);
                    };
                    self.failed = Some(Failed::AtEnd(err));
                    return Ok(Some(chunk));
                }
            }
        }
    }
}

impl<C: Decoder + Encoder<T>, T> Encoder<Vec<T>> for Chunks<C> {
    type Error = <C as Encoder<T>>::Error;

    fn encode(&mut self, items: Vec<T>, dst: &mut BytesMut) -> Result<(), Self::Error> {
        let before = dst.len();
        for item in items {
            if let Err(err) = self.codec.encode(item, dst) {
                dst.truncate(before);
                return Err(err);
            }
        }
        Ok(())
    }
}
