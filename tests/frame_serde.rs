//! The serde codec: documents are complete and within their limit, and the bad ones are reported or
//! end the connection, as chosen.

#[path = "support/decoding.rs"]
mod decoding;
mod support;

use std::io;

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};
use tokio::io::AsyncReadExt;
use tokio_util::codec::{Decoder, Encoder, LengthDelimitedCodec};
use tower::service_fn;
use tower_tcp::error::find_cause;
use tower_tcp::frame::{Format, FrameTooLarge, Serde, SerdeError};
use tower_tcp::testkit::serve;
use tower_tcp::{BoxError, EndReason, Pipeline};

use decoding::decode;
use support::{Clients, Ends, each_way};

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Note {
    id: u32,
    text: String,
}

type Notes = Serde<Note, Note>;

/// Prefixes each document with its length.
fn framed(documents: &[&str]) -> BytesMut {
    let mut wire = BytesMut::new();
    for document in documents {
        wire.put_u32(document.len().try_into().expect("they are short"));
        wire.put_slice(document.as_bytes());
    }
    wire
}

fn nested(depth: usize) -> String {
    "[".repeat(depth) + &"]".repeat(depth)
}

#[test]
fn a_document_has_its_length_in_front_as_tokio_utils_codec_reads_it() {
    let mut wire = BytesMut::from("before");
    let before = wire.len();
    let mut codec = Serde::<u8, [u8; 2]>::default();

    codec.encode([1, 2], &mut wire).unwrap();
    codec.encode([3, 4], &mut wire).unwrap();

    let mut wire = wire.split_off(before);
    assert_eq!(wire, framed(&["[1,2]", "[3,4]"]));
    let mut frames = LengthDelimitedCodec::new();
    assert_eq!(frames.decode(&mut wire).unwrap().unwrap(), "[1,2]");
}

#[test]
fn nothing_is_reserved_for_a_length_that_was_announced() {
    let mut codec = Serde::<u8, u8>::default().max_frame(usize::MAX);
    let mut input = BytesMut::with_capacity(16);
    input.put_u32(u32::MAX);
    input.put_slice(b"12");

    assert!(codec.decode(&mut input).unwrap().is_none());

    assert_eq!(input.capacity(), 16);
}

#[test]
fn a_length_beyond_the_limit_is_refused_at_its_prefix() {
    for announced in [97, 1 << 20, u32::MAX] {
        let mut codec = Serde::<u8, u8>::default().max_frame(100);
        let mut input = BytesMut::new();
        input.put_u32(announced);

        for _ in 0..2 {
            let err = codec.decode(&mut input).unwrap_err();
            assert!(
                matches!(err, SerdeError::TooLarge(err) if err == FrameTooLarge::new(100)),
                "{announced}"
            );
        }
    }
}

#[test]
fn the_limit_counts_the_prefix_and_is_64_kib_by_default() {
    for (content, fits) in [(65_536 - 4 - 2, true), (65_536 - 4 - 1, false)] {
        let text = "x".repeat(content);
        let input = framed(&[&format!("{text:?}")]);

        let (items, err) = decode(Serde::<String, ()>::default(), &input, &[10_000]);

        assert_eq!(items.len(), usize::from(fits));
        assert_eq!(err.is_none(), fits);
    }
}

#[test]
fn a_limit_below_the_prefix_admits_nothing() {
    for (max, fits) in [(0, false), (3, false), (4, true)] {
        let codec = Serde::<u8, ()>::default().max_frame(max).recoverable();

        let (items, _) = decode(codec, &framed(&[""]), &[1]);

        assert_eq!(items.len(), usize::from(fits), "{max}");
    }
}

#[test]
fn what_is_too_large_is_not_written() {
    let mut codec = Serde::<(), String>::default().max_frame(10);
    let mut output = BytesMut::from("before");

    let err = codec.encode("12345".to_owned(), &mut output).unwrap_err();
    assert!(matches!(err, SerdeError::TooLarge(_)));
    assert_eq!(output, "before");

    codec.encode("1234".to_owned(), &mut output).unwrap();
    assert_eq!(output, "before\0\0\0\x06\"1234\"");
}

/// A value whose serialisation fails halfway.
struct Unwritable;

impl Serialize for Unwritable {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        use serde::ser::{Error, SerializeSeq};
        let mut seq = to.serialize_seq(Some(2))?;
        seq.serialize_element("half")?;
        Err(S::Error::custom("the other half is missing"))
    }
}

#[test]
fn what_cannot_be_written_is_not_begun() {
    let mut output = BytesMut::from("before");

    let err = Serde::<(), Unwritable>::default()
        .encode(Unwritable, &mut output)
        .unwrap_err();

    assert!(matches!(err, SerdeError::Document(_)));
    assert_eq!(output, "before");
}

#[test]
fn a_bad_document_is_an_error_behind_those_before_it() {
    for bad in ["", "x", "\"text\"", "1 2", "[1]", "300"] {
        let (items, err) = decode(
            Serde::<u8, ()>::default(),
            &framed(&["1", bad, "2"]),
            &[100],
        );

        assert_eq!(items, [1], "{bad}");
        let err = err.expect("it is not a number");
        assert!(find_cause::<serde_json::Error>(&err).is_some(), "{bad}");
    }
}

#[test]
fn a_bad_document_is_an_item_if_asked_for() {
    let codec = Serde::<u8, ()>::default().recoverable();

    let (items, err) = decode(codec, &framed(&["1", "x", "", "2"]), &[1]);

    let items: Vec<_> = items.into_iter().map(Result::ok).collect();
    assert_eq!(items, [Some(1), None, None, Some(2)]);
    assert!(err.is_none());
}

#[test]
fn a_frame_that_is_too_large_ends_the_stream_in_any_case() {
    let codec = Serde::<u8, ()>::default().max_frame(8).recoverable();

    let (items, err) = decode(codec, &framed(&["1", "12345", "2"]), &[100]);

    assert_eq!(items.len(), 1);
    assert!(matches!(err, Some(SerdeError::TooLarge(_))));
}

#[test]
fn a_document_that_is_cut_off_is_an_error() {
    let whole = framed(&["1", "23"]);
    for cut in 6..whole.len() {
        let (items, err) = decode(Serde::<u8, ()>::default(), &whole[..cut], &[1]);
        assert_eq!(items, [1]);
        let err = err.expect("it is cut off");
        let err = find_cause::<io::Error>(&err).expect("the stream ended");
        assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);

        let codec = Serde::<u8, ()>::default().recoverable();
        let (items, err) = decode(codec, &whole[..cut], &[1]);
        assert_eq!(items.len(), 1);
        assert!(matches!(err, Some(SerdeError::Io(_))));
    }
}

#[test]
fn json_is_read_127_deep() {
    for (depth, fits) in [(127, true), (128, false), (30_000, false)] {
        let codec = Serde::<serde_json::Value, ()>::default();

        let (items, err) = decode(codec, &framed(&[&nested(depth)]), &[100_000]);

        assert_eq!(items.len(), usize::from(fits), "{depth}");
        assert_eq!(err.is_none(), fits, "{depth}");
    }
}

/// A format that writes a number as that many strokes.
#[derive(Default)]
struct Strokes;

impl Format for Strokes {
    type Error = serde_json::Error;

    fn read<T: DeserializeOwned>(&self, document: &[u8]) -> Result<T, Self::Error> {
        serde_json::from_str(&document.len().to_string())
    }

    fn write<T: Serialize>(&self, value: &T, mut to: impl io::Write) -> Result<(), Self::Error> {
        let number: usize = serde_json::from_value(serde_json::to_value(value)?)?;
        to.write_all("|".repeat(number).as_bytes())
            .map_err(serde_json::Error::io)
    }
}

#[test]
fn another_format_can_be_plugged_in() {
    let mut codec = Serde::<u8, u8, Strokes>::default();
    let mut wire = BytesMut::new();

    codec.encode(3, &mut wire).unwrap();

    assert_eq!(wire, framed(&["|||"]));
    assert_eq!(codec.decode(&mut wire).unwrap(), Some(3));
}

/// Compiles only while the codec encodes one type.
#[test]
fn the_type_that_is_written_follows_from_the_codec() {
    fn only<T, C: Encoder<T>>(_codec: &C) -> Option<T> {
        None
    }

    assert!(only(&Notes::default()).is_none());
    assert!(only(&Notes::default().recoverable()).is_none());
}

#[tokio::test(start_paused = true)]
async fn documents_serve_in_a_pipeline() {
    let shout = service_fn(|note: Note| async move {
        Ok::<_, BoxError>(Note {
            text: note.text.to_uppercase(),
            ..note
        })
    });

    for served in each_way(Pipeline::new(Notes::default).service(shout)) {
        let mut client = served.client().await;
        let asked = framed(&[r#"{"id":1,"text":"a"}"#, r#"{ "text": "b", "id": 2 }"#]);
        client.send(asked).await;
        client.finish().await;

        let mut replies = Vec::new();
        client.0.read_to_end(&mut replies).await.unwrap();
        let expected = framed(&[r#"{"id":1,"text":"A"}"#, r#"{"id":2,"text":"B"}"#]);
        assert_eq!(replies, expected, "{}", served.way());
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_bad_document_is_answered_by_the_service_if_asked_for() {
    let codec = || Serde::<u8, Result<u8, String>>::default().recoverable();
    let check = service_fn(|number: serde_json::Result<u8>| async move {
        Ok::<_, BoxError>(number.map_err(|err| format!("{:?}", err.classify())))
    });
    let served = serve(Pipeline::new(codec).service(check));
    let mut client = served.client().await;

    client.send(framed(&["1", "x", "300", "2"])).await;
    client.finish().await;

    let mut replies = Vec::new();
    client.0.read_to_end(&mut replies).await.unwrap();
    let expected = [
        r#"{"Ok":1}"#,
        r#"{"Err":"Syntax"}"#,
        r#"{"Err":"Data"}"#,
        r#"{"Ok":2}"#,
    ];
    assert_eq!(replies, framed(&expected));
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_connection_says_what_was_wrong_with_a_document() {
    let echo = service_fn(|number: u8| async move { Ok::<_, BoxError>(number) });
    let codec = || Serde::<u8, u8>::default().max_frame(8);

    for served in each_way(Pipeline::new(codec).service(echo)) {
        for (last, reason) in [
            (framed(&["12345"]), EndReason::FrameTooLarge),
            (framed(&["x"]), EndReason::CodecError),
            (BytesMut::from("\0\0"), EndReason::Truncated),
        ] {
            let mut client = served.client().await;
            client.send(framed(&["1"])).await;
            client.send(last).await;
            client.finish().await;

            let mut replies = Vec::new();
            client.0.read_to_end(&mut replies).await.unwrap();
            drop(client);
            assert_eq!(replies, framed(&["1"]), "{} {reason}", served.way());
            assert_eq!(served.reason().await, reason, "{}", served.way());
        }
    }
}

proptest! {
    #[test]
    fn what_was_written_is_read_back_in_whatever_pieces(
        notes in prop::collection::vec((any::<u32>(), ".{0,20}"), 0..10),
        sizes in prop::collection::vec(1..20_usize, 1..40),
    ) {
        let notes: Vec<_> = notes.into_iter().map(|(id, text)| Note { id, text }).collect();
        let mut wire = BytesMut::new();
        for note in &notes {
            Notes::default().encode(note.clone(), &mut wire)?;
        }

        let (read, err) = decode(Notes::default(), &wire, &sizes);

        prop_assert_eq!(read, notes);
        prop_assert!(err.is_none());
    }

    #[test]
    fn whatever_comes_is_the_same_in_whatever_pieces(
        input in prop::collection::vec(
            prop_oneof![3 => 0..4_u8, 1 => any::<u8>(), 2 => b'0'..=b'9'],
            0..80,
        ),
        sizes in prop::collection::vec(1..20_usize, 1..40),
    ) {
        let codec = || Serde::<u8, ()>::default().max_frame(20).recoverable();
        let words = |(items, err): (Vec<serde_json::Result<u8>>, Option<SerdeError<_>>)| {
            let items: Vec<_> = items.into_iter().map(Result::ok).collect();
            (items, err.map(|err| err.to_string()))
        };

        let whole = words(decode(codec(), &input, &[input.len().max(1)]));
        let pieces = words(decode(codec(), &input, &sizes));

        prop_assert_eq!(whole, pieces);
    }
}
