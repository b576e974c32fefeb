//! Pipeline: requests reach the service in order, replies leave in order, and no finished reply is
//! lost.

mod support;

use std::convert::Infallible;
use std::future::{pending, ready};
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream;
use futures_util::stream::StreamExt as _;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::codec::{AnyDelimiterCodec, Decoder, Encoder, LengthDelimitedCodec, LinesCodec};
use tower::make::Shared;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::error::find_cause;
use tower_tcp::frame::{CodecExt as _, DecoderStalled, InOut, Lines, LinesError};
use tower_tcp::pipeline::{
    Closed, Limits, OnConnectLayer, Session, SessionService, ShutdownOnErrorLayer,
};
use tower_tcp::registry::{Groups, SlowPeer};
use tower_tcp::testkit::serve;
use tower_tcp::{BoxError, ConnectionEnded, ConnectionService, EndReason, Peer, Pipeline, Reply};

use support::{Clients, Ends, each_way, panic_if, serve_stream};

const MS: Duration = Duration::from_millis(1);

/// Counts the requests in progress.
struct InHand(Arc<AtomicUsize>);

impl InHand {
    fn begin(begun: &Arc<AtomicUsize>) -> Self {
        begun.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(begun))
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Waits the requested number of milliseconds, then returns the request.
async fn delayed(request: Bytes) -> Result<Bytes, BoxError> {
    let digits: String = request
        .iter()
        .map(|byte| char::from(*byte))
        .filter(char::is_ascii_digit)
        .collect();
    sleep(MS * digits.parse().unwrap_or(0)).await;
    if request.starts_with(b"fail") {
        return Err("failed".into());
    }
    Ok(request)
}

/// A codec of lines, in which certain words at the start of a line trigger faults of the codec.
#[derive(Default)]
struct Faulty(Lines);

impl Decoder for Faulty {
    type Item = Bytes;
    type Error = LinesError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, LinesError> {
        match self.0.decode(src)? {
            Some(line) if line.starts_with(b"decode-error") => {
                Err(io::Error::from(io::ErrorKind::InvalidData).into())
            }
            line => {
                let panics = |line: &Bytes| line.starts_with(b"decode-panic");
                panic_if(line.as_ref().is_some_and(panics));
                Ok(line)
            }
        }
    }
}

impl Encoder<Bytes> for Faulty {
    type Error = LinesError;

    fn encode(&mut self, line: Bytes, dst: &mut BytesMut) -> Result<(), LinesError> {
        if line.starts_with(b"encode") {
            dst.put_slice(b"half of a fra");
        }
        if line.starts_with(b"encode-error") {
            return Err(io::Error::from(io::ErrorKind::InvalidData).into());
        }
        panic_if(line.starts_with(b"encode-panic"));
        self.0.encode(line, dst)
    }
}

// Replies.

#[tokio::test(start_paused = true)]
async fn a_request_may_get_no_reply_or_one_or_several() {
    let repeat = service_fn(|request: Bytes| async move {
        let times = usize::from(request[0] - b'0');
        Ok::<_, Infallible>(vec![request; times])
    });

    for served in each_way(Pipeline::new(Lines::default).service(repeat)) {
        let mut client = served.client().await;
        client.send("0\n1\n3\n0\n2\n").await;
        client.finish().await;

        let replies = client.rest().await;
        drop(client);

        assert_eq!(replies, ["1", "3", "3", "3", "2", "2"], "{}", served.way());
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_may_get_a_reply_or_not() {
    let odd = service_fn(|request: Bytes| {
        ready(Ok::<_, Infallible>(
            Some(request).filter(|request| request[0] % 2 == 1),
        ))
    });

    for served in each_way(Pipeline::new(Lines::default).service(odd)) {
        let mut client = served.client().await;
        client.send("1\n2\n3\n").await;
        client.finish().await;

        assert_eq!(client.rest().await, ["1", "3"], "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_streamed_reply_arrives_frame_by_frame_and_whole_before_the_next() {
    let count = service_fn(|request: Bytes| async move {
        let frames = stream::unfold(0, move |n| {
            let frame = Bytes::from(format!("{}{n}", char::from(request[0])));
            async move {
                sleep(10 * MS).await;
                (n < 3).then_some((Ok::<_, BoxError>(frame), n + 1))
            }
        });
        Ok::<_, Infallible>(Reply::stream(frames))
    });

    for served in each_way(Pipeline::new(Lines::default).service(count)) {
        let begun = Instant::now();
        let mut client = served.client().await;
        client.send("a\nb\n").await;

        assert_eq!(client.line().await, "a0", "{}", served.way());
        assert_eq!(begun.elapsed(), 10 * MS, "{}", served.way());
        assert_eq!(client.line().await, "a1", "{}", served.way());
        assert_eq!(begun.elapsed(), 20 * MS, "{}", served.way());
        client.finish().await;
        assert_eq!(client.rest().await, ["a2", "b0", "b1", "b2"]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_in_a_streamed_reply_is_a_failed_request() {
    let breaks = service_fn(|request: Bytes| async move {
        let frames = [Ok(request), Err("broke".into())];
        Ok::<_, Infallible>(Reply::stream(stream::iter(frames)))
    });

    for served in each_way(Pipeline::new(Lines::default).service(breaks)) {
        let mut client = served.client().await;
        client.send("a\n").await;

        assert_eq!(client.rest().await, ["a"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::ServiceError);
    }
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_closes_is_the_last_and_calls_behind_it_are_dropped() {
    let running = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&running);
    let service = service_fn(move |request: Bytes| {
        let in_hand = InHand::begin(&counted);
        async move {
            let _in_hand = in_hand;
            match &request[..] {
                b"quit" => {
                    sleep(MS).await;
                    Ok::<_, Infallible>(Reply::from(Bytes::from("bye")).close())
                }
                b"hang" => pending().await,
                _ => Ok(Reply::from(request)),
            }
        }
    });

    for served in each_way(Pipeline::new(Lines::default).service(service)) {
        let begun = Instant::now();
        let mut client = served.client().await;
        client.send("a\nquit\nhang\nhang\n").await;

        assert_eq!(client.rest().await, ["a", "bye"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::ServiceClosed);
        assert_eq!(begun.elapsed(), MS, "{}", served.way());
        assert_eq!(running.load(Ordering::Relaxed), 0, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn replies_of_several_frames_of_a_stream_and_of_none_can_close() {
    let service = service_fn(|request: Bytes| async move {
        let reply = match &request[..] {
            b"several" => Reply::from(vec![request.clone(), request]),
            b"stream" => Reply::stream(stream::iter([Ok(request)])),
            _ => Reply::none(),
        };
        Ok::<_, Infallible>(reply.close())
    });

    for served in each_way(Pipeline::new(Lines::default).service(service)) {
        for (request, replies) in [
            ("several", &["several", "several"][..]),
            ("stream", &["stream"]),
            ("none", &[]),
        ] {
            let mut client = served.client().await;
            client.send(format!("{request}\nmore\n")).await;

            assert_eq!(client.rest().await, replies, "{} {request}", served.way());
            drop(client);
            assert_eq!(served.reason().await, EndReason::ServiceClosed);
        }
    }
}

// Pushes.

type Lined = Result<Reply<Bytes>, BoxError>;

/// Returns a make-service whose services call `call` with their peer.
fn with_peer<F>(
    call: impl Fn(Peer<Bytes>, Bytes) -> F + Clone + Send + 'static,
) -> impl Service<
    Peer<Bytes>,
    Response = impl Service<Bytes, Response = Reply<Bytes>, Error = BoxError, Future = F>
               + Send
               + 'static,
    Error = BoxError,
    Future: Send + 'static,
> + Clone
+ Send
+ 'static
where
    F: Future<Output = Lined> + Send + 'static,
{
    service_fn(move |peer: Peer<Bytes>| {
        let call = call.clone();
        ready(Ok(service_fn(move |request| call(peer.clone(), request))))
    })
}

#[tokio::test(start_paused = true)]
async fn pushes_go_out_before_between_and_behind_replies() {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        peer.send("hello".into()).await?;
        Ok::<_, BoxError>(service_fn(move |request: Bytes| {
            let peer = peer.clone();
            async move {
                peer.send([b"before ", &request[..]].concat().into())
                    .await?;
                let behind = [b"behind ", &request[..]].concat().into();
                tokio::spawn(async move {
                    sleep(MS).await;
                    peer.send(behind).await
                });
                Ok::<_, BoxError>(request)
            }
        }))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;

        assert_eq!(client.line().await, "hello", "{}", served.way());
        for request in ["a", "b"] {
            client.send(format!("{request}\n")).await;
            assert_eq!(client.line().await, format!("before {request}"));
            assert_eq!(client.line().await, request, "{}", served.way());
            assert_eq!(client.line().await, format!("behind {request}"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn pushes_go_out_between_the_frames_of_a_streamed_reply() {
    let make = with_peer(|peer, request| async move {
        let push = async move { peer.send("push".into()).await.map(|()| "2".into()) };
        let second = stream::once(async { push.await.map_err(BoxError::from) });
        Ok(Reply::stream(
            stream::once(ready(Ok(request))).chain(second),
        ))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;
        client.send("1\n").await;
        client.finish().await;

        assert_eq!(client.rest().await, ["1", "push", "2"], "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_push_to_a_resting_connection_goes_out_at_once() {
    let (hand_over, mut peers) = mpsc::channel(3);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let given = hand_over.try_send(peer);
        ready(given.map(|()| service_fn(delayed)))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;
        let peer = peers.recv().await.unwrap();
        sleep(1000 * MS).await;
        let begun = Instant::now();
        peer.send("news".into()).await.unwrap();

        assert_eq!(client.line().await, "news", "{}", served.way());
        assert_eq!(begun.elapsed(), Duration::ZERO, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_banner_of_many_frames_beyond_the_high_mark_completes() {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        for _ in 0..200 {
            peer.send(vec![b'x'; 999].into()).await?;
        }
        Ok::<_, BoxError>(service_fn(delayed))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;
        client.send("done\n").await;
        client.finish().await;

        let lines = client.rest().await;

        assert_eq!(lines.len(), 201, "{}", served.way());
        assert!(lines[..200].iter().all(|line| line.len() == 999));
        assert_eq!(lines[200], "done", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_banner_of_one_frame_beyond_the_high_mark_completes() {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        peer.send(vec![b'x'; 200_000].into()).await?;
        peer.send("second".into()).await?;
        Ok::<_, BoxError>(service_fn(delayed))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;

        assert_eq!(client.line().await.len(), 200_000, "{}", served.way());
        assert_eq!(client.line().await, "second", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_send_waits_above_the_high_mark_until_the_low_one() {
    let (hand_over, mut peers) = mpsc::channel(3);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let given = hand_over.try_send(peer);
        ready(given.map(|()| service_fn(delayed)))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;
        let peer = peers.recv().await.unwrap();
        // The memory stream holds 64 KiB, the connection as much, and the queue 16 frames.
        let sent = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&sent);
        let sender = tokio::spawn(async move {
            for _ in 0..400 {
                peer.send(vec![b'x'; 1023].into()).await.unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        sleep(MS).await;
        let at_the_mark = sent.load(Ordering::Relaxed);
        for _ in 0..20 {
            client.line().await;
        }
        sleep(MS).await;
        let above_the_low_mark = sent.load(Ordering::Relaxed);
        for _ in 20..400 {
            client.line().await;
        }
        sender.await.unwrap();

        assert!((128..=148).contains(&at_the_mark), "{at_the_mark}");
        assert_eq!(above_the_low_mark, at_the_mark, "{}", served.way());
        assert_eq!(sent.load(Ordering::Relaxed), 400, "{}", served.way());
    }
}

// Ends caused by the service.

#[tokio::test(start_paused = true)]
async fn a_close_answers_what_is_in_hand_and_drops_what_is_not_begun() {
    let make = with_peer(|peer, request| async move {
        peer.send("push".into()).await?;
        sleep(MS).await;
        peer.close();
        let refused = peer.send("too late".into()).await;
        sleep(MS).await;
        assert_eq!(refused, Err(Closed));
        Ok(request.into())
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));

    let mut client = served.client().await;
    client.send("a\nb\nc\n").await;
    let replies = client.rest().await;
    drop(client);

    assert_eq!(replies, ["push", "a"]);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn a_close_answers_all_that_is_in_hand_where_there_are_several() {
    let make = with_peer(|peer, request| async move {
        if &request[..] == b"close" {
            peer.close();
        }
        Ok(delayed(request).await?.into())
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);

    for served in each_way(pipeline).into_iter().skip(1) {
        let mut client = served.client().await;
        client.send("2\nclose\n").await;
        let mut replies = client.rest().await;
        replies.sort();
        drop(client);

        assert_eq!(replies, ["2", "close"], "{}", served.way());
        assert_eq!(served.reason().await, EndReason::ServiceClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_close_from_outside_ends_a_resting_connection() {
    let (hand_over, mut peers) = mpsc::channel(3);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let given = hand_over.try_send(peer);
        ready(given.map(|()| service_fn(delayed)))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;
        let peer = peers.recv().await.unwrap();
        peer.send("bye".into()).await.unwrap();
        peer.close();

        assert_eq!(client.rest().await, ["bye"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::ServiceClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn an_abort_drops_what_is_in_hand() {
    let make = with_peer(|peer, _request| async move {
        peer.send("written".into()).await?;
        sleep(MS).await;
        peer.abort();
        pending().await
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;
        client.send("a\nb\n").await;

        let replies = client.rest().await;

        assert_eq!(replies[0], "written", "{}", served.way());
        assert_eq!(
            served.reason().await,
            EndReason::Aborted,
            "{}",
            served.way()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_send_after_any_end_says_that_the_peer_is_gone() {
    let (hand_over, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let given = hand_over.try_send(peer);
        ready(given.map(|()| {
            service_fn(|request: Bytes| async move {
                assert_ne!(request, "panic");
                delayed(request).await
            })
        }))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        for end in [
            "peer leaves",
            "fail",
            "panic",
            "abort",
            "close",
            "server stops",
        ] {
            let mut client = served.client().await;
            let peer = peers.recv().await.unwrap();
            client.send(format!("{end}\n")).await;
            client.line().await;
            match end {
                "abort" => peer.abort(),
                "close" => peer.close(),
                "server stops" => served.handle().abort(),
                _ => {}
            }
            drop(client);
            let ended = served.reason().await;

            let sent = timeout(MS, peer.send("anyone?".into())).await;

            assert_eq!(sent, Ok(Err(Closed)), "{}: {ended}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_send_that_waits_when_the_connection_is_aborted_is_told() {
    let (hand_over, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let given = hand_over.try_send(peer);
        ready(given.map(|()| service_fn(delayed)))
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));
    let client = served.client().await;
    let peer = peers.recv().await.unwrap();
    let sender = tokio::spawn({
        let peer = peer.clone();
        async move { while peer.send(vec![b'x'; 1023].into()).await.is_ok() {} }
    });
    sleep(MS).await;
    assert!(!sender.is_finished());

    peer.abort();

    timeout(MS, sender).await.unwrap().unwrap();
    drop(client);
}

// Order.

#[tokio::test(start_paused = true)]
async fn e13_replies_keep_the_order_of_requests_whatever_they_take() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(delayed));

    for served in each_way(pipeline).into_iter().take(2) {
        let mut client = served.client().await;
        // Pseudo-random delays of 0 to 12 ms: multiples of 7919, modulo 13.
        let requests: Vec<_> = (0..1000_usize)
            .map(|n| format!("{} {}", "x".repeat(n % 50), n * 7919 % 13))
            .collect();
        client.send(requests.join("\n") + "\n").await;
        client.finish().await;

        assert_eq!(client.rest().await, requests, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn multiplexed_replies_go_out_as_they_finish() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(delayed));
    let served = serve(pipeline.multiplexed(8));
    let begun = Instant::now();
    let mut client = served.client().await;
    client.send("30\n10\n20\n").await;

    assert_eq!(client.line().await, "10");
    assert_eq!(begun.elapsed(), 10 * MS);
    assert_eq!(client.line().await, "20");
    assert_eq!(client.line().await, "30");
    assert_eq!(begun.elapsed(), 30 * MS);
}

#[tokio::test(start_paused = true)]
async fn a_request_is_not_taken_before_the_service_is_ready() {
    let (mock, mut requests) = tower_test::mock::pair::<Bytes, Bytes>();
    requests.allow(0);
    let pipeline = Pipeline::new(Lines::default).service(mock);
    let served = serve(pipeline.in_flight(8));
    let mut client = served.client().await;
    client.send("a\nb\n").await;

    let early = timeout(1000 * MS, requests.next_request()).await;
    requests.allow(1);
    let (request, answer) = requests.next_request().await.unwrap();
    let second = timeout(1000 * MS, requests.next_request()).await;
    answer.send_response(request.clone());

    assert!(early.is_err());
    assert_eq!(request, "a");
    assert!(second.is_err());
    assert_eq!(client.line().await, "a");
}

// Errors of the service.

#[tokio::test(start_paused = true)]
async fn e4_an_error_ends_the_connection_in_its_place_in_the_order() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(delayed));

    for served in each_way(pipeline).into_iter().take(2) {
        let mut client = served.client().await;
        client.send("20\n10\nfail\n0\n").await;

        assert_eq!(client.rest().await, ["20", "10"], "{}", served.way());
        drop(client);
        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::ServiceError, "{}", served.way());
        assert_eq!(end.error().unwrap().to_string(), "failed");
    }
}

#[tokio::test(start_paused = true)]
async fn e4_with_the_policy_off_an_error_gets_no_reply_and_the_connection_goes_on() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .shutdown_on_error(false);

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("1\nfail 2\n3\nfail\n4\n").await;
        client.finish().await;

        assert_eq!(client.rest().await, ["1", "3", "4"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn with_the_policy_off_a_marked_error_closes_all_the_same() {
    let service = ServiceBuilder::new()
        .layer(ShutdownOnErrorLayer::new())
        .service_fn(delayed);
    let pipeline = Pipeline::new(Lines::default)
        .service(service)
        .shutdown_on_error(false);

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("1\nfail 2\n3\n").await;

        assert_eq!(client.rest().await, ["1"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::ServiceError);
    }
}

// Errors that choose the reason of the end.

/// An error with another one as its cause, such as that of a layer.
#[derive(Debug, thiserror::Error)]
#[error("wrapped")]
struct Wrapped(#[source] BoxError);

fn bad() -> BoxError {
    ConnectionEnded::new(EndReason::CodecError, "bad").into()
}

/// Fails in the way that the request names, or answers it after its time.
async fn strict(request: Bytes) -> Result<Reply<Bytes>, BoxError> {
    let request = delayed(request).await?;
    match request.split(|byte| *byte == b' ').next() {
        Some(b"bad") => Err(bad()),
        Some(b"wrapped") => Err(Wrapped(bad()).into()),
        Some(b"stream") => Ok(Reply::stream(stream::iter([Err(bad())]))),
        Some(b"closed") => Err(ConnectionEnded::from(EndReason::ServiceClosed).into()),
        Some(b"limit") => Err(ConnectionEnded::from(EndReason::LimitExceeded).into()),
        _ => Ok(request.into()),
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_service_chooses_the_reason_whatever_the_policy() {
    for shutdown in [true, false] {
        let pipeline = Pipeline::new(Lines::default)
            .service(service_fn(strict))
            .farewell(|_, _| Bytes::from("bye"))
            .shutdown_on_error(shutdown);
        for served in each_way(pipeline) {
            for (request, reason, error) in [
                ("bad", EndReason::CodecError, Some("bad")),
                ("wrapped", EndReason::CodecError, Some("wrapped")),
                ("stream", EndReason::CodecError, Some("bad")),
                ("closed", EndReason::ServiceClosed, None),
                ("limit", EndReason::LimitExceeded, None),
            ] {
                let context = format!("{request}, {shutdown}, {}", served.way());
                let mut client = served.client().await;
                client.send(format!("1\n{request} 2\n3\n")).await;

                assert_eq!(client.rest().await, ["1"], "{context}");
                drop(client);
                let end = served.end().await;
                assert_eq!(end.reason(), reason, "{context}");
                let cause = end.error().map(ToString::to_string);
                assert_eq!(cause.as_deref(), error, "{context}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_reason_chosen_behind_the_end_of_input_replaces_only_an_orderly_one() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(strict))) {
        // One at a time, input behind a request is not decoded before the request has failed.
        for (input, alone, among_several) in [
            ("1\nbad 10\n", EndReason::CodecError, EndReason::CodecError),
            (
                "1\nclosed 10\n",
                EndReason::ServiceClosed,
                EndReason::PeerClosed,
            ),
            (
                "1\nbad 10\ncut",
                EndReason::CodecError,
                EndReason::Truncated,
            ),
        ] {
            let mut client = served.client().await;
            client.send(input).await;
            client.finish().await;

            assert_eq!(client.rest().await, ["1"], "{}", served.way());
            drop(client);
            let expected = match served.way() {
                "one at a time" => alone,
                _ => among_several,
            };
            assert_eq!(served.reason().await, expected, "{}: {input}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_reason_that_cuts_the_peer_off_does_not_wait_for_the_peer_to_read() {
    let flood = service_fn(|request: Bytes| async move {
        match &request[..] {
            b"flood" => Ok(vec![Bytes::from(vec![b'x'; 16 * 1024]); 16]),
            _ => Err(ConnectionEnded::from(EndReason::Aborted)),
        }
    });
    let limits = Limits::default().high_mark(1 << 20);

    for served in each_way(Pipeline::new(Lines::default).service(flood).limits(limits)) {
        // It reads nothing.
        let mut client = served.client().await;
        client.send("flood\nabort\n").await;
        let begun = Instant::now();

        assert_eq!(served.reason().await, EndReason::Aborted);
        assert_eq!(begun.elapsed(), Duration::ZERO, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_make_service_chooses_the_reason_too_and_one_of_poll_ready_does_not() {
    /// Fails before it is ready.
    #[derive(Clone)]
    struct Busy;

    impl Service<Bytes> for Busy {
        type Response = Bytes;
        type Error = Wrapped;
        type Future = std::future::Ready<Result<Bytes, Wrapped>>;

        fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Wrapped>> {
            Poll::Ready(Err(Wrapped(bad())))
        }

        fn call(&mut self, request: Bytes) -> Self::Future {
            ready(Ok(request))
        }
    }

    let turned_away = OnConnectLayer::new(|peer: Peer<Bytes>| async move {
        peer.send("421 no".into()).await?;
        Err::<(), _>(bad())
    });
    let make = ServiceBuilder::new()
        .layer(turned_away)
        .service(Shared::new(Busy));
    let busy = each_way(Pipeline::new(Lines::default).service(Busy));
    let turning_away = each_way(Pipeline::new(Lines::default).make_service(make));

    for (served, replies, reason) in [
        (busy, &[][..], EndReason::ServiceNotReady),
        (turning_away, &["421 no"], EndReason::CodecError),
    ] {
        for served in served {
            let mut client = served.client().await;
            client.send("1\n").await;

            assert_eq!(client.rest().await, replies, "{}", served.way());
            drop(client);
            assert_eq!(served.reason().await, reason, "{}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_chooses_the_reason_too() {
    struct Strict;

    impl Session<Bytes> for Strict {
        type Reply = Bytes;
        type Error = ConnectionEnded;

        async fn call(&mut self, request: Bytes) -> Result<Bytes, ConnectionEnded> {
            match &request[..] {
                b"bad" => Err(EndReason::Rejected.into()),
                _ => Ok(request),
            }
        }
    }

    let make = service_fn(|_: Peer<Bytes>| ready(Ok::<_, Infallible>(SessionService::new(Strict))));
    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;
        client.send("1\nbad\n2\n").await;

        assert_eq!(client.rest().await, ["1"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::Rejected);
    }
}

/// Is ready for some requests, then never again.
#[derive(Clone)]
struct ReadyFor(Arc<AtomicUsize>);

impl Service<Bytes> for ReadyFor {
    type Response = Bytes;
    type Error = BoxError;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Bytes, BoxError>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self.0.load(Ordering::Relaxed) {
            0 => Poll::Ready(Err("worn out".into())),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, request: Bytes) -> Self::Future {
        self.0.fetch_sub(1, Ordering::Relaxed);
        Box::pin(delayed(request))
    }
}

#[tokio::test(start_paused = true)]
async fn e6_a_service_that_fails_to_be_ready_is_called_no_more_and_earlier_calls_are_answered() {
    let left = Arc::new(AtomicUsize::new(0));
    let pipeline = Pipeline::new(Lines::default)
        .service(ReadyFor(Arc::clone(&left)))
        .shutdown_on_error(false);

    for served in each_way(pipeline) {
        left.store(2, Ordering::Relaxed);
        let mut client = served.client().await;
        client.send("1\n2\n3\n").await;

        assert_eq!(client.rest().await, ["1", "2"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::ServiceNotReady);
        assert_eq!(left.load(Ordering::Relaxed), 0, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_behind_the_end_of_input_is_the_reason_all_the_same() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
        let mut client = served.client().await;
        client.send("1\nfail 10\n").await;
        client.finish().await;

        assert_eq!(client.rest().await, ["1"], "{}", served.way());
        drop(client);
        let reason = served.reason().await;
        assert_eq!(reason, EndReason::ServiceError, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_before_its_replies_has_not_closed_in_good_order() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
        let mut client = served.client().await;
        client.send("1\n").await;
        drop(client);

        let reason = served.reason().await;

        assert_eq!(reason, EndReason::PeerReset, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_make_service_that_fails_turns_the_peer_away_behind_what_it_said() {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        peer.send("421 not today".into()).await?;
        if peer.info().get::<()>().is_none() {
            return Err(BoxError::from("not today"));
        }
        Ok(service_fn(delayed))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;
        client.send("1\n").await;

        assert_eq!(client.rest().await, ["421 not today"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::MakeServiceError);
    }
}

// Faults of frames and codecs.

#[tokio::test(start_paused = true)]
async fn c9_answers_before_a_bad_frame_are_delivered() {
    let pipeline = Pipeline::new(Faulty::default).service(service_fn(delayed));

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("1\n2\n3\ndecode-error\n4\n").await;

        assert_eq!(client.rest().await, ["1", "2", "3"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::CodecError);
    }
}

#[tokio::test(start_paused = true)]
async fn c9_answers_before_a_frame_that_is_too_large_are_delivered() {
    let pipeline = Pipeline::new(|| Lines::default().max_line(10)).service(service_fn(delayed));

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("1\n2\n3\n12345678901\n4\n").await;

        assert_eq!(client.rest().await, ["1", "2", "3"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::FrameTooLarge);
    }
}

/// Each of these codecs has an error of its own for a frame that is too large.
#[tokio::test(start_paused = true)]
async fn a_frame_that_is_too_large_for_a_codec_of_tokio_util_has_the_same_reason() {
    let lines = || LinesCodec::new_with_max_length(10);
    let words = || AnyDelimiterCodec::new_with_max_length(b" ".to_vec(), b" ".to_vec(), 10);
    let framed = || {
        let mut codec = LengthDelimitedCodec::new();
        codec.set_max_frame_length(10);
        InOut::new(codec, Lines::default())
    };
    let frozen = async |frame: BytesMut| Ok::<_, BoxError>(frame.freeze());
    let same = async |text: String| Ok::<_, BoxError>(text);
    let text = async |text: Bytes| Ok::<_, BoxError>(String::from_utf8_lossy(&text).into_owned());
    for (served, input) in [
        (
            serve(Pipeline::new(lines).service::<String, _>(service_fn(same))),
            "12345678901\n",
        ),
        (
            serve(Pipeline::new(words).service::<String, _>(service_fn(text))),
            "12345678901 ",
        ),
        (
            serve(Pipeline::new(framed).service(service_fn(frozen))),
            "\0\0\0\u{b}12345678901",
        ),
    ] {
        let mut client = served.client().await;
        client.send(input).await;

        assert!(client.rest().await.is_empty(), "{input:?}");
        drop(client);
        assert_eq!(served.reason().await, EndReason::FrameTooLarge, "{input:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn c10_a_reply_that_cannot_be_encoded_ends_the_connection_behind_those_before_it() {
    let pipeline = Pipeline::new(Faulty::default).service(service_fn(delayed));

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("1\n2\nencode-error 3\n4\n").await;

        assert_eq!(client.rest().await, ["1", "2"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::EncodeError);
    }
}

#[tokio::test(start_paused = true)]
async fn c11_answers_before_a_panic_of_the_decoder_are_delivered() {
    let pipeline = Pipeline::new(Faulty::default).service(service_fn(delayed));

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("1\n2\n3\ndecode-panic\n4\n").await;

        assert_eq!(client.rest().await, ["1", "2", "3"], "{}", served.way());
        drop(client);
        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::Panic, "{}", served.way());
        assert_eq!(
            end.error().unwrap().to_string(),
            "panicked: something that is not text"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn c11_answers_before_a_panic_of_the_encoder_are_delivered_and_no_torn_frame() {
    let pipeline = Pipeline::new(Faulty::default).service(service_fn(delayed));

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("1\n2\nencode-panic 3\n4\n").await;

        assert_eq!(client.rest().await, ["1", "2"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::Panic, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn answers_before_frames_that_all_panic_in_the_encoder_are_delivered() {
    let make = service_fn(|peer: Peer<Bytes>| {
        let service = service_fn(move |request: Bytes| {
            if request == "push" {
                for _ in 0..5 {
                    peer.try_send("encode-panic".into()).expect("there is room");
                }
            }
            ready(Ok::<_, Infallible>(request))
        });
        ready(Ok::<_, Infallible>(service))
    });

    for served in each_way(Pipeline::new(Faulty::default).make_service(make)) {
        let mut client = served.client().await;
        client.send("1\npush\n").await;

        let replies = client.rest().await;
        assert_eq!(replies[0], "1", "{}", served.way());
        // With any order of replies, the finished one is still sent.
        let others: &[_] = match served.way() {
            "multiplexed" => &["push"],
            _ => &[],
        };
        assert_eq!(&replies[1..], others, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::Panic, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn frames_around_one_that_panics_in_the_encoder_are_delivered() {
    let groups = Groups::<(), Bytes>::new();
    let shared = groups.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        let groups = shared.clone();
        async move {
            groups.join((), &peer).await?;
            Ok::<_, BoxError>(service_fn(delayed))
        }
    });
    for served in each_way(Pipeline::new(Faulty::default).make_service(make)) {
        let mut client = served.client().await;
        assert_eq!(client.ask("1").await, "1");

        for frame in ["first", "encode-panic", "last"] {
            let sent = groups
                .broadcast(&(), frame.into(), |_| true, SlowPeer::Skip)
                .await;
            assert_eq!(sent.sent(), 1, "{}", served.way());
        }

        assert_eq!(client.rest().await, ["first", "last"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::Panic, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_greeting_before_a_panic_of_the_encoder_is_delivered() {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        for frame in ["welcome", "encode-panic"] {
            peer.send(frame.into()).await?;
        }
        peer.flushed().await?;
        Ok::<_, BoxError>(service_fn(delayed))
    });

    for served in each_way(Pipeline::new(Faulty::default).make_service(make)) {
        let mut client = served.client().await;

        assert_eq!(client.rest().await, ["welcome"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::Panic, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn c4_a_frame_that_is_cut_off_is_reported_and_not_delivered() {
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&seen);
    let echo = service_fn(move |request: Bytes| {
        counted.fetch_add(1, Ordering::Relaxed);
        delayed(request)
    });

    for served in each_way(Pipeline::new(Lines::default).service(echo)) {
        seen.store(0, Ordering::Relaxed);
        let mut client = served.client().await;
        client.send("1\n2\n3 is cut").await;
        client.finish().await;

        assert_eq!(client.rest().await, ["1", "2"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::Truncated);
        assert_eq!(seen.load(Ordering::Relaxed), 2, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn c3_an_announced_length_beyond_the_codecs_limit_is_refused_at_its_header() {
    let codec = || {
        LengthDelimitedCodec::builder()
            .max_frame_length(64 * 1024)
            .new_codec()
    };
    let never = service_fn(|_: BytesMut| pending::<Result<Bytes, BoxError>>());

    for served in each_way(Pipeline::new(codec).service(never)) {
        for announced in [64 * 1024 + 1, 8 << 20, u32::MAX] {
            let mut client = served.client().await;
            client.send(announced.to_be_bytes()).await;

            assert_eq!(client.rest().await, [""; 0], "{announced}");
            drop(client);
            assert_eq!(served.reason().await, EndReason::FrameTooLarge);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_is_as_large_as_the_limit_at_most_whatever_the_codec_allows() {
    let pipeline = Pipeline::new(|| Lines::default().max_line(1 << 20))
        .service(service_fn(|line: Bytes| ready(Ok::<_, Infallible>(line))))
        .limits(Limits::default().max_frame(100_000));

    for served in each_way(pipeline) {
        for (line, reason) in [
            (99_999, EndReason::PeerClosed),
            (100_000, EndReason::FrameTooLarge),
        ] {
            let mut client = served.client().await;
            let mut frame = vec![b'x'; line];
            frame.push(b'\n');
            client.send(frame).await;
            client.finish().await;

            let replies = client.rest().await;
            drop(client);

            let expected = usize::from(reason == EndReason::PeerClosed);
            assert_eq!(replies.len(), expected, "{} {line}", served.way());
            assert_eq!(served.reason().await, reason, "{} {line}", served.way());
        }
    }
}

// Ends caused by the peer.

#[tokio::test(start_paused = true)]
async fn d2_a_peer_that_finishes_sending_gets_all_its_replies() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(delayed));

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("10\n20\n30\n").await;
        client.finish().await;

        assert_eq!(client.rest().await, ["10", "20", "30"], "{}", served.way());
        drop(client);
        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::PeerClosed, "{}", served.way());
        assert_eq!(end.requests(), 3);
    }
}

/// Splits a line of a number into as many items. After a line `spin` it makes items without end,
/// and after `last` it does so at the end of input.
#[derive(Default)]
struct Splits {
    lines: Lines,
    left: usize,
    spins_at_end: bool,
}

impl Decoder for Splits {
    type Item = Bytes;
    type Error = LinesError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, LinesError> {
        if self.left == 0 {
            let Some(line) = self.lines.decode(src)? else {
                return Ok(None);
            };
            self.left = match &line[..] {
                b"spin" => usize::MAX,
                b"last" => 1,
                digits => String::from_utf8_lossy(digits).parse().unwrap_or(1),
            };
            self.spins_at_end = line == "last";
        }
        self.left -= 1;
        Ok(Some(Bytes::from_static(b"item")))
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, LinesError> {
        if self.spins_at_end && src.is_empty() {
            self.left = 1;
        }
        self.decode(src)
    }
}

impl Encoder<Bytes> for Splits {
    type Error = LinesError;

    fn encode(&mut self, line: Bytes, dst: &mut BytesMut) -> Result<(), LinesError> {
        self.lines.encode(line, dst)
    }
}

#[tokio::test(start_paused = true)]
async fn a_decoder_that_makes_frames_without_end_of_no_input_ends_its_connection() {
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&begun);
    let silent = service_fn(move |_: Bytes| {
        counted.fetch_add(1, Ordering::Relaxed);
        ready(Ok::<_, Infallible>(None::<Bytes>))
    });

    for served in each_way(Pipeline::new(Splits::default).service(silent)) {
        for fault in ["spin\n", "last\n"] {
            begun.store(0, Ordering::Relaxed);
            let replies = served.exchange(fault).await;

            let (way, end) = (served.way(), served.end().await);
            let cause = end.error().map(ToString::to_string).unwrap_or_default();
            assert_eq!(replies, "", "{way}");
            assert_eq!(end.reason(), EndReason::CodecError, "{way} {fault}");
            assert!(cause.contains("without taking input"), "{way} {cause}");
            assert!(begun.load(Ordering::Relaxed) <= 65_537, "{way} {fault}");
        }
    }
}

/// Returns empty frames without end.
#[derive(Clone)]
struct Empties;

impl Decoder for Empties {
    type Item = Bytes;
    type Error = io::Error;

    fn decode(&mut self, _: &mut BytesMut) -> io::Result<Option<Bytes>> {
        Ok(Some(Bytes::new()))
    }
}

impl Encoder<Bytes> for Empties {
    type Error = io::Error;

    fn encode(&mut self, frame: Bytes, dst: &mut BytesMut) -> io::Result<()> {
        dst.extend_from_slice(&frame);
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn codecs_that_skip_or_join_items_end_a_connection_whose_decoder_never_stops() {
    async fn check<F, K, T>(pipeline: Pipeline<F, K, T>, input: &str)
    where
        Pipeline<F, K, T>: ConnectionService<DuplexStream> + Clone,
    {
        let served = serve(pipeline);

        served.exchange(input).await;

        let end = served.end().await;
        let cause = end
            .error()
            .and_then(|err| find_cause::<DecoderStalled>(err));
        assert_eq!(end.reason(), EndReason::CodecError, "{input}");
        assert!(cause.is_some(), "{input} {:?}", end.error());
    }
    let echo = service_fn(|line: Bytes| ready(Ok::<_, Infallible>(line)));
    let filter = || Splits::default().filter_decode(|_: &Bytes| false);
    for input in ["spin\n", "last\n"] {
        check(Pipeline::new(filter).service(echo), input).await;
    }
    let then = || Empties.then(Lines::default());
    check(Pipeline::new(then).service(echo), "a\n").await;
    let chunks = || Empties.chunks(NonZeroUsize::MAX);
    let joined = service_fn(|chunk: Vec<Bytes>| ready(Ok::<_, Infallible>(chunk)));
    check(Pipeline::new(chunks).service(joined), "a\n").await;
}

#[tokio::test(start_paused = true)]
async fn a_decoder_may_split_each_frame_into_tens_of_thousands() {
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&begun);
    let silent = service_fn(move |_: Bytes| {
        counted.fetch_add(1, Ordering::Relaxed);
        ready(Ok::<_, Infallible>(None::<Bytes>))
    });

    for served in each_way(Pipeline::new(Splits::default).service(silent)) {
        begun.store(0, Ordering::Relaxed);
        let _none = served.exchange("60000\n60000\n1\n60000\n").await;

        assert_eq!(begun.load(Ordering::Relaxed), 180_001, "{}", served.way());
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_decoder_may_split_a_frame_into_as_many_as_the_largest_frame_has_bytes() {
    const LINES: usize = 70_000;
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&begun);
    let silent = service_fn(move |_: Bytes| {
        counted.fetch_add(1, Ordering::Relaxed);
        ready(Ok::<_, Infallible>(None::<Bytes>))
    });
    let codec = || LengthDelimitedCodec::new().then(Lines::default());
    let pipeline = Pipeline::new(codec)
        .service(silent)
        .limits(Limits::default().max_frame(1024 * 1024));
    let length = u32::try_from(LINES).expect("it is small").to_be_bytes();
    let frame = [&length[..], &[b'\n'; LINES]].concat();

    for served in each_way(pipeline) {
        begun.store(0, Ordering::Relaxed);
        let mut client = served.client().await;
        client.send(&frame).await;
        drop(client);

        let reason = served.reason().await;
        assert_eq!(reason, EndReason::PeerClosed, "{}", served.way());
        assert_eq!(begun.load(Ordering::Relaxed), LINES, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn c8_m3_empty_frames_without_end_leave_other_tasks_their_turns() {
    let taken = Arc::new(AtomicUsize::new(0));
    let taking = Arc::clone(&taken);
    let count = service_fn(move |line: Bytes| {
        assert!(line.is_empty());
        taking.fetch_add(1, Ordering::Relaxed);
        ready(Ok::<_, BoxError>(None::<Bytes>))
    });
    let endless = tokio::io::join(tokio::io::repeat(b'\n'), tokio::io::sink());
    let served = serve_stream(endless, Pipeline::new(Lines::default).service(count));

    for _ in 0..20 {
        let before = taken.load(Ordering::Relaxed);
        tokio::task::yield_now().await;
        let now = taken.load(Ordering::Relaxed);
        // tokio polls up to 61 times before it comes back to this test.
        assert!(now <= before + 61 * 256, "{before}, then {now}");
    }

    assert!(taken.load(Ordering::Relaxed) > 10_000);
    drop(served);
}
