//! Properties of the parser, for random bytes and headers. `PROPTEST_CASES` sets the number of
//! cases.

use std::net::SocketAddr;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use tower_tcp::Address;
use tower_tcp::proxy::{Command, Family, ProxyHeader, ProxyHeaderError as Error, Ssl};

use crate::vectors;

/// The beginning of any header, or of none, of vectors that are bent in a few places.
fn almost_a_header() -> impl Strategy<Value = Vec<u8>> {
    let vectors: Vec<_> = vectors::all()
        .into_iter()
        .map(|vector| vector.bytes)
        .collect();
    let short: Vec<_> = vectors
        .into_iter()
        .filter(|bytes| bytes.len() < 1000)
        .collect();
    let often = || prop::sample::select(&b"\r\n 0159:.+-PXTCUN46\0\x01\x03\x11\x20\x21"[..]);
    let byte = prop_oneof![any::<u8>(), often()];
    let bend = (0..3_u8, any::<Index>(), byte);
    let behind = vec(any::<u8>(), 0..20);
    (prop::sample::select(short), vec(bend, 0..4), behind).prop_map(|(mut bytes, bends, behind)| {
        for (how, at, byte) in bends {
            let at = at.index(bytes.len() + 1);
            match how {
                0 => bytes.insert(at, byte),
                1 if at < bytes.len() => bytes[at] = byte,
                _ => bytes.truncate(at),
            }
        }
        bytes.extend(behind);
        bytes
    })
}

fn addresses() -> impl Strategy<Value = (Address, Address)> {
    let tcp = || any::<SocketAddr>().prop_map(Address::from);
    let path = vec(1..=u8::MAX, 0..=108).prop_map(|path| {
        use std::os::unix::ffi::OsStringExt;
        let path = std::path::PathBuf::from(std::ffi::OsString::from_vec(path));
        Address::Unix((!path.as_os_str().is_empty()).then(|| path.into()))
    });
    let paths = (path.clone(), path);
    prop_oneof![
        4 => (tcp(), tcp()),
        2 => paths,
        1 => Just((Address::Memory(1), Address::Memory(2))),
    ]
}

fn any_header() -> impl Strategy<Value = ProxyHeader> {
    let header = prop_oneof![
        1 => Just(ProxyHeader::local()),
        6 => addresses().prop_map(|(from, to)| ProxyHeader::proxied(from, to)),
    ];
    let of_any_type = vec((0x80..=u8::MAX, vec(any::<u8>(), 0..40)), 0..4);
    (header, of_any_type, 0..8_u8, any::<bool>()).prop_map(|(mut header, tlvs, known, checksum)| {
        if header.command() == Command::Local {
            return header; // What is behind it is skipped.
        }
        if known & 1 != 0 {
            header = header.with_alpn("h2").with_netns("blue");
        }
        if known & 2 != 0 {
            header = header
                .with_authority("b\u{fc}cher.example")
                .with_unique_id(vec![0xff; 128]);
        }
        if known & 4 != 0 {
            let ssl = Ssl::new()
                .with_version("TLSv1.3")
                .with_certificate_verified("名");
            header = header.with_ssl(&ssl.with_cipher("AES").with_fact(0x2f, vec![0xff]));
        }
        for (kind, value) in tlvs {
            header = header.with_tlv(kind, value);
        }
        if checksum {
            header.with_checksum()
        } else {
            header
        }
    })
}

proptest! {
    #[test]
    fn no_bytes_panic_and_more_of_them_do_not_change_a_verdict(bytes in almost_a_header()) {
        let mut verdict = None;
        for cut in 0..=bytes.len() {
            let parsed = ProxyHeader::parse(&bytes[..cut]);
            if let Some(before) = &verdict {
                prop_assert_eq!(&parsed, before);
            } else if parsed != Ok(None) {
                if let Ok(Some((_, len))) = &parsed {
                    prop_assert_eq!(*len, cut);
                }
                verdict = Some(parsed);
            }
        }
    }

    #[test]
    fn bytes_that_are_no_header_at_all_do_not_panic(bytes in vec(any::<u8>(), 0..300)) {
        let _any_verdict = ProxyHeader::parse(&bytes);
    }

    #[test]
    fn a_header_that_is_written_is_the_header_that_is_read(header in any_header()) {
        let bytes = header.encode_v2().expect("a valid header");
        prop_assert_eq!(ProxyHeader::parse(&bytes), Ok(Some((header.clone(), bytes.len()))));
        if let Ok(line) = header.encode_v1() {
            prop_assert!(line.len() <= 107);
            prop_assert_eq!(ProxyHeader::parse(&line), Ok(Some((header, line.len()))));
        }
    }

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

/// Compares with the crate `proxy-header`, apart from what it is known to do otherwise.
fn compare(bytes: &[u8]) -> Result<(), String> {
    let ours = ProxyHeader::parse(bytes);
    let theirs = proxy_header::ProxyHeader::parse(bytes, proxy_header::ParseConfig::default());
    let same = match (&ours, &theirs) {
        (Ok(Some((ours, len))), Ok((theirs, their_len))) => {
            let of_tcp = theirs.proxied_address().filter(|proxied| {
                // It returns the addresses of UDP, too.
                proxied.protocol == proxy_header::Protocol::Stream
            });
            let theirs = of_tcp.map(|proxied| {
                let (source, destination) = (proxied.source, proxied.destination);
                // It keeps IPv4-mapped addresses as they are.
                (Address::from(source), Address::from(destination))
            });
            let ours = ours.source().cloned().zip(ours.destination().cloned());
            let ours = ours.filter(|(source, _)| source.tcp().is_some());
            len == their_len && ours == theirs
        }
        (Ok(Some((header, _))), Err(_)) => {
            // It refuses LOCAL of an unknown family, or too short for its family, which is to be
            // ignored; and an unspecified family or protocol whose other half is specified.
            header.command() == Command::Local || header.family() == Family::Unspecified
        }
        // It decodes an address of version 1 before the whole line has arrived.
        (Ok(None), Err(_)) | (Err(_), Err(_)) => true,
        (Ok(None), Ok(_)) => false,
        (Err(err), Ok((theirs, _))) => match err {
            // It decodes TLVs only when asked for, and leaves the checksum to its caller. It takes
            // a sign and leading zeros in front of a port.
            Error::Tlv(_) | Error::Checksum | Error::Port => true,
            // It takes any sixth byte for the space, and UNKNOWN of any length, with more letters,
            // and with a line feed in it.
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
