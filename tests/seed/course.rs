//! Scenarios 11 and 14: watermarks, and codecs that change within a connection.

use std::convert::Infallible;
use std::future::ready;
use std::num::NonZeroUsize;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::codec::{Decoder, Encoder};
use tower::service_fn;
use tower_tcp::BoxError;
use tower_tcp::frame::{Block, Lines};
use tower_tcp::pipeline::{Crossing, Crossings, Limits, Watermarks};
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{Peer, Pipeline};

use super::support::{Clients, settled};
use super::{Journal, echo, text};

/// The size of a large push, the line end included.
const BIG: usize = 9_000_000;

fn big() -> Bytes {
    vec![b'x'; BIG - 1].into()
}

/// Serves with marks of 100,000 and 6,000,000 bytes. The receiver yields the peers.
fn marked() -> (Served, mpsc::Receiver<Peer<Bytes>>) {
    let (tell, told) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room for one");
        ready(Ok::<_, Infallible>(service_fn(echo)))
    });
    let marks = Watermarks::new(100_000, 6_000_000).expect("low is below high");
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    (
        serve(pipeline.limits(Limits::default().watermarks(marks))),
        told,
    )
}

/// Returns whether no crossing is pending.
async fn none_is_crossed(crossings: &mut Crossings<Bytes>) -> bool {
    let a_while = Duration::from_millis(10);
    timeout(a_while, crossings.next()).await.is_err()
}

#[tokio::test(start_paused = true)]
async fn s11_x70_high_comes_once_at_the_high_mark_and_low_once_at_the_low_mark() {
    let (served, mut peers) = marked();
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is connected");
    let mut crossings = peer.crossings();

    peer.send(big()).await.expect("it is connected");
    assert_eq!(crossings.next().await, Some(Crossing::High));
    let mut heard = vec![0; BIG - 200_000];
    client.0.read_exact(&mut heard).await.expect("it is coming");
    assert!(none_is_crossed(&mut crossings).await);
    let mut rest = vec![0; 200_000];
    client.0.read_exact(&mut rest).await.expect("it is coming");

    assert_eq!(crossings.next().await, Some(Crossing::Low));
    assert!(none_is_crossed(&mut crossings).await);
    peer.close();
    assert!(client.rest().await.is_empty());
    drop(client);
    assert_eq!(crossings.next().await, None);
}

#[tokio::test(start_paused = true)]
async fn s11_x71_a_small_write_in_between_costs_nobody_the_low_mark() {
    let (served, mut peers) = marked();
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is connected");
    let mut crossings = peer.crossings();
    peer.send(big()).await.expect("it is connected");
    assert_eq!(crossings.next().await, Some(Crossing::High));

    let mut heard = vec![0; 4_000_000];
    client.0.read_exact(&mut heard).await.expect("it is coming");
    settled().await;
    let between = peer.buffered().bytes();
    let sender = peer.clone();
    let small = tokio::spawn(async move { sender.send("more".into()).await });
    assert!(none_is_crossed(&mut crossings).await);
    let mut rest = vec![0; BIG - 4_000_000];
    client.0.read_exact(&mut rest).await.expect("it is coming");

    assert!((100_000..6_000_000).contains(&between), "{between}");
    assert_eq!(crossings.next().await, Some(Crossing::Low));
    assert_eq!(client.line().await, "more");
    assert_eq!(small.await.expect("it does not panic"), Ok(()));
    assert!(none_is_crossed(&mut crossings).await);
}

#[tokio::test(start_paused = true)]
async fn s11_x71b_x71c_marks_that_another_task_lowers_below_what_waits_are_crossed_at_once() {
    let (served, mut peers) = marked();
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is connected");
    let mut crossings = peer.crossings();
    let below = vec![b'x'; 5_000_000 - 1].into();
    peer.send(below).await.expect("it is connected");
    assert!(none_is_crossed(&mut crossings).await);

    let other = peer.clone();
    let lower = Watermarks::new(10_000, 1_000_000).expect("low is below high");
    let lowered = tokio::spawn(async move { other.set_watermarks(lower) });
    lowered.await.expect("it does not panic");

    assert_eq!(crossings.next().await, Some(Crossing::High));
    let mut heard = vec![0; 5_000_000];
    client.0.read_exact(&mut heard).await.expect("it is coming");
    assert_eq!(crossings.next().await, Some(Crossing::Low));
}

#[test]
fn s11_x72_x73_marks_that_make_no_sense_are_refused_before_anybody_connects() {
    assert!(Watermarks::new(0, 0).is_err());
    assert!(Watermarks::new(2, 1).is_err());
    assert!(Watermarks::new(1, 1).is_err());
    assert!(Watermarks::new(0, 1).is_ok());
}

#[tokio::test(start_paused = true)]
async fn s11_x74_a_flush_of_nothing_is_done_at_once_and_several_writes_are_flushed_together() {
    let (served, mut peers) = marked();
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is connected");

    assert_eq!(peer.flushed().await, Ok(()));
    for line in ["one", "two", "three"] {
        peer.send(line.into()).await.expect("it is connected");
    }
    let before = peer.buffered();
    assert_eq!(peer.flushed().await, Ok(()));

    assert_eq!((before.frames(), before.bytes()), (3, 0));
    assert_eq!((peer.buffered().frames(), peer.buffered().bytes()), (0, 0));
    for line in ["one", "two", "three"] {
        assert_eq!(client.line().await, line);
    }
}

#[tokio::test(start_paused = true)]
async fn s11_x79_another_task_sends_and_flushes_as_the_connections_own_does() {
    let (served, mut peers) = marked();
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is connected");

    let other = std::thread::spawn(move || {
        futures_util::future::FutureExt::now_or_never(peer.send("from afar".into()))
            .expect("there is room")
            .map(|()| peer)
    });
    let peer = other.join().expect("it does not panic").expect("it is in");

    assert_eq!(peer.flushed().await, Ok(()));
    assert_eq!(client.line().await, "from afar");
}

/// A codec with two modes. It changes mode when it encodes a certain word.
#[derive(Default)]
struct Switching {
    lines: Lines,
    blocks: Option<Block>,
}

enum Out {
    Text(Bytes),
    ThenBlocks(Bytes),
    ThenLines(Bytes),
}

const FOUR: NonZeroUsize = NonZeroUsize::new(4).expect("it is not zero");

impl Decoder for Switching {
    type Item = Bytes;
    type Error = BoxError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, BoxError> {
        Ok(match &mut self.blocks {
            Some(blocks) => blocks.decode(src)?,
            None => self.lines.decode(src)?,
        })
    }
}

impl Encoder<Out> for Switching {
    type Error = BoxError;

    fn encode(&mut self, out: Out, dst: &mut BytesMut) -> Result<(), BoxError> {
        let (Out::Text(text) | Out::ThenBlocks(text) | Out::ThenLines(text)) = &out;
        match &mut self.blocks {
            Some(_) => dst.extend_from_slice(&[text, &b"|"[..]].concat()),
            None => self.lines.encode(text.clone(), dst)?,
        }
        match out {
            Out::Text(_) => {}
            Out::ThenBlocks(_) => self.blocks = Some(Block::new(FOUR)),
            Out::ThenLines(_) => self.blocks = None,
        }
        Ok(())
    }
}

/// Serves with a codec that changes at `block` and at `line`. Records each frame when it arrives
/// and when it is done.
fn switching(journal: &Journal) -> Served {
    let journal = journal.clone();
    let service = service_fn(move |frame: Bytes| {
        let noted = journal.clone();
        async move {
            noted.note(text(&frame));
            tokio::task::yield_now().await;
            noted.note("done");
            Ok::<_, BoxError>(match &*frame {
                b"block" => Out::ThenBlocks(frame),
                b"line" => Out::ThenLines(frame),
                _ => Out::Text(frame),
            })
        }
    });
    serve(Pipeline::new(Switching::default).service(service))
}

#[tokio::test(start_paused = true)]
async fn s14_x83_a_codec_that_changes_reads_on_where_it_was_never_within_a_call_never_twice() {
    let journal = Journal::default();
    let served = switching(&journal);

    let mut client = served.client().await;
    client.send("one\nblock\n12345678line").await;
    client.send("two\nblock\nline").await;
    client.send("three\n").await;
    client.finish().await;
    let heard = client.rest().await;

    let frames = [
        "one", "block", "1234", "5678", "line", "two", "block", "line", "three",
    ];
    let expected: Vec<_> = frames.iter().flat_map(|frame| [*frame, "done"]).collect();
    assert_eq!(journal.all(), expected);
    assert_eq!(
        heard,
        ["one", "block", "1234|5678|line|two", "block", "line|three"]
    );
}

#[tokio::test(start_paused = true)]
async fn s14_x84_what_was_sent_before_a_codec_changes_keeps_its_encoding() {
    let (tell, mut told) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Out>| {
        tell.try_send(peer).expect("one comes");
        ready(Ok::<_, Infallible>(service_fn(|frame: Bytes| {
            ready(Ok::<_, Infallible>(Out::Text(frame)))
        })))
    });
    let served = serve(Pipeline::new(Switching::default).make_service(make));
    let mut client = served.client().await;
    let peer = told.recv().await.expect("it is connected");

    for out in [
        Out::Text("one".into()),
        Out::ThenBlocks("two".into()),
        Out::Text("three".into()),
        Out::Text("four".into()),
    ] {
        peer.send(out).await.expect("it is connected");
    }
    peer.close();

    assert_eq!(client.rest().await, ["one", "two", "three|four|"]);
}
