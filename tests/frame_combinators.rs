//! Codec combinators lose nothing, whatever pieces the bytes arrive in and however the stream ends.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

#[path = "support/decoding.rs"]
mod decoding;
mod support;

use std::convert::Infallible;
use std::io;
use std::num::NonZeroUsize;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt as _;
use proptest::prelude::*;
use tokio::time::timeout;
use tokio_util::codec::{BytesCodec, Decoder, Encoder, FramedRead, LengthDelimitedCodec};
use tower::service_fn;
use tower_tcp::error::find_cause;
use tower_tcp::frame::{
    Block, BlockError, CodecExt, FrameTooLarge, InOut, Lines, LinesError, ThenError,
};
use tower_tcp::pipeline::Limits;
use tower_tcp::testkit::serve;
use tower_tcp::{BoxError, ConnectionEnded, EndReason, Pipeline};

use decoding::decode;
use support::{Clients, Ends, each_way};

fn size(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).expect("sizes in tests are not zero")
}

fn lines() -> Lines {
    Lines::default()
}

/// An item that cannot be cloned.
#[derive(Debug, PartialEq)]
struct Word(Bytes);

fn is_cut(err: &(dyn std::error::Error + 'static)) -> bool {
    find_cause::<io::Error>(err).is_some_and(|err| err.kind() == io::ErrorKind::UnexpectedEof)
}

/// Lines that can be encoded only while they are short.
#[derive(Default)]
struct Short(Lines);

impl Decoder for Short {
    type Item = Bytes;
    type Error = LinesError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, LinesError> {
        self.0.decode(src)
    }
}

impl Encoder<Bytes> for Short {
    type Error = LinesError;

    fn encode(&mut self, line: Bytes, dst: &mut BytesMut) -> Result<(), LinesError> {
        if line.len() > 3 {
            dst.put_slice(b"half");
            return Err(FrameTooLarge::new(3).into());
        }
        self.0.encode(line, dst)
    }
}

#[test]
fn decoded_items_are_mapped_to_the_last() {
    let codec = lines().deliver_unterminated().map_decode(Word);

    let (words, err) = decode(codec, b"one\ntwo\nlast", &[2]);

    assert_eq!(
        words,
        ["one", "two", "last"].map(|word| Word(Bytes::from(word)))
    );
    assert!(err.is_none());
}

/// Parses a number, or fails.
#[expect(clippy::needless_pass_by_value, reason = "codecs give items away")]
fn number(line: Bytes) -> Result<u64, BoxError> {
    Ok(str::from_utf8(&line)?.parse()?)
}

#[test]
fn decoded_items_are_mapped_up_to_one_that_is_invalid() {
    let codec = || lines().deliver_unterminated().try_map_decode(number);

    let (numbers, err) = decode(codec(), b"1\n2\n3", &[2]);
    assert_eq!(numbers, [1, 2, 3]);
    assert!(err.is_none());

    for input in [&b"1\nx\n2\n"[..], b"1\nx"] {
        let (numbers, err) = decode(codec(), input, &[2]);
        assert_eq!(numbers, [1]);
        let err = err.expect("`x` is no number");
        assert!(find_cause::<std::num::ParseIntError>(&*err).is_some());
    }
}

#[test]
fn errors_of_the_codec_are_found_in_those_of_a_function_that_can_fail() {
    let (_, err) = decode(lines().max_line(3).try_map_decode(number), b"1000\n", &[9]);
    let err = err.expect("the line is too long");
    assert!(find_cause::<LinesError>(&*err).is_some());

    let (numbers, err) = decode(lines().try_map_decode(number), b"1\n2", &[9]);
    assert_eq!(numbers, [1]);
    assert!(is_cut(&*err.expect("the last line has no end")));
}

#[test]
fn items_are_mapped_before_they_are_encoded() {
    let mut codec = lines().map_encode(|Word(word)| word);
    let mut output = BytesMut::new();

    codec.encode(Word("one".into()), &mut output).unwrap();

    assert_eq!(output, "one\n");
}

#[test]
fn an_item_that_is_filtered_out_does_not_keep_back_those_behind_it() {
    let codec = lines().filter_decode(|line| line != "drop");

    let (kept, err) = decode(codec, b"a\ndrop\ndrop\nb\ndrop\n", &[100]);

    assert_eq!(kept, ["a", "b"]);
    assert!(err.is_none());
}

#[tokio::test(start_paused = true)]
async fn what_stands_behind_filtered_items_needs_no_further_bytes() {
    let (read, mut write) = tokio::io::duplex(64);
    let mut framed = FramedRead::new(read, lines().filter_decode(|line| line != "drop"));

    tokio::io::AsyncWriteExt::write_all(&mut write, b"drop\ndrop\nb\n")
        .await
        .unwrap();

    let next = timeout(Duration::from_secs(1), framed.next()).await;
    assert_eq!(next.unwrap().unwrap().unwrap(), "b");
}

#[test]
fn the_last_frame_is_filtered_too_and_not_the_end() {
    let keep = |line: &Bytes| line != "drop";

    let codec = || lines().deliver_unterminated().filter_decode(keep);

    assert_eq!(decode(codec(), b"a\ndrop", &[1]).0, ["a"]);
    assert_eq!(decode(codec(), b"drop\nb", &[1]).0, ["b"]);
    let mut input = BytesMut::from("drop\nb");
    assert_eq!(codec().decode_eof(&mut input).unwrap().unwrap(), "b");
}

#[test]
fn nothing_is_written_for_an_item_that_is_filtered_out() {
    let mut codec = lines().filter_encode(|line| !line.is_empty());
    let mut output = BytesMut::new();

    for line in ["", "one", "", "two"] {
        codec.encode(Bytes::from(line), &mut output).unwrap();
    }

    assert_eq!(output, "one\ntwo\n");
}

#[test]
fn leftovers_of_a_chunk_are_delivered_at_the_end() {
    let (chunks, err) = decode(lines().chunks(size(2)), b"1\n2\n3\n4\n5\n", &[3]);

    assert_eq!(chunks, [vec!["1", "2"], vec!["3", "4"], vec!["5"]]);
    assert!(err.is_none());
}

#[test]
fn a_stream_of_whole_chunks_has_no_empty_one_at_its_end() {
    let (chunks, _) = decode(lines().chunks(size(2)), b"1\n2\n", &[1]);

    assert_eq!(chunks, [["1", "2"]]);
}

#[test]
fn what_came_before_an_error_is_delivered_before_it() {
    let codec = || lines().max_line(4).chunks(size(3));

    let (chunks, err) = decode(codec(), b"1\n2\ntoo long\n", &[100]);
    assert_eq!(chunks, [["1", "2"]]);
    assert!(matches!(err, Some(LinesError::TooLong(_))));

    let (chunks, err) = decode(codec(), b"1\n2\ncut", &[100]);
    assert_eq!(chunks, [["1", "2"]]);
    assert!(is_cut(&err.unwrap()));
}

#[test]
fn an_error_at_the_end_stays_one_of_the_end_behind_leftovers() {
    let mut codec = Block::new(size(2)).chunks(size(2));
    let mut input = BytesMut::from("11cut"); // a chunk, and a block that is cut off
    assert!(codec.decode(&mut input).unwrap().is_some());
    input.put_slice(b"44"); // "t4" is half a chunk, and "4" half a block

    assert_eq!(codec.decode(&mut input).unwrap(), None);
    assert_eq!(codec.decode_eof(&mut input).unwrap().unwrap(), ["t4"]);
    assert_eq!(codec.decode(&mut input).unwrap(), None);
    assert!(matches!(
        codec.decode_eof(&mut input),
        Err(BlockError::Io(_))
    ));
}

#[test]
fn a_chunk_is_encoded_whole_or_not_at_all() {
    let mut codec = Short::default().chunks(size(2));
    let mut output = BytesMut::from("before\n");

    let items = |texts: &[&'static str]| texts.iter().map(|text| Bytes::from(*text)).collect();
    codec.encode(items(&["1", "2", "3"]), &mut output).unwrap();
    assert!(codec.encode(items(&["4", "long"]), &mut output).is_err());

    assert_eq!(output, "before\n1\n2\n3\n");
}

#[test]
fn nothing_is_reserved_for_a_chunk_that_has_not_come() {
    let codec = lines().chunks(NonZeroUsize::MAX);

    let (chunks, _) = decode(codec, b"1\n2\n", &[1]);

    assert_eq!(chunks, [["1", "2"]]);
}

fn framed(frames: &[&[u8]]) -> BytesMut {
    let mut codec = LengthDelimitedCodec::new();
    let mut wire = BytesMut::new();
    for frame in frames {
        codec
            .encode(Bytes::copy_from_slice(frame), &mut wire)
            .unwrap();
    }
    wire
}

#[test]
fn inner_frames_begin_and_end_anywhere_in_outer_ones() {
    let codec = LengthDelimitedCodec::new().then(lines());
    let wire = framed(&[b"one\ntw", b"", b"o", b"\nthree\n", b"four\n"]);

    let (items, err) = decode(codec, &wire, &[3]);

    assert_eq!(items, ["one", "two", "three", "four"]);
    assert!(err.is_none());
}

#[test]
fn each_item_is_one_outer_frame_and_one_of_no_bytes_is_none() {
    let inner = BytesCodec::new();
    let mut codec = LengthDelimitedCodec::new().then(inner);
    let mut output = BytesMut::new();

    for item in ["one", "", "two"] {
        codec.encode(Bytes::from(item), &mut output).unwrap();
    }

    assert_eq!(output, framed(&[b"one", b"two"]));
}

#[test]
fn a_stream_that_ends_within_an_inner_frame_is_cut_off() {
    let codec = || LengthDelimitedCodec::new().then(lines());

    let (items, err) = decode(codec(), &framed(&[b"one\ntw"]), &[1]);
    assert_eq!(items, ["one"]);
    assert!(matches!(&err, Some(ThenError::Inner(err)) if is_cut(err)));

    let unterminated = lines().deliver_unterminated();
    let codec = LengthDelimitedCodec::new().then(unterminated);
    let (items, err) = decode(codec, &framed(&[b"one\ntw"]), &[1]);
    assert_eq!(items, ["one", "tw"]);
    assert!(err.is_none());
}

/// A codec that ignores an incomplete frame at the end.
struct Careless(Lines);

impl Decoder for Careless {
    type Item = Bytes;
    type Error = LinesError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, LinesError> {
        self.0.decode(src)
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, LinesError> {
        self.0.decode(src)
    }
}

#[test]
fn what_a_careless_inner_codec_leaves_at_the_end_is_an_error() {
    let codec = LengthDelimitedCodec::new().then(Careless(lines()));

    let (items, err) = decode(codec, &framed(&[b"one\ntw"]), &[1]);

    assert_eq!(items, ["one"]);
    assert!(matches!(&err, Some(ThenError::Inner(err)) if is_cut(err)));
}

#[test]
fn what_came_before_a_broken_outer_frame_is_delivered() {
    let mut wire = framed(&[b"one\ntwo\n"]);
    wire.put_slice(b"\xff\xff\xff\xff");

    let (items, err) = decode(LengthDelimitedCodec::new().then(lines()), &wire, &[100]);

    assert_eq!(items, ["one", "two"]);
    assert!(matches!(err, Some(ThenError::Outer(_))));
}

#[test]
fn an_inner_frame_has_a_limit_whatever_the_inner_codec_allows() {
    let codec = || {
        LengthDelimitedCodec::new()
            .then(lines().max_line(usize::MAX))
            .max_frame(4)
    };
    // Inner frames over the limit: in one outer frame, in two, behind others, and unterminated.
    for frames in [
        &[&b"1234\n"[..]][..],
        &[b"123", b"4\n"],
        &[b"1\n2\n1234\n"],
        &[b"12345"],
    ] {
        let (_, err) = decode(codec(), &framed(frames), &[100]);
        let Some(ThenError::TooLarge(err)) = err else {
            panic!("{frames:?}: {err:?}");
        };
        assert_eq!(err, FrameTooLarge::new(4));
    }
    for frames in [
        &[&b"123\n123\n12\n"[..]][..],
        &[b"123", b"\n"],
        &[b"1\n2\n123\n"],
    ] {
        let (_, err) = decode(codec(), &framed(frames), &[100]);
        assert!(err.is_none(), "{frames:?}: {err:?}");
    }
}

#[test]
fn the_limit_of_an_inner_frame_is_64_kib_by_default() {
    let codec = || LengthDelimitedCodec::new().then(lines().max_line(usize::MAX));
    for (content, fits) in [(65_535, true), (65_536, false)] {
        let mut line = vec![b'x'; content];
        line.push(b'\n');

        let (items, err) = decode(codec(), &framed(&[&line]), &[10_000]);

        assert_eq!(items.len(), usize::from(fits));
        assert_eq!(err.is_none(), fits);
    }
}

#[test]
fn an_inner_frame_of_the_limit_may_be_ended_by_the_stream() {
    let inner = lines().deliver_unterminated().max_line(usize::MAX);
    let codec = LengthDelimitedCodec::new().then(inner).max_frame(4);

    let (items, err) = decode(codec, &framed(&[b"1234"]), &[100]);

    assert_eq!(items, ["1234"]);
    assert!(err.is_none());
}

#[test]
fn the_limit_of_an_inner_frame_is_not_one_of_several_together() {
    let inner = lines().filter_decode(|line| line != "no").chunks(size(3));
    let codec = LengthDelimitedCodec::new().then(inner).max_frame(4);

    let (chunks, err) = decode(codec, &framed(&[b"no\nno\nno\n1\n2\nno\n3\n"]), &[100]);

    assert_eq!(chunks, [["1", "2", "3"]]);
    assert!(err.is_none());
}

#[test]
fn what_an_inner_codec_holds_itself_comes_out_without_further_bytes() {
    let mut codec = LengthDelimitedCodec::new().then(BytesCodec::new().then(lines()));
    let mut input = framed(&[b"1\n2\n3\n"]);

    for line in ["1", "2", "3"] {
        assert_eq!(codec.decode(&mut input).unwrap().unwrap(), line);
    }
    assert_eq!(codec.decode(&mut input).unwrap(), None);
}

#[test]
fn combinators_stand_in_combinators() {
    let inner = LengthDelimitedCodec::new()
        .then(lines())
        .filter_decode(|line| line != "no")
        .chunks(size(2));
    let codec = LengthDelimitedCodec::new().then(inner);
    let wire = framed(&[&framed(&[b"1\nno\n2\n3\n"]), &framed(&[b"4\n5\n"])]);

    let (chunks, err) = decode(codec, &wire, &[wire.len()]);

    assert_eq!(chunks, [vec!["1", "2"], vec!["3", "4"], vec!["5"]]);
    assert!(err.is_none());
}

/// Compiles only while each combinator encodes one type if its inner codec does.
#[test]
fn the_type_that_is_written_follows_from_the_codec() {
    fn only<T, C: Encoder<T>>(_codec: &C) -> Option<T> {
        None
    }

    assert!(only(&lines().map_decode(Word)).is_none());
    assert!(only(&lines().try_map_decode(number)).is_none());
    assert!(only(&lines().map_encode(|Word(word)| word)).is_none());
    assert!(only(&lines().filter_decode(Bytes::is_empty)).is_none());
    assert!(only(&lines().filter_encode(Bytes::is_empty)).is_none());
    assert!(only(&lines().chunks(NonZeroUsize::MIN)).is_none());
    assert!(only(&lines().then(lines())).is_none());
}

#[tokio::test(start_paused = true)]
async fn maps_and_filters_serve_in_a_pipeline() {
    let codec = || {
        lines()
            .filter_decode(|line| !line.starts_with(b"#"))
            .map_decode(|line| str::from_utf8(&line).ok()?.parse::<u64>().ok())
            .filter_encode(|line| line != "0")
            .map_encode(|number: u64| Bytes::from(number.to_string()))
    };
    let double = service_fn(|number: Option<u64>| async move {
        Ok::<_, Infallible>(number.map_or(u64::MAX, |number| 2 * number))
    });

    for served in each_way(Pipeline::new(codec).service(double)) {
        let mut client = served.client().await;
        client.send("# first\n1\n0\n# then\nx\n2\n# last\n").await;
        client.finish().await;

        let expected = ["2", "18446744073709551615", "4"];
        assert_eq!(client.rest().await, expected, "{}", served.way());
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn an_item_that_a_function_rejects_ends_the_connection_behind_the_replies_before_it() {
    let codec = || {
        lines()
            .deliver_unterminated()
            .try_map_decode(|line| match &line[..] {
                b"large" => Err(BoxError::from(FrameTooLarge::new(3))),
                b"bad" => Err("bad".into()),
                // An error of a codec cannot choose the end reason.
                b"chosen" => Err(ConnectionEnded::from(EndReason::Rejected).into()),
                _ => Ok(line),
            })
    };
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });

    for served in each_way(Pipeline::new(codec).service(echo)) {
        for (input, reason) in [
            ("1\n2\nbad\n3\n", EndReason::CodecError),
            ("1\n2\nlarge\n3\n", EndReason::FrameTooLarge),
            ("1\n2\nchosen\n3\n", EndReason::CodecError),
            ("1\n2\nbad", EndReason::Truncated),
            ("1\n2", EndReason::PeerClosed),
        ] {
            let mut client = served.client().await;
            client.send(input).await;
            client.finish().await;

            assert_eq!(client.rest().await, ["1", "2"], "{}", served.way());
            assert_eq!(served.reason().await, reason, "{}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn chunks_serve_in_a_pipeline_with_the_last_ones_too() {
    let backwards = service_fn(|mut chunk: Vec<Bytes>| async move {
        chunk.reverse();
        Ok::<_, Infallible>(chunk)
    });
    let pipeline = Pipeline::new(|| lines().chunks(size(3))).service(backwards);

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("1\n2\n3\n4\n5\n").await;
        client.finish().await;

        let replies = client.rest().await;
        assert_eq!(replies, ["3", "2", "1", "5", "4"], "{}", served.way());
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn what_of_a_chunk_came_before_a_cut_is_answered() {
    let echo = service_fn(|chunk: Vec<Bytes>| async move { Ok::<_, Infallible>(chunk) });
    let pipeline = Pipeline::new(|| lines().chunks(size(3))).service(echo);

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("1\n2\ncu").await;
        client.finish().await;

        assert_eq!(client.rest().await, ["1", "2"], "{}", served.way());
        assert_eq!(served.reason().await, EndReason::Truncated);
    }
}

#[tokio::test(start_paused = true)]
async fn lines_in_lines_serve_in_a_pipeline() {
    // Hex digits on lines, and lines in the bytes that they encode.
    let hex = || {
        let digit = |byte: u8| char::from(byte).to_digit(16).unwrap_or(0) as u8;
        lines().map_decode(move |line| {
            let pairs = line.chunks_exact(2);
            let bytes: Vec<u8> = pairs
                .map(|two| digit(two[0]) << 4 | digit(two[1]))
                .collect();
            bytes
        })
    };
    let codec = move || InOut::new(hex().then(lines()), lines());
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });

    for served in each_way(Pipeline::new(codec).service(echo)) {
        let mut client = served.client().await;
        client.send("610a62\n0a630a640a\n").await;
        client.finish().await;

        assert_eq!(
            client.rest().await,
            ["a", "b", "c", "d"],
            "{}",
            served.way()
        );
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn an_inner_frame_that_is_too_large_is_the_reason_of_the_end() {
    let codec = || {
        lines()
            .then(
                BytesCodec::new()
                    .then(lines().max_line(usize::MAX))
                    .max_frame(8),
            )
            .max_frame(1 << 20)
    };
    let never = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let limits = Limits::default().max_frame(1_000);
    let served = serve(Pipeline::new(codec).service(never).limits(limits));
    let mut client = served.client().await;

    client.send("123456789\n").await;

    assert_eq!(client.rest().await, [""; 0]);
    assert_eq!(served.reason().await, EndReason::FrameTooLarge);
}

fn pieces() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1..20_usize, 1..40)
}

/// Lines of one digit, some of them `0`.
fn digits() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(0..4_u8, 0..40)
}

fn on_lines(digits: &[u8]) -> Vec<u8> {
    digits
        .iter()
        .flat_map(|digit| [b'0' + digit, b'\n'])
        .collect()
}

proptest! {
    #[test]
    fn filtered_and_mapped_chunks_are_those_of_an_iterator_in_whatever_pieces(
        digits in digits(),
        sizes in pieces(),
        n in 1..5_usize,
    ) {
        let codec = lines()
            .filter_decode(|line| line != "0")
            .map_decode(|line| line[0] - b'0')
            .chunks(size(n));

        let (chunks, err) = decode(codec, &on_lines(&digits), &sizes);

        let kept: Vec<u8> = digits.into_iter().filter(|digit| *digit != 0).collect();
        let expected: Vec<_> = kept.chunks(n).map(<[u8]>::to_vec).collect();
        prop_assert_eq!(chunks, expected);
        prop_assert!(err.is_none());
    }

    #[test]
    fn inner_frames_are_the_same_in_whatever_outer_frames_and_pieces(
        digits in digits(),
        frames in pieces(),
        sizes in pieces(),
        max in 2..5_usize,
    ) {
        let stream = on_lines(&digits);
        let mut wire = BytesMut::new();
        let mut rest = &stream[..];
        let mut frames = frames.into_iter().cycle();
        while let Some(frame) = frames.next().filter(|_| !rest.is_empty()) {
            let (frame, later) = rest.split_at(frame.min(rest.len()));
            wire.extend_from_slice(&framed(&[frame]));
            rest = later;
        }
        let codec = LengthDelimitedCodec::new().then(lines()).max_frame(max);

        let (items, err) = decode(codec, &wire, &sizes);

        let expected: Vec<_> = digits.iter().map(u8::to_string).collect();
        prop_assert_eq!(items, expected);
        prop_assert!(err.is_none());
    }

    #[test]
    fn what_was_written_is_read_back(
        digits in digits(),
        sizes in pieces(),
    ) {
        let codec = || LengthDelimitedCodec::new().then(lines().chunks(size(2)));
        let chunks: Vec<Vec<Bytes>> = digits
            .chunks(2)
            .map(|two| two.iter().map(|digit| Bytes::from(digit.to_string())).collect())
            .collect();
        let mut wire = BytesMut::new();
        let mut writer = codec();
        for chunk in chunks.clone() {
            writer.encode(chunk, &mut wire)?;
        }

        let (read, err) = decode(codec(), &wire, &sizes);

        prop_assert_eq!(read, chunks);
        prop_assert!(err.is_none());
    }
}
