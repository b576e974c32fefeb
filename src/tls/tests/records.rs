//! Tests `Records` without I/O: with records that are split at any byte, have any size, or come
//! from a hostile peer. Also tests how much memory `Records` uses.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use bytes::BytesMut;
use ring::aead;
use rustls::server::UnbufferedServerConnection;
use rustls::{ConnectionTrafficSecrets, PeerMisbehaved};
use tokio::io::ReadBuf;

use super::super::records::Records;
use super::*;

const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

/// The maximum size of a record's content.
const PLAIN: usize = 16 * 1024;
/// The maximum size of an encrypted record.
const LARGEST: usize = 5 + PLAIN + 2048;

/// A server's `Records`, and a client.
struct Pair {
    server: Records,
    client: ClientConnection,
}

impl Pair {
    fn new(version: &'static SupportedProtocolVersion) -> Self {
        let me = made("localhost");
        let config = server(&me).configuration().unwrap().server;
        let server = Records::new(UnbufferedServerConnection::new(config).unwrap());
        let mut config = client(&me, &[version], None);
        config.enable_secret_extraction = true;
        let client = ClientConnection::new(Arc::new(config), localhost()).unwrap();
        let mut pair = Self { server, client };
        while pair.client.is_handshaking() || pair.server.session().is_handshaking() {
            let mut flight = pair.flight();
            assert_eq!(pair.receive(&mut flight), b"");
            pair.answer().unwrap();
        }
        pair
    }

    /// Takes the records that the client wants to send.
    fn flight(&mut self) -> Vec<u8> {
        let mut flight = Vec::new();
        while self.client.wants_write() {
            self.client.write_tls(&mut flight).unwrap();
        }
        flight
    }

    /// Encrypts a text with the client's keys, and returns the records.
    fn records(&mut self, text: &[u8]) -> Vec<u8> {
        self.client.writer().write_all(text).unwrap();
        self.flight()
    }

    /// Makes the server decrypt `input` into a buffer that is always large enough. Returns the
    /// decrypted bytes.
    fn receive(&mut self, input: &mut [u8]) -> Vec<u8> {
        let mut room = vec![0; input.len() + LARGEST];
        let mut read = ReadBuf::new(&mut room);
        self.server.receive(input, &mut read);
        read.filled().to_vec()
    }

    /// Makes the client read the server's output. Returns the decrypted text.
    fn answer(&mut self) -> Result<Vec<u8>, rustls::Error> {
        let mut output = std::mem::take(self.server.output());
        let mut text = Vec::new();
        while !output.is_empty() {
            let mut next = &output[..];
            let n = self.client.read_tls(&mut next).unwrap();
            output = BytesMut::from(&output[n..]);
            self.client.process_new_packets()?;
            let mut part = vec![0; PLAIN];
            while let Ok(n) = self.client.reader().read(&mut part)
                && n > 0
            {
                text.extend_from_slice(&part[..n]);
            }
        }
        Ok(text)
    }

    /// Makes the server send a text. Returns the bytes that the client read.
    fn send(&mut self, text: &[u8]) -> Vec<u8> {
        let mut records = Vec::new();
        let n = self.server.encrypt(text, &mut records).unwrap();
        self.server.output().extend_from_slice(&records[..n]);
        self.answer().unwrap()
    }
}

/// Encrypts records of TLS 1.3 that rustls never sends.
struct Forger {
    key: aead::LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Forger {
    /// Creates a forger with the client's keys. Also returns the server's `Records`.
    fn new(pair: Pair) -> (Records, Self) {
        let secrets = pair.client.dangerous_extract_secrets().unwrap();
        let (sequence, secrets) = secrets.tx;
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            other => panic!("a suite of AES, not {}", std::any::type_name_of_val(other)),
        };
        let key = aead::UnboundKey::new(algorithm, key.as_ref()).unwrap();
        let forger = Self {
            key: aead::LessSafeKey::new(key),
            iv: iv.as_ref().try_into().unwrap(),
            sequence,
        };
        (pair.server, forger)
    }

    /// Returns an encrypted record with this content type, content, and number of zero bytes as
    /// padding.
    fn record(&mut self, typ: u8, content: &[u8], padding: usize) -> Vec<u8> {
        let mut body = [content, &[typ], &vec![0; padding]].concat();
        let len = u16::try_from(body.len() + 16).unwrap().to_be_bytes();
        let header = [23, 3, 3, len[0], len[1]];
        let mut nonce = self.iv;
        for (byte, of_sequence) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= of_sequence;
        }
        self.sequence += 1;
        let nonce = aead::Nonce::assume_unique_for_key(nonce);
        self.key
            .seal_in_place_append_tag(nonce, aead::Aad::from(header), &mut body)
            .unwrap();
        [&header, &body[..]].concat()
    }
}

const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;
/// A `KeyUpdate` message that does not request a key update from the peer.
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

fn receive(server: &mut Records, input: &mut [u8]) -> Vec<u8> {
    let mut room = vec![0; input.len() + LARGEST];
    let mut read = ReadBuf::new(&mut room);
    server.receive(input, &mut read);
    read.filled().to_vec()
}

#[test]
fn records_may_be_cut_at_every_byte() {
    for version in VERSIONS {
        let mut pair = Pair::new(version);
        let all = [b"one".repeat(20), b"t".to_vec(), b"three".to_vec()];
        for cut in 0.. {
            let mut sent: Vec<_> = all.iter().flat_map(|text| pair.records(text)).collect();
            if cut > sent.len() {
                break;
            }
            let (first, second) = sent.split_at_mut(cut);

            let read = [pair.receive(first), pair.receive(second)].concat();

            assert_eq!(read, all.concat(), "cut at {cut}");
            assert_eq!(pair.server.memory(), 0, "cut at {cut}");
        }
    }
}

#[test]
fn a_record_that_arrives_byte_by_byte_holds_little_more_memory_than_its_bytes() {
    for version in VERSIONS {
        let mut pair = Pair::new(version);
        for size in [1, 100, 5_000, PLAIN] {
            let text = vec![b'x'; size];
            let mut sent = pair.records(&text);
            let last = sent.pop().unwrap();
            let whole = sent.len() + 1;
            let mut sizes = BTreeSet::new();

            for (at, byte) in sent.iter_mut().enumerate() {
                assert_eq!(pair.receive(std::slice::from_mut(byte)), b"");
                let held = pair.server.memory();
                assert!(held <= (at + 1 + 4096).min(whole), "{held} of {at}");
                sizes.insert(held);
            }
            // Growing copies the bytes, so it must not happen for each of them.
            assert!(sizes.len() <= 3 + whole / 4096, "{sizes:?}");
            let read = pair.receive(&mut [last]);

            assert_eq!(read, text);
            assert_eq!(pair.server.memory(), 0);
        }
    }
}

#[test]
fn a_reader_with_little_room_gets_everything_in_order() {
    for version in VERSIONS {
        let mut pair = Pair::new(version);
        let text: Vec<u8> = (0..40_000_u32).map(|n| (n % 251) as u8).collect();
        let mut read = Vec::new();
        let mut sent = pair.records(&text);
        for part in sent.chunks_mut(9_999) {
            let mut room = [0; 7];
            let mut to = ReadBuf::new(&mut room);
            pair.server.receive(part, &mut to);
            loop {
                read.extend_from_slice(to.filled());
                to.clear();
                pair.server.take_plain(&mut to);
                if to.filled().is_empty() {
                    break;
                }
            }
        }

        assert!(read == text);
        assert_eq!(pair.server.memory(), 0);
    }
}

#[test]
fn empty_and_padded_records_are_read() {
    let (mut server, mut forger) = Forger::new(Pair::new(&TLS13));
    let mut sent = [
        forger.record(DATA, b"", 0),
        forger.record(DATA, b"a", PLAIN - 1),
        forger.record(DATA, b"", PLAIN),
        forger.record(DATA, &[b'b'; PLAIN], 0),
    ]
    .concat();

    let read = receive(&mut server, &mut sent);

    assert_eq!(read, [&b"a"[..], &[b'b'; PLAIN]].concat());
    assert!(server.failed().is_none());
    assert_eq!(server.memory(), 0);
}

#[test]
fn both_sides_change_their_keys() {
    let mut pair = Pair::new(&TLS13);
    for _ in 0..3 {
        // This also requests a key update from the server.
        pair.client.refresh_traffic_keys().unwrap();
        let mut sent = pair.records(b"question");

        let read = pair.receive(&mut sent);
        let answered = pair.send(b"answer");

        assert_eq!(read, b"question");
        assert_eq!(answered, b"answer");
        assert_eq!(pair.server.memory(), 0);
    }
}

#[test]
fn a_write_between_the_parts_of_a_handshake_message_succeeds() {
    for cut in 1..KEY_UPDATE.len() {
        let (mut server, mut forger) = Forger::new(Pair::new(&TLS13));
        let (first, second) = KEY_UPDATE.split_at(cut);
        let mut part = forger.record(HANDSHAKE, first, 0);
        let mut rest = forger.record(HANDSHAKE, second, 0);
        let (start, end) = rest.split_at_mut(cut);

        assert_eq!(receive(&mut server, &mut part), b"");
        assert!(server.encrypt(b"in between", &mut Vec::new()).is_ok());
        assert_eq!(receive(&mut server, start), b"");
        assert!(server.encrypt(b"in between", &mut Vec::new()).is_ok());
        assert_eq!(receive(&mut server, end), b"");
        server.close();

        assert!(server.failed().is_none(), "{:?}", server.failed());
        assert!(!server.output().is_empty(), "close_notify was not sent");
    }
}

#[test]
fn a_handshake_message_without_an_end_is_refused() {
    let (mut server, mut forger) = Forger::new(Pair::new(&TLS13));
    let mut most = 0;
    // A `KeyUpdate` of 60,000 bytes, in small parts.
    let mut content = [24, 0, 0xea, 0x60].to_vec();
    for _ in 0..1000 {
        let mut part = forger.record(HANDSHAKE, &content, 0);
        receive(&mut server, &mut part);
        most = most.max(server.memory());
        if server.failed().is_some() {
            break;
        }
        content = vec![0; 100];
    }

    assert!(server.failed().is_some());
    assert!(most <= LARGEST + 2 * 4096, "{most}");
}

#[test]
fn an_announced_length_that_is_too_long_is_refused_at_once() {
    for version in VERSIONS {
        let mut pair = Pair::new(version);

        pair.receive(&mut [23, 3, 3, 0xff, 0xff]);

        assert_eq!(
            pair.server.failed(),
            Some(rustls::InvalidMessage::MessageTooLarge.into())
        );
        assert_eq!(
            pair.answer(),
            Err(rustls::Error::AlertReceived(
                rustls::AlertDescription::DecodeError
            ))
        );
    }
}

#[test]
fn a_changed_record_is_refused_with_an_alert_after_the_good_data() {
    for version in VERSIONS {
        let mut pair = Pair::new(version);
        let mut sent = pair.records(b"good");
        sent.extend(pair.records(b"bad"));
        *sent.last_mut().unwrap() ^= 1;
        sent.extend(pair.records(b"never read"));

        let read = pair.receive(&mut sent);

        assert_eq!(read, b"good");
        assert_eq!(pair.server.failed(), Some(rustls::Error::DecryptError));
        assert!(pair.server.encrypt(b"more", &mut Vec::new()).is_err());
        pair.server.close();
        assert_eq!(
            pair.answer(),
            Err(rustls::Error::AlertReceived(
                rustls::AlertDescription::BadRecordMac
            ))
        );
        assert_eq!(pair.receive(&mut [1, 2, 3]), b"");
    }
}

#[test]
fn too_many_empty_records_are_refused() {
    let (mut server, mut forger) = Forger::new(Pair::new(&TLS13));
    let mut sent: Vec<u8> = (0..40).flat_map(|_| forger.record(DATA, b"", 0)).collect();

    receive(&mut server, &mut sent);

    assert_eq!(
        server.failed(),
        Some(PeerMisbehaved::TooManyEmptyFragments.into())
    );
}

#[test]
fn after_close_notify_nothing_is_read_but_answers_are_sent() {
    for version in VERSIONS {
        let mut pair = Pair::new(version);
        pair.client.send_close_notify();
        let mut sent = pair.records(b"");
        sent.extend([23, 3, 3, 0, 40, 1, 2, 3]);

        let read = pair.receive(&mut sent);
        let more = pair.receive(&mut [0xff; 100]);

        assert!(pair.server.is_ended() && read.is_empty() && more.is_empty());
        assert!(pair.server.failed().is_none());
        assert_eq!(pair.send(b"answer"), b"answer");
        pair.server.close();
        pair.server.close();
        assert!(pair.answer().is_ok());
        assert!(pair.client.process_new_packets().unwrap().peer_has_closed());
    }
}
