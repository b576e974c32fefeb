//! The transport under a pipeline: reading and writing, beside tokio-util's `Framed`.

use bytes::{Bytes, BytesMut};
use divan::Bencher;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::io::DuplexStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};
use tower::service_fn;
use tower_tcp::{BoxError, Pipeline};

use crate::support::{Client, Load, by_hand, prefixed, prefixed_of, serve};

#[derive(Clone, Copy, Debug)]
enum Over {
    ByHand,
    FramedSend,
    FramedTuned,
    Pipeline,
}

const ALL: [Over; 4] = [
    Over::ByHand,
    Over::FramedSend,
    Over::FramedTuned,
    Over::Pipeline,
];

/// More than a block at a time.
#[divan::bench(args = ALL)]
fn large_frames(bencher: Bencher, over: Over) {
    requests(bencher, over, &Load::new(&prefixed_of(32 * 1024), 4));
}

#[divan::bench(args = ALL)]
fn small_frames(bencher: Bencher, over: Over) {
    requests(bencher, over, &Load::new(&prefixed_of(16), 512));
}

/// Each frame arrives in two reads.
#[divan::bench(args = ALL)]
fn half_frames(bencher: Bencher, over: Over) {
    requests(bencher, over, &Load::halves(&prefixed_of(1024)));
}

fn requests(bencher: Bencher, over: Over, load: &Load) {
    let client = match over {
        Over::ByHand => Client::of(|stream| by_hand(stream, prefixed)),
        Over::FramedSend => Client::of(framed_send),
        Over::FramedTuned => Client::of(framed_tuned),
        Over::Pipeline => Client::of_server(|| {
            let echo = async |frame: BytesMut| Ok::<_, BoxError>(frame.freeze());
            serve(Pipeline::new(LengthDelimitedCodec::new).service(service_fn(echo)))
        }),
    };
    client.bench(bencher, load);
}

/// Uses `Framed` as its documentation shows it: each reply is flushed.
async fn framed_send(stream: DuplexStream) -> Result<(), BoxError> {
    let mut framed = Framed::new(stream, LengthDelimitedCodec::new());
    while let Some(frame) = framed.next().await {
        framed.send(frame?.freeze()).await?;
    }
    Ok(())
}

/// Uses `Framed`, and flushes only when nothing more can be decoded.
async fn framed_tuned(stream: DuplexStream) -> Result<(), BoxError> {
    let mut framed = Framed::new(stream, LengthDelimitedCodec::new());
    loop {
        let next = match framed.next().now_or_never() {
            Some(next) => next,
            None => {
                SinkExt::<Bytes>::flush(&mut framed).await?;
                framed.next().await
            }
        };
        let Some(frame) = next else {
            return Ok(());
        };
        framed.feed(frame?.freeze()).await?;
    }
}
