//! Pausing input is exact: no request is delivered during the pause, none is lost at the resume,
//! and a peer that leaves meanwhile is noticed.

mod support;

use std::convert::Infallible;
use std::future::ready;
use std::time::Duration;

use bytes::Bytes;
use support::{Client, Clients, Ends, each_way, each_way_over_tcp, over_tcp, settled};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::util::BoxCloneSyncService;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::deadline::{Deadlines, DrainDeadlines};
use tower_tcp::frame::Lines;
use tower_tcp::make::MakeEventsPerConnection;
use tower_tcp::pipeline::{Event, Limits};
use tower_tcp::testkit::{serve, serve_with};
use tower_tcp::{EndReason, Peer, Pipeline, Server};

/// The longest wait for what happens at once.
const DEADLINE: Duration = Duration::from_secs(10);

type Resumed = Peer<Bytes, Resume>;
type Make = BoxCloneSyncService<Resumed, Answer, Infallible>;
type Answer = BoxCloneSyncService<Event<Bytes, Resume>, Bytes, Infallible>;

struct Resume;

type Pausing = Pipeline<fn() -> Lines, MakeEventsPerConnection<Make, Resume>, Bytes>;

/// Echoes lines, and pauses at the line "pause" until a message arrives. The receiver yields the
/// peers.
fn pausing() -> (Pausing, mpsc::Receiver<Resumed>) {
    let (tell, peers) = mpsc::channel(64);
    let make = service_fn(move |peer: Resumed| {
        tell.try_send(peer.clone()).expect("there is room");
        let answer = service_fn(move |event| {
            std::future::ready(Ok::<_, Infallible>(match event {
                Event::Request(line) => {
                    if line == "pause" {
                        peer.pause_input();
                    }
                    line
                }
                Event::Message(Resume) => {
                    peer.resume_input();
                    Bytes::from("resumed")
                }
            }))
        });
        std::future::ready(Ok::<_, Infallible>(Answer::new(answer)))
    });
    let codec: fn() -> Lines = Lines::default;
    (
        Pipeline::new(codec).make_event_service(Make::new(make)),
        peers,
    )
}

async fn next(peers: &mut mpsc::Receiver<Resumed>) -> Resumed {
    peers.recv().await.expect("it is served")
}

#[tokio::test(start_paused = true)]
async fn x76_nothing_is_delivered_while_paused_and_nothing_lost_by_it() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;

        // In one packet: the lines behind `pause` have been read when it pauses.
        client.send("a\npause\nb\nc\n").await;
        assert_eq!(client.line().await, "a", "{}", served.way());
        assert_eq!(client.line().await, "pause", "{}", served.way());
        assert!(client.hears_nothing().await, "{}", served.way());
        client.send("d\n").await;
        assert!(client.hears_nothing().await, "{}", served.way());
        peer.post(Resume).await.expect("it is open");

        assert_eq!(client.line().await, "resumed", "{}", served.way());
        client.send("e\n").await;
        for line in ["b", "c", "d", "e"] {
            assert_eq!(client.line().await, line, "{}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_resting_connection_can_be_paused_from_anywhere_and_goes_on_at_once() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        settled().await;

        peer.pause_input();
        client.send("a\n").await;
        assert!(client.hears_nothing().await, "{}", served.way());
        peer.resume_input();

        assert_eq!(client.line().await, "a", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn pushes_go_out_while_input_is_paused() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        peer.pause_input();
        settled().await;

        peer.send("push".into()).await.expect("it is open");

        assert_eq!(client.line().await, "push", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn x75b_a_peer_that_leaves_while_paused_is_noticed() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let client = served.client().await;
        let peer = next(&mut peers).await;
        peer.pause_input();
        settled().await;

        drop(client);

        assert_eq!(
            served.reason().await,
            EndReason::PeerClosed,
            "{}",
            served.way()
        );
    }
}

#[tokio::test]
async fn x75b_a_peer_that_resets_while_paused_is_noticed() {
    // Few lines are read ahead. The others stay unread.
    for lines in [1, 10_000] {
        let (pipeline, mut peers) = pausing();
        let (served, address) = over_tcp("paused", pipeline).await;
        let mut client = TcpStream::connect(address).await.expect("it listens");
        let peer = next(&mut peers).await;
        peer.pause_input();
        let input = "unread\n".repeat(lines);
        client
            .write_all(input.as_bytes())
            .await
            .expect("it is open");

        client.set_zero_linger().expect("it is a socket");
        drop(client);

        let reason = timeout(DEADLINE, served.reason()).await;
        assert_eq!(reason.expect("in time"), EndReason::PeerReset);
    }
}

#[tokio::test]
async fn a_peer_that_closes_its_unix_socket_leaves_its_requests() {
    const REQUESTS: usize = 10_000;
    let (called, mut calls) = mpsc::channel(REQUESTS);
    let slow = service_fn(move |_: Bytes| {
        called.try_send(()).expect("there is room");
        async {
            tokio::task::yield_now().await;
            Ok::<_, Infallible>(None::<Bytes>)
        }
    });
    let dir = tempfile::tempdir().expect("it is made");
    let path = dir.path().join("socket");
    let server = Server::bind(format!("unix:{}", path.display())).await;
    let server = server.expect("the path is free");
    let served = serve_with(server, (), Pipeline::new(Lines::default).service(slow));
    let mut client = UnixStream::connect(path).await.expect("it listens");

    let input = "unread\n".repeat(REQUESTS);
    client
        .write_all(input.as_bytes())
        .await
        .expect("it is open");
    drop(client);

    let reason = timeout(DEADLINE, served.reason()).await;
    assert_eq!(reason.expect("in time"), EndReason::PeerClosed);
    calls.close();
    let mut count = 0;
    while calls.recv().await.is_some() {
        count += 1;
    }
    assert_eq!(count, REQUESTS);
}

/// A client that leaves in one of two ways while its first requests hang and more wait behind them
/// than are read ahead.
#[tokio::test]
async fn a_peer_that_leaves_behind_unread_requests_is_noticed() {
    let hang = service_fn(|_: Bytes| std::future::pending::<Result<Bytes, Infallible>>());
    let half_closed = Duration::from_millis(100);
    let pipeline = Pipeline::new(Lines::default)
        .service(hang)
        .deadlines(Deadlines::default().half_closed(half_closed));
    for resets in [true, false] {
        for (served, address) in each_way_over_tcp(pipeline.clone(), 2).await {
            let mut client = TcpStream::connect(address).await.expect("it listens");
            let input = "unread\n".repeat(10_000);
            client
                .write_all(input.as_bytes())
                .await
                .expect("it is open");

            if resets {
                client.set_zero_linger().expect("it is a socket");
            }
            drop(client);

            let reason = timeout(DEADLINE, served.reason()).await;
            let way = served.way();
            let reason = reason.unwrap_or_else(|_| panic!("{way}, resets: {resets}"));
            assert_eq!(reason, EndReason::PeerReset);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_peer_sent_before_it_finished_is_answered_when_input_goes_on() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        peer.pause_input();
        client.send("a\nb\n").await;
        client.finish().await;
        assert!(client.hears_nothing().await, "{}", served.way());

        peer.resume_input();

        assert_eq!(client.rest().await, ["a", "b"], "{}", served.way());
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_peer_sent_before_it_finished_waits_for_input_to_go_on() {
    let minute = Duration::from_secs(60);
    let (tell, mut peers) = mpsc::channel(64);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room");
        std::future::ready(Ok::<_, Infallible>(service_fn(hurried)))
    });
    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        for (in_progress, held_back, answered) in [
            ("", "a\n9\n", &["a", "9"][..]),
            // During a pause, a call may take longer than the 10 s of `half_closed`.
            ("11\n", "a\n9\n", &["11", "a", "9"]),
            // From the resume on, `half_closed` applies.
            ("", "a\n11\n", &["a"]),
        ] {
            let mut client = served.client().await;
            let peer = peers.recv().await.expect("it is served");
            client.send(in_progress).await;
            settled().await;
            peer.pause_input();
            client.send(held_back).await;
            client.finish().await;
            tokio::time::sleep(minute).await;

            peer.resume_input();

            assert_eq!(client.rest().await, answered, "{}", served.way());
            let reason = if held_back.contains("11") {
                EndReason::PeerReset
            } else {
                EndReason::PeerClosed
            };
            assert_eq!(served.reason().await, reason, "{}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_arrived_before_a_connection_is_to_leave_waits_for_input_to_go_on() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        peer.pause_input();
        client.send("a\nb\n").await;
        settled().await;
        for connection in served.handle().connections() {
            connection.close();
        }
        tokio::time::sleep(Duration::from_secs(60)).await;

        peer.resume_input();

        assert_eq!(client.rest().await, ["a", "b"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::ServiceClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_paused_peer_is_not_idle() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        client.send("pause\n").await;
        client.line().await;

        tokio::time::sleep(Duration::from_secs(3600)).await;
        peer.resume_input();

        assert_eq!(
            client.ask("still there").await,
            "still there",
            "{}",
            served.way()
        );
    }
}

/// Resumes input an hour later, and waits for the end of the idle time.
async fn is_closed_as_idle_after_an_hour_of_pause<M>(
    served: &impl Ends,
    mut client: Client<DuplexStream>,
    peer: Peer<Bytes, M>,
) {
    tokio::time::sleep(Duration::from_secs(3600)).await;
    peer.resume_input();
    let resumed = Instant::now();

    assert!(client.rest().await.is_empty(), "{}", served.way());
    assert_eq!(resumed.elapsed().as_secs(), 75, "{}", served.way());
    drop(client);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_peer_has_its_whole_idle_time_after_a_pause() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        assert_eq!(client.ask("pause").await, "pause");

        is_closed_as_idle_after_an_hour_of_pause(&served, client, peer).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_has_sent_nothing_has_the_idle_time_after_a_pause() {
    let (peers, mut made) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        peer.pause_input();
        peers.try_send(peer).expect("there is room");
        ready(Ok::<_, Infallible>(service_fn(hurried)))
    });
    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let client = served.client().await;
        let peer = made.recv().await.expect("it is served");

        is_closed_as_idle_after_an_hour_of_pause(&served, client, peer).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_paused_connection_with_nothing_undelivered_leaves_at_a_drain() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let _peer = next(&mut peers).await;
        assert_eq!(client.ask("pause").await, "pause");

        served.handle().shutdown();

        assert!(client.rest().await.is_empty(), "{}", served.way());
        drop(client);
        assert_eq!(
            served.reason().await,
            EndReason::Drained,
            "{}",
            served.way()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_arrived_before_a_drain_is_answered_when_input_goes_on() {
    for (read_ahead, heard) in [
        (0, true),
        (0, false),
        (1, true),
        (8192, true),
        (8192, false),
    ] {
        let (pipeline, mut peers) = pausing();
        let limits = Limits::default().read_ahead(read_ahead);
        for served in each_way(pipeline.limits(limits)) {
            let mut client = served.client().await;
            let peer = next(&mut peers).await;
            if heard {
                assert_eq!(client.ask("before").await, "before");
            }
            peer.pause_input();
            settled().await;
            client.send("a\nb\n").await;
            served.handle().shutdown();
            assert!(client.hears_nothing().await, "{}", served.way());

            peer.resume_input();

            assert_eq!(client.rest().await, ["a", "b"], "{}", served.way());
            drop(client);
            assert_eq!(served.reason().await, EndReason::Drained);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_a_pause_is_answered_although_a_drain_is_over() {
    let make = service_fn(|peer: Resumed| async move {
        let answer = service_fn(move |event| {
            let peer = peer.clone();
            async move {
                if let Event::Request(line) = event {
                    if line == "begin" {
                        let _timer = peer.post_after(Duration::from_millis(4500), Resume);
                    }
                    return hurried(line).await;
                }
                peer.pause_input();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(3)).await;
                    peer.send("pushed".into()).await.expect("it is open");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    peer.resume_input();
                });
                Ok("paused".into())
            }
        });
        let one = ServiceBuilder::new().concurrency_limit(1);
        Ok::<_, Infallible>(one.service(answer))
    });
    let drain = DrainDeadlines::default().next_frame(Duration::from_millis(600));
    let pipeline = Pipeline::new(Lines::default)
        .make_event_service(make)
        .deadlines(Deadlines::default().drain(drain))
        .in_flight(8);
    let served = serve(pipeline);
    let mut client = served.client().await;
    assert_eq!(client.ask("begin").await, "begin");
    served.handle().shutdown();
    tokio::time::sleep(Duration::from_millis(500)).await;
    client.send("4\n0\n").await;

    assert_eq!(client.rest().await, ["4", "paused", "pushed", "0"]);
}

/// Echoes lines. A line that is a number takes as many seconds.
async fn hurried(line: Bytes) -> Result<Bytes, Infallible> {
    let seconds = String::from_utf8_lossy(&line).parse().unwrap_or(0);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    Ok(line)
}

#[tokio::test(start_paused = true)]
async fn a_paused_connection_keeps_no_permit_that_others_wait_for() {
    let (tell, mut peers) = mpsc::channel(64);
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room");
        let stack = ServiceBuilder::new().layer(limit.clone());
        std::future::ready(Ok::<_, Infallible>(stack.service_fn(hurried)))
    });
    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut first = served.client().await;
        let _first = peers.recv().await.expect("it is served");
        first.send("10\n").await;
        settled().await;
        let mut paused = served.client().await;
        let peer = peers.recv().await.expect("it is served");
        paused.send("a\nb\n").await;
        settled().await;
        peer.pause_input();
        let mut other = served.client().await;
        let _other = peers.recv().await.expect("it is served");
        other.send("other\n").await;

        assert_eq!(first.line().await, "10", "{}", served.way());

        // The request that had reached the service when input was paused is answered, but none
        // behind it.
        assert_eq!(paused.line().await, "a", "{}", served.way());
        assert_eq!(other.line().await, "other", "{}", served.way());
        assert!(paused.hears_nothing().await, "{}", served.way());
        peer.resume_input();
        assert_eq!(paused.line().await, "b", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_paused_peer_that_sends_on_is_not_read_without_end() {
    let (pipeline, mut peers) = pausing();
    let served = serve(pipeline.limits(Limits::default().read_ahead(8 * 1024)));
    let mut client = served.client().await;
    let peer = next(&mut peers).await;
    peer.pause_input();
    settled().await;

    // The stream holds 64 KiB.
    let flood = tokio::time::timeout(
        Duration::from_secs(60),
        client.send("flood\n".repeat(1024 * 1024)),
    );

    assert!(flood.await.is_err(), "it has to wait");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pausing_and_going_on_at_any_moment_loses_nothing() {
    let (pipeline, mut peers) = pausing();
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let toggling = std::thread::spawn({
            let over = std::sync::Arc::clone(&over);
            move || {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    peer.pause_input();
                    peer.resume_input();
                }
            }
        });

        for n in 0..200 {
            let lines: String = (0..100).map(|m| format!("{n} {m}\n")).collect();
            client.send(lines).await;
            for m in 0..100 {
                assert_eq!(client.line().await, format!("{n} {m}"), "{}", served.way());
            }
        }

        over.store(true, std::sync::atomic::Ordering::Relaxed);
        toggling.join().expect("it does not panic");
    }
}
