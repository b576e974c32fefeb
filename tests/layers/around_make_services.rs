//! Layers around a make-service. Each connection calls a clone of it once, with its `Peer`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::time::Instant;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::load_shed::error::Overloaded;
use tower::make::Shared;
use tower::retry::RetryLayer;
use tower::timeout::error::Elapsed;
use tower::timeout::{Timeout, TimeoutLayer};
use tower::util::BoxCloneService;
use tower::{Layer, ServiceBuilder, service_fn};
use tower_tcp::error::find_cause;
use tower_tcp::{Address, EndReason};

use super::*;

/// Makes a service that calls `desk`. Takes three seconds.
async fn make(
    _: Peer<Bytes>,
) -> Result<impl Service<Bytes, Response = Bytes, Error = BoxError, Future: Send> + Send, BoxError>
{
    sleep(3 * SEC).await;
    Ok(service_fn(desk))
}

fn serve_made_by<K, S>(make: K) -> Served
where
    K: Service<Peer<Bytes>, Response = S, Error: Into<BoxError>, Future: Send>
        + Clone
        + Send
        + 'static,
    S: Service<Bytes, Response = Bytes, Error: Into<BoxError>, Future: Send> + Send + 'static,
{
    serve(Pipeline::new(Lines::default).make_service(make))
}

#[tokio::test(start_paused = true)]
async fn concurrency_limit_bounds_what_is_made_and_not_what_is_connected() {
    let served = serve_made_by(ServiceBuilder::new().concurrency_limit(1).service_fn(make));
    let begun = Instant::now();
    let mut clients = [
        served.client().await,
        served.client().await,
        served.client().await,
    ];

    let mut answered_at = Vec::new();
    for client in &mut clients {
        assert_eq!(client.ask("a").await, "a");
        answered_at.push(begun.elapsed().as_secs());
    }

    assert_eq!(answered_at, [3, 6, 9]);
    assert_eq!(served.handle().live(), 3);
}

#[tokio::test(start_paused = true)]
async fn global_concurrency_limit_bounds_what_several_servers_make() {
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let stack = || ServiceBuilder::new().layer(limit.clone()).service_fn(make);
    let (one, other) = (serve_made_by(stack()), serve_made_by(stack()));
    let begun = Instant::now();
    let (mut first, mut second) = (one.client().await, other.client().await);

    assert_eq!(first.ask("a").await, "a");
    assert_eq!(second.ask("b").await, "b");

    assert_eq!(begun.elapsed().as_secs(), 6);
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_the_limit_counts_for_the_deadline_of_the_make_service() {
    let served = serve_made_by(ServiceBuilder::new().concurrency_limit(1).service_fn(make));
    let begun = Instant::now();
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(served.client().await);
    }

    assert_eq!(clients[3].ask("a").await, "");

    assert_eq!(begun.elapsed().as_secs(), 10);
    assert_eq!(served.reason().await, EndReason::MakeServiceError);
}

#[tokio::test(start_paused = true)]
async fn rate_limit_in_a_buffer_makes_so_many_services_in_a_time() {
    let shared = Shared::new(service_fn(desk));
    let served = serve_made_by(
        ServiceBuilder::new()
            .buffer::<Peer<Bytes>>(8)
            .rate_limit(1, 5 * SEC)
            .service(shared),
    );
    let begun = Instant::now();
    assert_eq!(served.client().await.ask("a").await, "a");

    assert_eq!(served.client().await.ask("b").await, "b");

    assert_eq!(begun.elapsed().as_secs(), 5);
}

#[tokio::test(start_paused = true)]
async fn load_shed_turns_a_peer_away_whose_service_would_have_to_wait() {
    let served = serve_made_by(
        ServiceBuilder::new()
            .load_shed()
            .concurrency_limit(1)
            .service_fn(make),
    );
    let mut first = served.client().await;
    let mut second = served.client().await;

    assert_eq!(second.line().await, "");

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::MakeServiceError);
    assert!(find_cause::<Overloaded>(end.error().unwrap()).is_some());
    assert_eq!(first.ask("a").await, "a");
    assert_eq!(served.client().await.ask("c").await, "c");
}

#[tokio::test(start_paused = true)]
async fn timeout_limits_the_making_and_not_the_connection() {
    let layer = TimeoutLayer::new(2 * SEC);
    let served = serve_made_by(layer.layer(service_fn(make)));
    assert_eq!(served.client().await.ask("a").await, "");
    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::MakeServiceError);
    assert_eq!(end.duration().as_secs(), 2);
    assert!(find_cause::<Elapsed>(end.error().unwrap()).is_some());

    let served = serve_made_by(layer.layer(Shared::new(service_fn(desk))));

    assert_eq!(served.client().await.ask("7").await, "7");
}

#[tokio::test(start_paused = true)]
async fn filter_turns_a_peer_away() {
    let first_only = |peer: Peer<Bytes>| match peer.info().peer_addr() == &Address::Memory(1) {
        true => Ok(peer),
        false => Err("not on the list"),
    };
    let served = serve_made_by(
        ServiceBuilder::new()
            .filter(first_only)
            .service(Shared::new(service_fn(desk))),
    );
    let mut first = served.client().await;

    assert_eq!(served.client().await.line().await, "");

    assert_eq!(served.reason().await, EndReason::MakeServiceError);
    assert_eq!(first.ask("a").await, "a");
}

#[tokio::test(start_paused = true)]
async fn map_response_puts_a_layer_around_each_service_that_is_made() {
    let served = serve_made_by(
        ServiceBuilder::new()
            .map_response(|service| Timeout::new(service, 5 * SEC))
            .service(Shared::new(service_fn(desk))),
    );
    let mut client = served.client().await;
    assert_eq!(client.ask("4").await, "4");

    assert_eq!(client.ask("6").await, "");

    assert_eq!(served.reason().await, EndReason::ServiceError);
}

#[tokio::test(start_paused = true)]
async fn map_err_changes_the_error_that_the_end_has() {
    let make = service_fn(|_: Peer<Bytes>| {
        let failed = Err::<BoxCloneService<Bytes, Bytes, BoxError>, _>("no backend");
        ready(failed)
    });
    let served = serve_made_by(
        ServiceBuilder::new()
            .map_err(|err: &str| format!("cannot be served: {err}"))
            .service(make),
    );

    assert_eq!(served.client().await.line().await, "");

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::MakeServiceError);
    let why = end.error().unwrap().to_string();
    assert_eq!(why, "cannot be served: no backend");
}

#[tokio::test(start_paused = true)]
async fn retry_makes_a_service_again_when_that_failed() {
    let made = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&made);
    let make = service_fn(move |_: Peer<Bytes>| {
        let failed = count.fetch_add(1, Ordering::SeqCst) < 2;
        ready(if failed {
            Err("no backend")
        } else {
            Ok(service_fn(desk))
        })
    });
    let retry = RetryLayer::new(Tries(2, |peer: &Peer<Bytes>| Some(peer.clone())));
    let served = serve_made_by(retry.layer(make));

    assert_eq!(served.client().await.ask("a").await, "a");

    assert_eq!(made.load(Ordering::SeqCst), 3);
}
