//! What a peer may take its time for, and for how long.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, sleep};
use tower::service_fn;
use tower_tcp::EndReason;
use tower_tcp::deadline::Deadlines;
use tower_tcp::http::Http;

use crate::support::{serve, settled};
use crate::{GET, answer, connect, get, http, http2, text};

/// Whole seconds since then.
fn seconds(since: Instant) -> u64 {
    (since.elapsed().as_secs_f64()).round() as u64
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_ends_after_a_minute() {
    let mut served = serve(http());
    let mut client = served.connect().await;
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());

    assert_eq!(seconds(begun), 60);
    drop(client);
    assert_eq!(served.reason().await, EndReason::FirstByteTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_head_has_half_a_minute_however_it_trickles() {
    let mut served = serve(http());
    let mut client = served.connect().await;
    // It counts from the first byte, not from the connection.
    sleep(Duration::from_secs(20)).await;
    let begun = Instant::now();

    let mut end = Vec::new();
    for byte in GET.bytes() {
        client.send([byte]).await;
        if let Ok(rest) = tokio::time::timeout(Duration::from_secs(7), client.rest()).await {
            end = rest;
            break;
        }
    }

    assert!(end.is_empty());
    assert_eq!(seconds(begun), 30);
    drop(client);
    assert_eq!(served.reason().await, EndReason::FrameTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_later_head_has_its_time_behind_the_rest() {
    let mut served = serve(http());
    let mut client = served.connect().await;
    client.send(GET).await;
    answer(&mut client).await;
    sleep(Duration::from_secs(70)).await;

    client.send("GET /").await;
    let begun = Instant::now();
    assert!(client.rest().await.is_empty());

    assert_eq!(seconds(begun), 30);
    drop(client);
    assert_eq!(served.reason().await, EndReason::FrameTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_connection_rests_75_seconds_between_requests() {
    let mut served = serve(http());
    let mut client = served.connect().await;
    client.send(GET).await;
    answer(&mut client).await;
    sleep(Duration::from_secs(74)).await;
    client.send(GET).await;
    answer(&mut client).await;
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());

    assert_eq!(seconds(begun), 75);
    drop(client);
    let end = served.ended().await;
    assert_eq!((end.reason(), end.requests()), (EndReason::IdleTimeout, 2));
}

#[tokio::test(start_paused = true)]
async fn an_http2_connection_rests_75_seconds_without_streams() {
    let mut served = serve(http());
    let (mut sender, connection) = http2(connect(&served).await).await;
    let response = sender.send_request(get("/sleep/100")).await;
    text(response.expect("an answer")).await;
    let begun = Instant::now();

    connection
        .await
        .expect("it ran")
        .expect("it was told to go");

    assert_eq!(seconds(begun), 75);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn an_http2_connection_may_rest_before_its_first_request() {
    let mut served = serve(http());
    let begun = Instant::now();
    let (_sender, connection) = http2(connect(&served).await).await;

    connection
        .await
        .expect("it ran")
        .expect("it was told to go");

    assert_eq!(seconds(begun), 75);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_request_in_hand_is_no_rest() {
    for http2_too in [false, true] {
        let served = serve(http());

        if http2_too {
            let (mut sender, _connection) = http2(connect(&served).await).await;
            let response = sender.send_request(get("/sleep/3600")).await;
            assert_eq!(text(response.expect("an answer")).await, "/sleep/3600");
        } else {
            let mut client = served.connect().await;
            client
                .send("GET /sleep/3600 HTTP/1.1\r\nhost: a\r\n\r\n")
                .await;
            assert_eq!(answer(&mut client).await.body, "/sleep/3600");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_takes_the_time_it_takes() {
    let service = service_fn(|request: Request<Incoming>| async {
        use http_body_util::BodyExt;
        let body = request.into_body().collect().await?.to_bytes();
        Ok::<_, hyper::Error>(Response::new(Full::new(body)))
    });
    let served = serve(Http::new(service));
    let mut client = served.connect().await;

    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
        .await;
    for byte in "slow".bytes() {
        sleep(Duration::from_secs(600)).await;
        client.send([byte]).await;
    }

    assert_eq!(answer(&mut client).await.body, "slow");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_nothing_is_cut_off() {
    let service = service_fn(|_: Request<Incoming>| async {
        let body = Bytes::from(vec![b'x'; 1 << 20]);
        Ok::<_, std::convert::Infallible>(Response::new(Full::new(body)))
    });
    let mut served = serve(Http::new(service));
    let mut client = served.connect().await;

    client.send(GET).await;
    settled().await;
    let begun = Instant::now();

    assert_eq!(served.reason().await, EndReason::WriteTimeout);
    assert_eq!(seconds(begun), 30);
}

#[tokio::test(start_paused = true)]
async fn limits_can_be_off() {
    let deadlines = Deadlines::default().first_byte(None).frame(None).idle(None);
    let served = serve(http().deadlines(deadlines));
    let mut client = served.connect().await;
    let day = Duration::from_secs(3600);

    sleep(day).await;
    let (begin, end) = GET.split_at(7);
    client.send(begin).await;
    sleep(day).await;
    client.send(end).await;
    assert_eq!(answer(&mut client).await.status(), "200");
    sleep(day).await;
    client.send(GET).await;

    assert_eq!(answer(&mut client).await.status(), "200");
    client.0.shutdown().await.expect("it is open");
}

#[tokio::test(start_paused = true)]
async fn a_deadline_is_kept_whatever_the_turn_before_it_has_cost() {
    for costs in 100..150 {
        let costly = service_fn(move |_: Request<Incoming>| async move {
            for _ in 0..costs {
                tokio::task::consume_budget().await;
            }
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        });
        let mut served = serve(Http::new(costly));
        let mut client = served.connect().await;

        client.send(GET).await;

        assert_eq!(answer(&mut client).await.status(), "200");
        assert!(client.rest().await.is_empty());
        drop(client);
        assert_eq!(served.reason().await, EndReason::IdleTimeout, "{costs}");
    }
}
