//! Each HTTP connection ends once, for one reason, and answers that were sent arrive.

use std::convert::Infallible;
use std::future::ready;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Frame, SizeHint};
use hyper::{Request, Response};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::error::{Panicked, find_cause};
use tower_tcp::http::{Http, RequestBody, RequestBodyError};
use tower_tcp::testkit::serve;
use tower_tcp::{BoxError, ConnectionEnded, ConnectionInfo, EndReason};

use crate::support::{Clients, Ends, panic_if, settled, until};
use crate::{GET, Reply, answer, connect, frames, get, http, http2, reply, text};

/// Reports when it is dropped.
struct Dropped(mpsc::Sender<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.try_send(()).expect("there is room for one");
    }
}

/// Returns a service that never answers, and a receiver that learns when its future is dropped.
fn never() -> (
    Http<tower_tcp::make::ClonePerRequest<impl crate::Serves>>,
    mpsc::Receiver<()>,
) {
    let (dropped, told) = mpsc::channel(1);
    let service = service_fn(move |_: Request<RequestBody>| {
        let guard = Dropped(dropped.clone());
        async move {
            let _guard = guard;
            std::future::pending::<Reply>().await
        }
    });
    (Http::new(service), told)
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_between_requests_has_closed() {
    let served = serve(http());
    let mut client = served.client().await;
    client.send(GET).await;
    answer(&mut client).await;

    drop(client);

    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn an_http2_peer_that_leaves_has_closed() {
    let served = serve(http());
    let (sender, connection) = http2(connect(&served).await).await;
    let response = sender.send_request(get("/")).await.expect("an answer");
    text(response).await;

    drop(sender);
    connection
        .await
        .expect("it ran")
        .expect("it ends in good order");

    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_asks_for_the_end_gets_its_answer_first() {
    let served = serve(http());
    let mut client = served.client().await;

    client
        .send("GET /last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await;

    let answer = answer(&mut client).await;
    assert_eq!(answer.body, "/last");
    assert!(client.rest().await.is_empty());
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn the_side_that_asks_for_the_close_is_said_to_have_closed() {
    let close = service_fn(|request: Request<RequestBody>| async move {
        let response = Response::builder();
        let response = match request.uri().path() {
            "/close" => response.header("connection", "close"),
            _ => response,
        };
        Ok::<_, Infallible>(response.body(String::new()).expect("a response"))
    });
    let (peer, service) = (EndReason::PeerClosed, EndReason::ServiceClosed);
    for (request, by) in [
        ("GET / HTTP/1.0\r\n\r\n", peer),
        (
            "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
            peer,
        ),
        (
            "GET / HTTP/1.1\r\nhost: a\r\nconnection: TE, Close\r\n\r\n",
            peer,
        ),
        ("GET /close HTTP/1.1\r\nhost: a\r\n\r\n", service),
        (
            "GET /close HTTP/1.1\r\nhost: a\r\nconnection: TE\r\n\r\n",
            service,
        ),
        (
            "GET /close HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
            service,
        ),
    ] {
        let served = serve(Http::new(close));
        let mut client = served.client().await;

        client.send(request).await;

        assert!(!client.rest().await.is_empty());
        assert_eq!(served.reason().await, by, "{request}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_within_a_head_was_cut_off() {
    let served = serve(http());
    let mut client = served.client().await;

    client.send("GET / HTT").await;
    client.finish().await;

    assert_eq!(served.reason().await, EndReason::Truncated);
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_peer_is_gone_is_dropped() {
    let (http, mut dropped) = never();
    let served = serve(http);
    let mut client = served.client().await;
    client.send(GET).await;
    settled().await;

    drop(client);

    assert_eq!(served.reason().await, EndReason::PeerReset);
    assert_eq!(dropped.recv().await, Some(()));
}

/// The close of a connection begins when its requests are done, so such a handler waits for itself.
/// While the peer stays, only a drain or an abort ends the handler.
#[tokio::test(start_paused = true)]
async fn a_handler_that_awaits_the_closing_of_its_own_connection_ends_with_its_peer_or_a_drain() {
    let hour = Duration::from_secs(3600);
    for (is_http2, leaves, ends_after) in [
        // The peer may have only finished sending, so it has 10 s for its answer.
        (false, true, 10),
        (true, true, 0),
        (false, false, 30),
        (true, false, 30),
    ] {
        for is_closed in [false, true] {
            let case = format!("HTTP/2: {is_http2}, closed: {is_closed}, leaves: {leaves}");
            let (dropped, mut told) = mpsc::channel(1);
            let served = serve(Http::new(service_fn(
                move |request: Request<RequestBody>| {
                    let guard = Dropped(dropped.clone());
                    async move {
                        let _guard = guard;
                        let info = request.extensions().get::<ConnectionInfo>();
                        let closing = info.expect("a request knows it").closing();
                        reply(format!("{:?}", closing.await))
                    }
                },
            )));
            let mut client = connect(&served).await;
            if is_http2 {
                frames::begin(&mut client).await;
                let head = frames::frame(frames::HEADERS, 5, 1, frames::GET_NEVER);
                client.write_all(&head).await.expect("it is open");
            } else {
                client.write_all(GET.as_bytes()).await.expect("it is open");
            }
            let handle = served.handle();
            until(|| handle.connections().any(|live| live.requests() == 1)).await;
            if is_closed {
                handle.connections().for_each(|live| live.close());
            }
            sleep(hour).await;
            assert!(told.try_recv().is_err(), "{case}: it waits");
            let begun = Instant::now();

            let stays = if leaves {
                drop(client);
                None
            } else {
                handle.shutdown();
                Some(client)
            };

            let is_cut_off = served.reason().await == EndReason::DrainDeadline;
            assert_eq!(is_cut_off, !leaves, "{case}");
            assert_eq!(begun.elapsed().as_secs(), ends_after, "{case}");
            told.recv().await.expect("the handler is dropped");
            drop(stays);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_abort_ends_the_requests_of_an_http2_connection() {
    let (http, mut dropped) = never();
    let served = serve(http);
    let (sender, _connection) = http2(connect(&served).await).await;
    let request = tokio::spawn(sender.send_request(get("/")));
    settled().await;

    let live = served.handle().connections().next().expect("it is there");
    live.abort();

    assert_eq!(served.reason().await, EndReason::Aborted);
    assert_eq!(dropped.recv().await, Some(()));
    assert!(request.await.expect("it ran").is_err());
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_request_ends_its_connection_alone() {
    let served = serve(http());
    let mut other = served.client().await;
    let mut client = served.client().await;

    client
        .send("GET /panic HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .await;

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::Panic);
    let cause = end.error().expect("there is a cause");
    assert!(find_cause::<Panicked>(cause).is_some());
    assert!(client.rest().await.is_empty());
    other.send(GET).await;
    assert_eq!(answer(&mut other).await.status(), "200");
}

#[tokio::test(start_paused = true)]
async fn what_runs_beside_a_request_that_panics_is_answered() {
    let served = serve(http());
    let (sender, connection) = http2(connect(&served).await).await;
    let slow = tokio::spawn(sender.send_request(get("/sleep/10")));
    settled().await;

    let panicked = sender.send_request(get("/panic")).await;

    assert!(panicked.is_err());
    let slow = slow.await.expect("it ran").expect("an answer");
    assert_eq!(text(slow).await, "/sleep/10");
    connection.await.expect("it ran").expect("in good order");
    assert!(sender.got_goaway().await);
    assert_eq!(served.reason().await, EndReason::Panic);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_body_ends_its_connection() {
    let service = service_fn(|_: Request<RequestBody>| async {
        let mut frames = 0;
        let body = futures_util::stream::poll_fn(move |_| {
            frames += 1;
            panic_if(frames == 2);
            std::task::Poll::Ready(Some(Ok::<_, Infallible>(Frame::data(Bytes::from("half")))))
        });
        Ok::<_, Infallible>(Response::new(StreamBody::new(body)))
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

    client.send(GET).await;

    assert_eq!(served.reason().await, EndReason::Panic);
}

/// A response's body without a byte, which panics where it is told to.
struct Panics(&'static str);

impl Body for Panics {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        panic_if(self.0 == "poll_frame");
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        panic_if(self.0 == "is_end_stream");
        false
    }

    fn size_hint(&self) -> SizeHint {
        panic_if(self.0 == "size_hint");
        SizeHint::default()
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        panic_if(self.0 == "drop");
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_anywhere_in_a_body_ends_its_connection() {
    for whence in ["poll_frame", "is_end_stream", "size_hint", "drop"] {
        let service = service_fn(move |request: Request<RequestBody>| async move {
            if request.uri().path() == "/slow" {
                sleep(Duration::from_secs(10)).await;
            }
            Ok::<_, Infallible>(Response::new(match request.uri().path() {
                "/slow" => Panics("nowhere"),
                _ => Panics(whence),
            }))
        });
        let served = serve(Http::new(service));

        let mut client = served.client().await;
        client.send(GET).await;
        assert_eq!(served.reason().await, EndReason::Panic, "{whence}");

        let (sender, _connection) = http2(connect(&served).await).await;
        let slow = tokio::spawn(sender.send_request(get("/slow")));
        let begun = Instant::now();
        // A panic at the drop comes after the response.
        let _panicked = sender.send_request(get("/")).await;
        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::Panic, "{whence}");
        let cause = end.error().expect("there is a cause");
        assert!(find_cause::<Panicked>(cause).is_some());
        // What runs beside it is answered.
        assert_eq!(begun.elapsed().as_secs(), 10, "{whence}");
        slow.await.expect("it ran").expect("an answer");
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_service_ends_an_http1_connection() {
    let service = service_fn(|_: Request<RequestBody>| async { Err::<Response<String>, _>("no") });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

    client.send(GET).await;

    assert!(client.rest().await.is_empty());
    assert_eq!(served.reason().await, EndReason::ServiceError);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_breaks_off_is_not_the_fault_of_a_service_that_passes_its_error_on() {
    const HEAD: &str = "POST / HTTP/1.1\r\nhost: a\r\n";
    const CHUNKED: &str = "transfer-encoding: chunked\r\n\r\n2\r\nst\r\n";
    for (body, leaves, reason) in [
        ("content-length: 4\r\n\r\nst", true, EndReason::PeerReset),
        ("content-length: 4\r\n\r\nst", false, EndReason::BodyTimeout),
        (CHUNKED, true, EndReason::PeerReset),
        (&format!("{CHUNKED}2"), true, EndReason::PeerReset),
        (&format!("{CHUNKED}x"), false, EndReason::CodecError),
    ] {
        for echoes in [false, true] {
            let service = service_fn(move |request: Request<RequestBody>| async move {
                let body = request.into_body();
                let body = if echoes {
                    body.boxed()
                } else {
                    let read = body.collect().await?.to_bytes();
                    Full::new(read).map_err(|never| match never {}).boxed()
                };
                Ok::<_, RequestBodyError>(Response::new(body))
            });
            let served = serve(Http::new(service));
            let mut client = served.client().await;
            client.send([HEAD, body].concat()).await;
            settled().await;

            let stays = (!leaves).then_some(client);

            let end = served.end().await;
            assert_eq!(end.reason(), reason, "{body:?}");
            drop(stays);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_service_ends_its_http2_stream_only() {
    let service = service_fn(|request: Request<RequestBody>| async move {
        match request.uri().path() {
            "/bad" => Err(BoxError::from("no")),
            _ => Ok(Response::new("good".to_owned())),
        }
    });
    let served = serve(Http::new(service));
    let (sender, _connection) = http2(connect(&served).await).await;

    let bad = sender.send_request(get("/bad")).await;

    assert!(bad.is_err());
    let good = sender.send_request(get("/good")).await.expect("an answer");
    assert_eq!(text(good).await, "good");
    drop((sender, _connection));
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_http_is_answered_and_ended() {
    let served = serve(http());
    let mut client = served.client().await;

    client.send("EHLO localhost\r\n\r\n").await;

    assert_eq!(answer(&mut client).await.status(), "400");
    assert!(client.rest().await.is_empty());
    assert_eq!(served.reason().await, EndReason::CodecError);
}

#[tokio::test(start_paused = true)]
async fn a_head_beyond_the_limit_is_answered_and_ended() {
    let http = http().configure(|hyper| {
        hyper.http1().max_buf_size(16 * 1024);
    });
    let served = serve(http);
    let mut client = served.client().await;

    // The head is larger than the limit. The answer must arrive all the same.
    let field = "a".repeat(60_000);
    client.send(format!("GET / HTTP/1.1\r\nx: {field}")).await;

    assert_eq!(answer(&mut client).await.status(), "431");
    assert!(client.rest().await.is_empty());
    assert_eq!(served.reason().await, EndReason::FrameTooLarge);
}

#[tokio::test(start_paused = true)]
async fn an_answer_arrives_before_its_request_was_read() {
    let service = service_fn(|_: Request<RequestBody>| async { reply("too much") });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n")
        .await;
    client.send("x".repeat(60_000)).await;

    assert_eq!(answer(&mut client).await.body, "too much");
    // The server reads on for a while, so that no reset destroys the answer.
    client.send("x".repeat(60_000)).await;
    assert!(client.rest().await.is_empty());
    drop(client);
    served.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_make_service_that_fails_ends_the_connection() {
    type Made = tower::util::BoxCloneService<Request<RequestBody>, Response<String>, Infallible>;
    let make = service_fn(|_: ConnectionInfo| async { Err::<Made, _>("no") });
    let served = serve(Http::make_service(make));

    let _client = served.client().await;

    assert_eq!(served.reason().await, EndReason::MakeServiceError);
}

#[tokio::test(start_paused = true)]
async fn a_make_service_that_fails_may_choose_the_reason() {
    type Made = tower::util::BoxCloneService<Request<RequestBody>, Response<String>, Infallible>;
    let ended = || ConnectionEnded::new(EndReason::Rejected, "no");
    let make = service_fn(move |_: ConnectionInfo| ready(Err::<Made, _>(ended())));
    let served = serve(Http::make_service(make));

    let _client = served.client().await;

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::Rejected);
    assert_eq!(end.error().map(ToString::to_string).as_deref(), Some("no"));
}

#[tokio::test(start_paused = true)]
async fn a_make_service_has_its_time() {
    type Made = tower::util::BoxCloneService<Request<RequestBody>, Response<String>, Infallible>;
    let make = service_fn(|_: ConnectionInfo| std::future::pending::<Result<Made, BoxError>>());
    let deadlines = Deadlines::default().make_service(Duration::from_secs(3));
    let served = serve(Http::make_service(make).deadlines(deadlines));

    let _client = served.client().await;

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::MakeServiceError);
    // The client does not close, so the server lingers for 2 s.
    assert_eq!(end.duration().as_secs(), 3 + 2);
}

#[tokio::test(start_paused = true)]
async fn a_request_body_is_read_by_the_service() {
    let service = service_fn(|request: Request<RequestBody>| async move {
        let body = request.into_body().collect().await?.to_bytes();
        Ok::<_, tower_tcp::BoxError>(Response::new(format!("{} bytes", body.len())))
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n")
        .await;
    client.send("x".repeat(200_000)).await;

    assert_eq!(answer(&mut client).await.body, "200000 bytes");
    client.0.shutdown().await.expect("it was open");
}

#[tokio::test(start_paused = true)]
async fn an_upload_reaches_the_service_in_large_pieces() {
    let service = service_fn(|request: Request<RequestBody>| async move {
        let mut body = request.into_body();
        let mut pieces = 0;
        while let Some(frame) = body.frame().await {
            frame?;
            pieces += 1;
        }
        Ok::<_, tower_tcp::BoxError>(Response::new(pieces.to_string()))
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n")
        .await;
    client.send("x".repeat(1_000_000)).await;

    let pieces: usize = answer(&mut client).await.body.parse().expect("a number");
    assert!(pieces < 300, "{pieces} pieces");
}
