//! A codec for blocks of a fixed size.

use std::io;
use std::num::NonZeroUsize;

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio_util::codec::{Decoder, Encoder};

/// A codec for blocks of a fixed size, with nothing between them.
///
/// ```
/// use std::num::NonZeroUsize;
/// use bytes::BytesMut;
/// use tokio_util::codec::Decoder;
/// use tower_tcp::frame::Block;
///
/// const SIZE: NonZeroUsize = NonZeroUsize::new(4).unwrap();
///
/// let mut blocks = Block::new(SIZE);
/// let mut input = BytesMut::from("onetwo");
/// assert_eq!(blocks.decode(&mut input)?.as_deref(), Some(&b"onet"[..]));
/// assert_eq!(blocks.decode(&mut input)?, None);
/// # Ok::<_, tower_tcp::frame::BlockError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Block {
    size: NonZeroUsize,
}

impl Block {
    /// Creates the codec for blocks of `size` bytes. In a pipeline, blocks of more than 64 KiB need
    /// a higher [`Limits::max_frame`](crate::pipeline::Limits::max_frame).
    pub fn new(size: NonZeroUsize) -> Self {
        Self { size }
    }
}

impl Decoder for Block {
    type Item = Bytes;
    type Error = BlockError;

    #[inline]
    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, BlockError> {
        if src.len() < self.size.get() {
            return Ok(None);
        }
        Ok(Some(src.split_to(self.size.get()).freeze()))
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, BlockError> {
        match self.decode(src)? {
            None if !src.is_empty() => Err(BlockError::Io(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the stream ended within a block",
            ))),
            block => Ok(block),
        }
    }
}

// `Block` must implement `Encoder` for one type only. With two, the compiler could not infer the
// type of the value that a service returns.
impl Encoder<Bytes> for Block {
    type Error = BlockError;

    #[inline]
    fn encode(&mut self, block: Bytes, dst: &mut BytesMut) -> Result<(), BlockError> {
        if block.len() != self.size.get() {
            return Err(BlockError::WrongSize {
                expected: self.size.get(),
                actual: block.len(),
            });
        }
        dst.reserve(block.len());
        dst.put_slice(&block);
        Ok(())
    }
}

/// The error of [`Block`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The size of an item to encode differs from the block size. Nothing was written.
    #[error("block of {actual} bytes where {expected} are due")]
    WrongSize {
        /// The size of a block in bytes.
        expected: usize,
        /// The size of the item in bytes.
        actual: usize,
    },
    /// The stream failed, or ended within a block
    /// ([`UnexpectedEof`](io::ErrorKind::UnexpectedEof)).
    #[error("cannot read or write blocks")]
    Io(#[from] io::Error),
}
