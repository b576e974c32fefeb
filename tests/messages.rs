//! Messages reach a connection's service in turn with its requests, one at a time and bounded. A
//! timer is a message that is sent later.

mod support;

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use support::{Clients, Ends, each_way, settled};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tower::service_fn;
use tower::util::BoxCloneSyncService;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::make::MakeEventsPerConnection;
use tower_tcp::pipeline::{Closed, Event, Limits, TrySendError};
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{BoxError, EndReason, Peer, Pipeline};

type Teller = Peer<Bytes, &'static str>;
type Make = BoxCloneSyncService<Teller, Answer, Infallible>;
type Answer = BoxCloneSyncService<Event<Bytes, &'static str>, Option<Bytes>, BoxError>;

type Told = Pipeline<fn() -> Lines, MakeEventsPerConnection<Make, &'static str>, Bytes>;

/// Returns a pipeline that answers each event with its kind after `time`. The receiver yields the
/// peers.
fn says_what_it_got(time: Duration) -> (Told, mpsc::Receiver<Teller>) {
    let (tell, peers) = mpsc::channel(64);
    let make = service_fn(move |peer: Teller| {
        tell.try_send(peer).expect("there is room");
        let answer = service_fn(move |event: Event<Bytes, &'static str>| async move {
            if !time.is_zero() {
                tokio::time::sleep(time).await;
            }
            Ok::<_, BoxError>(Some(match event {
                Event::Request(line) => [b"request ", &*line].concat().into(),
                Event::Message("quit") => return Err("told to quit".into()),
                Event::Message(message) => format!("message {message}").into(),
            }))
        });
        std::future::ready(Ok::<_, Infallible>(Answer::new(answer)))
    });
    let codec: fn() -> Lines = Lines::default;
    let pipeline = Pipeline::new(codec).make_event_service(Make::new(make));
    (
        pipeline.deadlines(Deadlines::default().idle(None).first_byte(None)),
        peers,
    )
}

async fn next(peers: &mut mpsc::Receiver<Teller>) -> Teller {
    peers.recv().await.expect("it is served")
}

#[tokio::test(start_paused = true)]
async fn a_message_to_a_resting_connection_is_answered_at_once() {
    let (pipeline, mut peers) = says_what_it_got(Duration::ZERO);
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        settled().await;

        peer.post("hello").await.expect("it is open");

        assert_eq!(client.line().await, "message hello", "{}", served.way());
        assert_eq!(client.ask("a").await, "request a", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn messages_and_requests_take_turns_when_both_are_waiting() {
    let (pipeline, mut peers) = says_what_it_got(Duration::from_millis(1));
    let served = serve(pipeline);
    let mut client = served.client().await;
    let peer = next(&mut peers).await;
    client.send("1\n2\n3\n").await;
    for message in ["a", "b", "c"] {
        peer.post(message).await.expect("it is open");
    }

    client.finish().await;
    let answers = client.rest().await;

    let by = |kind: &str| -> Vec<String> {
        let of_kind = |answer: &String| answer.strip_prefix(kind).map(str::to_owned);
        answers.iter().filter_map(of_kind).collect()
    };
    assert_eq!(by("request "), ["1", "2", "3"]);
    assert_eq!(by("message "), ["a", "b", "c"]);
    let kinds: Vec<_> = answers.iter().map(|answer| &answer[..1]).collect();
    assert!(
        kinds == ["r", "m", "r", "m", "r", "m"] || kinds == ["m", "r", "m", "r", "m", "r"],
        "{answers:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_messages_keeps_no_request_waiting_and_none_the_other_way() {
    let (pipeline, mut peers) = says_what_it_got(Duration::ZERO);
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        let flood = tokio::spawn(async move { while peer.post("flood").await.is_ok() {} });
        settled().await;

        client.send("here\n").await;
        let mut floods = 0;
        while client.line().await != "request here" {
            floods += 1;
            assert!(floods < 10_000, "{}", served.way());
        }

        flood.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_waits_while_a_request_is_in_hand_and_calls_come_one_at_a_time() {
    let (pipeline, mut peers) = says_what_it_got(Duration::from_secs(1));
    let served = serve(pipeline);
    let mut client = served.client().await;
    let peer = next(&mut peers).await;
    let begun = Instant::now();
    client.send("slow\n").await;
    settled().await;

    peer.post("behind").await.expect("there is room");

    assert_eq!(client.line().await, "request slow");
    assert_eq!(client.line().await, "message behind");
    assert_eq!(begun.elapsed().as_secs(), 2);
}

#[tokio::test(start_paused = true)]
async fn j9_messages_that_are_sent_faster_than_they_are_taken_wait() {
    let (pipeline, mut peers) = says_what_it_got(Duration::from_secs(1));
    let served = serve(
        pipeline
            .limits(Limits::default().messages(4))
            .deadlines(Deadlines::default().idle(None).first_byte(None)),
    );
    let mut client = served.client().await;
    let peer = next(&mut peers).await;
    settled().await;
    peer.post("in hand").await.expect("it is open");
    settled().await;
    for _ in 0..4 {
        peer.try_post("waiting").expect("there is room for four");
    }

    let fifth = peer.try_post("fifth");
    let mut waits = tokio_test::task::spawn(peer.post("waits"));
    assert!(waits.poll().is_pending());
    for _ in 0..2 {
        client.line().await;
    }

    assert_eq!(fifth, Err(TrySendError::Full("fifth")));
    assert!(waits.is_woken());
    tokio_test::assert_ready_ok!(waits.poll());
}

#[tokio::test(start_paused = true)]
async fn a_timer_is_a_message_that_comes_when_it_is_due() {
    let (pipeline, mut peers) = says_what_it_got(Duration::ZERO);
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        settled().await;
        let begun = Instant::now();

        let late = peer.post_after(Duration::from_secs(3), "late");
        let soon = peer.post_after(Duration::from_secs(2), "soon");
        let never = peer.post_after(Duration::from_secs(1), "never");
        let taken_back = never.expect("there is room").cancel();

        assert_eq!(taken_back, Some("never"));
        assert_eq!(client.line().await, "message soon", "{}", served.way());
        assert_eq!(begun.elapsed().as_secs(), 2);
        assert_eq!(client.line().await, "message late", "{}", served.way());
        assert_eq!(begun.elapsed().as_secs(), 3);
        assert_eq!(late.expect("there is room").cancel(), None);
        assert_eq!(
            soon.expect("there is room").due(),
            begun + Duration::from_secs(2)
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_timer_set_while_one_for_later_is_running_comes_first() {
    let (pipeline, mut peers) = says_what_it_got(Duration::ZERO);
    let served = serve(pipeline);
    let mut client = served.client().await;
    let peer = next(&mut peers).await;
    let _later = peer.post_after(Duration::from_secs(3600), "later");
    settled().await;
    let begun = Instant::now();

    let _sooner = peer.post_after(Duration::from_secs(1), "sooner");

    assert_eq!(client.line().await, "message sooner");
    assert_eq!(begun.elapsed().as_secs(), 1);
}

const YEAR: Duration = Duration::from_secs(365 * 86_400);

#[tokio::test(start_paused = true)]
async fn timers_are_bounded_and_those_for_ever_are_no_harm() {
    let (pipeline, mut peers) = says_what_it_got(Duration::ZERO);
    let served = serve(pipeline);
    let mut client = served.client().await;
    let peer = next(&mut peers).await;
    for _ in 0..16 {
        let timer = peer.post_after(Duration::MAX, "never");
        let due = timer.expect("there is room for sixteen").due();
        assert!(due > Instant::now() + 20 * YEAR, "{due:?}");
    }

    let seventeenth = peer.post_after(Duration::ZERO, "seventeenth");

    let refused = seventeenth.expect_err("there is no room");
    assert_eq!(refused.into_inner(), "seventeenth");
    assert_eq!(client.ask("on").await, "request on");
}

#[tokio::test(start_paused = true)]
async fn messages_that_a_close_leaves_behind_are_counted() {
    let (pipeline, mut peers) = says_what_it_got(Duration::from_secs(1));
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        settled().await;
        // Eight calls run where several may be in flight.
        let in_hand = if served.way() == "one at a time" {
            1
        } else {
            8
        };
        for _ in 0..in_hand {
            peer.post("in hand").await.expect("it is open");
            settled().await;
        }
        for _ in 0..5 {
            peer.post("left behind").await.expect("it is open");
        }
        let _timer = peer.post_after(Duration::from_secs(60), "not due");

        peer.close();
        let answers = client.rest().await;

        assert_eq!(answers.len(), in_hand, "{}", served.way());
        drop(client);
        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::ServiceClosed);
        assert_eq!(
            (end.messages_dropped(), end.requests()),
            (5, 0),
            "{}",
            served.way()
        );
        assert_eq!(peer.post("gone").await, Err(Closed));
        assert_eq!(peer.try_post("gone"), Err(TrySendError::Closed("gone")));
        assert!(peer.post_after(Duration::ZERO, "gone").is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_is_a_request_to_the_error_policy() {
    let (pipeline, mut peers) = says_what_it_got(Duration::ZERO);
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        settled().await;
        peer.post("last words").await.expect("it is open");

        peer.post("quit").await.expect("it is open");

        assert_eq!(
            client.rest().await,
            ["message last words"],
            "{}",
            served.way()
        );
        drop(client);
        assert_eq!(served.reason().await, EndReason::ServiceError);
    }
}

#[tokio::test(start_paused = true)]
async fn one_who_waits_for_room_learns_of_the_end() {
    let (pipeline, mut peers) = says_what_it_got(Duration::from_secs(3600));
    let served = serve(pipeline);
    let client = served.client().await;
    let peer = next(&mut peers).await;
    let flood = tokio::spawn({
        let peer = peer.clone();
        async move { while peer.post("flood").await.is_ok() {} }
    });
    settled().await;

    peer.abort();

    let over = timeout(Duration::from_secs(1), flood).await;
    over.expect("it ends").expect("it does not panic");
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn a_drain_delivers_the_messages_that_are_waiting_and_takes_no_more() {
    let (pipeline, mut peers) = says_what_it_got(Duration::from_secs(1));
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        client.send("in hand\n").await;
        settled().await;
        for message in ["first", "second", "third"] {
            peer.post(message).await.expect("it is open");
        }

        served.handle().shutdown();
        settled().await;
        let late = peer.post("late").await;
        let timer = peer.post_after(Duration::ZERO, "late");

        let answers = [
            "request in hand",
            "message first",
            "message second",
            "message third",
        ];
        let mut got = client.rest().await;
        if served.way() == "multiplexed" {
            got.sort_by_key(|answer| answers.iter().position(|known| known == answer));
        }
        assert_eq!(got, answers, "{}", served.way());
        drop(client);
        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::Drained, "{}", served.way());
        assert_eq!(end.messages_dropped(), 0, "{}", served.way());
        assert_eq!(late, Err(Closed));
        assert!(timer.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_messages_itself_without_end_leaves_at_a_drain() {
    let make = service_fn(|peer: Teller| {
        peer.try_post("again").expect("there is room");
        let again = service_fn(move |_event: Event<Bytes, &'static str>| {
            let peer = peer.clone();
            async move {
                tokio::time::sleep(Duration::from_millis(1)).await;
                peer.post("again").await?;
                Ok::<_, BoxError>(None::<Bytes>)
            }
        });
        std::future::ready(Ok::<_, Infallible>(again))
    });
    let pipeline = Pipeline::new(Lines::default).make_event_service(make);
    let served = serve(pipeline.shutdown_on_error(false));
    let mut client = served.client().await;
    settled().await;
    let begun = Instant::now();

    served.handle().shutdown();

    assert!(client.rest().await.is_empty());
    drop(client);
    assert_eq!(served.reason().await, EndReason::Drained);
    assert!(begun.elapsed() < Duration::from_secs(1));
}

/// A message that panics when it is dropped.
struct Panics;

impl Drop for Panics {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "panicked as told");
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_panics_when_it_is_dropped_is_counted_and_keeps_nobody_waiting() {
    let (tell, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes, Panics>| {
        tell.try_send(peer).expect("there is room");
        let hang = service_fn(|_event: Event<Bytes, Panics>| {
            std::future::pending::<Result<Bytes, BoxError>>()
        });
        std::future::ready(Ok::<_, Infallible>(hang))
    });
    let served = serve(Pipeline::new(Lines::default).make_event_service(make));
    let mut client = served.client().await;
    let peer: Peer<Bytes, Panics> = peers.recv().await.expect("it is served");
    client.send("hang\n").await;
    settled().await;
    peer.post(Panics).await.expect("there is room");
    let mut crossings = peer.crossings();
    let waiting = tokio::spawn(async move { crossings.next().await });
    settled().await;

    peer.abort();

    let end = served.end().await;
    assert_eq!(end.messages_dropped(), 1);
    let waited = timeout(Duration::from_secs(1), waiting).await;
    assert_eq!(
        waited.expect("it is told").expect("it does not panic"),
        None
    );
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_idle_whatever_messages_it_gets() {
    // The peer has sent nothing. The program's own messages do not keep the connection open.
    let (pipeline, mut peers) = says_what_it_got(Duration::ZERO);
    let deadlines = Deadlines::default().first_byte(Duration::from_secs(5));
    let served: Served = serve(pipeline.deadlines(deadlines));
    let client = served.client().await;
    let peer = next(&mut peers).await;
    let begun = Instant::now();
    let ticking = tokio::spawn(async move {
        while peer.post("tick").await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });

    let reason = served.reason().await;

    assert_eq!(reason, EndReason::FirstByteTimeout);
    // Includes the 2 s in which the peer may close.
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    ticking.await.expect("it does not panic");
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn messages_do_not_put_off_the_deadline_of_a_frame_that_was_begun() {
    let (pipeline, mut peers) = says_what_it_got(Duration::from_millis(1));
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        let peer = next(&mut peers).await;
        client.send("half a fra").await;
        let begun = Instant::now();

        let heartbeat = async {
            while peer.post("still there?").await.is_ok() {
                client.line().await;
                tokio::time::sleep(Duration::from_secs(7)).await;
            }
        };
        timeout(Duration::from_secs(60), heartbeat)
            .await
            .expect("the frame is given up");

        assert_eq!(served.reason().await, EndReason::FrameTimeout);
        assert!(
            begun.elapsed() < Duration::from_secs(36),
            "{:?}",
            begun.elapsed()
        );
    }
}
