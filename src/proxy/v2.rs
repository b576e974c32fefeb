//! The header of version 2: binary.

use std::ffi::OsStr;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use bytes::{Buf, Bytes};
use crc::{CRC_32_ISCSI, Crc};

use super::error::ProxyHeaderError as Error;
use super::header::{Command, Family, Parsed, ProxyHeader};
use super::tlv;
use crate::connection::Address;

pub(super) const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The length, in bytes, of the fixed part, which every header has.
pub(super) const FIXED: usize = 16;
/// The length, in bytes, of the longest header that the length field allows.
pub(super) const LONGEST: usize = FIXED + u16::MAX as usize;
/// The size, in bytes, of the field for the path of a Unix socket.
pub(super) const UNIX_PATH: usize = 108;

static CRC_32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// Parses a header, or the beginning of one. `bytes` must begin with [`SIGNATURE`]. If `bytes` is
/// shorter than that, it must be the beginning of [`SIGNATURE`]. The fixed part is checked as its
/// bytes arrive.
pub(super) fn parse(bytes: &[u8], max_len: usize) -> Result<Parsed, Error> {
    let command = match bytes.get(12).map(|byte| (byte >> 4, byte & 0xf)) {
        None => Command::Proxy, // The byte has not arrived yet.
        Some((2, 0)) => Command::Local,
        Some((2, 1)) => Command::Proxy,
        Some((2, _)) => return Err(Error::Command),
        Some(_) => return Err(Error::Version),
    };
    let form = match bytes.get(13) {
        // The specification says to ignore the family of a `LOCAL` header.
        Some(byte) if command == Command::Proxy => Form::of(*byte)?,
        _ => Form::Opaque,
    };
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED>() else {
        return Ok(Parsed::Incomplete { at_least: FIXED });
    };
    let block_len = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    let len = FIXED + block_len;
    if len > max_len {
        return Err(Error::TooLong(max_len));
    }
    if block_len < form.addresses_len() {
        return Err(Error::Length);
    }
    let Some(block) = rest.get(..block_len) else {
        return Ok(Parsed::Incomplete { at_least: len });
    };
    Ok(Parsed::Complete(decode(command, form, fixed, block)?, len))
}

/// The form of the bytes after the fixed part.
#[derive(Clone, Copy)]
enum Form {
    /// Addresses of this family, and TLVs.
    Of(Family),
    /// Bytes to skip. A `LOCAL` header has such bytes. So does a header that specifies only the
    /// family or only the protocol, because then the length of the addresses is unknown.
    Opaque,
}

impl Form {
    fn of(byte: u8) -> Result<Self, Error> {
        Ok(match byte {
            0x00 => Self::Of(Family::Unspecified),
            0x11 => Self::Of(Family::Tcp4),
            0x12 => Self::Of(Family::Udp4),
            0x21 => Self::Of(Family::Tcp6),
            0x22 => Self::Of(Family::Udp6),
            0x31 => Self::Of(Family::UnixStream),
            0x32 => Self::Of(Family::UnixDatagram),
            0x01 | 0x02 | 0x10 | 0x20 | 0x30 => Self::Opaque,
            _ => return Err(Error::Family),
        })
    }

    fn addresses_len(self) -> usize {
        match self {
            Self::Opaque | Self::Of(Family::Unspecified) => 0,
            Self::Of(Family::Tcp4 | Family::Udp4) => 2 * (4 + 2),
            Self::Of(Family::Tcp6 | Family::Udp6) => 2 * (16 + 2),
            Self::Of(Family::UnixStream | Family::UnixDatagram) => 2 * UNIX_PATH,
        }
    }
}

fn decode(
    command: Command,
    form: Form,
    fixed: &[u8; FIXED],
    block: &[u8],
) -> Result<ProxyHeader, Error> {
    let Form::Of(family) = form else {
        return Ok(ProxyHeader::bare(command, Family::Unspecified));
    };
    let (addresses, facts) = block
        .split_at_checked(form.addresses_len())
        .ok_or(Error::Length)?;
    let (tlvs, checksum) = tlv::parse(&Bytes::copy_from_slice(facts))?;
    if let Some((at, expected)) = checksum {
        let (before, behind) = (&facts[..at], &facts[at + 4..]);
        if crc_32c([fixed, addresses, before, &[0; 4], behind]) != expected {
            return Err(Error::Checksum);
        }
    }
    Ok(ProxyHeader {
        addresses: decode_addresses(family, addresses),
        tlvs,
        checksum: checksum.is_some(),
        ..ProxyHeader::bare(command, family)
    })
}

/// Returns the checksum of a header that is passed in parts.
pub(super) fn crc_32c<const N: usize>(parts: [&[u8]; N]) -> u32 {
    let mut digest = CRC_32C.digest();
    for part in parts {
        digest.update(part);
    }
    digest.finalize()
}

/// Decodes the addresses of stream sockets. Returns `None` for an unspecified family, and for
/// datagram sockets, because their addresses cannot be those of this connection's client.
fn decode_addresses(family: Family, mut block: &[u8]) -> Option<(Address, Address)> {
    let (source, destination) = match family {
        Family::Tcp4 => {
            let source = Ipv4Addr::from(block.try_get_u32().ok()?);
            let destination = Ipv4Addr::from(block.try_get_u32().ok()?);
            (source.into(), destination.into())
        }
        Family::Tcp6 => {
            let source = Ipv6Addr::from(block.try_get_u128().ok()?);
            let destination = Ipv6Addr::from(block.try_get_u128().ok()?);
            (source.into(), destination.into())
        }
        Family::UnixStream => {
            let (source, destination) = block.split_at_checked(UNIX_PATH)?;
            return Some((unix(source), unix(destination)));
        }
        _ => return None,
    };
    let source = SocketAddr::new(source, block.try_get_u16().ok()?);
    let destination = SocketAddr::new(destination, block.try_get_u16().ok()?);
    Some((source.into(), destination.into()))
}

/// Decodes the field for the path of a Unix socket. The path ends with a zero byte or fills the
/// field. So does an abstract name, which follows a zero byte, and gets the prefix `@`.
fn unix(field: &[u8]) -> Address {
    let mut parts = field.split(|byte| *byte == 0);
    let mut next = || parts.next().filter(|part| !part.is_empty());
    let path = |path: &[u8]| Path::new(OsStr::from_bytes(path)).into();
    Address::Unix(match next() {
        Some(part) => Some(path(part)),
        None => next().map(|name| path(&[b"@", name].concat())),
    })
}
