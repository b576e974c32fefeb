//! Around connections.

use tokio::io::DuplexStream;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::retry::RetryLayer;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::pipeline::PipelineFuture;
use tower_tcp::testkit::serve;
use tower_tcp::{Connection, EndReason};

use super::support::settled;
use super::*;

fn lines() -> impl Service<
    Connection<DuplexStream>,
    Response = EndReason,
    Error = BoxError,
    Future = PipelineFuture,
> + Clone {
    Pipeline::new(Lines::default).service(service_fn(desk))
}

#[tokio::test(start_paused = true)]
async fn retry_does_nothing_for_a_connection_because_it_cannot_be_cloned() {
    let retry = RetryLayer::new(Tries(3, |_: &Connection<DuplexStream>| None));
    let served = serve(
        ServiceBuilder::new()
            .layer(retry)
            .service_fn(|_: Connection<DuplexStream>| ready(Err::<(), _>(BoxError::from("no")))),
    );

    assert_eq!(served.client().await.line().await, "");

    assert_eq!(served.reason().await, EndReason::ServiceError);
}

/// tower's semaphore hands the permit to the waiter that the shed connection left behind.
#[tokio::test(start_paused = true)]
async fn load_shed_and_a_limit_of_two_servers_leave_a_permit_with_one_that_rests() {
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let stack = || {
        ServiceBuilder::new()
            .load_shed()
            .layer(limit.clone())
            .service(lines())
    };
    let (busy, resting) = (serve(stack()), serve(stack()));
    let mut first = busy.client().await;
    assert_eq!(first.ask("a").await, "a");
    assert_eq!(resting.client().await.line().await, "");

    drop(first);
    sleep(SEC).await;

    assert_eq!(busy.client().await.line().await, "");
}

#[tokio::test(start_paused = true)]
async fn connection_limit_with_overflow_leaves_no_permit_with_a_server_that_rests() {
    let limit = ConnectionLimit::new(1);
    let refuse = service_fn(|_: Connection<DuplexStream>| ready(Ok::<_, Infallible>(())));
    let stack = || {
        ServiceBuilder::new()
            .layer(limit.layer().overflow(refuse))
            .service(lines())
    };
    let (busy, resting) = (serve(stack()), serve(stack()));
    let mut first = busy.client().await;
    assert_eq!(first.ask("a").await, "a");
    assert_eq!(resting.client().await.line().await, "");

    drop(first);
    sleep(SEC).await;

    assert_eq!(busy.client().await.ask("b").await, "b");
}

/// Pauses a server while a client of it waits for the limit that it shares with another one.
/// Returns whether the other server answers a client when nobody is connected any more.
async fn answers_beside_one_paused<S>(stack: impl Fn() -> S) -> bool
where
    S: Service<Connection<DuplexStream>, Error: Into<BoxError>, Future: Send> + Send + 'static,
    S::Response: 'static,
{
    let (busy, paused) = (serve(stack()), serve(stack()));
    let mut first = busy.client().await;
    assert_eq!(first.ask("a").await, "a");
    let _waiting = paused.client().await;
    settled().await;
    paused.handle().pause();

    drop(first);
    settled().await;

    let mut second = busy.client().await;
    second.send("b\n").await;
    !second.hears_nothing().await
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_paused_while_it_waits_for_a_stock_limit_rests_on_a_permit() {
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let stack = || ServiceBuilder::new().layer(limit.clone()).service(lines());

    assert!(!answers_beside_one_paused(stack).await);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_paused_while_it_waits_for_a_connection_limit_does_not() {
    let limit = ConnectionLimit::new(1);
    let stack = || ServiceBuilder::new().layer(limit.layer()).service(lines());

    assert!(answers_beside_one_paused(stack).await);
}
