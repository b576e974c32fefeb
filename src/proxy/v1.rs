//! The header of version 1: a line of text.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use memchr::memchr2;

use super::error::ProxyHeaderError as Error;
use super::header::{Command, Family, Parsed, ProxyHeader};
use crate::connection::Address;

pub(super) const PREFIX: &[u8] = b"PROXY ";
/// The length, in bytes, of the longest line, including its CRLF.
pub(super) const LONGEST: usize = 107;

/// Parses a header, or the beginning of one. `bytes` begins with [`PREFIX`], or is the beginning of
/// [`PREFIX`] if `bytes` is shorter.
pub(super) fn parse(bytes: &[u8]) -> Result<Parsed, Error> {
    let begins_with = |prefix: &[u8]| bytes.iter().zip(prefix).all(|(a, b)| a == b);
    let families: [&[u8]; 3] = [b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN"];
    if !families.into_iter().any(begins_with) {
        return Err(Error::Family);
    }
    let line = &bytes[..bytes.len().min(LONGEST)];
    // A line that ends with CR or LF alone is refused. If the search went on for a CRLF, the
    // client's first line would count as the rest of an `UNKNOWN` header.
    let at = match memchr2(b'\r', b'\n', line) {
        Some(at) => at,
        None if line.len() < LONGEST => {
            let at_least = line.len() + 1;
            return Ok(Parsed::Incomplete { at_least });
        }
        None => return Err(Error::TooLong(LONGEST)),
    };
    match line[at..] {
        [b'\r', b'\n', ..] => Ok(Parsed::Complete(decode(&line[..at])?, at + 2)),
        [b'\r'] if at + 1 < LONGEST => Ok(Parsed::Incomplete { at_least: at + 2 }),
        [b'\r'] => Err(Error::TooLong(LONGEST)),
        _ => Err(Error::Line),
    }
}

/// Decodes a line without its CRLF.
fn decode(line: &[u8]) -> Result<ProxyHeader, Error> {
    let mut fields = line[PREFIX.len()..].split(|byte| *byte == b' ');
    let family = match fields.next() {
        Some(b"TCP4") => Family::Tcp4,
        Some(b"TCP6") => Family::Tcp6,
        // The specification says to ignore the rest of the line.
        Some(b"UNKNOWN") => return Ok(ProxyHeader::bare(Command::Proxy, Family::Unspecified)),
        _ => return Err(Error::Family),
    };
    let mut next = || fields.next().ok_or(Error::Line);
    let (source, destination) = (next()?, next()?);
    let (source_port, destination_port) = (next()?, next()?);
    if next().is_ok() {
        return Err(Error::Line);
    }
    let source = SocketAddr::new(ip(family, source)?, port(source_port)?);
    let destination = SocketAddr::new(ip(family, destination)?, port(destination_port)?);
    Ok(ProxyHeader {
        addresses: Some((Address::from(source), Address::from(destination))),
        ..ProxyHeader::bare(Command::Proxy, family)
    })
}

fn ip(family: Family, field: &[u8]) -> Result<IpAddr, Error> {
    let text = str::from_utf8(field).map_err(|_no_text| Error::Address)?;
    let ip = match family {
        Family::Tcp4 => text.parse::<Ipv4Addr>().map(IpAddr::from),
        _ => text.parse::<Ipv6Addr>().map(IpAddr::from),
    };
    ip.map_err(|_malformed| Error::Address)
}

fn port(field: &[u8]) -> Result<u16, Error> {
    // The parser of the standard library also accepts a sign and leading zeros.
    let is_plain = match field {
        [b'0'] => true,
        [b'1'..=b'9', rest @ ..] => rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    let text = str::from_utf8(field).ok().filter(|_| is_plain);
    text.and_then(|text| text.parse().ok()).ok_or(Error::Port)
}
