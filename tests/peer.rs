//! `Peer`: watermarks with true hysteresis, each crossing reported once, a flush that can be
//! awaited, and an end that can be awaited.

mod support;

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use support::{Clients, Ends, each_way, serve_stream, settled};
use tokio::io::{AsyncRead, AsyncReadExt, DuplexStream};
use tokio::net::TcpSocket;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tower::util::BoxCloneSyncService;
use tower::{ServiceExt, service_fn};
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::make::MakePerConnection;
use tower_tcp::pipeline::{Closed, Crossing, Crossings, Limits, TrySendError, Watermarks};
use tower_tcp::testkit::{Served, serve, serve_with};
use tower_tcp::{BoxError, EndReason, Peer, Pipeline, Server};

const KIB: usize = 1024;

const SECOND: Duration = Duration::from_secs(1);

type Make = BoxCloneSyncService<Peer<Bytes>, Echo, BoxError>;
type Echo = BoxCloneSyncService<Bytes, Bytes, Infallible>;

type Echoes = Pipeline<fn() -> Lines, MakePerConnection<Make>, Bytes>;

/// An echo. The receiver yields its peers.
fn echo_with_peers() -> (Echoes, mpsc::Receiver<Peer<Bytes>>) {
    let (tell, peers) = mpsc::channel(64);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let tell = tell.clone();
        async move {
            tell.send(peer).await?;
            let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
            Ok::<_, BoxError>(Echo::new(echo))
        }
    });
    let codec: fn() -> Lines = Lines::default;
    (Pipeline::new(codec).make_service(Make::new(make)), peers)
}

/// Opens one connection over a stream that holds 1 KiB. Returns the client, the peer and the
/// server.
async fn stalled(marks: Watermarks) -> (DuplexStream, Peer<Bytes>, Served<()>) {
    let (pipeline, mut peers) = echo_with_peers();
    let limits = Limits::default().watermarks(marks);
    let deadlines = Deadlines::default().write(None).idle(None);
    let (client, io) = tokio::io::duplex(KIB);
    let served = serve_stream(io, pipeline.limits(limits).deadlines(deadlines));
    let peer = peers.recv().await.expect("it is served");
    (client, peer, served)
}

fn marks(low: usize, high: usize) -> Watermarks {
    Watermarks::new(low, high).expect("low is below high")
}

/// Returns a line of `bytes` bytes on the wire.
fn line_of(bytes: usize) -> Bytes {
    vec![b'x'; bytes - 1].into()
}

async fn read<Io: AsyncRead + Unpin>(client: &mut Io, bytes: usize) -> Vec<u8> {
    let mut read = vec![0; bytes];
    let whole = timeout(Duration::from_secs(60), client.read_exact(&mut read));
    whole.await.expect("it comes").expect("all of it");
    read
}

/// Returns the next crossing if there has been one.
async fn crossed<M>(crossings: &mut Crossings<Bytes, M>) -> Option<Crossing> {
    let next = timeout(Duration::from_millis(1), crossings.next()).await;
    next.ok().flatten()
}

#[tokio::test(start_paused = true)]
async fn flushed_waits_until_all_before_it_is_written() {
    let (mut client, peer, _served) = stalled(Watermarks::below(64 * KIB)).await;
    peer.send(line_of(4 * KIB)).await.expect("it is open");
    let mut flushed = tokio_test::task::spawn(peer.flushed());

    settled().await;
    assert!(
        flushed.poll().is_pending(),
        "3 KiB have no room in the pipe"
    );
    read(&mut client, 3 * KIB - 1).await;
    settled().await;
    assert!(
        flushed.poll().is_pending(),
        "a byte has no room in the pipe"
    );
    read(&mut client, 1).await;
    settled().await;

    assert!(flushed.is_woken());
    tokio_test::assert_ready_ok!(flushed.poll());
}

#[tokio::test(start_paused = true)]
async fn flushed_of_a_connection_that_has_nothing_to_write_is_done() {
    let (pipeline, mut peers) = echo_with_peers();
    for served in each_way(pipeline) {
        let client = served.client().await;
        let peer = peers.recv().await.expect("it is served");

        let flushed = timeout(Duration::from_secs(1), peer.flushed()).await;

        assert_eq!(flushed, Ok(Ok(())), "{}", served.way());
        drop(client);
    }
}

#[tokio::test(start_paused = true)]
async fn flushed_is_done_though_others_push_without_end() {
    let (mut client, peer, _served) = stalled(Watermarks::below(8 * KIB)).await;
    let pusher = peer.clone();
    let pushing = tokio::spawn(async move { while pusher.send(line_of(700)).await.is_ok() {} });
    let reading = tokio::spawn(async move {
        let mut block = [0; 100];
        while client.read(&mut block).await.is_ok_and(|n| n > 0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    settled().await;

    let flushed = timeout(Duration::from_secs(10), peer.flushed()).await;

    assert_eq!(flushed, Ok(Ok(())));
    assert!(!pushing.is_finished());
    peer.abort();
    reading.await.expect("it does not panic");
}

#[tokio::test(start_paused = true)]
async fn one_who_sends_without_end_leaves_room_for_others() {
    let (mut client, peer, _served) = stalled(Watermarks::below(8 * KIB)).await;
    let greedy = peer.clone();
    let pushing = tokio::spawn(async move { while greedy.send(line_of(100)).await.is_ok() {} });
    settled().await;
    let sending = tokio::spawn(async move {
        for _ in 0..100 {
            peer.send(line_of(10)).await.expect("it is open");
        }
    });

    let mut lines = Vec::new();
    while !sending.is_finished() {
        lines.extend(read(&mut client, 100).await);
        assert!(lines.len() < 500 * KIB, "a hundred frames take their turns");
    }

    assert!(!pushing.is_finished());
}

#[tokio::test(start_paused = true)]
async fn flushed_that_cannot_be_any_more_says_that_the_peer_is_gone() {
    let (client, peer, served) = stalled(Watermarks::below(64 * KIB)).await;
    peer.send(line_of(4 * KIB)).await.expect("it is open");
    let flushed = tokio::spawn({
        let peer = peer.clone();
        async move { peer.flushed().await }
    });
    settled().await;

    peer.abort();

    assert_eq!(flushed.await.expect("it does not panic"), Err(Closed));
    assert_eq!(peer.flushed().await, Err(Closed));
    assert_eq!(served.reason().await, EndReason::Aborted);
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn a_close_is_no_excuse_for_what_was_sent_and_awaited_before() {
    let (mut client, peer, served) = stalled(Watermarks::below(64 * KIB)).await;
    peer.send(line_of(4 * KIB)).await.expect("it is open");
    let flushed = tokio::spawn({
        let peer = peer.clone();
        async move { peer.flushed().await }
    });
    settled().await;

    peer.close();
    let mut all = Vec::new();
    client
        .read_to_end(&mut all)
        .await
        .expect("it closes in good order");

    assert_eq!(all.len(), 4 * KIB);
    assert_eq!(flushed.await.expect("it does not panic"), Ok(()));
    drop(client);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn try_send_gives_back_what_has_no_room() {
    let (client, peer, served) = stalled(Watermarks::below(2 * KIB)).await;
    peer.send(line_of(4 * KIB)).await.expect("it is open");
    settled().await;

    let above = peer.try_send("above".into());
    peer.abort();
    served.reason().await;
    let gone = peer.try_send("gone".into());

    assert_eq!(above, Err(TrySendError::Full("above".into())));
    assert_eq!(gone, Err(TrySendError::Closed("gone".into())));
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn what_is_buffered_is_known_in_frames_and_then_in_bytes() {
    let (mut client, peer, _served) = stalled(Watermarks::below(64 * KIB)).await;
    for _ in 0..3 {
        peer.try_send(line_of(2 * KIB)).expect("there is room");
    }

    let queued = peer.buffered();
    settled().await;
    let encoded = peer.buffered();
    read(&mut client, 6 * KIB).await;
    settled().await;
    let written = peer.buffered();

    assert_eq!((queued.frames(), queued.bytes()), (3, 0));
    assert_eq!((encoded.frames(), encoded.bytes()), (0, 5 * KIB));
    assert_eq!((written.frames(), written.bytes()), (0, 0));
}

#[test]
fn marks_that_make_no_sense_are_refused() {
    assert!(Watermarks::new(0, 1).is_ok());
    assert!(Watermarks::new(0, 0).is_err());
    let refused = Watermarks::new(8, 8).expect_err("they are equal");
    assert_eq!(
        refused.to_string(),
        "the low mark, 8, is not below the high mark, 8"
    );
    assert_eq!(
        (Watermarks::below(0).low(), Watermarks::below(0).high()),
        (0, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn j3_each_crossing_is_told_once_and_in_turn() {
    let (mut client, peer, _served) = stalled(marks(2 * KIB, 8 * KIB)).await;
    let (mut awake, mut late) = (peer.crossings(), peer.crossings());

    for _ in 0..1_000 {
        peer.send(line_of(10 * KIB)).await.expect("it is open");
        assert_eq!(awake.next().await, Some(Crossing::High));
        read(&mut client, 10 * KIB).await;
        assert_eq!(awake.next().await, Some(Crossing::Low));
    }

    // A late observer finds them all.
    for _ in 0..1_000 {
        assert_eq!(crossed(&mut late).await, Some(Crossing::High));
        assert_eq!(crossed(&mut late).await, Some(Crossing::Low));
    }
    assert_eq!(crossed(&mut awake).await, None);
    assert_eq!(crossed(&mut late).await, None);
}

#[tokio::test(start_paused = true)]
async fn the_crossings_of_a_connection_that_has_ended_are_over() {
    let (client, peer, served) = stalled(marks(KIB, 2 * KIB)).await;
    peer.send(line_of(10 * KIB)).await.expect("it is open");
    settled().await;
    let mut crossings = peer.crossings();

    peer.abort();
    served.reason().await;

    assert_eq!(crossings.next().await, Some(Crossing::High));
    assert_eq!(crossings.next().await, None);
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn x71_small_writes_between_the_marks_cross_nothing() {
    let (mut client, peer, _served) = stalled(marks(2 * KIB, 64 * KIB)).await;
    let mut crossings = peer.crossings();
    // The last of these wait in the queue when the mark is reached. They are written into the space
    // between the marks.
    for _ in 0..70 {
        while peer.try_send(line_of(KIB)).is_err() {
            settled().await;
            if peer.buffered().bytes() >= 64 * KIB {
                break;
            }
        }
    }
    settled().await;
    assert_eq!(crossed(&mut crossings).await, Some(Crossing::High));

    for _ in 0..50 {
        read(&mut client, KIB).await;
        settled().await;
    }
    assert_eq!(
        crossed(&mut crossings).await,
        None,
        "it is between the marks"
    );
    while peer.buffered().bytes() > 0 {
        read(&mut client, KIB).await;
        settled().await;
    }

    assert_eq!(crossed(&mut crossings).await, Some(Crossing::Low));
    assert_eq!(crossed(&mut crossings).await, None);
}

#[tokio::test(start_paused = true)]
async fn x71b_marks_can_be_changed_while_it_runs() {
    let (client, peer, _served) = stalled(marks(10 * KIB, 64 * KIB)).await;
    let mut crossings = peer.crossings();
    peer.send(line_of(9 * KIB)).await.expect("it is open");
    assert_eq!(crossed(&mut crossings).await, None);

    peer.set_watermarks(marks(KIB, 4 * KIB));
    let lowered = crossed(&mut crossings).await;
    peer.set_watermarks(marks(10 * KIB, 64 * KIB));
    let raised = crossed(&mut crossings).await;

    assert_eq!(lowered, Some(Crossing::High), "8 KiB are above 4 KiB");
    assert_eq!(raised, Some(Crossing::Low), "8 KiB are below 10 KiB");
    assert_eq!(crossed(&mut crossings).await, None);
    assert_eq!(peer.watermarks(), marks(10 * KIB, 64 * KIB));
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn x70_nine_megabytes_against_a_stalled_reader_in_memory() {
    let (client, peer, _served) = stalled(marks(10_000, 100_000)).await;

    let crossings_until_stalled = nine_megabytes(client, peer).await;

    assert_eq!(crossings_until_stalled, 1, "one high");
}

#[tokio::test]
async fn x70_nine_megabytes_against_a_stalled_reader_over_a_socket() {
    let (pipeline, mut peers) = echo_with_peers();
    let server = Server::bind("127.0.0.1:0").await.expect("it binds");
    let address = server.handle().local_addrs()[0].tcp().expect("it is TCP");
    let limits = Limits::default().watermarks(marks(10_000, 100_000));
    let _served = serve_with(server, (), pipeline.limits(limits));
    let client = TcpSocket::new_v4().expect("there are sockets");
    // A small buffer, so that the system does not take everything.
    client.set_recv_buffer_size(64 * 1024).expect("it is new");
    let client = client.connect(address).await.expect("it listens");
    let peer = peers.recv().await.expect("it is served");

    nine_megabytes(client, peer).await;
}

/// Sends 9 MB to a client that at first reads nothing and then reads all; then a single frame of 9
/// MB. Returns how often a mark was crossed before the connection stalled. This can be more than
/// once, because the system buffers some megabytes.
async fn nine_megabytes<Io: AsyncRead + Unpin>(mut client: Io, peer: Peer<Bytes>) -> usize {
    let mut crossings = peer.crossings();
    let sender = peer.clone();
    let sending = tokio::spawn(async move {
        for _ in 0..900 {
            sender.send(line_of(10_000)).await.expect("it is open");
        }
    });

    // Once the system buffers no more, output is above the mark and stays there. No more is held
    // than the mark and a frame.
    let (mut last, mut until_stalled) = (Crossing::Low, 0);
    while let Ok(next) = timeout(Duration::from_millis(200), crossings.next()).await {
        let next = next.expect("it is open");
        assert_ne!(next, last);
        last = next;
        until_stalled += 1;
    }
    assert_eq!(last, Crossing::High);
    assert!(!sending.is_finished());
    assert!(peer.buffered().bytes() < 110_000, "{:?}", peer.buffered());
    assert!(peer.buffered().frames() <= 16);
    let all = read(&mut client, 9_000_000).await;
    sending.await.expect("all was sent");
    assert_eq!(all.iter().filter(|byte| **byte == b'\n').count(), 900);
    peer.flushed().await.expect("it is open");

    // As many lows as highs, in turn, once everything is read.
    while let Some(next) = crossed(&mut crossings).await {
        assert_ne!(next, last);
        last = next;
    }
    assert_eq!(last, Crossing::Low);

    // A frame is accepted whole, however large: one high, and one low once it is read.
    peer.send(line_of(9_000_000)).await.expect("it is open");
    assert_eq!(crossings.next().await, Some(Crossing::High));
    let stalled = timeout(Duration::from_millis(200), crossings.next()).await;
    assert!(stalled.is_err(), "it is not read yet");
    let mut kept_waiting = tokio_test::task::spawn(peer.send("behind".into()));
    assert!(kept_waiting.poll().is_pending());
    read(&mut client, 9_000_000).await;
    assert_eq!(crossings.next().await, Some(Crossing::Low));
    assert_eq!(crossed(&mut crossings).await, None);
    kept_waiting.await.expect("it is open");
    assert_eq!(read(&mut client, 7).await, b"behind\n");
    until_stalled
}

#[tokio::test(start_paused = true)]
async fn j5_a_flood_against_a_stalled_connection_is_refused_and_not_kept() {
    let (mut client, peer, _served) = stalled(Watermarks::below(64 * KIB)).await;

    let (mut taken, mut most) = (0, 0);
    for n in 0..1_000_000 {
        taken += usize::from(peer.try_send(line_of(100)).is_ok());
        if n % 1_000 == 0 {
            settled().await;
        }
        let buffered = peer.buffered();
        most = most.max(buffered.bytes() + 100 * buffered.frames());
    }

    assert!(most <= 64 * KIB + 16 * 100, "{most} bytes were kept");
    let all = read(&mut client, taken * 100).await;
    assert_eq!(all.iter().filter(|byte| **byte == b'\n').count(), taken);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_connection_can_be_awaited_through_its_peer() {
    let (pipeline, mut peers) = echo_with_peers();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = peers.recv().await.expect("it is served");
        let closed = tokio::spawn({
            let peer = peer.clone();
            async move { peer.closed().await }
        });
        client.ask("hello").await;

        client.finish().await;

        let end = closed.await.expect("it does not panic");
        assert_eq!(end.reason(), EndReason::PeerClosed, "{}", served.way());
        assert_eq!(end.requests(), 1);
        assert_eq!((end.bytes_read(), end.bytes_written()), (6, 6));
        assert_eq!(peer.closed().await.reason(), EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_program_may_say_in_its_own_words_why_it_closes() {
    let (pipeline, mut peers) = echo_with_peers();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = peers.recv().await.expect("it is served");
        peer.send("you are kicked".into())
            .await
            .expect("it is open");

        peer.close_because("kicked by ann");

        assert_eq!(client.rest().await, ["you are kicked"], "{}", served.way());
        drop(client);
        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::ServiceClosed, "{}", served.way());
        let why = end.error().map(ToString::to_string);
        assert_eq!(why.as_deref(), Some("kicked by ann"));
    }
}

#[tokio::test(start_paused = true)]
async fn an_offer_waits_for_the_task_and_not_for_the_peer() {
    let (mut client, peer, _served) = stalled(Watermarks::below(2 * KIB)).await;

    // More than the queue holds, then more than the mark.
    for _ in 0..20 {
        peer.offer(line_of(100)).await.expect("it is read");
    }
    read(&mut client, 2_000).await;
    peer.offer(line_of(4 * KIB)).await.expect("it is read");
    settled().await;
    let slow = timeout(Duration::from_millis(1), peer.offer("slow".into())).await;

    assert_eq!(slow, Ok(Err(TrySendError::Full("slow".into()))));
}

#[tokio::test(start_paused = true)]
async fn an_offer_to_a_connection_that_ended_above_its_mark_fails() {
    let (_client, peer, served) = stalled(Watermarks::below(2 * KIB)).await;
    peer.offer(line_of(100 * KIB)).await.expect("it is open");
    settled().await;
    assert_eq!(
        peer.offer("late".into()).await,
        Err(TrySendError::Full("late".into()))
    );

    peer.abort();
    served.reason().await;

    assert_eq!(
        peer.offer("late".into()).await,
        Err(TrySendError::Closed("late".into()))
    );
}

#[tokio::test(start_paused = true)]
async fn a_callback_for_the_end_runs_once_also_when_it_comes_late() {
    let (pipeline, mut peers) = echo_with_peers();
    let served = serve(pipeline);
    let client = served.client().await;
    let peer = peers.recv().await.expect("it is served");
    let (tell, mut told) = mpsc::channel(2);
    let early = tell.clone();
    peer.on_end(move |end| {
        early
            .try_send(("early", end.reason()))
            .expect("there is room")
    });

    drop(client);
    served.reason().await;
    peer.on_end(move |end| {
        tell.try_send(("late", end.reason()))
            .expect("there is room")
    });

    assert_eq!(told.recv().await, Some(("early", EndReason::PeerClosed)));
    assert_eq!(told.recv().await, Some(("late", EndReason::PeerClosed)));
    assert_eq!(told.recv().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_peer_can_be_asked_for_what_it_sends_by_a_ready_service() {
    // `Make` is a boxed make-service of tower. Half of this test is that it composes.
    let (pipeline, mut peers) = echo_with_peers();
    let served = serve(pipeline);
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is served");
    let sending = service_fn(move |frame: Bytes| {
        let peer = peer.clone();
        async move { peer.send(frame).await }
    });

    sending.oneshot("pushed".into()).await.expect("it is open");

    assert_eq!(client.line().await, "pushed");
}

#[tokio::test(start_paused = true)]
async fn an_idle_time_that_the_peer_negotiates_counts_from_its_last_activity() {
    let (pipeline, mut peers) = echo_with_peers();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = peers.recv().await.expect("it is served");
        assert_eq!(peer.idle(), Some(75 * SECOND));
        client.ask("hello").await;
        let active = Instant::now();
        sleep(10 * SECOND).await;

        peer.set_idle(15 * SECOND);

        client.rest().await;
        assert_eq!(active.elapsed(), 15 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::IdleTimeout);
        assert_eq!(peer.idle(), Some(15 * SECOND));
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_time_that_has_passed_already_ends_the_connection_at_once() {
    let (pipeline, mut peers) = echo_with_peers();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = peers.recv().await.expect("it is served");
        client.ask("hello").await;
        sleep(10 * SECOND).await;
        let begun = Instant::now();

        peer.set_idle(5 * SECOND);

        client.rest().await;
        assert!(begun.elapsed() < SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::IdleTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_time_can_be_made_longer_and_taken_away_for_one_connection() {
    let (pipeline, mut peers) = echo_with_peers();
    for served in each_way(pipeline) {
        let (mut long, mut never) = (served.client().await, served.client().await);
        let first = peers.recv().await.expect("it is served");
        let second = peers.recv().await.expect("it is served");
        let mut usual = served.client().await;
        for client in [&mut long, &mut never, &mut usual] {
            client.ask("hello").await;
        }
        let begun = Instant::now();

        first.set_idle(300 * SECOND);
        second.set_idle(None);

        usual.rest().await;
        assert_eq!(begun.elapsed(), 75 * SECOND, "{}", served.way());
        long.rest().await;
        assert_eq!(begun.elapsed(), 300 * SECOND, "{}", served.way());
        sleep(1_000_000 * SECOND).await;
        assert_eq!(never.ask("still here").await, "still here");
        while peers.try_recv().is_ok() {}
    }
}
