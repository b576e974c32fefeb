//! `frame`: splits a block of bytes into frames.

use bytes::{Buf, BytesMut};
use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use std::num::NonZeroUsize;
use tokio_util::codec::{Decoder, LengthDelimitedCodec, LinesCodec};
use tower_tcp::frame::{Block, CodecExt, Lines, Serde};

use crate::support::{BLOCK, line, line_of, measured, prefixed, prefixed_of};

type Document = (String, u32, u32);

/// Times a function that takes all frames out of a block.
fn frames(bencher: Bencher, frame: &[u8], take_all: impl Fn(&mut BytesMut) -> usize) {
    let frames = BLOCK / frame.len();
    let block = frame.repeat(frames);
    bencher
        .counter(ItemsCount::new(frames))
        .with_inputs(|| BytesMut::from(&block[..]))
        .bench_local_refs(|block| {
            let taken = measured(|| take_all(block));
            assert_eq!(taken, frames);
        });
}

fn decode<C: Decoder>(mut codec: C, block: &mut BytesMut) -> usize {
    let mut frames = 0;
    while let Ok(Some(frame)) = codec.decode(block) {
        black_box(frame);
        frames += 1;
    }
    frames
}

/// The baseline: frames that are looked at in place.
fn slices(block: &mut BytesMut, frame: impl Fn(&[u8]) -> Option<usize>) -> usize {
    let mut frames = 0;
    while let Some(length) = frame(block) {
        black_box(&block[..length]);
        block.advance(length);
        frames += 1;
    }
    frames
}

/// The baseline of codecs whose frames can be kept.
fn shared(block: &mut BytesMut, frame: impl Fn(&[u8]) -> Option<usize>) -> usize {
    let mut frames = 0;
    while let Some(length) = frame(block) {
        black_box(block.split_to(length).freeze());
        frames += 1;
    }
    frames
}

#[derive(Clone, Copy, Debug)]
enum OfLines {
    ByHand,
    ByHandShared,
    Lines,
    LinesMapped,
    TokioUtil,
}

const OF_LINES: [OfLines; 5] = [
    OfLines::ByHand,
    OfLines::ByHandShared,
    OfLines::Lines,
    OfLines::LinesMapped,
    OfLines::TokioUtil,
];

#[divan::bench(consts = [16, 1024], args = OF_LINES)]
fn lines_of<const BYTES: usize>(bencher: Bencher, by: OfLines) {
    frames(bencher, &line_of(BYTES), |block| match by {
        OfLines::ByHand => slices(block, line),
        OfLines::ByHandShared => shared(block, line),
        OfLines::Lines => decode(Lines::default(), block),
        OfLines::LinesMapped => decode(Lines::default().map_decode(|line| line), block),
        OfLines::TokioUtil => decode(LinesCodec::new(), block),
    });
}

#[derive(Clone, Copy, Debug)]
enum OfFrames {
    ByHand,
    Codec,
}

const BOTH: [OfFrames; 2] = [OfFrames::ByHand, OfFrames::Codec];

#[divan::bench(args = BOTH)]
fn block_of_16(bencher: Bencher, by: OfFrames) {
    const SIZE: NonZeroUsize = NonZeroUsize::new(16).unwrap();
    frames(bencher, &[0; SIZE.get()], |block| match by {
        OfFrames::ByHand => shared(block, |input| (input.len() >= 16).then_some(16)),
        OfFrames::Codec => decode(Block::new(SIZE), block),
    });
}

#[divan::bench(args = BOTH)]
fn length_delimited_of_16(bencher: Bencher, by: OfFrames) {
    frames(bencher, &prefixed_of(16), |block| match by {
        OfFrames::ByHand => shared(block, prefixed),
        OfFrames::Codec => decode(LengthDelimitedCodec::new(), block),
    });
}

#[divan::bench(args = BOTH)]
fn serde(bencher: Bencher, by: OfFrames) {
    let document = b"\0\0\0\x0e[\"add\",42,23] ";
    frames(bencher, document, |block| match by {
        OfFrames::ByHand => {
            let mut documents = 0;
            while let Some(length) = prefixed(block) {
                black_box(serde_json::from_slice::<Document>(&block[4..length]).unwrap());
                block.advance(length);
                documents += 1;
            }
            documents
        }
        OfFrames::Codec => decode(Serde::<Document, Document>::default(), block),
    });
}
