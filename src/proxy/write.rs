//! Encodes headers as bytes to send.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;

use bytes::{BufMut, Bytes, BytesMut};

use super::error::ProxyEncodeError as Error;
use super::header::{Command, Family, ProxyHeader};
use super::{tlv, v2};
use crate::connection::Address;

impl ProxyHeader {
    /// Encodes the header in version 1, a line of text.
    ///
    /// If the family is [`Unspecified`](Family::Unspecified), the line contains `UNKNOWN` instead
    /// of addresses.
    ///
    /// # Errors
    ///
    /// Returns a [`ProxyEncodeError`](Error) if version 1 cannot express the header because of a
    /// `LOCAL` command, a family of UDP or Unix sockets, TLVs, or a checksum. A health check uses
    /// `LOCAL` in version 2. In version 1, the specification recommends a header with the addresses
    /// of the health check's own connection.
    pub fn encode_v1(&self) -> Result<Bytes, Error> {
        if self.command == Command::Local {
            return Err(Error::LocalInV1);
        }
        if !self.tlvs.is_empty() || self.checksum {
            return Err(Error::TlvsInV1);
        }
        let line = match (self.family, self.tcp()) {
            (Family::Unspecified, _) => "PROXY UNKNOWN\r\n".to_owned(),
            (Family::Tcp4, Some((from, to))) => {
                let (source, destination) = (from.ip(), to.ip());
                let (from, to) = (from.port(), to.port());
                format!("PROXY TCP4 {source} {destination} {from} {to}\r\n")
            }
            (Family::Tcp6, Some((from, to))) => {
                let (source, destination) = (hex(v6(from)), hex(v6(to)));
                let (from, to) = (from.port(), to.port());
                format!("PROXY TCP6 {source} {destination} {from} {to}\r\n")
            }
            _ => return Err(Error::FamilyInV1),
        };
        Ok(line.into())
    }

    /// Encodes the header in version 2, which is binary.
    ///
    /// # Errors
    ///
    /// Returns a [`ProxyEncodeError`](Error) if the path of a Unix socket is too long or contains a
    /// zero byte, if the whole header is too long, if a TLV is not valid, or if the header was
    /// received and its family is that of a datagram socket (UDP or Unix), because the addresses of
    /// such a header are not kept.
    pub fn encode_v2(&self) -> Result<Bytes, Error> {
        let mut header = BytesMut::with_capacity(v2::FIXED + 36);
        header.put_slice(v2::SIGNATURE);
        header.put_u8(match self.command {
            Command::Local => 0x20,
            Command::Proxy => 0x21,
        });
        header.put_u8(match self.family {
            Family::Unspecified => 0x00,
            Family::Tcp4 => 0x11,
            Family::Tcp6 => 0x21,
            Family::UnixStream => 0x31,
            Family::Udp4 | Family::Udp6 | Family::UnixDatagram => return Err(Error::Datagram),
        });
        header.put_u16(0); // the length, below
        self.put_addresses(&mut header)?;
        for (kind, value) in &self.tlvs.0 {
            if *kind == tlv::CRC32C || tlv::check(*kind, value).is_err() {
                return Err(Error::Tlv(*kind));
            }
            put_tlv(&mut header, *kind, value)?;
        }
        if self.checksum {
            put_tlv(&mut header, tlv::CRC32C, &[0; 4])?;
        }
        let len = u16::try_from(header.len() - v2::FIXED).map_err(|_long| Error::TooLong)?;
        header[14..v2::FIXED].copy_from_slice(&len.to_be_bytes());
        if self.checksum {
            let checksum = v2::crc_32c([&header]).to_be_bytes();
            let at = header.len() - checksum.len();
            header[at..].copy_from_slice(&checksum);
        }
        Ok(header.freeze())
    }

    fn tcp(&self) -> Option<(SocketAddr, SocketAddr)> {
        Some((self.source()?.tcp()?, self.destination()?.tcp()?))
    }

    fn put_addresses(&self, header: &mut BytesMut) -> Result<(), Error> {
        for address in [self.source(), self.destination()].into_iter().flatten() {
            match address {
                Address::Tcp(addr) if self.family == Family::Tcp6 => {
                    header.put_slice(&v6(*addr).octets());
                }
                Address::Tcp(addr) => match addr.ip() {
                    IpAddr::V4(ip) => header.put_slice(&ip.octets()),
                    IpAddr::V6(ip) => header.put_slice(&ip.octets()),
                },
                Address::Unix(path) => {
                    let path = path.as_ref().map(|path| path.as_os_str().as_bytes());
                    let path = path.unwrap_or_default();
                    if path.contains(&0) {
                        return Err(Error::Path);
                    }
                    let room = v2::UNIX_PATH.checked_sub(path.len()).ok_or(Error::Path)?;
                    match path {
                        // An abstract name. `Address` shows its first byte, which is zero, as `@`.
                        [b'@', name @ ..] if !name.is_empty() => {
                            header.put_u8(0);
                            header.put_slice(name);
                        }
                        path => header.put_slice(path),
                    }
                    header.put_bytes(0, room);
                }
                Address::Memory(_) => {}
            }
        }
        if let Some((source, destination)) = self.tcp() {
            header.put_u16(source.port());
            header.put_u16(destination.port());
        }
        Ok(())
    }
}

/// Returns the IP address for a header of the family TCP over IPv6. An IPv4 address becomes an
/// IPv4-mapped one.
fn v6(addr: SocketAddr) -> Ipv6Addr {
    match addr.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// Formats an IPv6 address. An IPv4-mapped address is written in hexadecimal only, because the
/// specification mentions no other form.
fn hex(ip: Ipv6Addr) -> String {
    match ip.segments() {
        [0, 0, 0, 0, 0, 0xffff, a, b] => format!("::ffff:{a:x}:{b:x}"),
        _ => ip.to_string(),
    }
}

fn put_tlv(header: &mut BytesMut, kind: u8, value: &[u8]) -> Result<(), Error> {
    let len = u16::try_from(value.len()).map_err(|_long| Error::TooLong)?;
    header.put_u8(kind);
    header.put_u16(len);
    header.put_slice(value);
    Ok(())
}
