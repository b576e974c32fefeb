//! Stock tower layers work at both levels: around the service of connections, and around the
//! service of requests.

mod support;

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::load_shed::error::Overloaded;
use tower::spawn_ready::SpawnReadyLayer;
use tower::steer::Steer;
use tower::timeout::TimeoutLayer;
use tower::timeout::error::Elapsed;
use tower::util::{BoxCloneService, Either};
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::bind::Socket;
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::PipelineFuture;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{
    Address, BoxError, Connection, ConnectionEnded, EndReason, Peer, Pipeline, Server,
};

use support::{Client, Clients, Ends, settled};

const SEC: Duration = Duration::from_secs(1);

/// Answers a line that is a number after as many seconds, `fail` with an error, and any other line
/// with itself.
async fn desk(line: Bytes) -> Result<Bytes, BoxError> {
    let text = std::str::from_utf8(&line)?;
    if text == "fail" {
        return Err("asked to fail".into());
    }
    if let Ok(seconds) = text.parse() {
        sleep(SEC * seconds).await;
    }
    Ok(line)
}

/// A service of connections whose requests are served at the desk.
#[rustfmt::skip] // It would put all of the bounds on one line of 104 columns.
fn lines<Io>() -> impl Clone + Service<
    Connection<Io>,
    Response = EndReason,
    Error = BoxError,
    Future = PipelineFuture,
>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    Pipeline::new(Lines::default).service(service_fn(desk))
}

fn tasks_alive() -> usize {
    tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks()
}

mod around_connections {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn concurrency_limit_leaves_the_next_client_in_the_backlog() {
        let served = serve(ServiceBuilder::new().concurrency_limit(1).service(lines()));
        let (mut first, mut second) = (served.client().await, served.client().await);
        assert_eq!(first.ask("a").await, "a");
        second.send("b\n").await;
        assert!(second.hears_nothing().await);

        drop(first);

        assert_eq!(second.line().await, "b");
    }

    #[tokio::test]
    async fn concurrency_limit_leaves_the_next_client_in_the_kernels_backlog() {
        // Counts those inside the limit, which is what the limit is about.
        let (inside, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (coming, going, most) = (inside.clone(), inside, peak.clone());
        let stack = ServiceBuilder::new()
            .concurrency_limit(2)
            .map_request(move |conn: Connection<Socket>| {
                most.fetch_max(coming.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                let going = going.clone();
                conn.on_end(move |_| {
                    going.fetch_sub(1, Ordering::SeqCst);
                });
                conn
            })
            .service(lines());
        let server = Server::bind("127.0.0.1:0").await.unwrap();
        let address = server.handle().local_addrs()[0].tcp().unwrap();
        let handle = server.handle();
        tokio::spawn(server.serve(stack));

        timeout(10 * SEC, async {
            let connect = || async { Client::new(TcpStream::connect(address).await.unwrap()) };
            let mut first = connect().await;
            let mut second = connect().await;
            let mut third = connect().await;
            third.send("c\n").await;
            for _ in 0..50 {
                assert_eq!(first.ask("a").await, "a");
                assert_eq!(second.ask("b").await, "b");
            }
            assert_eq!(handle.live(), 2);

            drop(first);

            assert_eq!(third.line().await, "c");
        })
        .await
        .expect("all of it is quick");
        assert_eq!(peak.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn global_concurrency_limit_counts_the_connections_of_several_servers() {
        let limit = GlobalConcurrencyLimitLayer::new(1);
        let stack = || ServiceBuilder::new().layer(limit.clone()).service(lines());
        let (one, other) = (serve(stack()), serve(stack()));
        let (mut first, mut second) = (one.client().await, other.client().await);
        assert_eq!(first.ask("a").await, "a");
        second.send("b\n").await;
        assert!(second.hears_nothing().await);

        drop(first);

        assert_eq!(second.line().await, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn global_concurrency_limit_gives_no_permit_to_a_server_without_clients() {
        let limit = GlobalConcurrencyLimitLayer::new(1);
        let stack = || ServiceBuilder::new().layer(limit.clone()).service(lines());
        let (busy, idle) = (serve(stack()), serve(stack()));
        // The idle one has had its turn, and looked for clients.
        assert_eq!(idle.client().await.ask("a").await, "a");

        for _ in 0..3 {
            assert_eq!(busy.client().await.ask("b").await, "b");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn rate_limit_accepts_so_many_in_a_time() {
        let served = serve(
            ServiceBuilder::new()
                .rate_limit(2, 10 * SEC)
                .service(lines()),
        );
        let begun = Instant::now();

        let mut accepted_at = Vec::new();
        for _ in 0..5 {
            assert_eq!(served.client().await.ask("a").await, "a");
            accepted_at.push(begun.elapsed().as_secs());
        }

        assert_eq!(accepted_at, [0, 0, 10, 10, 20]);
    }

    #[tokio::test(start_paused = true)]
    async fn rate_limit_behind_a_hook_stands_in_a_buffer_because_it_cannot_be_cloned() {
        let hook = service_fn(|conn: Connection<DuplexStream>| ready(Ok::<_, Infallible>(conn)));
        let served = serve(
            ServiceBuilder::new()
                .layer(PreConnectLayer::new(hook).deadline(None))
                .buffer(8)
                .rate_limit(1, 10 * SEC)
                .service(lines()),
        );
        let begun = Instant::now();
        assert_eq!(served.client().await.ask("a").await, "a");

        assert_eq!(served.client().await.ask("b").await, "b");

        assert_eq!(begun.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn load_shed_accepts_who_is_over_the_limit_and_closes() {
        let served = serve(
            ServiceBuilder::new()
                .load_shed()
                .concurrency_limit(1)
                .service(lines()),
        );
        let mut first = served.client().await;
        assert_eq!(first.ask("a").await, "a");

        let mut second = served.client().await;

        assert_eq!(second.line().await, "");
        assert_eq!(served.reason().await, EndReason::LimitExceeded);
        assert_eq!(first.ask("still here").await, "still here");
    }

    #[tokio::test(start_paused = true)]
    async fn load_shed_admits_again_when_one_has_left() {
        let served = serve(
            ServiceBuilder::new()
                .load_shed()
                .concurrency_limit(1)
                .service(lines()),
        );
        let mut first = served.client().await;
        assert_eq!(first.ask("a").await, "a");
        assert_eq!(served.client().await.line().await, "");
        assert_eq!(served.reason().await, EndReason::LimitExceeded);

        drop(first);
        served.end().await;

        assert_eq!(served.client().await.ask("b").await, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn timeout_cuts_the_connection_off() {
        let served = serve(ServiceBuilder::new().timeout(5 * SEC).service(lines()));
        let mut client = served.client().await;

        assert_eq!(client.ask("30").await, "");

        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::ServiceTimeout);
        assert_eq!(end.duration().as_secs(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn buffer_is_a_room_where_accepted_connections_wait() {
        let served = serve(
            ServiceBuilder::new()
                .buffer(8)
                .concurrency_limit(1)
                .service(lines()),
        );
        let (mut first, mut second) = (served.client().await, served.client().await);
        assert_eq!(first.ask("a").await, "a");
        second.send("b\n").await;
        assert!(second.hears_nothing().await);
        assert_eq!(served.handle().live(), 2);

        drop(first);

        assert_eq!(second.line().await, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn spawn_ready_waits_for_the_limit_in_a_task_of_its_own() {
        let served = serve(
            ServiceBuilder::new()
                .layer(SpawnReadyLayer::new())
                .concurrency_limit(1)
                .service(lines()),
        );
        let mut first = served.client().await;
        assert_eq!(first.ask("a").await, "a");
        let tasks = tasks_alive();
        let mut second = served.client().await;
        second.send("b\n").await;
        assert!(second.hears_nothing().await);
        assert_eq!(tasks_alive(), tasks + 1);

        drop(first);

        assert_eq!(second.line().await, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn filter_turns_a_connection_away_for_the_reason_it_gives() {
        let first_only =
            |conn: Connection<DuplexStream>| match conn.info().peer_addr() == &Address::Memory(1) {
                true => Ok(conn),
                false => Err(ConnectionEnded::from(EndReason::Rejected)),
            };
        let served = serve(ServiceBuilder::new().filter(first_only).service(lines()));
        let (mut first, mut second) = (served.client().await, served.client().await);

        assert_eq!(second.line().await, "");

        assert_eq!(served.reason().await, EndReason::Rejected);
        assert_eq!(first.ask("a").await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn filter_async_asks_elsewhere_before_it_decides() {
        let after_a_while = |conn: Connection<DuplexStream>| async move {
            sleep(3 * SEC).await;
            match conn.info().peer_addr() == &Address::Memory(1) {
                true => Ok(conn),
                false => Err(ConnectionEnded::from(EndReason::Rejected)),
            }
        };
        let served = serve(
            ServiceBuilder::new()
                .filter_async(after_a_while)
                .service(lines()),
        );
        let (mut first, mut second) = (served.client().await, served.client().await);

        // Both are asked about at the same time: the accept loop does not wait.
        assert_eq!(second.line().await, "");

        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::Rejected);
        assert_eq!(end.duration().as_secs(), 3);
        assert_eq!(first.ask("a").await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn map_request_can_add_what_is_known_of_the_peer() {
        struct Desk(&'static str);
        let make = service_fn(|peer: Peer<Bytes>| {
            let desk = peer.info().get::<Desk>().map_or("none", |desk| desk.0);
            ready(Ok::<_, Infallible>(service_fn(move |_: Bytes| {
                ready(Ok::<_, Infallible>(Bytes::from(desk)))
            })))
        });
        let served = serve(
            ServiceBuilder::new()
                .map_request(|mut conn: Connection<DuplexStream>| {
                    conn.insert(Desk("third floor"));
                    conn
                })
                .service(Pipeline::new(Lines::default).make_service(make)),
        );

        let reply = served.client().await.ask("where").await;

        assert_eq!(reply, "third floor");
    }

    #[tokio::test(start_paused = true)]
    async fn map_response_is_given_the_reason_of_an_orderly_end() {
        let (tell, mut told) = mpsc::channel(1);
        let served = serve(
            ServiceBuilder::new()
                .map_response(move |reason: EndReason| tell.try_send(reason))
                .service(lines()),
        );

        assert_eq!(served.client().await.ask("a").await, "a");

        let reason = timeout(SEC, told.recv()).await.expect("told at the end");
        assert_eq!(reason, Some(EndReason::PeerClosed));
    }

    #[tokio::test(start_paused = true)]
    async fn map_result_can_make_a_failure_of_a_connection_an_orderly_end() {
        let served = serve(
            ServiceBuilder::new()
                .map_result(|_: Result<(), BoxError>| Ok::<_, BoxError>(()))
                .service_fn(|_: Connection<DuplexStream>| ready(Err("no more to say".into()))),
        );

        let _client = served.client().await;

        assert_eq!(served.reason().await, EndReason::ServiceClosed);
    }

    #[tokio::test(start_paused = true)]
    async fn map_err_can_give_a_failure_of_a_connection_its_reason() {
        let served = serve(
            ServiceBuilder::new()
                .map_err(|_: BoxError| ConnectionEnded::from(EndReason::Rejected))
                .service_fn(|_: Connection<DuplexStream>| {
                    ready(Err::<(), BoxError>("not on the list".into()))
                }),
        );

        let _client = served.client().await;

        assert_eq!(served.reason().await, EndReason::Rejected);
    }

    #[tokio::test(start_paused = true)]
    async fn then_holds_the_connections_place_while_it_clears_up() {
        let served = serve(
            ServiceBuilder::new()
                .concurrency_limit(1)
                .then(|result: Result<EndReason, BoxError>| async {
                    sleep(7 * SEC).await;
                    result
                })
                .service(lines()),
        );
        let mut client = served.client().await;
        assert_eq!(client.ask("a").await, "a");
        let begun = Instant::now();

        drop(client);

        assert_eq!(served.client().await.ask("b").await, "b");
        assert_eq!(begun.elapsed().as_secs(), 7);
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }

    #[tokio::test(start_paused = true)]
    async fn option_layer_does_what_the_layer_in_it_does() {
        let layer = Some(TimeoutLayer::new(5 * SEC));
        let served = serve(ServiceBuilder::new().option_layer(layer).service(lines()));

        assert_eq!(served.client().await.ask("30").await, "");

        assert_eq!(served.reason().await, EndReason::ServiceTimeout);
    }

    #[tokio::test(start_paused = true)]
    async fn option_layer_without_a_layer_does_nothing() {
        let layer = None::<TimeoutLayer>;
        let served = serve(ServiceBuilder::new().option_layer(layer).service(lines()));

        assert_eq!(served.client().await.ask("30").await, "30");
    }

    #[tokio::test(start_paused = true)]
    async fn either_is_one_of_two_connection_services() {
        let shouted = |loud: bool| {
            if !loud {
                return Either::Left(lines());
            }
            Either::Right(
                Pipeline::new(Lines::default).service(service_fn(|line: Bytes| {
                    ready(Ok::<_, Infallible>(Bytes::from(line.to_ascii_uppercase())))
                })),
            )
        };
        let (quiet, loud) = (serve(shouted(false)), serve(shouted(true)));

        assert_eq!(quiet.client().await.ask("a").await, "a");
        assert_eq!(loud.client().await.ask("a").await, "A");
    }

    #[tokio::test(start_paused = true)]
    async fn box_clone_service_names_no_type_and_serves_two_servers() {
        let limit = GlobalConcurrencyLimitLayer::new(100);
        let stack: BoxCloneService<Connection<DuplexStream>, EndReason, BoxError> =
            BoxCloneService::new(ServiceBuilder::new().layer(limit).service(lines()));
        let (one, other) = (serve(stack.clone()), serve(stack));

        assert_eq!(one.client().await.ask("a").await, "a");
        assert_eq!(other.client().await.ask("b").await, "b");
    }

    #[tokio::test]
    async fn steer_chooses_by_the_address_the_peer_connected_to() {
        type Branch = BoxCloneService<Connection<Socket>, EndReason, BoxError>;
        let says = |word: &'static str| {
            let desk = service_fn(move |_: Bytes| {
                ready(Ok::<_, Infallible>(Bytes::from_static(word.as_bytes())))
            });
            Branch::new(Pipeline::new(Lines::default).service(desk))
        };
        let server = Server::builder()
            .listen("127.0.0.1:0")
            .listen("127.0.0.1:0")
            .bind()
            .await
            .unwrap();
        let [public, admin] = server.handle().local_addrs().to_vec().try_into().unwrap();
        let is_admin = admin.clone();
        let stack = Steer::new(
            [says("public"), says("admin")],
            move |conn: &Connection<Socket>, _: &[Branch]| {
                usize::from(conn.info().local_addr() == &is_admin)
            },
        );
        tokio::spawn(server.serve(stack));

        let answer = async |address: Address| {
            let stream = TcpStream::connect(address.tcp().unwrap()).await.unwrap();
            let answer = async { Client::new(stream).ask("who").await };
            timeout(10 * SEC, answer).await.expect("an answer")
        };

        assert_eq!(answer(public).await, "public");
        assert_eq!(answer(admin).await, "admin");
    }
}

mod around_requests {
    use super::*;

    /// Serves all connections with one service of requests, which is cloned for each request.
    fn serve_with<S>(service: S) -> Served
    where
        S: Service<Bytes, Response = Bytes> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
    {
        serve(Pipeline::new(Lines::default).service(service))
    }

    /// Serves each connection with a service that is made for it.
    fn serve_each_with<S>(make: impl Fn() -> S + Clone + Send + 'static) -> Served
    where
        S: Service<Bytes, Response = Bytes> + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
    {
        let make = service_fn(move |_: Peer<Bytes>| ready(Ok::<_, Infallible>(make())));
        serve(Pipeline::new(Lines::default).make_service(make))
    }

    #[tokio::test(start_paused = true)]
    async fn concurrency_limit_bounds_what_is_in_flight_of_all_connections() {
        let served = serve_with(ServiceBuilder::new().concurrency_limit(1).service_fn(desk));
        let (mut first, mut second) = (served.client().await, served.client().await);
        let begun = Instant::now();
        first.send("10\n").await;
        settled().await;

        assert_eq!(second.ask("b").await, "b");

        assert_eq!(begun.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn concurrency_limit_bounds_what_is_in_flight_of_one_connection() {
        let make = service_fn(|_: Peer<Bytes>| {
            let service = ServiceBuilder::new().concurrency_limit(2).service_fn(desk);
            ready(Ok::<_, Infallible>(service))
        });
        let served = serve(
            Pipeline::new(Lines::default)
                .make_service(make)
                .in_flight(8),
        );
        let (mut busy, mut other) = (served.client().await, served.client().await);
        let begun = Instant::now();
        busy.send("10\n10\n10\n").await;

        let mut answered_at = Vec::new();
        assert_eq!(other.ask("a").await, "a");
        answered_at.push(begun.elapsed().as_secs());
        for _ in 0..3 {
            assert_eq!(busy.line().await, "10");
            answered_at.push(begun.elapsed().as_secs());
        }

        assert_eq!(answered_at, [0, 10, 10, 20]);
    }

    #[tokio::test(start_paused = true)]
    async fn global_concurrency_limit_bounds_services_made_for_each_connection() {
        let limit = GlobalConcurrencyLimitLayer::new(1);
        let served =
            serve_each_with(move || ServiceBuilder::new().layer(limit.clone()).service_fn(desk));
        let (mut first, mut second) = (served.client().await, served.client().await);
        let begun = Instant::now();
        first.send("10\n").await;
        settled().await;

        assert_eq!(second.ask("b").await, "b");

        assert_eq!(begun.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn rate_limit_in_a_service_for_each_connection_holds_for_each() {
        let served = serve_each_with(|| {
            ServiceBuilder::new()
                .rate_limit(1, 10 * SEC)
                .service_fn(desk)
        });
        let (mut first, mut second) = (served.client().await, served.client().await);
        let begun = Instant::now();

        assert_eq!(first.ask("a").await, "a");
        assert_eq!(second.ask("b").await, "b");
        assert_eq!(begun.elapsed().as_secs(), 0);
        assert_eq!(first.ask("c").await, "c");
        assert_eq!(begun.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn rate_limit_in_a_buffer_holds_for_all_connections_together() {
        let served = serve_with(
            ServiceBuilder::new()
                .buffer(8)
                .rate_limit(1, 10 * SEC)
                .service_fn(desk),
        );
        let begun = Instant::now();
        assert_eq!(served.client().await.ask("a").await, "a");

        assert_eq!(served.client().await.ask("b").await, "b");

        assert_eq!(begun.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn load_shed_fails_a_request_over_the_limit_and_so_ends_its_connection() {
        let served = serve_with(
            ServiceBuilder::new()
                .load_shed()
                .concurrency_limit(1)
                .service_fn(desk),
        );
        let (mut first, mut second) = (served.client().await, served.client().await);
        first.send("10\n").await;
        settled().await;

        assert_eq!(second.ask("b").await, "");

        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::ServiceError);
        assert!(find_cause::<Overloaded>(end.error().unwrap()).is_some());
        assert_eq!(first.line().await, "10");
    }

    #[tokio::test(start_paused = true)]
    async fn load_shed_can_be_a_busy_reply() {
        let served = serve_with(busy_over(1));
        let (mut first, mut second) = (served.client().await, served.client().await);
        first.send("10\n").await;
        settled().await;

        assert_eq!(second.ask("b").await, "busy");

        assert_eq!(first.line().await, "10");
        assert_eq!(second.ask("b").await, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn l6_with_load_shed_ten_times_the_load_of_a_minute_is_over_with_that_minute() {
        // Twenty requests a second can be served, each on a connection of its own.
        let served = Arc::new(serve_with(busy_over(20)));
        let ask = || {
            let served = Arc::clone(&served);
            tokio::spawn(async move {
                let begun = Instant::now();
                let reply = served.client().await.ask("1").await;
                (reply, begun.elapsed())
            })
        };
        let mut overload = Vec::new();
        for _ in 0..60 * 200 {
            overload.push(ask());
            sleep(SEC / 200).await;
        }
        sleep(2 * SEC).await;

        let mut calm = Vec::new();
        for _ in 0..50 {
            calm.push(ask());
            sleep(SEC / 10).await;
        }

        for client in calm {
            assert_eq!(client.await.unwrap(), ("1".to_owned(), SEC));
        }
        let mut answered = 0;
        for client in overload {
            match client.await.unwrap() {
                (reply, SEC) if reply == "1" => answered += 1,
                (reply, Duration::ZERO) if reply == "busy" => {}
                other => panic!("{other:?}"),
            }
        }
        assert!((1100..=1240).contains(&answered), "{answered}");
    }

    /// A freed permit must not go to a connection whose earlier request was shed and that is idle
    /// now. tower's semaphore would assign it to the waiter that its service left behind.
    #[tokio::test(start_paused = true)]
    async fn load_shed_leaves_no_permit_with_connections_that_rest_after_their_requests_were_shed()
    {
        let served = serve_with(busy_over(1));
        let mut busy = served.client().await;
        let mut resting = [served.client().await, served.client().await];
        busy.send("10\n").await;
        for client in &mut resting {
            assert_eq!(client.ask("a").await, "busy");
        }
        assert_eq!(busy.line().await, "10");

        let mut third = served.client().await;

        assert_eq!(third.ask("c").await, "c");
    }

    #[tokio::test(start_paused = true)]
    async fn concurrency_limit_leaves_no_permit_with_connections_that_rest_after_a_wait() {
        let served = serve_with(ServiceBuilder::new().concurrency_limit(1).service_fn(desk));
        let mut busy = served.client().await;
        let mut resting = [served.client().await, served.client().await];
        busy.send("10\n").await;
        for client in &mut resting {
            client.send("1\n").await;
        }
        for client in &mut resting {
            assert_eq!(client.line().await, "1");
        }
        let begun = Instant::now();

        let mut third = served.client().await;

        assert_eq!(third.ask("c").await, "c");
        assert_eq!(begun.elapsed().as_secs(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn concurrency_limit_leaves_no_permit_with_a_connection_that_was_cut_off_in_the_wait() {
        let service = ServiceBuilder::new().concurrency_limit(1).service_fn(desk);
        let (served, cut_off) = (serve_with(service.clone()), serve_with(service));
        let (mut busy, mut waiting) = (served.client().await, cut_off.client().await);
        busy.send("10\n").await;
        settled().await;
        waiting.send("10\n").await;
        settled().await;
        cut_off.handle().abort();
        assert_eq!(cut_off.handle().closed().await.aborted, 1);
        let begun = Instant::now();

        assert_eq!(served.client().await.ask("c").await, "c");

        assert_eq!(begun.elapsed().as_secs(), 9);
    }

    #[tokio::test(start_paused = true)]
    async fn timeout_fails_a_request_that_takes_too_long() {
        let served = serve_with(ServiceBuilder::new().timeout(5 * SEC).service_fn(desk));
        let mut client = served.client().await;
        let begun = Instant::now();

        assert_eq!(client.ask("4").await, "4");
        assert_eq!(client.ask("6").await, "");

        assert_eq!(begun.elapsed().as_secs(), 9);
        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::ServiceError);
        assert!(find_cause::<Elapsed>(end.error().unwrap()).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn buffer_gives_all_connections_one_service_that_cannot_be_cloned() {
        struct Counter(u32);
        impl Service<Bytes> for Counter {
            type Response = Bytes;
            type Error = Infallible;
            type Future = std::future::Ready<Result<Bytes, Infallible>>;

            fn poll_ready(
                &mut self,
                _: &mut std::task::Context<'_>,
            ) -> std::task::Poll<Result<(), Infallible>> {
                Ok(()).into()
            }

            fn call(&mut self, _: Bytes) -> Self::Future {
                self.0 += 1;
                ready(Ok(self.0.to_string().into()))
            }
        }
        let served = serve_with(ServiceBuilder::new().buffer(8).service(Counter(0)));
        let (mut first, mut second) = (served.client().await, served.client().await);

        assert_eq!(first.ask("next").await, "1");
        assert_eq!(second.ask("next").await, "2");
        assert_eq!(first.ask("next").await, "3");
    }

    #[tokio::test(start_paused = true)]
    async fn spawn_ready_waits_for_the_rate_in_a_task_of_its_own() {
        let served = serve_each_with(|| {
            ServiceBuilder::new()
                .layer(SpawnReadyLayer::new())
                .rate_limit(1, 10 * SEC)
                .service_fn(desk)
        });
        let mut client = served.client().await;
        let begun = Instant::now();
        assert_eq!(client.ask("a").await, "a");
        let tasks = tasks_alive();

        client.send("b\n").await;
        settled().await;

        assert_eq!(tasks_alive(), tasks + 1);
        assert_eq!(client.line().await, "b");
        assert_eq!(begun.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn filter_fails_a_request_before_it_reaches_the_service() {
        let (tell, mut told) = mpsc::channel(8);
        let no_x = |line: Bytes| match &line[..] {
            b"x" => Err("no x here"),
            _ => Ok(line),
        };
        let service = ServiceBuilder::new()
            .filter(no_x)
            .service_fn(move |line: Bytes| {
                tell.try_send(line.clone()).expect("room for all requests");
                desk(line)
            });
        let served = serve(
            Pipeline::new(Lines::default)
                .service(service)
                .shutdown_on_error(false),
        );
        let mut client = served.client().await;

        assert_eq!(client.ask("x\na").await, "a");

        assert_eq!(told.try_recv().unwrap(), "a");
    }

    #[tokio::test(start_paused = true)]
    async fn map_request_changes_what_the_service_sees() {
        let served = serve_with(
            ServiceBuilder::new()
                .map_request(|line: Bytes| Bytes::from(line.to_ascii_lowercase()))
                .service_fn(desk),
        );

        assert_eq!(served.client().await.ask("SHOUT").await, "shout");
    }

    #[tokio::test(start_paused = true)]
    async fn map_response_changes_what_the_peer_sees() {
        let served = serve(
            Pipeline::new(Lines::default).service(
                ServiceBuilder::new()
                    .map_response(|line: Bytes| vec![Bytes::from("250-ok"), line])
                    .service_fn(desk),
            ),
        );
        let mut client = served.client().await;

        assert_eq!(client.ask("a").await, "250-ok");
        assert_eq!(client.line().await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn map_result_can_make_a_failure_a_reply() {
        let served = serve_with(
            ServiceBuilder::new()
                .map_result(|result: Result<Bytes, BoxError>| {
                    Ok::<_, BoxError>(result.unwrap_or_else(|err| err.to_string().into()))
                })
                .service_fn(desk),
        );
        let mut client = served.client().await;

        assert_eq!(client.ask("fail").await, "asked to fail");
        assert_eq!(client.ask("a").await, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn map_err_changes_the_error_that_the_end_has() {
        let served = serve_with(
            ServiceBuilder::new()
                .map_err(|err: BoxError| format!("at the desk: {err}"))
                .service_fn(desk),
        );

        assert_eq!(served.client().await.ask("fail").await, "");

        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::ServiceError);
        assert_eq!(
            end.error().unwrap().to_string(),
            "at the desk: asked to fail"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn then_can_answer_after_a_failure_when_it_has_asked_elsewhere() {
        let served = serve_with(
            ServiceBuilder::new()
                .then(|result: Result<Bytes, BoxError>| async {
                    match result {
                        Err(_) => desk("2".into()).await,
                        done => done,
                    }
                })
                .service_fn(desk),
        );

        assert_eq!(served.client().await.ask("fail").await, "2");
    }

    #[tokio::test(start_paused = true)]
    async fn option_layer_does_what_the_layer_in_it_does() {
        let layer = Some(TimeoutLayer::new(5 * SEC));
        let served = serve_with(ServiceBuilder::new().option_layer(layer).service_fn(desk));

        assert_eq!(served.client().await.ask("30").await, "");
    }

    #[tokio::test(start_paused = true)]
    async fn option_layer_without_a_layer_does_nothing() {
        let layer = None::<TimeoutLayer>;
        let served = serve_with(ServiceBuilder::new().option_layer(layer).service_fn(desk));

        assert_eq!(served.client().await.ask("30").await, "30");
    }

    #[tokio::test(start_paused = true)]
    async fn either_gives_each_connection_one_of_two_services() {
        let make = service_fn(|peer: Peer<Bytes>| {
            let first = peer.info().peer_addr() == &Address::Memory(1);
            ready(Ok::<_, Infallible>(if first {
                Either::Left(service_fn(desk))
            } else {
                Either::Right(service_fn(|_: Bytes| ready(Ok("other".into()))))
            }))
        });
        let served = serve(Pipeline::new(Lines::default).make_service(make));

        assert_eq!(served.client().await.ask("a").await, "a");
        assert_eq!(served.client().await.ask("a").await, "other");
    }

    #[tokio::test(start_paused = true)]
    async fn box_clone_service_names_no_type() {
        let service: BoxCloneService<Bytes, Bytes, BoxError> =
            BoxCloneService::new(ServiceBuilder::new().timeout(5 * SEC).service_fn(desk));
        let served = serve_with(service);

        assert_eq!(served.client().await.ask("a").await, "a");
        assert_eq!(served.client().await.ask("30").await, "");
    }

    #[tokio::test(start_paused = true)]
    async fn steer_chooses_by_the_request() {
        let says = |word: &'static str| {
            service_fn(move |_: Bytes| ready(Ok::<_, Infallible>(Bytes::from(word))))
        };
        let served = serve_with(Steer::new(
            [says("read"), says("written")],
            |line: &Bytes, _: &[_]| usize::from(line.starts_with(b"SET")),
        ));
        let mut client = served.client().await;

        assert_eq!(client.ask("GET a").await, "read");
        assert_eq!(client.ask("SET a 1").await, "written");
    }

    /// Returns the desk with at most `limit` requests at a time. Others get the reply `busy`.
    fn busy_over(
        limit: usize,
    ) -> impl Service<Bytes, Response = Bytes, Error = BoxError, Future: Send> + Clone + Send {
        ServiceBuilder::new()
            .map_result(|result: Result<Bytes, BoxError>| match result {
                Err(err) if err.is::<Overloaded>() => Ok(Bytes::from("busy")),
                result => result,
            })
            .load_shed()
            .concurrency_limit(limit)
            .service_fn(desk)
    }
}
