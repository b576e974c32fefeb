//! `OnConnectLayer` runs a function for each new peer, which can register another one for its end.
//! So a program can greet, reject or list peers without writing a service.

mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use support::{Clients, Ends, each_way};
use tower::make::Shared;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::OnConnectLayer;
use tower_tcp::testkit::serve;
use tower_tcp::{BoxError, EndReason, Peer, Pipeline};

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    match &*line {
        b"fail" => Err("failed as told".into()),
        b"panic" => panic!("panicked as told"),
        _ => Ok(line),
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_is_greeted_before_it_is_served() {
    let greet = OnConnectLayer::new(|peer: Peer<Bytes>| async move {
        for line in ["220-welcome", "220 ready"] {
            peer.send(line.into()).await?;
        }
        Ok::<_, BoxError>(())
    });
    let make = ServiceBuilder::new()
        .layer(greet)
        .service(Shared::new(service_fn(echo)));
    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;

        client.send("hello\n").await;
        client.finish().await;

        let expected = ["220-welcome", "220 ready", "hello"];
        assert_eq!(client.rest().await, expected, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_can_be_turned_away_with_a_word() {
    let made = Arc::new(AtomicUsize::new(0));
    let refuse = OnConnectLayer::new(|peer: Peer<Bytes>| async move {
        peer.send("554 no".into()).await?;
        Err::<(), _>(BoxError::from("not today"))
    });
    let count = Arc::clone(&made);
    let make =
        ServiceBuilder::new()
            .layer(refuse)
            .service(service_fn(move |_peer: Peer<Bytes>| {
                count.fetch_add(1, Ordering::Relaxed);
                std::future::ready(Ok::<_, Infallible>(service_fn(echo)))
            }));
    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let mut client = served.client().await;

        client.send("hello\n").await;

        assert_eq!(client.rest().await, ["554 no"], "{}", served.way());
        drop(client);
        let end = served.end().await;
        assert_eq!(
            end.reason(),
            EndReason::MakeServiceError,
            "{}",
            served.way()
        );
        assert_eq!(end.requests(), 0);
    }
    assert_eq!(made.load(Ordering::Relaxed), 0, "it needed no service");
}

#[tokio::test(start_paused = true)]
async fn one_who_is_never_done_greeting_has_ten_seconds() {
    let hang = OnConnectLayer::new(|_peer: Peer<Bytes>| async move {
        std::future::pending::<Result<(), BoxError>>().await
    });
    let make = ServiceBuilder::new()
        .layer(hang)
        .service(Shared::new(service_fn(echo)));
    let deadlines = Deadlines::default().make_service(Duration::from_secs(10));
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let served = serve(pipeline.deadlines(deadlines));
    let mut client = served.client().await;

    assert!(client.rest().await.is_empty());
    drop(client);

    assert_eq!(served.reason().await, EndReason::MakeServiceError);
}

#[tokio::test(start_paused = true)]
async fn each_who_connected_ends_exactly_once_with_reason_and_totals() {
    let (tell, mut told) = tokio::sync::mpsc::channel(64);
    let books = OnConnectLayer::new(move |peer: Peer<Bytes>| {
        let tell = tell.clone();
        peer.on_end(move |end| tell.try_send(end.clone()).expect("there is room"));
        std::future::ready(Ok::<_, Infallible>(()))
    });
    let make = ServiceBuilder::new()
        .layer(books)
        .service(Shared::new(service_fn(echo)));
    let served = each_way(Pipeline::new(Lines::default).make_service(make));

    for served in served {
        for (request, reason, written) in [
            ("a\n", EndReason::PeerClosed, 2),
            ("a\nfail\n", EndReason::ServiceError, 2),
            ("a\npanic\n", EndReason::Panic, 2),
            ("a\nhalf", EndReason::Truncated, 2),
        ] {
            let mut client = served.client().await;
            client.send(request).await;
            client.finish().await;
            assert_eq!(client.rest().await, ["a"], "{}", served.way());
            drop(client);
            served.end().await;

            let end = told.try_recv().expect("it was told");
            assert_eq!(end.reason(), reason, "{}", served.way());
            assert_eq!(end.bytes_written(), written);
            assert_eq!(end.bytes_read(), request.len() as u64);
            assert!(told.try_recv().is_err(), "once");
        }
    }
}
