//! Parses PROXY headers of both versions.

use super::error::ProxyHeaderError;
use super::header::{Parsed, ProxyHeader, Versions};
use super::{v1, v2};

impl ProxyHeader {
    /// Parses a header at the beginning of `bytes`. Returns the header and its length in bytes, or
    /// `None` if more bytes are needed.
    ///
    /// After `None`, call this function again each time more bytes have arrived. Pass all bytes
    /// received so far. Later bytes never change an error or a header that was returned. A version
    /// 1 header has at most 107 bytes, and a version 2 header at most 65,551.
    ///
    /// # Errors
    ///
    /// Returns a [`ProxyHeaderError`] if the bytes are not the beginning of a valid header. Some
    /// errors are found only when the whole header has arrived.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, ProxyHeaderError> {
        match parse(bytes, Versions::Both, v2::LONGEST)? {
            Parsed::Complete(header, len) => Ok(Some((header, len))),
            Parsed::Incomplete { .. } => Ok(None),
        }
    }
}

/// Parses a header of one of the accepted versions. A version 2 header may have at most `max_len`
/// bytes.
pub(super) fn parse(
    bytes: &[u8],
    versions: Versions,
    max_len: usize,
) -> Result<Parsed, ProxyHeaderError> {
    let Some(first) = bytes.first() else {
        return Ok(Parsed::Incomplete { at_least: 1 });
    };
    let is_v1 = *first == v1::PREFIX[0];
    let (prefix, refused) = if is_v1 {
        (v1::PREFIX, Versions::V2)
    } else {
        (&v2::SIGNATURE[..], Versions::V1)
    };
    if bytes.iter().zip(prefix).any(|(a, b)| a != b) {
        return Err(ProxyHeaderError::Absent);
    }
    if bytes.len() >= prefix.len() && versions == refused {
        return Err(ProxyHeaderError::Version);
    }
    if is_v1 {
        v1::parse(bytes)
    } else {
        v2::parse(bytes, max_len)
    }
}
