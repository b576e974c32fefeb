//! Layers around connections.

use tokio::io::DuplexStream;
use tokio::time::timeout;
use tower::layer::layer_fn;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::retry::RetryLayer;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::pipeline::{PerCall, PipelineFuture};
use tower_tcp::testkit::{memory, serve, serve_with};
use tower_tcp::{Connection, EndReason, Server};

use super::support::{Client, settled};
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

#[tokio::test(start_paused = true)]
async fn per_call_leaves_no_permit_with_a_server_that_rests() {
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let stack = || {
        ServiceBuilder::new()
            .layer(layer_fn(PerCall::new))
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

    assert_eq!(busy.client().await.ask("b").await, "b");
}

/// Two servers that share a limit. One is at the limit, the other is paused while its client waits.
struct BesideOnePaused {
    busy: Served,
    inside: Client<DuplexStream>,
    paused: Served,
    waiting: Client<DuplexStream>,
}

async fn beside_one_paused([busy, paused]: [Served; 2]) -> BesideOnePaused {
    let mut inside = busy.client().await;
    assert_eq!(inside.ask("a").await, "a");
    let mut waiting = paused.client().await;
    waiting.send("waiting\n").await;
    settled().await;
    paused.handle().pause();
    settled().await;
    BesideOnePaused {
        busy,
        inside,
        paused,
        waiting,
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_paused_while_it_waits_for_a_stock_limit_accepts_the_one_that_waits() {
    let global = GlobalConcurrencyLimitLayer::new(1);
    let global = ServiceBuilder::new().layer(global).service(lines());
    let clones = ServiceBuilder::new().concurrency_limit(1).service(lines());
    for stack in [global, clones] {
        let servers = [serve(stack.clone()), serve(stack)];
        let BesideOnePaused {
            busy,
            inside,
            paused,
            mut waiting,
        } = beside_one_paused(servers).await;

        drop(inside);

        assert_eq!(waiting.line().await, "waiting");
        drop(waiting);
        let mut late = paused.client().await;
        late.send("late\n").await;
        assert!(late.hears_nothing().await);
        for _ in 0..2 {
            let mut other = busy.client().await;
            assert_eq!(timeout(SEC, other.ask("b")).await.as_deref(), Ok("b"));
        }
        paused.handle().resume();
        assert_eq!(late.line().await, "late");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_paused_while_it_waits_for_its_own_limit_accepts_nobody() {
    let limit = ConnectionLimit::new(1);
    let limited = || {
        let (listener, connector) = memory();
        let server = Server::builder().limit(limit.clone()).build(listener);
        serve_with(server, connector, lines())
    };
    let mut servers = beside_one_paused([limited(), limited()]).await;

    drop(servers.inside);

    assert!(servers.waiting.hears_nothing().await);
    let mut other = servers.busy.client().await;
    assert_eq!(timeout(SEC, other.ask("b")).await.as_deref(), Ok("b"));
    drop(other);
    servers.paused.handle().resume();
    assert_eq!(servers.waiting.line().await, "waiting");
}
