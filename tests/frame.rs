//! Codecs of this crate: bytes to frames and back.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

#[path = "support/decoding.rs"]
mod decoding;

use std::error::Error as _;
use std::fmt::Debug;
use std::io;
use std::num::NonZeroUsize;

use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;
use tokio_util::codec::{BytesCodec, Decoder, Encoder};
use tower_tcp::error::find_cause;
use tower_tcp::frame::{Block, BlockError, FrameTooLarge, InOut, Lines, LinesError};

use decoding::decode;

fn encode<E>(mut codec: E, items: &[Bytes]) -> BytesMut
where
    E: Encoder<Bytes>,
    E::Error: Debug,
{
    let mut buffer = BytesMut::new();
    for item in items {
        codec.encode(item.clone(), &mut buffer).unwrap();
    }
    buffer
}

#[derive(Debug, PartialEq)]
enum Ended {
    Whole,
    Cut,
    TooLong,
}

fn ended(err: Option<LinesError>) -> Ended {
    match err {
        None => Ended::Whole,
        Some(LinesError::TooLong(_)) => Ended::TooLong,
        Some(err) => {
            let err = find_cause::<io::Error>(&err).unwrap();
            assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
            Ended::Cut
        }
    }
}

/// Splits the whole input at once, in the plainest way.
fn oracle(input: &[u8], limit: usize) -> (Vec<Bytes>, Ended) {
    let mut items = Vec::new();
    for line in input.split_inclusive(|byte| *byte == b'\n') {
        let Some(content) = line.strip_suffix(b"\n") else {
            let end = if line.len() >= limit {
                Ended::TooLong
            } else {
                Ended::Cut
            };
            return (items, end);
        };
        if line.len() > limit {
            return (items, Ended::TooLong);
        }
        let content = content.strip_suffix(b"\r").unwrap_or(content);
        items.push(Bytes::copy_from_slice(content));
    }
    (items, Ended::Whole)
}

#[test]
fn lines_end_with_lf_or_crlf() {
    for (input, lines, end) in [
        (&b""[..], &[][..], Ended::Whole),
        (b"\n", &[&b""[..]], Ended::Whole),
        (b"\r\n", &[b""], Ended::Whole),
        (b"a\nb\r\n\nc\n", &[b"a", b"b", b"", b"c"], Ended::Whole),
        (b"a\r\r\n", &[b"a\r"], Ended::Whole),
        (b"\ra\rb\n", &[b"\ra\rb"], Ended::Whole),
        (b"\n\r\n", &[b"", b""], Ended::Whole),
        (b"a\nb", &[b"a"], Ended::Cut),
        (b"a\r", &[], Ended::Cut),
    ] {
        for size in 1..=input.len().max(1) {
            let (items, err) = decode(Lines::default(), input, &[size]);
            assert_eq!(items, lines, "{input:?} by {size}");
            assert_eq!(ended(err), end, "{input:?} by {size}");
        }
    }
}

#[test]
fn c1_a_line_without_end_is_refused_at_the_limit() {
    const LIMIT: usize = 65_536;
    const PIECE: usize = 1_000;
    let piece = [b'x'; PIECE];
    let mut codec = Lines::default();
    let mut buffer = BytesMut::new();
    let mut fed = 0;

    let err = loop {
        assert!(fed < 64 << 20, "64 MiB were taken in");
        buffer.extend_from_slice(&piece);
        fed += PIECE;
        match codec.decode(&mut buffer) {
            Ok(item) => assert_eq!(item, None),
            Err(err) => break err,
        }
    };

    assert_eq!(
        find_cause::<FrameTooLarge>(&err),
        Some(&FrameTooLarge::new(LIMIT))
    );
    assert_eq!(fed, LIMIT.next_multiple_of(PIECE));
    assert!(buffer.len() <= LIMIT + PIECE);
    assert!(buffer.capacity() <= 2 * (LIMIT + PIECE));
}

#[test]
fn c1_the_refusal_stays() {
    let mut codec = Lines::default().max_line(4);
    let mut buffer = BytesMut::from("long\nok\n");

    for _ in 0..3 {
        assert!(matches!(
            codec.decode(&mut buffer),
            Err(LinesError::TooLong(_))
        ));
        buffer.extend_from_slice(b"ok\n");
    }
    assert!(matches!(
        codec.decode_eof(&mut buffer),
        Err(LinesError::TooLong(_))
    ));
}

#[test]
fn c1_nothing_is_reserved_ahead_of_the_bytes_that_came() {
    let mut buffer = BytesMut::with_capacity(16);
    buffer.put_slice(b"half a line");

    Lines::default().decode(&mut buffer).unwrap();
    Block::new(NonZeroUsize::new(1 << 20).unwrap())
        .decode(&mut buffer)
        .unwrap();

    assert_eq!(buffer.capacity(), 16);
}

#[test]
fn c2_the_limit_is_exact_in_whatever_pieces() {
    for limit in [1_usize, 2, 3, 10, 100] {
        for ending in ["\n", "\r\n"] {
            for length in limit.saturating_sub(1)..=limit + 1 {
                let Some(content) = length.checked_sub(ending.len()) else {
                    continue;
                };
                let line = format!("{}{ending}", "x".repeat(content));
                // An empty line first shows that its length is not counted for the next line.
                let input = format!("\n{line}");
                for size in 1..=input.len() {
                    let codec = Lines::default().max_line(limit);
                    let (items, err) = decode(codec, input.as_bytes(), &[size]);
                    let fits = length <= limit;
                    assert_eq!(
                        items.len(),
                        1 + usize::from(fits),
                        "{length} of {limit} by {size}"
                    );
                    assert_eq!(
                        ended(err) == Ended::TooLong,
                        !fits,
                        "{length} of {limit} by {size}"
                    );
                }
            }
        }
    }
}

#[test]
fn c2_the_default_limit_is_64_kib_with_the_ending() {
    for (length, fits) in [(65_535, true), (65_536, true), (65_537, false)] {
        let mut input = vec![b'x'; length - 1];
        input.push(b'\n');
        for size in [1, 1_000, 65_535, 65_536, 65_537] {
            let (items, err) = decode(Lines::default(), &input, &[size]);
            assert_eq!(items.len(), usize::from(fits));
            assert_eq!(ended(err) == Ended::Whole, fits);
        }
    }
}

#[test]
fn c2_a_limit_of_zero_admits_no_line() {
    let (items, err) = decode(Lines::default().max_line(0), b"\n", &[1]);

    assert!(items.is_empty());
    assert_eq!(ended(err), Ended::TooLong);
}

#[test]
fn c2_crlf_split_over_two_reads_is_one_ending() {
    let mut codec = Lines::default();
    let mut buffer = BytesMut::from("a\r");
    assert_eq!(codec.decode(&mut buffer).unwrap(), None);

    buffer.put_slice(b"\nb\n");

    assert_eq!(codec.decode(&mut buffer).unwrap().unwrap(), "a");
    assert_eq!(codec.decode(&mut buffer).unwrap().unwrap(), "b");
    assert_eq!(codec.decode(&mut buffer).unwrap(), None);
    assert!(buffer.is_empty());
}

#[test]
fn c4_a_frame_cut_off_by_the_end_is_an_error_and_not_delivered() {
    let (items, err) = decode(Lines::default(), b"whole\nDELETE 1", &[3]);
    assert_eq!(items, ["whole"]);
    assert_eq!(ended(err), Ended::Cut);

    let block = Block::new(NonZeroUsize::new(4).unwrap());
    let (items, err) = decode(block, b"wholecut", &[3]);
    assert_eq!(items, ["whol", "ecut"]);
    assert!(err.is_none());
    let (items, err) = decode(block, b"whole", &[3]);
    assert_eq!(items, ["whol"]);
    let err = err.unwrap();
    let err = find_cause::<io::Error>(&err).unwrap();
    assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn c4_an_unterminated_line_is_delivered_if_asked_for() {
    for (input, last) in [("a\nb", "b"), ("a\nb\r", "b")] {
        let (items, err) = decode(
            Lines::default().deliver_unterminated(),
            input.as_bytes(),
            &[1],
        );
        assert_eq!(items, ["a", last]);
        assert!(err.is_none());
    }
    let (items, err) = decode(Lines::default().deliver_unterminated(), b"a\n", &[1]);
    assert_eq!(items, ["a"]);
    assert!(err.is_none());
}

#[test]
fn c5_no_byte_is_searched_twice() {
    let mut codec = Lines::default();
    let mut buffer = BytesMut::from("searched");
    assert_eq!(codec.decode(&mut buffer).unwrap(), None);

    // A second search of these bytes would find this.
    buffer[3] = b'\n';
    buffer.put_slice(b"!\nnext\n");

    assert_eq!(codec.decode(&mut buffer).unwrap().unwrap(), "sea\nched!");
    assert_eq!(codec.decode(&mut buffer).unwrap().unwrap(), "next");
}

#[test]
fn c5_a_long_line_byte_by_byte_is_one_line() {
    let mut input = vec![b'x'; 65_535];
    input.push(b'\n');

    let (items, err) = decode(Lines::default(), &input, &[1]);

    assert_eq!(items, [&input[..65_535]]);
    assert!(err.is_none());
}

#[test]
fn c6_c7_bytes_that_are_no_text_pass_unchanged() {
    let every: Vec<u8> = (0..=255).filter(|byte| *byte != b'\n').collect();
    for line in [
        &every[..],
        b"\xff\xfe",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbfbom",
        b"\0\x1b[31m",
    ] {
        let input = encode(Lines::default(), &[Bytes::copy_from_slice(line)]);
        let (items, err) = decode(Lines::default(), &input, &[1]);
        assert_eq!(items, [line]);
        assert!(err.is_none());
    }
}

#[test]
fn lines_are_written_with_the_ending_asked_for() {
    let items = [Bytes::from("a"), Bytes::new()];

    assert_eq!(encode(Lines::default(), &items), "a\n\n");
    assert_eq!(encode(Lines::crlf(), &items), "a\r\n\r\n");
    assert_eq!(encode(Lines::crlf().max_line(1), &items), "a\r\n\r\n");
}

#[test]
fn writing_appends_to_what_is_there() {
    let mut buffer = BytesMut::from("before ");

    Lines::default()
        .encode(Bytes::from("line"), &mut buffer)
        .unwrap();

    assert_eq!(buffer, "before line\n");
}

#[test]
fn a_block_of_another_size_is_not_written() {
    let mut block = Block::new(NonZeroUsize::new(4).unwrap());
    let mut buffer = BytesMut::new();

    for wrong in ["", "123", "12345"] {
        let err = block.encode(Bytes::from(wrong), &mut buffer).unwrap_err();
        assert!(
            matches!(err, BlockError::WrongSize { expected: 4, actual } if actual == wrong.len())
        );
        assert!(err.source().is_none());
    }
    assert!(buffer.is_empty());

    block.encode(Bytes::from("1234"), &mut buffer).unwrap();
    assert_eq!(buffer, "1234");
}

#[test]
fn in_and_out_may_differ() {
    let mut codec = InOut::new(Lines::default(), Lines::crlf());
    let mut buffer = BytesMut::from("in\n");

    let line = codec.decode(&mut buffer).unwrap().unwrap();
    codec.encode(line, &mut buffer).unwrap();

    assert_eq!(buffer, "in\r\n");
    let (_, err) = decode(
        InOut::new(Lines::default(), BytesCodec::new()),
        b"cut",
        &[1],
    );
    assert_eq!(ended(err), Ended::Cut);
}

/// Compiles only while each codec of the crate encodes one type, so that the type of a reply can be
/// inferred.
#[test]
fn the_type_that_is_written_follows_from_the_codec() {
    fn only<T, C: Encoder<T>>(_codec: &C) -> Option<T> {
        None
    }

    assert!(only(&Lines::default()).is_none());
    assert!(only(&Block::new(NonZeroUsize::MIN)).is_none());
    assert!(only(&InOut::new(BytesCodec::new(), Lines::default())).is_none());
}

fn bytes_with_endings() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        3 => Just(b'x'),
        2 => Just(b'\n'),
        2 => Just(b'\r'),
        1 => any::<u8>(),
    ];
    prop::collection::vec(byte, 0..80)
}

fn items() -> impl Strategy<Value = Vec<Bytes>> {
    // A reader takes a CR before the line end for part of it.
    let line = bytes_with_endings().prop_map(|mut line| {
        line.retain(|byte| *byte != b'\n');
        while line.last() == Some(&b'\r') {
            line.pop();
        }
        Bytes::from(line)
    });
    prop::collection::vec(line, 0..10)
}

proptest! {
    #[test]
    fn c14_lines_are_those_of_a_plain_splitter_in_whatever_pieces(
        input in bytes_with_endings(),
        sizes in prop::collection::vec(1..20_usize, 1..40),
        limit in 1..30_usize,
    ) {
        let expected = oracle(&input, limit);
        for sizes in [&sizes[..], &[1], &[input.len().max(1)]] {
            let (items, err) = decode(Lines::default().max_line(limit), &input, sizes);
            prop_assert_eq!(&(items, ended(err)), &expected);
        }
    }

    #[test]
    fn c14_what_was_written_is_read_back(
        items in items(),
        sizes in prop::collection::vec(1..20_usize, 1..40),
    ) {
        for codec in [Lines::default(), Lines::crlf()] {
            let (read, err) = decode(codec.clone(), &encode(codec, &items), &sizes);
            prop_assert_eq!(&read, &items);
            prop_assert_eq!(ended(err), Ended::Whole);
        }
    }

    #[test]
    fn c14_blocks_are_the_chunks_of_the_input_in_whatever_pieces(
        input in prop::collection::vec(any::<u8>(), 0..80),
        sizes in prop::collection::vec(1..20_usize, 1..40),
        size in 1..10_usize,
    ) {
        let block = Block::new(NonZeroUsize::new(size).unwrap());
        let (items, err) = decode(block, &input, &sizes);
        let expected: Vec<_> = input.chunks_exact(size).map(Bytes::copy_from_slice).collect();
        prop_assert_eq!(&items, &expected);
        prop_assert_eq!(err.is_some(), input.len() % size != 0);
        prop_assert_eq!(encode(block, &items), &input[..items.len() * size]);
    }
}
