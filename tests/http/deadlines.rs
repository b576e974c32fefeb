//! Deadlines of HTTP connections: how long a peer may take for each part of an exchange.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tower::service_fn;
use tower_tcp::EndReason;
use tower_tcp::deadline::{Deadlines, DrainDeadlines};
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::testkit::{Served, serve};

use crate::support::{Clients, Ends, settled};
use crate::{GET, answer, connect, get, http, http2, post, text};

/// Returns the whole seconds since `since`.
fn seconds(since: Instant) -> u64 {
    (since.elapsed().as_secs_f64()).round() as u64
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_ends_after_a_minute() {
    let served = serve(http());
    let mut client = served.client().await;
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());

    assert_eq!(seconds(begun), 60);
    drop(client);
    assert_eq!(served.reason().await, EndReason::FirstByteTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_head_has_half_a_minute_however_it_trickles() {
    let served = serve(http());
    let mut client = served.client().await;
    // The deadline counts from the first byte, not from accept.
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
    let served = serve(http());
    let mut client = served.client().await;
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
    let served = serve(http());
    let mut client = served.client().await;
    client.send(GET).await;
    answer(&mut client).await;
    sleep(Duration::from_secs(74)).await;
    client.send(GET).await;
    answer(&mut client).await;
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());

    assert_eq!(seconds(begun), 75);
    drop(client);
    let end = served.end().await;
    assert_eq!((end.reason(), end.requests()), (EndReason::IdleTimeout, 2));
}

#[tokio::test(start_paused = true)]
async fn an_http2_connection_rests_75_seconds_without_streams() {
    let served = serve(http());
    let (sender, connection) = http2(connect(&served).await).await;
    let response = sender.send_request(get("/sleep/100")).await;
    text(response.expect("an answer")).await;
    let begun = Instant::now();

    connection.await.expect("it ran").expect("in good order");
    assert!(sender.got_goaway().await);

    assert_eq!(seconds(begun), 75);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn an_http2_connection_may_rest_before_its_first_request() {
    let served = serve(http());
    let begun = Instant::now();
    let (sender, connection) = http2(connect(&served).await).await;

    connection.await.expect("it ran").expect("in good order");
    assert!(sender.got_goaway().await);

    assert_eq!(seconds(begun), 75);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_request_in_hand_is_no_rest() {
    for http2_too in [false, true] {
        let served = serve(http());

        if http2_too {
            let (sender, _connection) = http2(connect(&served).await).await;
            let response = sender.send_request(get("/sleep/3600")).await;
            assert_eq!(text(response.expect("an answer")).await, "/sleep/3600");
        } else {
            let mut client = served.client().await;
            client
                .send("GET /sleep/3600 HTTP/1.1\r\nhost: a\r\n\r\n")
                .await;
            assert_eq!(answer(&mut client).await.body, "/sleep/3600");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_takes_the_time_it_takes() {
    let service = service_fn(|request: Request<RequestBody>| async {
        let body = request.into_body().collect().await?.to_bytes();
        Ok::<_, tower_tcp::BoxError>(Response::new(Full::new(body)))
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
        .await;
    for byte in "slow".bytes() {
        sleep(Duration::from_secs(29)).await;
        client.send([byte]).await;
    }

    assert_eq!(answer(&mut client).await.body, "slow");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_nothing_is_cut_off() {
    let service = service_fn(|_: Request<RequestBody>| async {
        let body = Bytes::from(vec![b'x'; 1 << 20]);
        Ok::<_, std::convert::Infallible>(Response::new(Full::new(body)))
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

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
    let mut client = served.client().await;
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
        let costly = service_fn(move |_: Request<RequestBody>| async move {
            for _ in 0..costs {
                tokio::task::consume_budget().await;
            }
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        });
        let served = serve(Http::new(costly));
        let mut client = served.client().await;

        client.send(GET).await;

        assert_eq!(answer(&mut client).await.status(), "200");
        assert!(client.rest().await.is_empty());
        drop(client);
        assert_eq!(served.reason().await, EndReason::IdleTimeout, "{costs}");
    }
}

/// Reads the whole body. Answers with the result.
async fn read(request: Request<RequestBody>) -> Result<Response<String>, Infallible> {
    let read = request.into_body().collect().await;
    Ok(Response::new(match read {
        Ok(body) => format!("{} bytes", body.to_bytes().len()),
        Err(err) => err.to_string(),
    }))
}

const STALLED: &str = "no byte of the request body arrived within 30s";

#[tokio::test(start_paused = true)]
async fn a_body_that_stalls_ends_its_http1_connection_behind_the_response() {
    let served = serve(Http::new(service_fn(read)));
    let mut client = served.client().await;
    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nst")
        .await;
    let begun = Instant::now();

    let answer = answer(&mut client).await;

    assert_eq!(seconds(begun), 30);
    assert_eq!(answer.body, STALLED);
    assert!(answer.closes());
    assert!(client.rest().await.is_empty());
    drop(client);
    assert_eq!(served.reason().await, EndReason::BodyTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stalls_fails_its_http2_stream_only() {
    let served = serve(Http::new(service_fn(read)));
    let (sender, connection) = http2(connect(&served).await).await;
    let begun = Instant::now();

    let (stalled, unfinished) = post(&sender, "st", true);
    assert_eq!(text(stalled.await.expect("a response")).await, STALLED);
    assert_eq!(seconds(begun), 30);

    let (other, _) = post(&sender, "all", false);
    assert_eq!(text(other.await.expect("a response")).await, "3 bytes");
    drop((sender, unfinished));
    connection.await.expect("it ran").expect("in good order");
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_does_not_read_the_body_costs_the_peer_nothing() {
    let service = service_fn(|request: Request<RequestBody>| async {
        sleep(Duration::from_secs(600)).await;
        read(request).await
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
        .await;
    sleep(Duration::from_secs(620)).await;
    client.send("late").await;

    assert_eq!(answer(&mut client).await.body, "4 bytes");
}

#[tokio::test(start_paused = true)]
async fn an_old_http1_connection_is_told_so_with_its_next_response() {
    let deadlines = Deadlines::default().max_age(Duration::from_secs(10));
    let served = serve(http().deadlines(deadlines));
    let mut client = served.client().await;
    client.send(GET).await;
    assert!(!answer(&mut client).await.closes());
    sleep(Duration::from_millis(10_500)).await;

    client.send(GET).await;

    assert!(answer(&mut client).await.closes());
    assert!(client.rest().await.is_empty());
    drop(client);
    assert_eq!(served.reason().await, EndReason::MaxAge);
}

#[tokio::test(start_paused = true)]
async fn an_old_http1_connection_at_rest_is_closed_a_second_later() {
    let deadlines = Deadlines::default().max_age(Duration::from_secs(10));
    let served = serve(http().deadlines(deadlines));
    let mut client = served.client().await;
    let begun = Instant::now();
    client.send(GET).await;
    answer(&mut client).await;

    assert!(client.rest().await.is_empty());

    assert_eq!(seconds(begun), 11);
    drop(client);
    assert_eq!(served.reason().await, EndReason::MaxAge);
}

/// Sends requests until `until`, over as many connections as it takes. Returns the number of
/// answers, and the age at which each connection ended.
async fn rotate(served: &Served, until: Instant) -> (usize, Vec<Duration>) {
    let (mut answered, mut ages) = (0, Vec::new());
    while Instant::now() < until {
        let begun = Instant::now();
        let (sender, connection) = http2(connect(served).await).await;
        // Nothing else runs between this check and the requests, so the server answers all four.
        while !sender.got_goaway().await && Instant::now() < until {
            let many = (0..4).map(|n| sender.send_request(get(&format!("/sleep/{}", n % 2))));
            for response in join_all(many).await {
                text(response.expect("an answer")).await;
                answered += 1;
            }
        }
        drop(sender);
        connection.await.expect("it ran").expect("in good order");
        ages.push(begun.elapsed());
    }
    ages.pop();
    (answered, ages)
}

#[tokio::test(start_paused = true)]
async fn old_http2_connections_rotate_within_the_jitter_and_lose_no_request() {
    let begun = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&begun);
    let service = service_fn(move |request| {
        count.fetch_add(1, Ordering::Relaxed);
        crate::paths(request)
    });
    let deadlines = Deadlines::default()
        .max_age(Duration::from_secs(20))
        .max_age_jitter(Duration::from_secs(10));
    let served = serve(Http::new(service).deadlines(deadlines));
    let until = Instant::now() + Duration::from_secs(120);

    let clients = (0..10).map(|_| rotate(&served, until));
    let rotated = join_all(clients).await;

    let answered: usize = rotated.iter().map(|(answered, _)| answered).sum();
    assert_eq!(answered, begun.load(Ordering::Relaxed));
    let ages: Vec<_> = rotated.into_iter().flat_map(|(_, ages)| ages).collect();
    assert!(ages.len() >= 10 * 3, "{}", ages.len());
    // The requests in progress take a second.
    let span = Duration::from_secs(20)..=Duration::from_secs(31);
    assert!(ages.iter().all(|age| span.contains(age)), "{ages:?}");
    let (least, most) = (ages.iter().min(), ages.iter().max());
    assert!(least < Some(&Duration::from_secs(24)), "{least:?}");
    assert!(most > Some(&Duration::from_secs(26)), "{most:?}");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_another_task_leaves_unread_behind_the_answer_is_bounded_by_idle() {
    let http = Http::new(service_fn(|request: Request<RequestBody>| async move {
        let body = request.into_body();
        tokio::spawn(async move {
            let _unread = body;
            std::future::pending::<()>().await;
        });
        Ok::<_, Infallible>(Response::new("answered".to_owned()))
    }));
    let served = serve(http);
    let mut client = served.client().await;
    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nab")
        .await;
    let begun = Instant::now();

    assert_eq!(served.reason().await, EndReason::IdleTimeout);
    // The idle time, and 2 s of linger, because the peer does not close.
    assert_eq!(begun.elapsed().as_secs(), 75 + 2);
}

#[tokio::test(start_paused = true)]
async fn over_http2_a_body_behind_the_answer_is_bounded_while_nothing_of_it_arrives() {
    for seconds_of_body in [0, 200] {
        let (told, mut tell) = mpsc::channel(1);
        let http = Http::new(service_fn(move |request: Request<RequestBody>| {
            let told = told.clone();
            async move {
                tokio::spawn(async move {
                    if seconds_of_body == 0 {
                        sleep(Duration::from_secs(1000)).await;
                    }
                    let read = request.into_body().collect().await;
                    let read = read.map(|body| body.to_bytes().len());
                    told.try_send(read.ok()).expect("there is room for one");
                });
                Ok::<_, Infallible>(Response::new("answered".to_owned()))
            }
        }));
        for closes in [false, true] {
            let served = serve(http.clone());
            let (sender, _connection) = http2(connect(&served).await).await;
            let (response, mut body) = post(&sender, "x", true);
            assert_eq!(text(response.await.expect("a response")).await, "answered");
            let begun = Instant::now();
            if closes {
                let live = served.handle().connections().next();
                live.expect("it is there").close();
            }

            for left in (0..seconds_of_body).rev() {
                sleep(Duration::from_secs(1)).await;
                body.send_data("x".into(), left == 0).expect("it is open");
            }

            let all = (seconds_of_body > 0).then_some(1 + seconds_of_body);
            let reason = served.reason().await;
            let took = seconds(begun);
            assert_eq!(tell.recv().await, Some(all), "{closes}");
            let (expected, time) = match (closes, all) {
                // As long as for the body in a drain, from the `GOAWAY`.
                (false, None) => (EndReason::IdleTimeout, 75 + 3),
                (true, None) => (EndReason::ServiceClosed, 3),
                (false, Some(_)) => (EndReason::IdleTimeout, 200 + 75),
                (true, Some(_)) => (EndReason::ServiceClosed, 200),
            };
            assert_eq!((reason, took), (expected, time), "{all:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_whose_first_part_came_with_a_request_has_half_a_minute() {
    for before in [GET, "GET / HTTP/1.1\nhost: a\n\n"] {
        let served = serve(http());
        let mut client = served.client().await;
        client.send(format!("{before}GET /x HTTP/1.1\r\nho")).await;
        answer(&mut client).await;
        let begun = Instant::now();

        assert!(client.rest().await.is_empty());

        assert_eq!(seconds(begun), 30);
        drop(client);
        assert_eq!(served.reason().await, EndReason::FrameTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_waits_for_a_body_is_not_woken_in_between() {
    let at_once = Deadlines::default().drain(DrainDeadlines::default().body(Duration::ZERO));
    for deadlines in [Deadlines::default(), at_once] {
        let polls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&polls);
        let service = service_fn(move |request: Request<RequestBody>| {
            let polls = Arc::clone(&counted);
            let mut read = Box::pin(request.into_body().collect());
            std::future::poll_fn(move |cx| {
                polls.fetch_add(1, Ordering::Relaxed);
                read.as_mut()
                    .poll(cx)
                    .map_ok(|_| Response::new(String::new()))
            })
        });
        let served = serve(Http::new(service).deadlines(deadlines));
        let mut client = served.client().await;
        client
            .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nst")
            .await;
        settled().await;
        let before = polls.load(Ordering::Relaxed);

        sleep(Duration::from_secs(20)).await;

        assert_eq!(polls.load(Ordering::Relaxed), before);
    }
}
