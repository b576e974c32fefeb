//! Pipeline: the replies to calls that run together keep the order of the requests, unless
//! multiplexed, no matter which of the calls completes at once.

mod support;

use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout};
use tower::{Service, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::testkit::serve;
use tower_tcp::{BoxError, EndReason, Peer, Pipeline, Reply};

use support::{Clients, Ends, each_way};

const MS: Duration = Duration::from_millis(1);

/// Digits wait that many milliseconds; `0` completes at once. `hang` never completes. `fail`,
/// `close` and `panic` act at once.
async fn act(request: Bytes) -> Result<Reply<Bytes>, BoxError> {
    match &request[..] {
        b"0" => {}
        b"hang" => pending().await,
        b"fail" => return Err("failed as told".into()),
        b"close" => return Ok(Reply::from(request).close()),
        b"panic" => panic!("panicked as told"),
        digits => sleep(MS * String::from_utf8_lossy(digits).parse().unwrap_or(0)).await,
    }
    Ok(request.into())
}

#[tokio::test(start_paused = true)]
async fn what_is_done_at_once_waits_for_a_slow_one_before_it() {
    let served = serve(
        Pipeline::new(Lines::default)
            .service(service_fn(act))
            .in_flight(8),
    );
    let begun = Instant::now();
    let mut client = served.client().await;
    client.send("0\n30\n0\n10\n0\n").await;

    assert_eq!(client.line().await, "0");
    assert_eq!(begun.elapsed(), Duration::ZERO);
    for reply in ["30", "0", "10", "0"] {
        assert_eq!(client.line().await, reply);
        assert_eq!(begun.elapsed(), 30 * MS);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_done_at_once_waits_for_none_when_multiplexed() {
    let served = serve(
        Pipeline::new(Lines::default)
            .service(service_fn(act))
            .multiplexed(8),
    );
    let begun = Instant::now();
    let mut client = served.client().await;
    client.send("30\n0\n10\n0\n").await;

    assert_eq!([client.line().await, client.line().await], ["0", "0"]);
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!([client.line().await, client.line().await], ["10", "30"]);
    assert_eq!(begun.elapsed(), 30 * MS);
}

#[tokio::test(start_paused = true)]
async fn replies_that_are_held_count_as_in_flight() {
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&begun);
    let service = service_fn(move |request: Bytes| {
        counted.fetch_add(1, Ordering::Relaxed);
        act(request)
    });
    let served = serve(Pipeline::new(Lines::default).service(service).in_flight(3));
    let mut client = served.client().await;
    client.send("50\n0\n0\n0\n0\n").await;

    sleep(10 * MS).await;
    let before = begun.load(Ordering::Relaxed);
    client.finish().await;
    let replies = client.rest().await;

    assert_eq!(before, 3);
    assert_eq!(replies, ["50", "0", "0", "0", "0"]);
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_told_in_its_place_behind_a_slow_one() {
    let service = Pipeline::new(Lines::default).service(service_fn(act));
    let served = serve(service.in_flight(8));

    for (last, reason) in [
        ("fail", EndReason::ServiceError),
        ("panic", EndReason::Panic),
    ] {
        let mut client = served.client().await;
        client.send(format!("20\n0\n{last}\n0\n")).await;

        assert_eq!(client.rest().await, ["20", "0"], "{last}");
        drop(client);
        assert_eq!(served.reason().await, reason);
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_one_that_fails_drops_what_is_held_behind_it() {
    let service = service_fn(async |request: Bytes| match &request[..] {
        b"slow" => {
            sleep(20 * MS).await;
            Err(BoxError::from("failed as told"))
        }
        _ => Ok(request),
    });
    let served = serve(Pipeline::new(Lines::default).service(service).in_flight(8));
    let mut client = served.client().await;
    client.send("a\nslow\nb\nc\n").await;

    assert_eq!(client.rest().await, ["a"]);
    drop(client);
    assert_eq!(served.reason().await, EndReason::ServiceError);
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_closes_is_written_behind_a_slow_one() {
    let service = Pipeline::new(Lines::default).service(service_fn(act));
    let served = serve(service.in_flight(8));
    let mut client = served.client().await;
    client.send("20\nclose\n0\n").await;

    assert_eq!(client.rest().await, ["20", "close"]);
    drop(client);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_hangs_does_not_keep_a_connection_that_another_closes() {
    let service = Pipeline::new(Lines::default).service(service_fn(act));
    let served = serve(service.multiplexed(8));
    let mut client = served.client().await;
    client.send("hang\n0\nclose\n").await;

    let rest = timeout(1000 * MS, client.rest()).await;

    assert_eq!(rest.unwrap(), ["0", "close"]);
    drop(client);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_input_waits_for_a_slow_one_and_those_held_behind_it() {
    for multiplexed in [false, true] {
        let pipeline = Pipeline::new(Lines::default).service(service_fn(act));
        let served = if multiplexed {
            serve(pipeline.multiplexed(8))
        } else {
            serve(pipeline.in_flight(8))
        };
        let mut client = served.client().await;
        client.send("20\n0\n10\n").await;
        client.finish().await;

        let mut replies = client.rest().await;

        replies.sort();
        assert_eq!(replies, ["0", "10", "20"], "multiplexed: {multiplexed}");
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_call_pushes_goes_out_while_it_runs_and_others_are_held() {
    let make = service_fn(async |peer: Peer<Bytes>| {
        Ok::<_, Infallible>(service_fn(move |request: Bytes| {
            let peer = peer.clone();
            async move {
                if request == "slow" {
                    peer.send("pushed".into()).await?;
                    sleep(20 * MS).await;
                }
                Ok::<_, BoxError>(request)
            }
        }))
    });
    let served = serve(
        Pipeline::new(Lines::default)
            .make_service(make)
            .in_flight(8),
    );
    let begun = Instant::now();
    let mut client = served.client().await;
    client.send("slow\nb\n").await;

    assert_eq!(client.line().await, "pushed");
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!([client.line().await, client.line().await], ["slow", "b"]);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_wakes_itself_is_polled_until_it_is_done() {
    let service = service_fn(async |request: Bytes| {
        let mut left = 100;
        poll_fn(|cx| {
            left -= 1;
            cx.waker().wake_by_ref();
            if left == 0 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        Ok::<_, Infallible>(request)
    });
    let served = serve(Pipeline::new(Lines::default).service(service).in_flight(4));
    let mut client = served.client().await;
    client.send("a\nb\nc\nd\ne\nf\n").await;
    client.finish().await;

    assert_eq!(client.rest().await, ["a", "b", "c", "d", "e", "f"]);
}

/// Yields a frame every 10 ms.
fn three_frames() -> impl futures_util::Stream<Item = Result<Bytes, BoxError>> {
    futures_util::stream::unfold(0, |n| async move {
        sleep(10 * MS).await;
        (n < 3).then(|| (Ok(Bytes::from(n.to_string())), n + 1))
    })
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_streams_is_whole_although_a_later_call_panics() {
    let service = service_fn(|request: Bytes| async move {
        if request == "stream" {
            return Ok(Reply::stream(three_frames()));
        }
        sleep(15 * MS).await;
        act(request).await
    });
    let served = serve(
        Pipeline::new(Lines::default)
            .service(service)
            .multiplexed(2),
    );
    let mut client = served.client().await;

    client.send("stream\npanic\n").await;

    for frame in ["0", "1", "2"] {
        assert_eq!(client.line().await, frame);
    }
    assert!(client.rest().await.is_empty());
}

/// Is ready once. Panics in the second `poll_ready`.
#[derive(Clone)]
struct ReadyOnce<S> {
    service: S,
    asked: Arc<AtomicUsize>,
}

impl<S: Service<Bytes>> Service<Bytes> for ReadyOnce<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        assert_eq!(self.asked.fetch_add(1, Ordering::Relaxed), 0, "asked again");
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Bytes) -> S::Future {
        self.service.call(request)
    }
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_streams_is_whole_although_the_service_panics_when_it_is_to_be_ready_again() {
    let service = ReadyOnce {
        service: service_fn(|_| async { Ok::<_, BoxError>(Reply::stream(three_frames())) }),
        asked: Arc::default(),
    };
    let pipeline = Pipeline::new(Lines::default).service(service);
    let served = serve(pipeline.in_flight(2));
    let mut client = served.client().await;

    client.send("stream\n").await;
    assert_eq!(client.line().await, "0");
    client.send("more\n").await;

    assert_eq!(client.rest().await, ["1", "2"]);
    assert_eq!(served.reason().await, EndReason::Panic);
}

/// A call that panics when it is dropped; if it is `torn`, also when it is polled.
struct PanicsInDrop {
    torn: bool,
    request: Bytes,
}

impl Future for PanicsInDrop {
    type Output = Result<Reply<Bytes>, BoxError>;

    fn poll(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Self::Output> {
        assert!(!self.torn, "panicked as told");
        Poll::Ready(Ok(self.request.clone().into()))
    }
}

impl Drop for PanicsInDrop {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "panicked in drop, as told");
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_asked_before_is_answered_although_a_call_panics_as_it_is_dropped() {
    let service = service_fn(|request: Bytes| {
        let call: Pin<Box<dyn Future<Output = _> + Send>> = match &request[..] {
            b"torn" | b"drop" => {
                let torn = request == "torn";
                Box::pin(PanicsInDrop { torn, request })
            }
            _ => Box::pin(act(request)),
        };
        call
    });
    for panics in ["torn", "drop"] {
        for served in each_way(Pipeline::new(Lines::default).service(service)) {
            let mut client = served.client().await;

            client.send(format!("0\n20\n{panics}\n0\n")).await;

            let answered = client.rest().await;
            // In `multiplexed`, a panic drops the replies of calls that are still running.
            let before: &[_] = match served.way() {
                "multiplexed" => &["0"],
                _ => &["0", "20"],
            };
            assert_eq!(answered, before, "{}, {panics}", served.way());
            assert_eq!(served.reason().await, EndReason::Panic, "{}", served.way());
        }
    }
}
