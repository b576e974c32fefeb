//! Headers by the specification (haproxy's `doc/proxy-protocol.txt` of 2020/03/05), each with its
//! verdict and the section that gives it.

use tower_tcp::proxy::ProxyHeaderError as Error;
use tower_tcp::proxy::{Command, Family};

/// The verdict on a header.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Verdict {
    /// The client has this address, and connected to that one.
    Client(&'static str, &'static str),
    /// The header is valid, but the addresses of the connection itself apply.
    Own(Command, Family),
    /// The header is refused.
    Refused(Error),
}
use Verdict::{Client, Own, Refused};

pub(crate) struct Vector {
    pub(crate) section: &'static str,
    pub(crate) name: &'static str,
    pub(crate) bytes: Vec<u8>,
    pub(crate) verdict: Verdict,
}

const UNKNOWN: Verdict = Own(Command::Proxy, Family::Unspecified);
const LOCAL: Verdict = Own(Command::Local, Family::Unspecified);
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const TCP4: &[u8] = &[192, 0, 2, 1, 198, 51, 100, 1, 0xdc, 0x04, 0x01, 0xbb];
const CLIENT4: Verdict = Client("192.0.2.1:56324", "198.51.100.1:443");

/// Returns a header of version 2 whose length is that of its parts.
pub(crate) fn v2(command: u8, family: u8, parts: &[&[u8]]) -> Vec<u8> {
    let block = parts.concat();
    let len = u16::try_from(block.len()).expect("a block has at most 65,535 bytes");
    let fixed = [SIGNATURE, &[command, family], &len.to_be_bytes()].concat();
    [fixed, block].concat()
}

pub(crate) fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(value.len()).expect("a value has at most 65,535 bytes");
    [&[kind], &len.to_be_bytes()[..], value].concat()
}

/// Returns a header of TCP over IPv4 with these TLVs.
pub(crate) fn tcp4(tlvs: &[&[u8]]) -> Vec<u8> {
    let tlvs = tlvs.concat();
    v2(0x21, 0x11, &[TCP4, &tlvs])
}

/// Puts the checksum into the four zero bytes at `at`.
pub(crate) fn summed(mut header: Vec<u8>, at: usize) -> Vec<u8> {
    let checksum = crc_32c(&header);
    header[at..at + 4].copy_from_slice(&checksum.to_be_bytes());
    header
}

/// CRC-32C bit by bit, from RFC 4960, appendix B, to be independent of the library's.
fn crc_32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

fn ipv6(source: [u16; 8], destination: [u16; 8]) -> Vec<u8> {
    let groups = source.into_iter().chain(destination);
    let ports = [56324_u16, 443];
    groups.chain(ports).flat_map(u16::to_be_bytes).collect()
}

fn unix(source: &[u8], destination: &[u8]) -> Vec<u8> {
    let mut block = source.to_vec();
    block.resize(108, 0);
    block.extend(destination);
    block.resize(216, 0);
    block
}

fn ssl(facts: &[&[u8]]) -> Vec<u8> {
    let facts = facts.concat();
    tlv(0x20, &[&[0x07, 0, 0, 0, 0], &facts[..]].concat())
}

pub(crate) fn all() -> Vec<Vector> {
    let mut vectors = v1();
    vectors.extend(v2_valid());
    vectors.extend(v2_tlvs());
    vectors.extend(v2_refused());
    vectors
}

fn vector(
    section: &'static str,
    name: &'static str,
    bytes: impl Into<Vec<u8>>,
    verdict: Verdict,
) -> Vector {
    let bytes = bytes.into();
    Vector {
        section,
        name,
        bytes,
        verdict,
    }
}

#[rustfmt::skip]
fn v1() -> Vec<Vector> {
    const FFFF: &str = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
    let line = |name, line: &str, verdict| vector("2.1", name, line, verdict);
    let unknown_107 = format!("PROXY UNKNOWN {FFFF} {FFFF} 65535 65535\r\n");
    assert_eq!(unknown_107.len(), 107);
    vec![
        line("TCP4", "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n", CLIENT4),
        line("TCP4 of zeros", "PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n",
            Client("0.0.0.0:0", "0.0.0.0:0")),
        line("the longest TCP4", "PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
            Client("255.255.255.255:65535", "255.255.255.255:65535")),
        line("TCP6", "PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n",
            Client("[2001:db8::1]:56324", "[2001:db8::2]:443")),
        line("the shortest TCP6", "PROXY TCP6 :: :: 0 0\r\n", Client("[::]:0", "[::]:0")),
        line("the longest TCP6", &format!("PROXY TCP6 {FFFF} {FFFF} 65535 65535\r\n"),
            Client("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
                "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535")),
        line("upper-case digits", "PROXY TCP6 2001:DB8::A 2001:DB8::B 1 2\r\n",
            Client("[2001:db8::a]:1", "[2001:db8::b]:2")),
        line("sets of four digits",
            "PROXY TCP6 2001:0db8:0000:0000:0000:0000:0000:0001 ::1 1 2\r\n",
            Client("[2001:db8::1]:1", "[::1]:2")),
        line("IPv4-mapped, as inet_ntop writes it",
            "PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.1 56324 443\r\n", CLIENT4),
        line("IPv4-mapped, by hexadecimal digits",
            "PROXY TCP6 ::ffff:c000:201 ::ffff:c633:6401 56324 443\r\n", CLIENT4),
        line("UNKNOWN", "PROXY UNKNOWN\r\n", UNKNOWN),
        line("the longest UNKNOWN", &unknown_107, UNKNOWN),
        line("UNKNOWN and a space", "PROXY UNKNOWN \r\n", UNKNOWN),
        line("UNKNOWN and words", "PROXY UNKNOWN TCP4 PROXY +5 x\r\n", UNKNOWN),
        vector("2.1", "UNKNOWN and bytes that are no text", b"PROXY UNKNOWN \xff\0\xc3\r\n",
            UNKNOWN),

        line("lower case", "proxy TCP4 192.0.2.1 198.51.100.1 56324 443\r\n",
            Refused(Error::Absent)),
        line("no space", "PROXY\r\n", Refused(Error::Absent)),
        line("a tab behind PROXY", "PROXY\tTCP4 192.0.2.1 198.51.100.1 1 2\r\n",
            Refused(Error::Absent)),
        line("two spaces behind PROXY", "PROXY  TCP4 192.0.2.1 198.51.100.1 1 2\r\n",
            Refused(Error::Family)),
        line("nothing behind PROXY", "PROXY \r\n", Refused(Error::Family)),
        line("a family in lower case", "PROXY tcp4 192.0.2.1 198.51.100.1 1 2\r\n",
            Refused(Error::Family)),
        line("a family that does not exist", "PROXY TCP5 192.0.2.1 198.51.100.1 1 2\r\n",
            Refused(Error::Family)),
        line("a family of version 2", "PROXY UDP4 192.0.2.1 198.51.100.1 1 2\r\n",
            Refused(Error::Family)),
        line("a family without addresses", "PROXY TCP4\r\n", Refused(Error::Family)),
        line("UNKNOWN and more letters", "PROXY UNKNOWNS\r\n", Refused(Error::Family)),
        line("two spaces", "PROXY TCP4 192.0.2.1  198.51.100.1 1 2\r\n", Refused(Error::Line)),
        line("a tab", "PROXY TCP4 192.0.2.1\t198.51.100.1 1 2\r\n", Refused(Error::Line)),
        line("a space at the end", "PROXY TCP4 192.0.2.1 198.51.100.1 1 2 \r\n",
            Refused(Error::Line)),
        line("a space in front of the address", "PROXY TCP4  192.0.2.1 198.51.100.1 1 2\r\n",
            Refused(Error::Line)),
        line("no ports", "PROXY TCP4 192.0.2.1 198.51.100.1\r\n", Refused(Error::Line)),
        line("one port", "PROXY TCP4 192.0.2.1 198.51.100.1 1\r\n", Refused(Error::Line)),
        line("three ports", "PROXY TCP4 192.0.2.1 198.51.100.1 1 2 3\r\n", Refused(Error::Line)),
        line("an octet with a leading zero", "PROXY TCP4 192.0.2.01 198.51.100.1 1 2\r\n",
            Refused(Error::Address)),
        line("an octet of 256", "PROXY TCP4 192.0.2.256 198.51.100.1 1 2\r\n",
            Refused(Error::Address)),
        line("three octets", "PROXY TCP4 192.0.2 198.51.100.1 1 2\r\n", Refused(Error::Address)),
        line("five octets", "PROXY TCP4 192.0.2.1.1 198.51.100.1 1 2\r\n", Refused(Error::Address)),
        line("a hexadecimal octet", "PROXY TCP4 0xc0.0.2.1 198.51.100.1 1 2\r\n",
            Refused(Error::Address)),
        line("a name", "PROXY TCP4 localhost 198.51.100.1 1 2\r\n", Refused(Error::Address)),
        line("IPv6 in TCP4", "PROXY TCP4 ::1 ::1 1 2\r\n", Refused(Error::Address)),
        line("IPv4 in TCP6", "PROXY TCP6 192.0.2.1 198.51.100.1 1 2\r\n", Refused(Error::Address)),
        line("a source of each family", "PROXY TCP6 ::1 198.51.100.1 1 2\r\n",
            Refused(Error::Address)),
        line("two double colons", "PROXY TCP6 2001::db8::1 ::1 1 2\r\n", Refused(Error::Address)),
        line("a set of five digits", "PROXY TCP6 2001:00db8::1 ::1 1 2\r\n",
            Refused(Error::Address)),
        line("seven sets", "PROXY TCP6 1:2:3:4:5:6:7 ::1 1 2\r\n", Refused(Error::Address)),
        line("nine sets", "PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 1 2\r\n", Refused(Error::Address)),
        line("a zone", "PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", Refused(Error::Address)),
        line("brackets", "PROXY TCP6 [::1] [::1] 1 2\r\n", Refused(Error::Address)),
        line("a port of 65536", "PROXY TCP4 192.0.2.1 198.51.100.1 65536 2\r\n",
            Refused(Error::Port)),
        line("a port beyond any number",
            "PROXY TCP4 192.0.2.1 198.51.100.1 1 99999999999999999999\r\n",
            Refused(Error::Port)),
        line("a port with a plus", "PROXY TCP4 192.0.2.1 198.51.100.1 +5632 443\r\n",
            Refused(Error::Port)),
        line("a port with a minus", "PROXY TCP4 192.0.2.1 198.51.100.1 1 -2\r\n",
            Refused(Error::Port)),
        line("a port with a leading zero", "PROXY TCP4 192.0.2.1 198.51.100.1 056324 443\r\n",
            Refused(Error::Port)),
        line("a port of two zeros", "PROXY TCP4 192.0.2.1 198.51.100.1 00 443\r\n",
            Refused(Error::Port)),
        line("an empty port", "PROXY TCP4 192.0.2.1 198.51.100.1 56324 \r\n", Refused(Error::Port)),
        line("a port with a letter", "PROXY TCP4 192.0.2.1 198.51.100.1 80a 443\r\n",
            Refused(Error::Port)),
        vector("2.1", "an address that is no text", b"PROXY TCP4 \xff.0.2.1 198.51.100.1 1 2\r\n",
            Refused(Error::Address)),
        vector("2.1", "a zero byte", b"PROXY TCP4 192.0.2.1\0 198.51.100.1 1 2\r\n",
            Refused(Error::Address)),
        line("LF alone", "PROXY TCP4 192.0.2.1 198.51.100.1 1 2\n", Refused(Error::Line)),
        line("CR alone", "PROXY TCP4 192.0.2.1 198.51.100.1 1 2\rX", Refused(Error::Line)),
        line("CR twice", "PROXY TCP4 192.0.2.1 198.51.100.1 1 2\r\r\n", Refused(Error::Line)),
        line("UNKNOWN and LF alone, in front of data", "PROXY UNKNOWN\nGET / HTTP/1.1\r\n",
            Refused(Error::Line)),
        line("no CRLF in 107 characters", &format!("{:f<107}", "PROXY UNKNOWN "),
            Refused(Error::TooLong(107))),
        line("108 characters", &unknown_107.replace("UNKNOWN ", "UNKNOWN  "),
            Refused(Error::TooLong(107))),
        line("109 characters", &unknown_107.replace("UNKNOWN ", "UNKNOWN   "),
            Refused(Error::TooLong(107))),
    ]
}

#[rustfmt::skip]
fn v2_valid() -> Vec<Vector> {
    let vector = |name, bytes: Vec<u8>, verdict| vector("2.2", name, bytes, verdict);
    let documentation = |last| [0x2001, 0xdb8, 0, 0, 0, 0, 0, last];
    let mapped = |a, b| [0, 0, 0, 0, 0, 0xffff, a, b];
    let own = |family| Own(Command::Proxy, family);
    vec![
        vector("LOCAL", v2(0x20, 0x00, &[]), LOCAL),
        vector("LOCAL with addresses", v2(0x20, 0x11, &[TCP4]), LOCAL),
        vector("LOCAL with a length but no TLVs", v2(0x20, 0x00, &[b"??"]), LOCAL),
        vector("LOCAL of a family that does not exist", v2(0x20, 0xff, &[b"?"]), LOCAL),
        vector("LOCAL shorter than its family", v2(0x20, 0x21, &[TCP4]), LOCAL),
        vector("LOCAL with TLVs", v2(0x20, 0x00, &[&tlv(0x05, b"id")]), LOCAL),
        vector("TCP4", tcp4(&[]), CLIENT4),
        vector("TCP6",
            v2(0x21, 0x21, &[&ipv6(documentation(1), documentation(2))]),
            Client("[2001:db8::1]:56324", "[2001:db8::2]:443")),
        vector("TCP6, IPv4-mapped",
            v2(0x21, 0x21, &[&ipv6(mapped(0xc000, 0x201), mapped(0xc633, 0x6401))]),
            CLIENT4),
        vector("UNSPEC", v2(0x21, 0x00, &[]), UNKNOWN),
        vector("UNSPEC with TLVs", v2(0x21, 0x00, &[&tlv(0x05, b"id")]), UNKNOWN),
        vector("a family that is unspecified", v2(0x21, 0x01, &[b"any bytes"]), UNKNOWN),
        vector("a family that is unspecified, for datagrams", v2(0x21, 0x02, &[]), UNKNOWN),
        vector("a protocol that is unspecified", v2(0x21, 0x10, &[b"any bytes"]), UNKNOWN),
        vector("a protocol that is unspecified, IPv6", v2(0x21, 0x20, &[]), UNKNOWN),
        vector("a protocol that is unspecified, Unix", v2(0x21, 0x30, &[b"?"]), UNKNOWN),
        vector("UDP4", v2(0x21, 0x12, &[TCP4]), own(Family::Udp4)),
        vector("UDP6", v2(0x21, 0x22, &[&ipv6([1; 8], [2; 8])]), own(Family::Udp6)),
        vector("Unix stream", v2(0x21, 0x31, &[&unix(b"/run/a", b"/run/b")]),
            own(Family::UnixStream)),
        vector("Unix stream without paths", v2(0x21, 0x31, &[&unix(b"", b"")]),
            own(Family::UnixStream)),
        vector("Unix stream of abstract names", v2(0x21, 0x31, &[&unix(b"\0a", b"\0b")]),
            own(Family::UnixStream)),
        vector("Unix stream of the longest path", v2(0x21, 0x31, &[&unix(&[b'p'; 108], b"")]),
            own(Family::UnixStream)),
        vector("Unix datagram", v2(0x21, 0x32, &[&unix(b"/run/a", b"")]),
            own(Family::UnixDatagram)),
    ]
}

#[rustfmt::skip]
fn v2_tlvs() -> Vec<Vector> {
    let filled = v2(0x21, 0x11, &[TCP4, &tlv(0x04, &vec![0; 65_535 - 12 - 3])]);
    assert_eq!(filled.len(), 65_551);
    let crc = tlv(0x03, &[0; 4]);
    let (version, name) = (tlv(0x21, b"TLSv1.3"), tlv(0x22, "名".as_bytes()));
    let (cipher, signature) = (tlv(0x23, b"AES"), tlv(0x24, b"RSA-SHA256"));
    let names = [version, name, cipher, signature, tlv(0x25, b"RSA2048")];
    vec![
        vector("2.2", "the longest header", filled, CLIENT4),
        vector("2.2", "an empty value", tcp4(&[&tlv(0x01, b"")]), CLIENT4),
        vector("2.2", "types that are not registered",
            tcp4(&[&tlv(0x00, b""), &tlv(0x07, b"x"), &tlv(0x99, b"y")]),
            CLIENT4),
        vector("2.2.1", "ALPN, which need not be text", tcp4(&[&tlv(0x01, b"h2\xff")]), CLIENT4),
        vector("2.2.2", "authority", tcp4(&[&tlv(0x02, "b\u{fc}cher.example".as_bytes())]),
            CLIENT4),
        vector("2.2.2", "authority that is not UTF-8", tcp4(&[&tlv(0x02, b"b\xfccher")]),
            Refused(Error::Tlv(0x02))),
        vector("2.2.3", "a checksum", summed(tcp4(&[&crc]), 31), CLIENT4),
        vector("2.2.3", "a checksum between others",
            summed(tcp4(&[&tlv(0x05, b"id"), &crc, &tlv(0x04, b"pad")]), 36),
            CLIENT4),
        vector("2.2.3", "a checksum of UNSPEC", summed(v2(0x21, 0x00, &[&crc]), 19), UNKNOWN),
        vector("2.2.3", "a checksum of UDP", summed(v2(0x21, 0x12, &[TCP4, &crc]), 31),
            Own(Command::Proxy, Family::Udp4)),
        vector("2.2.3", "a wrong checksum", tcp4(&[&tlv(0x03, &[1, 2, 3, 4])]),
            Refused(Error::Checksum)),
        vector("2.2.3", "a checksum of zero", tcp4(&[&crc]), Refused(Error::Checksum)),
        vector("2.2.3", "a wrong checksum of UNSPEC", v2(0x21, 0x00, &[&crc]),
            Refused(Error::Checksum)),
        vector("2.2.3", "a checksum of three bytes", tcp4(&[&tlv(0x03, &[0; 3])]),
            Refused(Error::Tlv(0x03))),
        vector("2.2.3", "a checksum of five bytes", tcp4(&[&tlv(0x03, &[0; 5])]),
            Refused(Error::Tlv(0x03))),
        vector("2.2.3", "two checksums", tcp4(&[&crc, &crc]), Refused(Error::Tlv(0x03))),
        vector("2.2.4", "padding", tcp4(&[&tlv(0x04, b""), &tlv(0x04, b"\0\0")]), CLIENT4),
        vector("2.2.5", "the longest unique ID", tcp4(&[&tlv(0x05, &[0xff; 128])]), CLIENT4),
        vector("2.2.5", "a unique ID of 129 bytes", tcp4(&[&tlv(0x05, &[0xff; 129])]),
            Refused(Error::Tlv(0x05))),
        vector("2.2.6", "SSL", tcp4(&[&ssl(&names.each_ref().map(|name| &name[..]))]), CLIENT4),
        vector("2.2.6", "SSL without facts", tcp4(&[&ssl(&[])]), CLIENT4),
        vector("2.2.6", "SSL with an unknown fact", tcp4(&[&ssl(&[&tlv(0x2f, b"\xff")])]), CLIENT4),
        vector("2.2.6", "SSL of four bytes", tcp4(&[&tlv(0x20, &[1, 0, 0, 0])]),
            Refused(Error::Tlv(0x20))),
        vector("2.2.6", "an SSL fact beyond the end", tcp4(&[&ssl(&[&[0x22, 0, 9, b'x']])]),
            Refused(Error::Tlv(0x22))),
        vector("2.2.6", "an SSL fact without a length", tcp4(&[&ssl(&[&[0x23, 0]])]),
            Refused(Error::Tlv(0x23))),
        vector("2.2.6", "a common name that is not UTF-8", tcp4(&[&ssl(&[&tlv(0x22, b"\xff")])]),
            Refused(Error::Tlv(0x22))),
        vector("2.2.6", "a version that is not ASCII", tcp4(&[&ssl(&[&tlv(0x21, b"\xff")])]),
            Refused(Error::Tlv(0x21))),
        vector("2.2.7", "a namespace", tcp4(&[&tlv(0x30, b"blue")]), CLIENT4),
        vector("2.2.7", "a namespace that is not ASCII", tcp4(&[&tlv(0x30, b"\xff")]),
            Refused(Error::Tlv(0x30))),
        vector("2.2.8", "types of applications",
            tcp4(&[&tlv(0xe0, b"a"), &tlv(0xea, b"?"), &tlv(0xef, b"b")]),
            CLIENT4),
        vector("2.2.8", "types of experiments and of the future",
            tcp4(&[&tlv(0xf0, b"a"), &tlv(0xff, b"b")]),
            CLIENT4),
        vector("2.2", "a TLV of one byte", tcp4(&[&[0x05]]), Refused(Error::Tlv(0x05))),
        vector("2.2", "a TLV of two bytes", tcp4(&[&[0x05, 0]]), Refused(Error::Tlv(0x05))),
        vector("2.2", "a TLV that is a byte too long", tcp4(&[&[0x05, 0, 2, b'x']]),
            Refused(Error::Tlv(0x05))),
        vector("2.2", "a TLV that is a byte too long, behind another",
            tcp4(&[&tlv(0x01, b"h2"), &[0xe0, 0xff, 0xff]]),
            Refused(Error::Tlv(0xe0))),
        vector("2.2", "UNSPEC with a broken TLV", v2(0x21, 0x00, &[&[0x05, 0]]),
            Refused(Error::Tlv(0x05))),
    ]
}

#[rustfmt::skip]
fn v2_refused() -> Vec<Vector> {
    let bent = |at: usize, byte| {
        let mut header = tcp4(&[]);
        header[at] = byte;
        header
    };
    let refused = |name, bytes: Vec<u8>, err| vector("2.2", name, bytes, Refused(err));
    vec![
        refused("HTTP", b"GET / HTTP/1.1\r\n".to_vec(), Error::Absent),
        refused("HTTP behind an empty line", b"\r\nGET / HTTP/1.1\r\n".to_vec(), Error::Absent),
        refused("TLS", vec![0x16, 0x03, 0x01, 0x02, 0x00], Error::Absent),
        refused("a wrong first byte", bent(0, b'\n'), Error::Absent),
        refused("a wrong fifth byte", bent(4, b'0'), Error::Absent),
        refused("a wrong last byte of the signature", bent(11, b'\r'), Error::Absent),
        refused("version 1 in binary", bent(12, 0x11), Error::Version),
        refused("version 3", bent(12, 0x31), Error::Version),
        refused("version 0", bent(12, 0x01), Error::Version),
        refused("command 2", bent(12, 0x22), Error::Command),
        refused("command 15", bent(12, 0x2f), Error::Command),
        refused("family 4", bent(13, 0x41), Error::Family),
        refused("family 15", bent(13, 0xf0), Error::Family),
        refused("protocol 3", bent(13, 0x13), Error::Family),
        refused("protocol 15", bent(13, 0x0f), Error::Family),
        refused("TCP4 of 11 bytes", v2(0x21, 0x11, &[&TCP4[..11]]), Error::Length),
        refused("TCP4 of no bytes", v2(0x21, 0x11, &[]), Error::Length),
        refused("UDP4 of 11 bytes", v2(0x21, 0x12, &[&TCP4[..11]]), Error::Length),
        refused("TCP6 of 35 bytes", v2(0x21, 0x21, &[&[0; 35]]), Error::Length),
        refused("TCP6 with the addresses of TCP4", v2(0x21, 0x21, &[TCP4]), Error::Length),
        refused("Unix of 215 bytes", v2(0x21, 0x31, &[&[0; 215]]), Error::Length),
    ]
}
