//! TLVs as bytes: type, length, value.

use bytes::{Buf, Bytes};

use super::error::ProxyHeaderError as Error;

/// The number of bytes of a TLV's type and length.
pub(super) const HEAD: usize = 3;

/// Splits bytes into TLVs. Fails if the last TLV is incomplete.
pub(super) fn split(block: &Bytes) -> Result<Vec<(u8, Bytes)>, Error> {
    let mut rest = block.clone();
    let mut tlvs = Vec::new();
    while let Some(kind) = rest.first().copied() {
        let malformed = Error::Tlv(kind);
        rest.advance(1);
        let len = usize::from(rest.try_get_u16().map_err(|_short| malformed)?);
        if rest.len() < len {
            return Err(malformed);
        }
        tlvs.push((kind, rest.split_to(len)));
    }
    Ok(tlvs)
}

/// Returns the value of the first TLV of type `kind`.
pub(super) fn first(tlvs: &[(u8, Bytes)], kind: u8) -> Option<&Bytes> {
    tlvs.iter().find(|tlv| tlv.0 == kind).map(|tlv| &tlv.1)
}

/// Returns the value of the first TLV of type `kind`, if the value is UTF-8.
pub(super) fn text(tlvs: &[(u8, Bytes)], kind: u8) -> Option<&str> {
    first(tlvs, kind).and_then(|value| str::from_utf8(value).ok())
}
