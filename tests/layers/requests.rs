//! Layers in `.service`: one service for all connections, cloned for each request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::time::Instant;
use tower::balance::p2c::Balance;
use tower::discover::ServiceList;
use tower::limit::{GlobalConcurrencyLimitLayer, RateLimit};
use tower::load::{CompleteOnResponse, PendingRequests};
use tower::retry::RetryLayer;
use tower::spawn_ready::SpawnReady;
use tower::util::{BoxCloneSyncService, BoxService, ServiceFn};
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::pipeline::{Session, SessionService};

use super::support::settled;
use super::*;

/// Compiles only for a type that is not `Clone`. For other types, two implementations apply.
trait NotClone<Which> {
    fn check() {}
}
impl<T> NotClone<()> for T {}
impl<T: Clone> NotClone<u8> for T {}

#[test]
fn what_is_not_clone_needs_a_buffer_or_a_service_for_each_connection() {
    struct State;
    impl Session<Bytes> for State {
        type Reply = Bytes;
        type Error = Infallible;

        async fn call(&mut self, line: Bytes) -> Result<Bytes, Infallible> {
            Ok(line)
        }
    }
    type Plain = ServiceFn<fn(Bytes) -> Ready<Result<Bytes, Infallible>>>;

    <RateLimit<Plain> as NotClone<_>>::check();
    <SpawnReady<Plain> as NotClone<_>>::check();
    <BoxService<Bytes, Bytes, BoxError> as NotClone<_>>::check();
    <Balance<ServiceList<Vec<Plain>>, Bytes> as NotClone<_>>::check();
    <SessionService<State, Bytes> as NotClone<_>>::check();
}

#[tokio::test(start_paused = true)]
async fn retry_asks_again_and_holds_no_permit_in_between() {
    let asked = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&asked);
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(Tries(2, |line: &Bytes| Some(line.clone()))))
        .concurrency_limit(1)
        .service_fn(move |line: Bytes| {
            let failed = count.fetch_add(1, Ordering::SeqCst) < 2;
            ready(if failed { Err("not yet") } else { Ok(line) })
        });
    let served = serve_all_with(service);

    assert_eq!(served.client().await.ask("a").await, "a");

    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn balance_in_a_buffer_chooses_the_backend_that_has_less_to_do() {
    let backend = |name: &'static str| {
        let backend = service_fn(move |line: Bytes| async move {
            desk(line)
                .await
                .map(|_line| Bytes::from_static(name.as_bytes()))
        });
        PendingRequests::new(backend, CompleteOnResponse::default())
    };
    let backends = ServiceList::new([backend("one"), backend("other")]);
    let served = serve_all_with(
        ServiceBuilder::new()
            .buffer(8)
            .service(Balance::new(backends)),
    );
    let (mut slow, mut fast) = (served.client().await, served.client().await);
    slow.send("10\n").await;
    settled().await;

    let mut answers = Vec::new();
    for _ in 0..8 {
        answers.push(fast.ask("a").await);
    }
    answers.dedup();
    answers.push(slow.line().await);

    answers.sort();
    assert_eq!(answers, ["one", "other"]);
}

#[tokio::test(start_paused = true)]
async fn box_clone_sync_service_names_no_type() {
    let service: BoxCloneSyncService<Bytes, Bytes, BoxError> =
        BoxCloneSyncService::new(service_fn(desk));

    assert_eq!(serve_all_with(service).client().await.ask("a").await, "a");
}

#[tokio::test(start_paused = true)]
async fn timeout_does_not_count_the_wait_for_a_permit() {
    let service = ServiceBuilder::new()
        .timeout(5 * SEC)
        .concurrency_limit(1)
        .service_fn(desk);
    let served = serve_all_with(service);
    let mut clients = [
        served.client().await,
        served.client().await,
        served.client().await,
    ];
    for client in &mut clients {
        client.send("4\n").await;
    }
    let begun = Instant::now();

    for client in &mut clients {
        assert_eq!(client.line().await, "4");
    }

    assert_eq!(begun.elapsed().as_secs(), 12);
}

#[tokio::test(start_paused = true)]
async fn timeout_around_a_oneshot_counts_the_wait_for_a_permit() {
    let limited = ServiceBuilder::new().concurrency_limit(1).service_fn(desk);
    let service = ServiceBuilder::new()
        .map_result(told)
        .timeout(5 * SEC)
        .service_fn(move |line: Bytes| limited.clone().oneshot(line));
    let served = serve_all_with(service);
    let (mut first, mut second) = (served.client().await, served.client().await);
    first.send("4\n").await;
    settled().await;
    let begun = Instant::now();

    assert_eq!(second.ask("4").await, "request timed out");

    assert_eq!(begun.elapsed().as_secs(), 5);
    assert_eq!(first.line().await, "4");
}

#[tokio::test(start_paused = true)]
async fn a_limit_outside_of_a_buffer_counts_the_requests_that_wait_in_it() {
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let waiting = ServiceBuilder::new()
        .layer(limit.clone())
        .buffer(8)
        .rate_limit(1, 10 * SEC)
        .service_fn(desk);

    assert_eq!(waits_for_another_beside(waiting, limit).await, 9);
}

#[tokio::test(start_paused = true)]
async fn a_limit_behind_the_rate_in_a_buffer_counts_the_requests_that_run() {
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let waiting = ServiceBuilder::new()
        .buffer(8)
        .rate_limit(1, 10 * SEC)
        .layer(limit.clone())
        .service_fn(desk);

    assert_eq!(waits_for_another_beside(waiting, limit).await, 0);
}

/// Sends two requests to `waiting`, a service of one request in ten seconds. Returns how many
/// seconds a request then waits at another service, which shares only the limit with `waiting`.
async fn waits_for_another_beside<S>(waiting: S, limit: GlobalConcurrencyLimitLayer) -> u64
where
    S: Service<Bytes, Response = Bytes, Error: Into<BoxError>, Future: Send>
        + Clone
        + Send
        + 'static,
{
    let waiting = serve_all_with(waiting);
    let other = serve_all_with(ServiceBuilder::new().layer(limit).service_fn(desk));
    assert_eq!(waiting.client().await.ask("a").await, "a");
    let mut second = waiting.client().await;
    second.send("a\n").await;
    settled().await;
    let begun = Instant::now();

    assert_eq!(other.client().await.ask("b").await, "b");

    begun.elapsed().as_secs()
}
