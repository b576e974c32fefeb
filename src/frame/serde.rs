//! A codec for documents in any format that serde supports.

use std::fmt;
use std::io;
use std::marker::PhantomData;

use ::serde::Serialize;
use ::serde::de::DeserializeOwned;
use bytes::{Buf, BufMut, BytesMut};
use thiserror::Error;
use tokio_util::codec::{Decoder, Encoder};

use super::FrameTooLarge;

/// The length of the prefix in bytes. The prefix is a big-endian `u32`.
const PREFIX: usize = size_of::<u32>();

/// A codec for length-prefixed documents (feature `serde`). It reads values of type `In` and writes
/// values of type `Out`. The [`Format`] is JSON by default.
///
/// On the wire each document is preceded by its length in bytes, a big-endian `u32`. No memory is
/// reserved for an announced length. If the announced length is over the limit
/// ([`max_frame`](Self::max_frame)), decoding fails before the document arrives.
///
/// If a document cannot be read as an `In`, the codec fails, which ends the connection. With
/// [`recoverable`](Self::recoverable), the error becomes an item instead, which the service can
/// answer.
///
/// ```
/// use bytes::BytesMut;
/// use serde::{Deserialize, Serialize};
/// use tokio_util::codec::{Decoder, Encoder};
/// use tower_tcp::frame::Serde;
///
/// #[derive(Debug, Deserialize, PartialEq, Serialize)]
/// struct Add(u32, u32);
///
/// let mut codec = Serde::<Add, Add>::default();
/// let mut wire = BytesMut::new();
/// codec.encode(Add(1, 2), &mut wire)?;
/// assert_eq!(wire, "\0\0\0\x05[1,2]");
/// assert_eq!(codec.decode(&mut wire)?, Some(Add(1, 2)));
/// # Ok::<_, tower_tcp::BoxError>(())
/// ```
///
/// # Memory and depth
///
/// A value can take more memory than its document. The factor depends on `In`: a long JSON array
/// `[1,1,...]`, read as a `serde_json::Value`, takes about sixteen times as much memory as its
/// text. So use a specific type for `In`, not `Value`. [`Json`] limits the depth of documents.
pub struct Serde<In, Out, F = Json> {
    format: F,
    max_frame: usize,
    types: PhantomData<fn(Out) -> In>,
}

impl<In, Out, F: Default> Default for Serde<In, Out, F> {
    fn default() -> Self {
        Self::new(F::default())
    }
}

impl<In, Out, F: Clone> Clone for Serde<In, Out, F> {
    fn clone(&self) -> Self {
        Self {
            format: self.format.clone(),
            ..*self
        }
    }
}

impl<In, Out, F: fmt::Debug> fmt::Debug for Serde<In, Out, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serde")
            .field("format", &self.format)
            .field("max_frame", &self.max_frame)
            .finish()
    }
}

impl<In, Out, F> Serde<In, Out, F> {
    /// Creates the codec for a format.
    pub fn new(format: F) -> Self {
        Self {
            format,
            max_frame: 64 * 1024,
            types: PhantomData,
        }
    }

    /// Sets the maximum size of a frame to read or write, in bytes on the wire, including the four
    /// bytes of the prefix.
    ///
    /// Default: 64 KiB. Why: it is the default of the pipeline. When reached: decoding fails as
    /// soon as the length is read, and encoding fails and writes nothing. Every later call to
    /// decode fails, too, because the codec does not skip the frame.
    ///
    /// To allow larger frames in a pipeline, raise
    /// [`Limits::max_frame`](crate::pipeline::Limits::max_frame), too.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Returns a codec whose items are `Result<In, F::Error>`. If a document cannot be read as an
    /// `In`, the error becomes an item, and the connection continues.
    ///
    /// ```
    /// use bytes::BytesMut;
    /// use tokio_util::codec::Decoder;
    /// use tower_tcp::frame::Serde;
    ///
    /// let mut codec = Serde::<bool, bool>::default().recoverable();
    /// let mut wire = BytesMut::from("\0\0\0\x05maybe\0\0\0\x04true");
    /// assert!(codec.decode(&mut wire)?.unwrap().is_err());
    /// assert!(codec.decode(&mut wire)?.unwrap()?);
    /// # Ok::<_, tower_tcp::BoxError>(())
    /// ```
    pub fn recoverable(self) -> RecoverableSerde<In, Out, F> {
        RecoverableSerde(self)
    }
}

impl<In, Out, F> Serde<In, Out, F> {
    /// Returns whether a document of `len` bytes and its prefix are within the limit.
    fn fits(&self, len: usize) -> bool {
        len.saturating_add(PREFIX) <= self.max_frame
    }
}

impl<In: DeserializeOwned, Out, F: Format> Serde<In, Out, F> {
    /// Removes the next document from the buffer and reads it.
    #[inline]
    fn read(&self, src: &mut BytesMut) -> Result<Option<Result<In, F::Error>>, FrameTooLarge> {
        let Some((prefix, behind)) = src.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if !self.fits(len) {
            return Err(FrameTooLarge::new(self.max_frame));
        }
        let Some(document) = behind.get(..len) else {
            return Ok(None);
        };
        let document = self.format.read(document);
        src.advance(PREFIX + len);
        Ok(Some(document))
    }
}

impl<In: DeserializeOwned, Out, F: Format> Decoder for Serde<In, Out, F> {
    type Item = In;
    type Error = SerdeError<F::Error>;

    #[inline]
    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<In>, Self::Error> {
        let document = self.read(src)?;
        document.transpose().map_err(SerdeError::Document)
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<In>, Self::Error> {
        let document = self.decode(src)?;
        at_end(document, src)
    }
}

// `Serde` must implement `Encoder` for one type only. With two, the compiler could not infer the
// type of the value that a service returns.
impl<In, Out: Serialize, F: Format> Encoder<Out> for Serde<In, Out, F> {
    type Error = SerdeError<F::Error>;

    fn encode(&mut self, value: Out, dst: &mut BytesMut) -> Result<(), Self::Error> {
        let start = dst.len();
        dst.put_bytes(0, PREFIX);
        let written = self.format.write(&value, dst.writer());
        let len = dst.len() - start - PREFIX;
        let refused = match (written, u32::try_from(len)) {
            (Ok(()), Ok(prefix)) if self.fits(len) => {
                dst[start..start + PREFIX].copy_from_slice(&prefix.to_be_bytes());
                return Ok(());
            }
            (Ok(()), _) => FrameTooLarge::new(self.max_frame).into(),
            (Err(err), _) => SerdeError::Document(err),
        };
        dst.truncate(start);
        Err(refused)
    }
}

/// A [`Serde`] that returns the errors of unreadable documents as items. See
/// [`Serde::recoverable`].
pub struct RecoverableSerde<In, Out, F = Json>(Serde<In, Out, F>);

impl<In, Out, F: Clone> Clone for RecoverableSerde<In, Out, F> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<In, Out, F: fmt::Debug> fmt::Debug for RecoverableSerde<In, Out, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RecoverableSerde").field(&self.0).finish()
    }
}

impl<In: DeserializeOwned, Out, F: Format> Decoder for RecoverableSerde<In, Out, F> {
    type Item = Result<In, F::Error>;
    type Error = SerdeError<F::Error>;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Self::Item>, Self::Error> {
        Ok(self.0.read(src)?)
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<Self::Item>, Self::Error> {
        let document = self.decode(src)?;
        at_end(document, src)
    }
}

impl<In, Out: Serialize, F: Format> Encoder<Out> for RecoverableSerde<In, Out, F> {
    type Error = SerdeError<F::Error>;

    fn encode(&mut self, value: Out, dst: &mut BytesMut) -> Result<(), Self::Error> {
        self.0.encode(value, dst)
    }
}

/// Returns `document`, or an error if it is `None` because the stream ended within a document.
fn at_end<T, E>(document: Option<T>, src: &BytesMut) -> Result<Option<T>, SerdeError<E>> {
    if document.is_none() && !src.is_empty() {
        return Err(SerdeError::Io(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the stream ended within a document",
        )));
    }
    Ok(document)
}

/// Reads and writes the documents of a [`Serde`] in a format that serde supports.
///
/// ```
/// use std::io::Write;
/// use serde::{Serialize, de::DeserializeOwned};
/// use tower_tcp::frame::{Format, Serde};
///
/// /// JSON with indentation.
/// #[derive(Default)]
/// struct Pretty;
///
/// impl Format for Pretty {
///     type Error = serde_json::Error;
///
///     fn read<T: DeserializeOwned>(&self, document: &[u8]) -> Result<T, Self::Error> {
///         serde_json::from_slice(document)
///     }
///
///     fn write<T: Serialize>(&self, value: &T, to: impl Write) -> Result<(), Self::Error> {
///         serde_json::to_writer_pretty(to, value)
///     }
/// }
///
/// let codec = Serde::<u32, u32, Pretty>::default();
/// # let _ = codec;
/// ```
pub trait Format {
    /// The error for a document that cannot be read or written.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Reads a whole document. If `document` contains other data after the value, the
    /// implementation must return an error, because a peer could hide data there.
    ///
    /// # Errors
    ///
    /// Returns an error if the document is malformed, or is not a `T`.
    fn read<T: DeserializeOwned>(&self, document: &[u8]) -> Result<T, Self::Error>;

    /// Writes a value as a document. The writer `to` never returns an error.
    ///
    /// # Errors
    ///
    /// Returns an error if the value cannot be written in this format.
    fn write<T: Serialize>(&self, value: &T, to: impl io::Write) -> Result<(), Self::Error>;
}

/// JSON, by `serde_json`.
///
/// After a document, `Json` rejects anything but white space. It also rejects a value with 128 or
/// more nested levels (the limit of `serde_json`), so that no peer can exhaust the stack. The limit
/// does not apply to a field that `In` does not have, because skipping its value uses no stack. The
/// depth of values to write is not limited.
#[derive(Clone, Copy, Debug, Default)]
pub struct Json;

impl Format for Json {
    type Error = serde_json::Error;

    fn read<T: DeserializeOwned>(&self, document: &[u8]) -> Result<T, serde_json::Error> {
        serde_json::from_slice(document)
    }

    fn write<T: Serialize>(&self, value: &T, to: impl io::Write) -> Result<(), serde_json::Error> {
        serde_json::to_writer(to, value)
    }
}

/// The error of [`Serde`]. `E` is the error of its [`Format`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SerdeError<E> {
    /// A document and its prefix together were larger than [`max_frame`](Serde::max_frame), or a
    /// document to write was longer than a prefix can state. A write that fails writes no part of
    /// the document.
    #[error("document too large")]
    TooLarge(#[from] FrameTooLarge),
    /// A document could not be read, or a value could not be written. A write that fails writes no
    /// part of the document.
    #[error("cannot read or write a document")]
    Document(#[source] E),
    /// The stream failed, or ended within a document
    /// ([`UnexpectedEof`](io::ErrorKind::UnexpectedEof)).
    #[error("cannot read or write documents")]
    Io(#[from] io::Error),
}
