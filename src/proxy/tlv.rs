//! TLVs (type, length, value): the additional facts in a version 2 header.

use bytes::{Buf, Bytes};

use super::error::ProxyHeaderError as Error;
use super::raw::{HEAD, first, split, text};
use super::ssl::{self, Ssl};

pub(super) const ALPN: u8 = 0x01;
pub(super) const AUTHORITY: u8 = 0x02;
pub(super) const CRC32C: u8 = 0x03;
const NOOP: u8 = 0x04;
pub(super) const UNIQUE_ID: u8 = 0x05;
pub(super) const NETNS: u8 = 0x30;
const AWS: u8 = 0xea;
const AZURE: u8 = 0xee;

const LONGEST_UNIQUE_ID: usize = 128;

/// The TLVs (type-length-value fields) of a [`ProxyHeader`](super::ProxyHeader), in the header's
/// order, without checksum and padding.
///
/// If a type occurs several times, a method that returns one value returns the first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tlvs(pub(super) Vec<(u8, Bytes)>);

impl Tlvs {
    /// Returns the value of the first TLV of this type.
    pub fn get(&self, kind: u8) -> Option<&[u8]> {
        first(&self.0, kind).map(|value| &**value)
    }

    /// Returns an iterator over types and values.
    pub fn iter(&self) -> impl Iterator<Item = (u8, &[u8])> {
        self.0.iter().map(|(kind, value)| (*kind, &**value))
    }

    /// Returns the number of TLVs.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there are no TLVs.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the protocol that the client and the sender of the header have negotiated by ALPN,
    /// such as `h2`.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.get(ALPN)
    }

    /// Returns the host name that the client requested. If the client connected over TLS, this is
    /// the name in the handshake (SNI).
    #[doc(alias = "sni")]
    pub fn authority(&self) -> Option<&str> {
        text(&self.0, AUTHORITY)
    }

    /// Returns the identifier, of at most 128 bytes, that the sender of the header gave to the
    /// connection.
    pub fn unique_id(&self) -> Option<&[u8]> {
        self.get(UNIQUE_ID)
    }

    /// Returns the facts about the client's TLS session.
    #[doc(alias = "tls")]
    pub fn ssl(&self) -> Option<Ssl> {
        first(&self.0, ssl::TYPE).and_then(|value| Ssl::parse(value).ok())
    }

    /// Returns the name of the network namespace to which the client connected.
    pub fn netns(&self) -> Option<&str> {
        text(&self.0, NETNS)
    }

    /// Returns the ID of the VPC endpoint that the client connected through. The load balancers of
    /// AWS send it in type `0xEA`, subtype 1.
    ///
    /// The specification leaves this type to applications, so a value of another form is not an
    /// error. For such a value, the method returns `None`.
    pub fn aws_vpc_endpoint_id(&self) -> Option<&str> {
        match self.get(AWS) {
            Some([1, id @ ..]) => str::from_utf8(id).ok(),
            _ => None,
        }
    }

    /// Returns the link ID of the private endpoint that the client connected through. Azure's
    /// Private Link sends it in type `0xEE`, subtype 1.
    ///
    /// The specification leaves this type to applications, so a value of another form is not an
    /// error. For such a value, the method returns `None`.
    pub fn azure_link_id(&self) -> Option<u32> {
        match *self.get(AZURE)? {
            [1, a, b, c, d] => Some(u32::from_le_bytes([a, b, c, d])),
            _ => None,
        }
    }
}

/// The index of the checksum in the TLVs' bytes, and the checksum.
pub(super) type Checksum = (usize, u32);

/// Parses and checks all TLVs of a header.
pub(super) fn parse(block: &Bytes) -> Result<(Tlvs, Option<Checksum>), Error> {
    let mut tlvs = split(block)?;
    let mut checksum = None;
    let mut at = 0;
    for (kind, value) in &tlvs {
        check(*kind, value)?;
        at += HEAD + value.len();
        if *kind == CRC32C {
            let expected = value
                .clone()
                .try_get_u32()
                .map_err(|_| Error::Tlv(CRC32C))?;
            // When the checksum is computed, its own bytes count as zero. With two checksums it
            // would be unclear which bytes count as zero.
            if checksum.replace((at - value.len(), expected)).is_some() {
                return Err(Error::Tlv(CRC32C));
            }
        }
    }
    tlvs.retain(|(kind, _)| !matches!(*kind, CRC32C | NOOP));
    Ok((Tlvs(tlvs), checksum))
}

/// Checks that a value has the form that the specification requires for its type.
pub(super) fn check(kind: u8, value: &Bytes) -> Result<(), Error> {
    let is_valid = match kind {
        AUTHORITY => str::from_utf8(value).is_ok(),
        CRC32C => value.len() == 4,
        UNIQUE_ID => value.len() <= LONGEST_UNIQUE_ID,
        ssl::TYPE => return Ssl::parse(value).map(drop),
        NETNS => value.is_ascii(),
        _ => true,
    };
    is_valid.then_some(()).ok_or(Error::Tlv(kind))
}
