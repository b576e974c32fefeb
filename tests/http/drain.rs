//! Drain of HTTP connections: pending requests are answered, and idle connections are closed.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Request;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, sleep, timeout};
use tower::service_fn;
use tower_tcp::EndReason;
use tower_tcp::deadline::Deadlines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::testkit::serve;

use crate::support::{Clients, Ends, settled};
use crate::{GET, answer, connect, get, http, http2, post, reply, text};

/// Far longer than the drain waits for a connection that was just accepted.
const LATER: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn a_connection_that_sent_nothing_is_closed_at_once() {
    let served = serve(http());
    let mut client = served.client().await;
    tokio::time::sleep(LATER).await;

    served.handle().shutdown();
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());
    assert_eq!(begun.elapsed(), Duration::ZERO);
    drop(client);
    assert_eq!(served.reason().await, EndReason::Drained);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_has_arrived_is_answered() {
    let served = serve(http());
    let mut client = served.client().await;
    tokio::time::sleep(LATER).await;

    client.send(GET).await;
    served.handle().shutdown();

    let answer = answer(&mut client).await;
    assert_eq!(answer.status(), "200");
    assert!(answer.closes());
    assert!(client.rest().await.is_empty());
    drop(client);
    assert_eq!(served.reason().await, EndReason::Drained);
}

#[tokio::test(start_paused = true)]
async fn a_request_in_the_backlog_is_answered() {
    let served = serve(http());
    let mut client = served.client().await;
    client.send(GET).await;

    // The drain begins before the server's task has run.
    served.handle().shutdown();

    assert!(answer(&mut client).await.closes());
}

#[tokio::test(start_paused = true)]
async fn a_request_in_hand_is_answered() {
    let served = serve(http());
    let mut client = served.client().await;
    client
        .send("GET /sleep/20 HTTP/1.1\r\nhost: a\r\n\r\n")
        .await;
    settled().await;

    served.handle().shutdown();

    let answer = answer(&mut client).await;
    assert_eq!(answer.body, "/sleep/20");
    assert!(answer.closes());
    assert!(client.rest().await.is_empty());
    drop(client);
    assert_eq!(served.reason().await, EndReason::Drained);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_may_ask_once_more() {
    let served = serve(http());
    let mut client = served.client().await;
    client.send(GET).await;
    assert!(!answer(&mut client).await.closes());

    served.handle().shutdown();
    tokio::time::sleep(Duration::from_millis(900)).await;
    client.send(GET).await;

    let answer = answer(&mut client).await;
    assert_eq!(answer.status(), "200");
    assert!(answer.closes());
    assert!(client.rest().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_after_a_second() {
    let served = serve(http());
    let mut client = served.client().await;
    client.send(GET).await;
    answer(&mut client).await;

    served.handle().shutdown();
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());
    assert_eq!(begun.elapsed().as_secs(), 1);
    drop(client);
    assert_eq!(served.reason().await, EndReason::Drained);
}

#[tokio::test(start_paused = true)]
async fn a_head_that_was_begun_is_waited_for() {
    let served = serve(http());
    let mut client = served.client().await;
    let (begin, end) = GET.split_at(10);
    client.send(begin).await;
    tokio::time::sleep(LATER).await;

    served.handle().shutdown();
    tokio::time::sleep(Duration::from_secs(2)).await;
    client.send(end).await;

    assert!(answer(&mut client).await.closes());
    assert!(client.rest().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_later_head_that_was_begun_is_waited_for() {
    let served = serve(http());
    let mut client = served.client().await;
    client.send(GET).await;
    answer(&mut client).await;
    let (begin, end) = GET.split_at(10);
    client.send(begin).await;
    settled().await;

    served.handle().shutdown();
    tokio::time::sleep(Duration::from_secs(2)).await;
    client.send(end).await;

    assert!(answer(&mut client).await.closes());
    assert!(client.rest().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_later_head_that_is_never_whole_has_three_seconds() {
    let served = serve(http());
    let mut client = served.client().await;
    client.send(GET).await;
    answer(&mut client).await;
    client.send("GET").await;
    settled().await;

    served.handle().shutdown();
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());
    assert_eq!(begun.elapsed().as_secs_f64().round(), 3.0);
    drop(client);
    assert_eq!(served.reason().await, EndReason::FrameTimeout);
}

#[tokio::test(start_paused = true)]
async fn http2_streams_in_hand_are_answered_and_others_are_not_begun() {
    let served = serve(http());
    let (sender, connection) = http2(connect(&served).await).await;
    let slow = tokio::spawn(sender.send_request(get("/sleep/20")));
    settled().await;

    served.handle().shutdown();
    settled().await;
    let late = sender.send_request(get("/late")).await;

    assert!(late.is_err());
    let slow = slow.await.expect("it ran").expect("an answer");
    assert_eq!(text(slow).await, "/sleep/20");
    connection.await.expect("it ran").expect("in good order");
    assert!(sender.got_goaway().await);
    assert_eq!(served.reason().await, EndReason::Drained);
    assert_eq!(served.handle().closed().await.drained, 1);
}

#[tokio::test(start_paused = true)]
async fn an_idle_http2_connection_is_told_to_go_at_once() {
    let served = serve(http());
    let (sender, connection) = http2(connect(&served).await).await;
    settled().await;

    served.handle().shutdown();

    let gone = timeout(Duration::from_millis(10), connection).await;
    gone.expect("at once")
        .expect("it ran")
        .expect("in good order");
    assert!(sender.got_goaway().await);
    assert_eq!(served.reason().await, EndReason::Drained);
}

#[tokio::test(start_paused = true)]
async fn one_connection_can_be_told_to_leave() {
    let served = serve(http());
    let mut client = served.client().await;
    client
        .send("GET /sleep/5 HTTP/1.1\r\nhost: a\r\n\r\n")
        .await;
    settled().await;

    let live = served.handle().connections().next().expect("it is there");
    live.close();

    assert!(answer(&mut client).await.closes());
    assert!(client.rest().await.is_empty());
    drop(client);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn a_request_without_end_is_cut_off_at_the_deadline() {
    for http2_too in [false, true] {
        let served = serve(http());
        let mut client = None;
        let mut other = None;
        if http2_too {
            let (sender, connection) = http2(connect(&served).await).await;
            let request = tokio::spawn(sender.send_request(get("/never")));
            other = Some((sender, connection, request));
        } else {
            let mut http1 = served.client().await;
            http1.send("GET /never HTTP/1.1\r\nhost: a\r\n\r\n").await;
            client = Some(http1);
        }
        settled().await;

        served.handle().shutdown_within(Duration::from_secs(5));

        assert_eq!(served.reason().await, EndReason::DrainDeadline);
        assert_eq!(served.handle().closed().await.aborted, 1);
        drop((client, other));
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_drips_holds_a_drain_for_three_seconds() {
    for before in ["", GET] {
        let mut served = serve(http());
        let mut client = served.client().await;
        client.send(before).await;
        client.send("GET /a HTTP/1.1\r\nx: ").await;
        settled().await;
        let drip = tokio::spawn(async move {
            while client.0.write_all(b"x").await.is_ok() {
                sleep(Duration::from_millis(100)).await;
            }
        });

        let report = served.shutdown().await.expect("it ends");

        // A linger of 2 s delivers the response.
        let linger = if before.is_empty() { 0 } else { 2 };
        assert_eq!(report.duration.as_secs(), 3 + linger, "{before}");
        assert_eq!(served.reason().await, EndReason::FrameTimeout);
        drip.await.expect("it ends");
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_whose_first_part_came_with_a_request_is_waited_for() {
    let chunked = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    for before in [GET, chunked] {
        let served = serve(http());
        let mut client = served.client().await;
        client.send(format!("{before}GET /x HTTP/1.1\r\nho")).await;
        settled().await;
        served.handle().shutdown();
        sleep(Duration::from_secs(3)).await;

        client.send("st: a\r\n\r\n").await;

        let all = client.rest().await.join("\n");
        assert_eq!(all.matches("200 OK").count(), 2, "{before}: {all}");
        assert_eq!(served.reason().await, EndReason::Drained);
    }
}

#[tokio::test(start_paused = true)]
async fn half_a_body_holds_a_drain_for_a_few_seconds() {
    for http2_too in [false, true] {
        let service = service_fn(|request: Request<RequestBody>| async {
            let read = request.into_body().collect().await;
            crate::reply(read.map_or_else(|err| err.to_string(), |_| "whole".to_owned()))
        });
        let mut served = serve(Http::new(service));
        let begun = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nst";
        let reads = if http2_too {
            let (sender, _connection) = http2(connect(&served).await).await;
            let (response, body) = post(&sender, "st", true);
            tokio::spawn(async move {
                let _open = (sender, body);
                text(response.await.expect("a response")).await
            })
        } else {
            let mut client = served.client().await;
            client.send(begun).await;
            tokio::spawn(async move { client.rest().await.join("\n") })
        };
        sleep(Duration::from_secs(1)).await;

        let report = served.shutdown().await.expect("it ends");

        let took = report.duration;
        let span = Duration::from_secs(3)..Duration::from_millis(3100);
        assert!(span.contains(&took), "{http2_too}: {took:?}");
        let response = reads.await.expect("it ran");
        assert!(response.ends_with("within 3s"), "{response}");
    }
}

#[tokio::test(start_paused = true)]
async fn h4_a_client_that_reads_nothing_is_reported_as_timed_out() {
    let large = service_fn(|_: Request<RequestBody>| async { reply(vec![b'x'; 1 << 20]) });
    let deadlines = Deadlines::default().write(Duration::from_secs(5));
    let mut served = serve(Http::new(large).deadlines(deadlines));
    let mut client = served.client().await;
    client.send(GET).await;
    settled().await;

    served.handle().shutdown();

    let report = served.report().await;
    assert_eq!(
        (report.drained, report.timed_out, report.aborted),
        (0, 1, 0)
    );
    assert_eq!(served.reasons(), [EndReason::WriteTimeout]);
}
