//! Nests one codec in the frames of another.

use std::io;

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use tokio_util::codec::{Decoder, Encoder};

use super::FrameTooLarge;
use super::stall::Stall;
use super::within::decode_within;

/// The default maximum size of an inner frame in bytes, the same as the pipeline's.
const MAX_FRAME: usize = 64 * 1024;

/// While the codec waits for input, the capacity of its buffer is at most this number of bytes plus
/// twice the size of the content. Before the wait, the content of a larger buffer is copied to a
/// new buffer of the content's size.
const SLACK: usize = 1024;

/// An inner codec in the frames of an outer one. See [`CodecExt::then`](super::CodecExt::then).
///
/// ```
/// use bytes::{Bytes, BytesMut};
/// use tokio_util::codec::{Decoder, Encoder, LengthDelimitedCodec};
/// use tower_tcp::BoxError;
/// use tower_tcp::frame::{CodecExt, Lines};
///
/// let mut codec = LengthDelimitedCodec::new().then(Lines::default());
/// let mut wire = BytesMut::new();
/// codec.encode(Bytes::from("line"), &mut wire)?;
/// assert_eq!(wire, "\0\0\0\x05line\n");
/// assert_eq!(codec.decode(&mut wire)?.unwrap(), "line");
/// # Ok::<_, BoxError>(())
/// ```
#[derive(Debug)]
pub struct Then<O, I> {
    outer: O,
    inner: I,
    /// Content of outer frames that the inner codec has not decoded yet.
    held: BytesMut,
    max_frame: usize,
}

impl<O, I> Then<O, I> {
    pub(super) fn new(outer: O, inner: I) -> Self {
        Self {
            outer,
            inner,
            held: BytesMut::new(),
            max_frame: MAX_FRAME,
        }
    }

    /// Sets the maximum size of an inner frame to decode, in bytes.
    ///
    /// Default: 64 KiB. Why: it is the default of the pipeline, too. When reached: decoding fails,
    /// and so does each later call to decode.
    ///
    /// The pipeline's own limit does not limit inner frames, because it counts the bytes of outer
    /// frames.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Releases memory that the undecoded bytes do not need. Called before each wait for the peer.
    fn shrink(&mut self) {
        let len = self.held.len();
        if len == 0 || self.held.capacity() > 2 * len + SLACK {
            self.held = BytesMut::from(&self.held[..]);
        }
    }
}

impl<O, I> Decoder for Then<O, I>
where
    O: Decoder<Item: AsRef<[u8]>>,
    I: Decoder,
{
    type Item = I::Item;
    type Error = ThenError<O::Error, I::Error>;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<I::Item>, Self::Error> {
        let mut stall = Stall::new(src);
        loop {
            // The inner codec is called even if no bytes are held, because it may hold an item
            // itself.
            let item = decode_within(self.max_frame, &mut self.inner, &mut self.held)?;
            if let Some(item) = item.map_err(ThenError::Inner)? {
                return Ok(Some(item));
            }
            match self.outer.decode(src).map_err(ThenError::Outer)? {
                Some(frame) => self.held.extend_from_slice(frame.as_ref()),
                None => break,
            }
            let counted = stall.count(src);
            counted.map_err(|err| ThenError::Outer(err.into()))?;
        }
        self.shrink();
        Ok(None)
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<I::Item>, Self::Error> {
        let mut stall = Stall::new(src);
        loop {
            let item = decode_within(self.max_frame, &mut self.inner, &mut self.held)?;
            if let Some(item) = item.map_err(ThenError::Inner)? {
                return Ok(Some(item));
            }
            match self.outer.decode_eof(src).map_err(ThenError::Outer)? {
                Some(frame) => self.held.extend_from_slice(frame.as_ref()),
                None => break,
            }
            let counted = stall.count(src);
            counted.map_err(|err| ThenError::Outer(err.into()))?;
        }
        let item = self.inner.decode_eof(&mut self.held);
        match item.map_err(ThenError::Inner)? {
            // An end of the stream within an inner frame is detected here. The caller knows only
            // the outer frames, which can all be complete.
            None if !self.held.is_empty() => {
                let cut = io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the stream ended within a frame of the inner codec",
                );
                Err(ThenError::Inner(cut.into()))
            }
            item => Ok(item),
        }
    }
}

impl<O, I, T> Encoder<T> for Then<O, I>
where
    O: Encoder<Bytes>,
    I: Encoder<T>,
{
    type Error = ThenError<O::Error, I::Error>;

    fn encode(&mut self, item: T, dst: &mut BytesMut) -> Result<(), Self::Error> {
        let mut frame = BytesMut::new();
        let encoded = self.inner.encode(item, &mut frame);
        encoded.map_err(ThenError::Inner)?;
        // If the inner codec filtered the item out, do not write an empty frame for it.
        if frame.is_empty() {
            return Ok(());
        }
        let encoded = self.outer.encode(frame.freeze(), dst);
        encoded.map_err(ThenError::Outer)
    }
}

/// The error of [`Then`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ThenError<O, I> {
    /// The outer codec failed, or the stream did.
    #[error("cannot read or write outer frames")]
    Outer(#[source] O),
    /// The inner codec failed, or the stream ended within one of its frames
    /// ([`UnexpectedEof`](io::ErrorKind::UnexpectedEof)).
    #[error("cannot read or write inner frames")]
    Inner(#[source] I),
    /// A frame of the inner codec was larger than [`max_frame`](Then::max_frame).
    #[error("inner frame too large")]
    TooLarge(#[from] FrameTooLarge),
}

impl<O: From<io::Error>, I> From<io::Error> for ThenError<O, I> {
    fn from(err: io::Error) -> Self {
        Self::Outer(err.into())
    }
}
