//! Connections over the limit get an answer before they are closed, within bounds.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::time::Instant;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::{AddressFilter, ConnectionLimit, PerClient, Verdict};
use tower_tcp::frame::Lines;
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{BoxError, Connection, EndReason, Pipeline};

use support::{Clients, Ends, settled};

mod support;

/// Starts a server of one connection at a time. It answers the others with `told`, or never
/// finishes answering if `told` is `None`.
fn one_at_a_time(told: Option<&'static [u8]>) -> Served {
    let busy = service_fn(move |mut conn: Connection<DuplexStream>| async move {
        match told {
            Some(told) => conn.write_all(told).await?,
            None => std::future::pending().await,
        }
        conn.close(Default::default()).await?;
        Ok::<_, BoxError>(())
    });
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let stack = ServiceBuilder::new()
        .layer(ConnectionLimit::new(1).layer().overflow(busy))
        .service(Pipeline::new(Lines::default).service(echo));
    serve(stack)
}

#[tokio::test(start_paused = true)]
async fn one_over_the_limit_is_told_and_closed_while_the_other_is_served() {
    let server = one_at_a_time(Some(b"421 busy\r\n"));
    let mut inside = server.client().await;
    assert_eq!(inside.ask("hi").await, "hi");

    let mut over = server.client().await;
    let said = over.rest().await;
    drop(over);

    assert_eq!(said, ["421 busy"]);
    assert_eq!(server.reason().await, EndReason::LimitExceeded);
    assert_eq!(inside.ask("still in").await, "still in");
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_tells_one_over_the_limit_by_its_farewell_and_serves_it_nothing() {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let pipeline = Pipeline::new(Lines::default)
        .service(echo)
        .farewell(|_, reason| Bytes::from(format!("bye: {reason}")));
    let stack = ServiceBuilder::new()
        .layer(ConnectionLimit::new(1).layer().overflow(pipeline.reject()))
        .service(pipeline);
    let server = serve(stack);
    let mut inside = server.client().await;
    assert_eq!(inside.ask("hi").await, "hi");

    let mut over = server.client().await;
    over.send("hi\n").await;
    let said = over.rest().await;
    drop(over);

    assert_eq!(said, ["bye: limit_exceeded"]);
    assert_eq!(server.reason().await, EndReason::LimitExceeded);
    assert_eq!(inside.ask("still in").await, "still in");
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_tells_those_that_are_denied_by_its_farewell() {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let pipeline = Pipeline::new(Lines::default)
        .service(echo)
        .farewell(|_, reason| Bytes::from(format!("bye: {reason}")));
    let per_client = PerClient::new(0).overflow(pipeline.reject());
    let filter = AddressFilter::new(|_| Verdict::Deny).overflow(pipeline.reject());
    let over = serve(
        ServiceBuilder::new()
            .map_request(|mut conn: Connection<DuplexStream>| {
                conn.set_client_addr(SocketAddr::from(([192, 0, 2, 7], 4000)));
                conn
            })
            .layer(per_client)
            .service(pipeline.clone()),
    );
    let denied = serve(ServiceBuilder::new().layer(filter).service(pipeline));

    for (server, reason) in [
        (over, EndReason::ClientLimitExceeded),
        (denied, EndReason::Denied),
    ] {
        let mut client = server.client().await;
        assert_eq!(client.rest().await, [format!("bye: {reason}")]);
        drop(client);
        assert_eq!(server.reason().await, reason);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_that_rejects_without_a_limit_says_so() {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let pipeline = Pipeline::new(Lines::default)
        .service(echo)
        .farewell(|_, reason| Bytes::from(format!("bye: {reason}")));
    let server = serve(pipeline.reject());

    let mut client = server.client().await;

    assert_eq!(client.rest().await, ["bye: rejected"]);
    drop(client);
    assert_eq!(server.reason().await, EndReason::Rejected);
}

#[tokio::test(start_paused = true)]
async fn the_word_has_a_second() {
    let server = one_at_a_time(None);
    let _inside = server.client().await;
    tokio::task::yield_now().await;
    let begun = Instant::now();

    let mut over = server.client().await;
    assert!(over.rest().await.is_empty());

    assert_eq!(begun.elapsed(), Duration::from_secs(1));
    assert_eq!(server.reason().await, EndReason::LimitExceeded);
}

#[tokio::test(start_paused = true)]
async fn a_flood_costs_no_more_than_its_bound() {
    let server = one_at_a_time(None);
    let _inside = server.client().await;
    let mut over = Vec::new();

    for _ in 0..200 {
        over.push(server.client().await);
    }
    settled().await;

    assert_eq!(server.handle().live(), 1 + 64);
}

#[tokio::test(start_paused = true)]
async fn one_over_the_limit_leaves_no_permit_reserved_that_servers_share() {
    let shared = GlobalConcurrencyLimitLayer::new(2);
    let refuse = service_fn(|_: Connection<DuplexStream>| async { Ok::<_, Infallible>(()) });
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let stack = || {
        ServiceBuilder::new()
            .layer(ConnectionLimit::new(1).layer().overflow(refuse))
            .layer(shared.clone())
            .service(Pipeline::new(Lines::default).service(echo))
    };
    let (full, other) = (serve(stack()), serve(stack()));
    let mut inside = full.client().await;
    assert_eq!(inside.ask("a").await, "a");
    assert!(full.client().await.rest().await.is_empty());

    let mut client = other.client().await;
    client.send("b\n").await;

    assert!(!client.hears_nothing().await);
    assert_eq!(client.line().await, "b");
}
