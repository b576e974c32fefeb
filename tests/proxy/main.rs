//! A trusted proxy's header gives the client's address, in pieces of any size, and no other bytes
//! do. A header that the crate writes is one that it reads.

use tower_tcp::Address;
use tower_tcp::proxy::{Command, Family, ProxyEncodeError, ProxyHeader, ProxyHeaderError, Ssl};

mod bent;
mod hook;
mod properties;
mod vectors;

use vectors::{Vector, Verdict, tcp4, tlv, v2};

fn addr(text: &str) -> std::net::SocketAddr {
    text.parse().expect("an address")
}

/// Panics unless this is the verdict on a vector.
fn judge(vector: &Vector, parsed: Result<Option<(ProxyHeader, usize)>, ProxyHeaderError>) {
    let Vector {
        section,
        name,
        bytes,
        verdict,
    } = vector;
    let what = format!("{name} (section {section})");
    let (header, len) = match (verdict, parsed) {
        (Verdict::Refused(expected), Err(err)) => {
            assert_eq!(err, *expected, "{what}");
            return;
        }
        (_, Ok(Some(parsed))) => parsed,
        (_, other) => panic!("{what}: {other:?} instead of {verdict:?}"),
    };
    assert_eq!(len, bytes.len(), "{what}");
    match *verdict {
        Verdict::Client(source, destination) => {
            let tcp = |text: &str| Address::Tcp(text.parse().expect("an address"));
            assert_eq!(header.command(), Command::Proxy, "{what}");
            assert_eq!(header.source(), Some(&tcp(source)), "{what}");
            assert_eq!(header.destination(), Some(&tcp(destination)), "{what}");
        }
        Verdict::Own(command, family) => {
            assert_eq!(
                (header.command(), header.family()),
                (command, family),
                "{what}"
            );
            let tcp = header.source().and_then(Address::tcp);
            assert_eq!(tcp, None, "{what}");
        }
        Verdict::Refused(_) => panic!("{what}: {header:?} instead of {verdict:?}"),
    }
}

#[test]
fn each_vector_of_the_specification_gets_its_verdict() {
    let vectors = vectors::all();
    assert!(vectors.len() >= 60);
    for vector in &vectors {
        judge(vector, ProxyHeader::parse(&vector.bytes));
    }
}

#[test]
fn bytes_behind_a_header_are_not_part_of_it() {
    for mut vector in vectors::all() {
        let header = vector.bytes.clone();
        for behind in [&b"\r\n"[..], b"PROXY UNKNOWN\r\n", b"\0", &[0xff; 300]] {
            vector.bytes = header.clone();
            let parsed = ProxyHeader::parse(&[&header, behind].concat());
            judge(&vector, parsed);
        }
    }
}

#[test]
fn a_header_cut_at_any_byte_is_incomplete_until_its_verdict_is_certain() {
    for vector in vectors::all() {
        let mut verdict = None;
        for cut in 0..=vector.bytes.len() {
            let parsed = ProxyHeader::parse(&vector.bytes[..cut]);
            match (&verdict, &parsed) {
                (None, Ok(None)) => {}
                (None, _) => verdict = Some(parsed),
                (Some(before), _) => assert_eq!(&parsed, before, "{} at {cut}", vector.name),
            }
        }
        judge(&vector, verdict.expect("the whole header has a verdict"));
    }
}

#[test]
fn each_tlv_is_a_typed_fact() {
    let ssl = [
        tlv(0x21, b"TLSv1.3"),
        tlv(0x22, b"alice"),
        tlv(0x23, b"TLS_AES_256_GCM_SHA384"),
        tlv(0x24, b"RSA-SHA256"),
        tlv(0x25, b"RSA2048"),
    ];
    let bytes = tcp4(&[
        &tlv(0x01, b"h2"),
        &tlv(0x02, b"a.test"),
        &tlv(0x02, b"another"),
        &tlv(0x04, b"padding"),
        &tlv(0x05, b"\x01\xff"),
        &tlv(0x20, &[&[0x07, 0, 0, 0, 0], &ssl.concat()[..]].concat()),
        &tlv(0x30, b"blue"),
        &tlv(0xea, b"\x01vpce-08d2bf15fac5001c9"),
        &tlv(0xee, &[1, 0x78, 0x56, 0x34, 0x12]),
        &tlv(0xe1, b"mine"),
    ]);
    let (header, _) = ProxyHeader::parse(&bytes)
        .expect("valid")
        .expect("complete");
    let tlvs = header.tlvs();
    assert_eq!(tlvs.alpn(), Some(&b"h2"[..]));
    assert_eq!(tlvs.authority(), Some("a.test"));
    assert_eq!(tlvs.unique_id(), Some(&[1, 0xff][..]));
    assert_eq!(tlvs.netns(), Some("blue"));
    assert_eq!(tlvs.aws_vpc_endpoint_id(), Some("vpce-08d2bf15fac5001c9"));
    assert_eq!(tlvs.azure_link_id(), Some(0x1234_5678));
    assert_eq!(tlvs.get(0xe1), Some(&b"mine"[..]));
    assert_eq!((tlvs.get(0xe2), tlvs.get(0x04)), (None, None));
    assert_eq!((tlvs.len(), tlvs.is_empty()), (9, false));
    let kinds: Vec<_> = tlvs.iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, [1, 2, 2, 5, 0x20, 0x30, 0xea, 0xee, 0xe1]);

    let ssl = tlvs.ssl().expect("SSL");
    assert!(ssl.is_tls() && ssl.has_certificate() && ssl.has_session_certificate());
    assert!(ssl.is_certificate_verified());
    assert_eq!(ssl.version(), Some("TLSv1.3"));
    assert_eq!(ssl.common_name(), Some("alice"));
    assert_eq!(ssl.cipher(), Some("TLS_AES_256_GCM_SHA384"));
    assert_eq!(ssl.signature_algorithm(), Some("RSA-SHA256"));
    assert_eq!(ssl.key_algorithm(), Some("RSA2048"));
    assert_eq!(
        (ssl.get(0x21), ssl.get(0x26)),
        (Some(&b"TLSv1.3"[..]), None)
    );
}

#[test]
fn a_certificate_is_verified_only_if_there_was_one() {
    for (client, verify, verified) in [
        (0x01, 0, false), // as HAProxy sends it without a certificate
        (0x01, 1, false),
        (0x03, 0, true),
        (0x05, 0, true),
        (0x07, 0, true),
        (0x07, 1, false),
        (0x07, 0x0100_0000, false),
    ] {
        let verify: u32 = verify;
        let value = [&[client][..], &verify.to_be_bytes()].concat();
        let (header, _) = ProxyHeader::parse(&tcp4(&[&tlv(0x20, &value)]))
            .expect("valid")
            .expect("complete");
        let ssl = header.tlvs().ssl().expect("SSL");
        assert_eq!(ssl.is_certificate_verified(), verified, "{client} {verify}");
        assert_eq!(ssl.verify_result(), verify);
    }
}

#[test]
fn values_of_another_form_in_the_types_of_applications_are_no_facts_of_a_cloud() {
    for value in [&b""[..], b"\x01", b"\x02vpce", b"\x01\xff\xff\xff\xff\xff"] {
        let bytes = tcp4(&[&tlv(0xea, value), &tlv(0xee, value)]);
        let (header, _) = ProxyHeader::parse(&bytes)
            .expect("valid")
            .expect("complete");
        let id = header.tlvs().aws_vpc_endpoint_id();
        assert_eq!(id, (value == b"\x01").then_some(""));
        assert_eq!(header.tlvs().azure_link_id(), None);
        assert_eq!(header.tlvs().get(0xea), Some(value));
    }
}

#[test]
fn a_header_that_version_1_cannot_express_is_not_written_in_it() {
    let tcp = || ProxyHeader::proxied(addr("192.0.2.1:1"), addr("192.0.2.2:2"));
    let unix = || ProxyHeader::proxied(Address::Unix(None), Address::Unix(None));
    assert_eq!(
        tcp().encode_v1().expect("TCP4"),
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
    );
    assert_eq!(
        tcp().with_alpn("h2").encode_v1(),
        Err(ProxyEncodeError::TlvsInV1)
    );
    assert_eq!(
        tcp().with_checksum().encode_v1(),
        Err(ProxyEncodeError::TlvsInV1)
    );
    assert_eq!(unix().encode_v1(), Err(ProxyEncodeError::FamilyInV1));
    assert_eq!(
        ProxyHeader::local().encode_v1(),
        Err(ProxyEncodeError::LocalInV1)
    );
    let unlike = ProxyHeader::proxied(addr("192.0.2.1:1"), Address::Unix(None));
    assert_eq!(unlike.encode_v1().expect("UNKNOWN"), "PROXY UNKNOWN\r\n");
}

#[test]
fn addresses_of_both_families_are_written_as_ipv6() {
    let mixed = ProxyHeader::proxied(addr("[::ffff:192.0.2.1]:1"), addr("[2001:db8::2]:2"));
    assert_eq!(mixed.family(), Family::Tcp6);
    let line = "PROXY TCP6 ::ffff:c000:201 2001:db8::2 1 2\r\n";
    assert_eq!(mixed.encode_v1().expect("TCP6"), line);
    let both_mapped = ProxyHeader::proxied(addr("[::ffff:192.0.2.1]:1"), addr("192.0.2.2:2"));
    assert_eq!(both_mapped.family(), Family::Tcp4);
}

#[test]
fn an_abstract_name_begins_with_a_zero_byte_on_the_wire_and_with_an_at_sign_here() {
    let long = format!("@{}", "n".repeat(107));
    for name in ["@app", long.as_str()] {
        let abstract_name = Address::Unix(Some(std::path::Path::new(name).into()));
        let header = ProxyHeader::proxied(abstract_name.clone(), Address::Unix(None));

        let bytes = header.encode_v2().expect("it fits");

        let field = [b"\0", &name.as_bytes()[1..]].concat();
        assert_eq!(bytes[16..16 + field.len()], field);
        assert!(bytes[16 + field.len()..].iter().all(|byte| *byte == 0));
        let (parsed, _) = ProxyHeader::parse(&bytes)
            .expect("valid")
            .expect("complete");
        assert_eq!(parsed.source(), Some(&abstract_name));
        assert_eq!(parsed.destination(), Some(&Address::Unix(None)));
    }
}

#[test]
fn a_header_that_no_receiver_could_read_is_not_written() {
    let local = ProxyHeader::local;
    let path = |path: &[u8]| {
        use std::os::unix::ffi::OsStrExt;
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(path));
        ProxyHeader::proxied(Address::Unix(Some(path.into())), Address::Unix(None))
    };
    assert_eq!(path(&[b'p'; 109]).encode_v2(), Err(ProxyEncodeError::Path));
    assert_eq!(path(b"a\0b").encode_v2(), Err(ProxyEncodeError::Path));
    for (kind, value) in [
        (0x02, &b"\xff"[..]),
        (0x03, &[0; 4]),
        (0x05, &[0; 129]),
        (0x20, b""),
        (0x30, b"\xff"),
    ] {
        let header = local().with_tlv(kind, value.to_vec());
        assert_eq!(header.encode_v2(), Err(ProxyEncodeError::Tlv(kind)));
    }
    let long = Ssl::new().with_fact(0x2f, vec![0; 70_000]);
    assert!(local().with_ssl(&long).encode_v2().is_err());
    let most = local().with_tlv(0xe0, vec![0; 65_532]).encode_v2();
    assert_eq!(most.expect("the longest header").len(), 65_551);
    let more = local().with_tlv(0xe0, vec![0; 65_533]).encode_v2();
    assert_eq!(more, Err(ProxyEncodeError::TooLong));
    let udp = ProxyHeader::parse(&v2(0x21, 0x12, &[&[0; 12]]));
    let (udp, _) = udp.expect("valid").expect("complete");
    assert_eq!(udp.encode_v2(), Err(ProxyEncodeError::Datagram));
}

#[test]
fn bytes_that_cannot_become_a_header_are_refused_by_the_first_wrong_one() {
    let v2 = tcp4(&[]);
    let long = v2.len();
    for (bytes, wrong) in [
        (&b"GET / HTTP/1.1\r\n"[..], 0),
        (b"POST / HTTP/1.1\r\n", 1),
        (b"PROXYING TCP4", 5),
        (b"PROXY TCP5 192.0.2.1", 9),
        (b"PROXY UNKNOWN\nGET", 13),
        (b"\r\nGET / HTTP/1.1\r\n", 2),
        (&[&v2[..12], &[0x31; 100]].concat(), 12),
        (&[&v2[..12], &[0x22; 100]].concat(), 12),
        (&[&v2[..13], &[0x41; 100]].concat(), 13),
        (&[&v2[..15], &[11; 1]].concat(), 15),
    ] {
        let parse = |len| ProxyHeader::parse(&bytes[..len]);
        assert_eq!(parse(wrong), Ok(None), "{}", bytes.escape_ascii());
        assert!(parse(wrong + 1).is_err(), "{}", bytes.escape_ascii());
    }
    assert_eq!(ProxyHeader::parse(&v2[..long - 1]), Ok(None));
}
