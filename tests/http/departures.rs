//! A peer of HTTP/1 that stops sending while its request is being answered. If it has only finished
//! sending, it gets its response, within a deadline. If it is gone, that is noticed, whatever it
//! sent before.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};
use tower::{Layer, service_fn};
use tower_tcp::deadline::Deadlines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::preconnect::{Peek, PreConnectExt, PreConnectLayer, Protocol};
use tower_tcp::testkit::serve;
use tower_tcp::{EndReason, Server};

use crate::over::{Over, TRANSPORTS, Transport};
use crate::support::{Clients, Ends, settled, until};
use crate::{GET, http, paths};

const NET: Duration = Duration::from_secs(60);
const NEVER: &str = "GET /never HTTP/1.1\r\nhost: a\r\n\r\n";

/// Serves [`paths`] over real sockets. With TLS, several streams wrap the socket.
async fn serve_over(transport: Transport, deadlines: Deadlines) -> Over {
    let http = Http::new(service_fn(paths)).deadlines(deadlines);
    let secured = http.clone();
    Over::behind(transport, Server::builder(), http, |tls| {
        let hooks = Peek::new(Protocol::detect).chain(tls.when(|_| true));
        PreConnectLayer::new(hooks).layer(secured)
    })
    .await
}

/// Waits until a request is being answered.
async fn has_begun(over: &Over) {
    let handle = over.served.handle();
    until(|| handle.connections().any(|live| live.requests() > 0)).await;
}

#[tokio::test]
async fn a_half_close_right_behind_a_request_is_answered_each_time() {
    for transport in TRANSPORTS {
        let over = serve_over(transport, Deadlines::default()).await;
        for run in 0..200 {
            let mut io = over.connect().await;
            io.write_all(GET.as_bytes()).await.expect("it is open");
            io.shutdown().await.expect("it is open");
            let mut all = String::new();

            let read = timeout(NET, io.read_to_string(&mut all)).await;

            read.expect("in time").expect("it closes in good order");
            assert!(
                all.starts_with("HTTP/1.1 200"),
                "{transport:?} {run}: {all}"
            );
            assert_eq!(over.served.reason().await, EndReason::PeerClosed);
        }
    }
}

/// Returns requests that are never answered, each with unread input behind it and the input's name.
fn unread() -> Vec<(&'static str, String)> {
    let post = "POST /never HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n";
    vec![
        ("nothing", NEVER.to_owned()),
        ("a byte", format!("{NEVER}G")),
        ("an empty line", format!("{NEVER}\r\n")),
        ("a request", format!("{NEVER}{GET}")),
        ("many requests", format!("{NEVER}{}", GET.repeat(1000))),
        ("a body", format!("{post}{}", "x".repeat(100_000))),
        ("half a body", format!("{post}{}", "x".repeat(50_000))),
    ]
}

#[tokio::test]
async fn a_peer_that_is_gone_ends_its_request_at_once_whatever_lies_unread() {
    for transport in TRANSPORTS {
        for (what, input) in unread() {
            let deadlines = Deadlines::default();
            let over = serve_over(transport, deadlines).await;
            let mut io = over.connect().await;
            io.write_all(input.as_bytes()).await.expect("it is open");
            has_begun(&over).await;
            let begun = Instant::now();

            io.vanish().expect("it is a socket");

            let ended = timeout(NET, over.served.end()).await;
            let ended = ended.unwrap_or_else(|_| panic!("{transport:?}, {what}: not noticed"));
            assert_eq!(
                ended.reason(),
                EndReason::PeerReset,
                "{transport:?}, {what}"
            );
            let took = begun.elapsed();
            assert!(
                took < Duration::from_secs(5),
                "{transport:?}, {what}: {took:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_peer_that_has_finished_counts_as_gone_after_a_time_whatever_lies_unread() {
    for transport in TRANSPORTS {
        for (what, input) in unread() {
            let deadlines = Deadlines::default().half_closed(Duration::from_millis(100));
            let over = serve_over(transport, deadlines).await;
            let mut io = over.connect().await;
            io.write_all(input.as_bytes()).await.expect("it is open");
            let begun = Instant::now();

            io.shutdown().await.expect("it is open");

            let ended = timeout(NET, over.served.end()).await;
            let ended = ended.unwrap_or_else(|_| panic!("{transport:?}, {what}: not noticed"));
            assert_eq!(
                ended.reason(),
                EndReason::PeerReset,
                "{transport:?}, {what}"
            );
            let took = begun.elapsed();
            assert!(
                took > Duration::from_millis(90),
                "{transport:?}, {what}: {took:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_reset_behind_a_half_close_ends_the_request_at_once() {
    for transport in TRANSPORTS {
        let over = serve_over(transport, Deadlines::default().half_closed(None)).await;
        let mut io = over.connect().await;
        io.write_all(NEVER.as_bytes()).await.expect("it is open");
        io.shutdown().await.expect("it is open");
        has_begun(&over).await;

        io.vanish().expect("it is a socket");

        let ended = timeout(NET, over.served.end()).await;
        let ended = ended.unwrap_or_else(|_| panic!("{transport:?}: not noticed"));
        assert_eq!(ended.reason(), EndReason::PeerReset, "{transport:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_has_finished_has_ten_seconds_for_its_answer() {
    let served = serve(http());
    let mut client = served.client().await;
    client
        .send("GET /sleep/9 HTTP/1.1\r\nhost: a\r\n\r\n")
        .await;
    client.finish().await;

    let rest = client.rest().await.join("\n");

    assert!(rest.starts_with("HTTP/1.1 200"), "{rest}");
    assert_eq!(served.reason().await, EndReason::PeerClosed);
    let mut client = served.client().await;
    client.send(NEVER).await;
    let begun = Instant::now();
    client.finish().await;

    assert!(client.rest().await.is_empty());

    assert_eq!(begun.elapsed().as_secs(), 10);
    assert_eq!(served.reason().await, EndReason::PeerReset);
}

#[tokio::test(start_paused = true)]
async fn each_pipelined_request_is_answered_behind_a_half_close() {
    let served = serve(http());
    let mut client = served.client().await;
    client
        .send("GET /sleep/9 HTTP/1.1\r\nhost: a\r\n\r\n".repeat(3))
        .await;
    client.finish().await;

    let rest = client.rest().await.join("\n");

    assert_eq!(rest.matches("200 OK").count(), 3);
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_peer_that_has_finished_can_be_none_or_zero() {
    let day = Duration::from_secs(24 * 3600);
    for (time, answered) in [(None, true), (Some(Duration::ZERO), false)] {
        let served = serve(http().deadlines(Deadlines::default().half_closed(time)));
        let mut client = served.client().await;
        let begun = Instant::now();
        client
            .send("GET /sleep/3600 HTTP/1.1\r\nhost: a\r\n\r\n")
            .await;
        client.finish().await;

        let rest = timeout(day, client.rest()).await.expect("in time");

        assert_eq!(!rest.is_empty(), answered);
        assert_eq!(begun.elapsed().as_secs(), if answered { 3600 } else { 0 });
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_that_goes_on_keeps_a_peer_that_has_finished() {
    let service = service_fn(|_: Request<RequestBody>| async {
        let body = stream::iter(0..10).then(|n| async move {
            sleep(Duration::from_secs(9)).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from(n.to_string())))
        });
        Ok::<_, Infallible>(Response::new(StreamBody::new(body)))
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;
    client.send(GET).await;
    client.finish().await;

    let rest = client.rest().await.join("\n");

    assert!(rest.ends_with("0\n"), "{rest}");
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn in_memory_a_peer_that_has_finished_is_noticed_behind_511_unread_bytes() {
    for (unread, noticed) in [(511, true), (512, false)] {
        let served = serve(http());
        let mut client = served.client().await;
        client.send(NEVER).await;
        settled().await;
        // hyper reads none of these, because it has begun to answer.
        for byte in "G".repeat(unread).chars() {
            client.send(byte.to_string()).await;
            settled().await;
        }

        client.finish().await;

        let ended = timeout(NET, served.reason()).await;
        let expected = noticed.then_some(EndReason::PeerReset);
        assert_eq!(ended.ok(), expected, "{unread} bytes unread");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_finishes_within_a_body_fails_the_body_at_once() {
    let service = service_fn(|request: Request<RequestBody>| async {
        let read = request.into_body().collect().await;
        Ok::<_, Infallible>(Response::new(match read {
            Ok(_) => "whole".to_owned(),
            Err(err) => err.to_string(),
        }))
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;
    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nst")
        .await;
    settled().await;
    let begun = Instant::now();
    client.finish().await;

    let rest = client.rest().await.join("\n");

    assert!(
        rest.ends_with("the request body could not be read"),
        "{rest}"
    );
    assert_eq!(begun.elapsed().as_secs(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_read_late_arrives_whole() {
    let service = service_fn(|request: Request<RequestBody>| async {
        sleep(Duration::from_secs(5)).await;
        let read = request.into_body().collect().await;
        let read = read.expect("the body arrives").to_bytes();
        Ok::<_, Infallible>(Response::new(format!("{} bytes", read.len())))
    });
    let served = serve(Http::new(service));
    for finishes in [false, true] {
        let mut client = served.client().await;
        let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 50000\r\n\r\n";
        client.send(head).await;
        settled().await;
        client.send("x".repeat(50_000)).await;
        if finishes {
            client.finish().await;
        }

        let answer = crate::answer(&mut client).await;

        assert_eq!(answer.body, "50000 bytes");
    }
}
