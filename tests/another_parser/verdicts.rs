//! Another parser of PROXY headers, the crate `proxy-header`, has the same verdicts.
//! `PROPTEST_CASES` sets the number of random headers.

#[path = "../proxy/bent.rs"]
mod bent;
#[expect(dead_code, reason = "the other parser has the verdicts")]
#[path = "../proxy/vectors.rs"]
mod vectors;

use proptest::prelude::*;
use tower_tcp::Address;
use tower_tcp::proxy::{Command, Family, ProxyHeader, ProxyHeaderError as Error};

use bent::almost_a_header;

proptest! {
    #[test]
    fn another_parser_has_the_same_verdict(bytes in almost_a_header()) {
        compare(&bytes).map_err(TestCaseError::fail)?;
    }
}

#[test]
fn another_parser_has_the_same_verdict_on_each_vector() {
    for vector in vectors::all() {
        if let Err(difference) = compare(&vector.bytes) {
            panic!("{} (section {}): {difference}", vector.name, vector.section);
        }
    }
}

/// Compares our verdict with that of the crate `proxy-header`, except for known differences.
fn compare(bytes: &[u8]) -> Result<(), String> {
    let ours = ProxyHeader::parse(bytes);
    let theirs = proxy_header::ProxyHeader::parse(bytes, proxy_header::ParseConfig::default());
    let same = match (&ours, &theirs) {
        (Ok(Some((ours, len))), Ok((theirs, their_len))) => {
            let of_tcp = theirs.proxied_address().filter(|proxied| {
                // `proxy-header` returns the addresses of UDP, too.
                proxied.protocol == proxy_header::Protocol::Stream
            });
            let theirs = of_tcp.map(|proxied| {
                let (source, destination) = (proxied.source, proxied.destination);
                // `proxy-header` keeps IPv4-mapped addresses as they are.
                (Address::from(source), Address::from(destination))
            });
            let ours = ours.source().cloned().zip(ours.destination().cloned());
            let ours = ours.filter(|(source, _)| source.tcp().is_some());
            len == their_len && ours == theirs
        }
        (Ok(Some((header, _))), Err(_)) => {
            // `proxy-header` refuses a LOCAL header with an unknown family, or with a block too
            // short for its family. Both must be ignored there. It also refuses a header that
            // specifies only the family or only the protocol.
            header.command() == Command::Local || header.family() == Family::Unspecified
        }
        // `proxy-header` decodes an address of version 1 before the whole line has arrived.
        (Ok(None), Err(_)) | (Err(_), Err(_)) => true,
        (Ok(None), Ok(_)) => false,
        (Err(err), Ok((theirs, _))) => match err {
            // `proxy-header` decodes TLVs only on request, and leaves the checksum to its caller.
            // It accepts a sign and leading zeros in front of a port.
            Error::Tlv(_) | Error::Checksum | Error::Port => true,
            // `proxy-header` accepts any sixth byte in place of the space. It accepts a line of any
            // length that begins with UNKNOWN, even if more letters or a line feed follow.
            Error::Absent | Error::Family | Error::Line | Error::TooLong(_) => {
                bytes.starts_with(b"PROXY") && theirs.proxied_address().is_none()
                    || err == &Error::Absent && bytes.starts_with(b"PROXY")
            }
            _ => false,
        },
    };
    if same {
        return Ok(());
    }
    Err(format!(
        "{:?}: {ours:?}, and {theirs:?} by proxy-header",
        bytes.escape_ascii().to_string()
    ))
}
