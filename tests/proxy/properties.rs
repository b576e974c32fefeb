//! Properties of the parser, for random bytes and headers. `PROPTEST_CASES` sets the number of
//! cases.

use std::net::SocketAddr;

use proptest::collection::vec;
use proptest::prelude::*;
use tower_tcp::Address;
use tower_tcp::proxy::{Command, ProxyHeader, Ssl};

use crate::bent::almost_a_header;

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
}
