//! Layers in the service that a make-service makes: one service for each connection, kept from
//! request to request.

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::make::Shared;
use tower::retry::RetryLayer;
use tower::util::{BoxCloneSyncService, BoxService};
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::pipeline::{PerCall, Session, SessionService};

use super::support::{each_way, settled};
use super::*;

/// Returns a service that calls `desk`, and sheds requests while one runs on any connection.
fn busy_over_one()
-> impl Service<Bytes, Response = Bytes, Error = BoxError, Future: Send> + Clone + Send {
    ServiceBuilder::new()
        .map_result(told)
        .load_shed()
        .concurrency_limit(1)
        .service_fn(desk)
}

/// Lets a request be shed. Returns the answer of another connection once nothing runs any more.
async fn told_after_another_was_shed(served: Served) -> String {
    let (mut busy, mut resting) = (served.client().await, served.client().await);
    busy.send("10\n").await;
    settled().await;
    assert_eq!(resting.ask("a").await, "service overloaded");
    assert_eq!(busy.line().await, "10");
    settled().await;

    served.client().await.ask("b").await
}

/// tower's semaphore hands the permit to the waiter that the shed request left behind.
#[tokio::test(start_paused = true)]
async fn load_shed_and_a_shared_limit_leave_a_permit_with_a_connection_that_rests() {
    let make = Shared::new(busy_over_one());
    let served = serve(Pipeline::new(Lines::default).make_service(make));

    assert_eq!(
        told_after_another_was_shed(served).await,
        "service overloaded"
    );
}

/// Returns every stack of stock layers whose clones share a limit of one request.
fn shared_by_clones() -> Vec<(&'static str, Shareable)> {
    let builder = || ServiceBuilder::new().map_result(told);
    let global = GlobalConcurrencyLimitLayer::new(1);
    let in_global = builder().layer(global.clone()).service_fn(desk);
    let shed_in_global = builder().load_shed().layer(global).service_fn(desk);
    let behind_a_rate = builder()
        .buffer(1)
        .rate_limit(100, SEC)
        .concurrency_limit(1)
        .service_fn(desk);
    let around_a_rate = builder()
        .concurrency_limit(1)
        .buffer(1)
        .rate_limit(100, SEC)
        .service_fn(desk);
    let shed_over_a_buffer = builder()
        .load_shed()
        .buffer(1)
        .concurrency_limit(1)
        .service_fn(desk);
    let limited = builder().concurrency_limit(1).service_fn(desk);
    vec![
        ("limit", Shareable::new(limited)),
        ("global limit", Shareable::new(in_global)),
        ("shed, limit", Shareable::new(busy_over_one())),
        ("shed, global limit", Shareable::new(shed_in_global)),
        ("buffer, rate, limit", Shareable::new(behind_a_rate)),
        ("limit, buffer, rate", Shareable::new(around_a_rate)),
        ("shed, buffer, limit", Shareable::new(shed_over_a_buffer)),
    ]
}

type Shareable = BoxCloneSyncService<Bytes, Bytes, BoxError>;

/// Asserts that each of many connections is answered at once when nothing runs any more. Their
/// earlier requests were answered or shed.
async fn assert_that_nobody_rests_on_a_permit(stack: &str, served: &Served) {
    let mut clients = Vec::new();
    for lines in ["10\na\n", "a\na\n", "a\na\n", "a\na\n", "a\na\n"] {
        let mut client = served.client().await;
        client.send(lines).await;
        settled().await;
        clients.push(client);
    }
    for client in &mut clients {
        let _answered_or_shed = (client.line().await, client.line().await);
    }
    settled().await;

    clients.insert(0, served.client().await);
    for client in &mut clients {
        let answer = timeout(SEC, client.ask("b")).await;
        assert_eq!(answer.as_deref(), Ok("b"), "{stack}, {}", served.way());
        settled().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_stack_in_per_call_leaves_no_permit_with_a_connection_that_rests() {
    for (name, stack) in shared_by_clones() {
        let make = Shared::new(PerCall::new(stack));
        for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
            assert_that_nobody_rests_on_a_permit(name, &served).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stack_in_service_leaves_no_permit_with_a_connection_that_rests() {
    for (name, stack) in shared_by_clones() {
        for served in each_way(Pipeline::new(Lines::default).service(stack)) {
            assert_that_nobody_rests_on_a_permit(name, &served).await;
        }
    }
}

/// Has a client exceed its rate of one request in ten seconds, and returns how many seconds another
/// client waits for the limit that they share.
async fn waits_beside_one_over_its_rate(served: Served) -> u64 {
    let (mut fast, mut other) = (served.client().await, served.client().await);
    assert_eq!(fast.ask("a").await, "a");
    fast.send("a\n").await;
    settled().await;
    let begun = Instant::now();

    assert_eq!(other.ask("b").await, "b");

    begun.elapsed().as_secs()
}

#[tokio::test(start_paused = true)]
async fn a_shared_limit_outside_of_a_rate_holds_its_permit_while_the_rate_is_waited_for() {
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let served = serve_each_with(move || {
        ServiceBuilder::new()
            .layer(limit.clone())
            .rate_limit(1, 10 * SEC)
            .service_fn(desk)
    });

    assert_eq!(waits_beside_one_over_its_rate(served).await, 9);
}

#[tokio::test(start_paused = true)]
async fn a_shared_limit_inside_of_a_rate_is_taken_when_the_rate_allows_the_request() {
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let served = serve_each_with(move || {
        ServiceBuilder::new()
            .rate_limit(1, 10 * SEC)
            .layer(limit.clone())
            .service_fn(desk)
    });

    assert_eq!(waits_beside_one_over_its_rate(served).await, 0);
}

/// Pauses a connection while it waits for a limit that others hold. Returns whether another
/// connection is answered when nothing runs any more.
async fn answers_beside_one_paused<S>(make: impl Fn() -> S + Clone + Send + 'static) -> bool
where
    S: Service<Bytes, Response = Bytes, Error: Into<BoxError>, Future: Send> + Send + 'static,
{
    let (tell, mut peers) = mpsc::channel(3);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room for all");
        ready(Ok::<_, Infallible>(make()))
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));
    let mut busy = served.client().await;
    busy.send("10\n").await;
    settled().await;
    let mut paused = served.client().await;
    paused.send("a\n").await;
    settled().await;
    let _busy = peers.recv().await;
    peers.recv().await.expect("it is connected").pause_input();

    assert_eq!(busy.line().await, "10");

    let mut other = served.client().await;
    other.send("b\n").await;
    !other.hears_nothing().await
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_paused_while_it_waits_for_a_shared_limit_keeps_no_permit() {
    let limited = ServiceBuilder::new().concurrency_limit(1).service_fn(desk);

    assert!(answers_beside_one_paused(move || limited.clone()).await);
}

#[tokio::test(start_paused = true)]
async fn load_shed_over_a_limit_of_the_connection_sheds_what_runs_beside() {
    let make = service_fn(|_: Peer<Bytes>| {
        let service = ServiceBuilder::new()
            .map_result(told)
            .load_shed()
            .concurrency_limit(1)
            .service_fn(desk);
        ready(Ok::<_, Infallible>(service))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let served = serve(pipeline.multiplexed(8));
    let (mut client, mut other) = (served.client().await, served.client().await);

    client.send("10\na\n").await;

    assert_eq!(client.line().await, "service overloaded");
    assert_eq!(other.ask("b").await, "b");
    assert_eq!(client.line().await, "10");
    assert_eq!(client.ask("c").await, "c");
}

#[tokio::test(start_paused = true)]
async fn buffer_is_a_queue_and_a_task_of_the_connection() {
    struct Count(u32);
    impl Session<Bytes> for Count {
        type Reply = Bytes;
        type Error = Infallible;

        async fn call(&mut self, _: Bytes) -> Result<Bytes, Infallible> {
            self.0 += 1;
            Ok(self.0.to_string().into())
        }
    }
    let alive = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let served = serve_each_with(|| {
        let session = SessionService::new(Count(0));
        ServiceBuilder::new().buffer(8).service(session)
    });
    settled().await;
    let before = alive();
    let mut client = served.client().await;
    assert_eq!(client.ask("a").await, "1");
    assert_eq!(client.ask("a").await, "2");
    assert_eq!(alive(), before + 2);

    drop(client);
    settled().await;

    assert_eq!(alive(), before);
}

#[tokio::test(start_paused = true)]
async fn box_service_makes_services_of_several_types_one() {
    let make = service_fn(|peer: Peer<Bytes>| {
        let is_first = peer.info().peer_addr().to_string().ends_with('1');
        let service: BoxService<Bytes, Bytes, BoxError> = if is_first {
            ServiceBuilder::new()
                .rate_limit(1, 10 * SEC)
                .service_fn(desk)
                .boxed()
        } else {
            service_fn(|_: Bytes| ready(Ok("other".into()))).boxed()
        };
        ready(Ok::<_, Infallible>(service))
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));

    assert_eq!(served.client().await.ask("a").await, "a");
    assert_eq!(served.client().await.ask("a").await, "other");
}

#[tokio::test(start_paused = true)]
async fn retry_asks_again_where_what_is_inside_can_be_cloned() {
    let served = serve_each_with(|| {
        let mut asked = 0;
        ServiceBuilder::new()
            .layer(RetryLayer::new(Tries(1, |line: &Bytes| Some(line.clone()))))
            .buffer(1)
            .service_fn(move |line: Bytes| {
                asked += 1;
                ready(if asked == 1 { Err("not yet") } else { Ok(line) })
            })
    });

    assert_eq!(served.client().await.ask("a").await, "a");
}
