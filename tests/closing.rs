//! The beginning of a close is reported once, and before the end, however a connection ends.

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/http2.rs"]
mod http2;
#[path = "support/over.rs"]
mod over;
mod support;

use std::convert::Infallible;
use std::future::{pending, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONNECTION, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tower::util::MapRequest;
use tower::{Layer, ServiceBuilder, service_fn};
use tower_tcp::close::Linger;
use tower_tcp::frame::Lines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::registry::Registry;
use tower_tcp::testkit::{Served, memory, serve, serve_with};
use tower_tcp::{
    BoxError, Connection, ConnectionInfo, ConnectionPhase, ConnectionService, EndReason, Handle,
    Peer, Pipeline, Reply, Server,
};

use http2::http2;
use over::{Io, Over, Stack, TRANSPORTS, Transport};
use support::{Clients, Ends, Pipelined, settled, until};

const SECOND: Duration = Duration::from_secs(1);
/// The time for which a server waits for its peer to close.
const LINGER: Duration = Duration::from_secs(2);

/// A moment of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Closing(EndReason),
    End(EndReason),
}

/// The moments of connections with their times, as they come.
struct Moments(mpsc::Receiver<(Heard, Instant)>);

impl Moments {
    /// Returns the next one with its time.
    async fn next(&mut self) -> (Heard, Instant) {
        let next = timeout(24 * 3600 * SECOND, self.0.recv()).await;
        next.expect("it comes").expect("the server is there")
    }

    /// Checks that the next connection closes and ends for this reason, each moment once. Returns
    /// the time between.
    async fn closes_and_ends(&mut self, reason: EndReason) -> Duration {
        let (closing, closing_at) = self.next().await;
        assert_eq!(closing, Heard::Closing(reason));
        let (end, end_at) = self.next().await;
        assert_eq!(end, Heard::End(reason));
        settled().await;
        assert!(self.0.is_empty(), "each moment is heard once");
        end_at - closing_at
    }
}

/// A stack that tells the moments of its connections.
fn told<S, Io>(stack: S) -> (impl ConnectionService<Io>, Moments)
where
    S: ConnectionService<Io>,
    Io: Send + 'static,
{
    let (tell, told) = mpsc::channel(64);
    (telling(stack, tell), Moments(told))
}

fn telling<S, Io>(stack: S, tell: mpsc::Sender<(Heard, Instant)>) -> impl ConnectionService<Io>
where
    S: ConnectionService<Io>,
    Io: Send + 'static,
{
    MapRequest::new(stack, move |conn: Connection<Io>| {
        let (closing, end) = (tell.clone(), tell.clone());
        // Registered in the reverse of the order in which they must run.
        conn.on_end(move |e| {
            let told = end.try_send((Heard::End(e.reason()), Instant::now()));
            told.expect("there is room");
        });
        conn.on_closing(move |e| {
            let told = closing.try_send((Heard::Closing(e.reason()), Instant::now()));
            told.expect("there is room");
        });
        conn
    })
}

fn serve_told<S>(stack: S) -> (Served, Moments)
where
    S: ConnectionService<DuplexStream>,
{
    let (stack, moments) = told(stack);
    (serve(stack), moments)
}

async fn command(line: Bytes) -> Result<Reply<Bytes>, BoxError> {
    match &line[..] {
        b"quit" => Ok(Reply::from(Bytes::from("bye")).close()),
        b"fail" => Err("it failed".into()),
        b"panic" => panic!("it was asked to"),
        b"hang" => pending().await,
        b"large" => Ok(Reply::from(Bytes::from(vec![b'x'; 1 << 20])).close()),
        _ => Ok(line.into()),
    }
}

/// Runs `check` against a server of each way of dispatch.
async fn in_each_way(check: impl AsyncFn(Served, Moments)) {
    async fn one(pipeline: impl Pipelined, check: &impl AsyncFn(Served, Moments)) {
        let (served, moments) = serve_told(pipeline);
        check(served, moments).await;
    }
    let pipeline = Pipeline::new(Lines::default).service(service_fn(command));
    one(pipeline.clone(), &check).await;
    one(pipeline.clone().in_flight(8), &check).await;
    one(pipeline.multiplexed(8), &check).await;
}

#[tokio::test(start_paused = true)]
async fn closing_is_heard_before_the_linger() {
    for (line, reason) in [
        ("quit", EndReason::ServiceClosed),
        ("fail", EndReason::ServiceError),
        ("panic", EndReason::Panic),
    ] {
        in_each_way(async |served, mut moments| {
            let mut client = served.client().await;
            client.send(format!("{line}\n")).await;

            assert_eq!(moments.closes_and_ends(reason).await, LINGER, "{line}");
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn closing_is_heard_at_a_drain_and_at_an_idle_end() {
    in_each_way(async |served, mut moments| {
        let _client = served.client().await;
        settled().await;
        served.handle().shutdown();
        assert_eq!(moments.closes_and_ends(EndReason::Drained).await, LINGER);
    })
    .await;
    in_each_way(async |served, mut moments| {
        let mut client = served.client().await;
        client.ask("one").await;
        assert_eq!(
            moments.closes_and_ends(EndReason::IdleTimeout).await,
            LINGER
        );
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn closing_is_heard_before_the_last_output_is_taken() {
    in_each_way(async |served, mut moments| {
        let mut client = served.client().await;
        client.send("large\n").await;

        let (closing, closing_at) = moments.next().await;
        assert_eq!(closing, Heard::Closing(EndReason::ServiceClosed));
        let (end, end_at) = moments.next().await;

        // The peer does not read the rest.
        assert_eq!(end, Heard::End(EndReason::WriteTimeout));
        assert_eq!(end_at - closing_at, 30 * SECOND);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn closing_is_heard_before_the_farewell_of_a_rejected_connection_is_taken() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(command))
        .farewell(|_: &ConnectionInfo, _| Bytes::from(vec![b'x'; 1 << 20]));
    let (served, mut moments) = serve_told(pipeline.reject());
    let _client = served.client().await;

    // The peer reads nothing.
    let (closing, closing_at) = moments.next().await;
    assert_eq!(closing, Heard::Closing(EndReason::Rejected));
    let (end, end_at) = moments.next().await;
    assert_eq!(end, Heard::End(EndReason::Rejected));
    assert_eq!(end_at - closing_at, 30 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn closing_is_heard_before_the_end_when_the_peer_leaves_or_nothing_is_closed() {
    in_each_way(async |served, mut moments| {
        drop(served.client().await);
        moments.closes_and_ends(EndReason::PeerClosed).await;

        let mut client = served.client().await;
        client.send("hang\n").await;
        settled().await;
        let live = served.handle().connections().next();
        live.expect("it is there").abort();
        let waited = moments.closes_and_ends(EndReason::Aborted).await;
        assert_eq!(waited, Duration::ZERO);

        client = served.client().await;
        client.send("hang\n").await;
        settled().await;
        served.handle().abort();
        let waited = moments.closes_and_ends(EndReason::Killed).await;
        assert_eq!(waited, Duration::ZERO);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn closing_is_heard_of_a_connection_whose_future_a_layer_drops() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(command));
    let stack = ServiceBuilder::new().timeout(5 * SECOND).service(pipeline);
    let (served, mut moments) = serve_told(stack);
    let _client = served.client().await;

    let waited = moments.closes_and_ends(EndReason::ServiceTimeout).await;

    assert_eq!(waited, Duration::ZERO);
}

#[tokio::test]
async fn closing_is_heard_of_a_runtime_that_is_shut_down() {
    let (stack, mut moments) = told(Pipeline::new(Lines::default).service(service_fn(command)));
    let (listener, connector) = memory();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("threads can be started");
    let server = Server::builder()
        .runtimes([runtime.handle().clone()])
        .build(listener);
    let served = serve_with(server, connector, stack);
    let _client = served.connect().await.expect("it listens");
    let handle = served.handle().clone();
    until(|| handle.live() == 1).await;

    runtime.shutdown_background();

    moments.closes_and_ends(EndReason::Killed).await;
}

#[tokio::test(start_paused = true)]
async fn a_raw_service_closes_when_it_says_so_or_at_its_end() {
    let raw = service_fn(|mut conn: Connection<DuplexStream>| async move {
        match conn.read_u8().await? {
            b'c' => conn.close(Linger::default()).await?,
            b'f' => return Err("it failed".into()),
            b'p' => panic!("it was asked to"),
            _ => {}
        }
        Ok::<_, BoxError>(())
    });
    let (served, mut moments) = serve_told(raw);
    for (command, reason, waited) in [
        ("c", EndReason::ServiceClosed, LINGER),
        ("d", EndReason::ServiceClosed, Duration::ZERO),
        ("f", EndReason::ServiceError, Duration::ZERO),
        ("p", EndReason::Panic, Duration::ZERO),
    ] {
        let mut client = served.client().await;
        client.send(command).await;
        assert_eq!(moments.closes_and_ends(reason).await, waited, "{command}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stack_that_panics_or_refuses_has_both_moments() {
    let panics = service_fn(
        |_: Connection<DuplexStream>| -> std::future::Ready<Result<(), BoxError>> {
            panic!("in the call")
        },
    );
    let (served, mut moments) = serve_told(panics);
    let _client = served.client().await;
    moments.closes_and_ends(EndReason::Panic).await;

    let reject = service_fn(|conn: Connection<DuplexStream>| async move {
        drop(conn);
        Err::<Connection<DuplexStream>, BoxError>("not you".into())
    });
    let pipeline = Pipeline::new(Lines::default).service(service_fn(command));
    let (served, mut moments) = serve_told(PreConnectLayer::new(reject).layer(pipeline));
    let _client = served.client().await;
    moments.closes_and_ends(EndReason::Rejected).await;
}

async fn http(request: Request<RequestBody>) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::new(Full::from("ok"));
    match request.uri().path() {
        "/panic" => panic!("it was asked to"),
        "/upgrade" => {
            *response.body_mut() = Full::default();
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let headers = response.headers_mut();
            headers.insert(CONNECTION, "upgrade".parse().expect("a value"));
            headers.insert(UPGRADE, "echo".parse().expect("a value"));
            let upgrade = hyper::upgrade::on(request);
            tokio::spawn(async move {
                let mut stream = TokioIo::new(upgrade.await.expect("it is agreed"));
                let _one_byte = stream.read_u8().await;
            });
        }
        _ => {}
    }
    Ok(response)
}

#[tokio::test(start_paused = true)]
async fn http1_closes_after_its_last_response() {
    let (served, mut moments) = serve_told(Http::new(service_fn(http)));
    for (path, more, reason) in [
        ("/", "connection: close\r\n", EndReason::PeerClosed),
        ("/panic", "", EndReason::Panic),
    ] {
        let mut client = served.client().await;
        client
            .send(format!("GET {path} HTTP/1.1\r\nhost: a\r\n{more}\r\n"))
            .await;
        assert_eq!(moments.closes_and_ends(reason).await, LINGER, "{path}");
    }
    let mut client = served.client().await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    settled().await;
    served.handle().shutdown();
    assert_eq!(moments.closes_and_ends(EndReason::Drained).await, LINGER);
}

#[tokio::test(start_paused = true)]
async fn http2_closes_after_its_last_stream() {
    let (served, mut moments) = serve_told(Http::new(service_fn(http)));
    let (sender, conn) = http2(served.stream().await).await;
    let request = Request::get("http://a/").body(());
    let response = sender.send_request(request.expect("a request")).await;
    assert_eq!(response.expect("it is answered").status(), StatusCode::OK);

    served.handle().shutdown();

    moments.closes_and_ends(EndReason::Drained).await;
    drop((sender, conn));
}

#[tokio::test(start_paused = true)]
async fn an_upgraded_stream_closes_when_its_task_is_done() {
    let (served, mut moments) = serve_told(Http::new(service_fn(http)));
    let mut client = served.client().await;
    let headers = "host: a\r\nconnection: upgrade\r\nupgrade: echo\r\n";
    client
        .send(format!("GET /upgrade HTTP/1.1\r\n{headers}\r\n"))
        .await;
    sleep(60 * SECOND).await;
    assert!(moments.0.is_empty(), "an upgrade is no end");

    client.send("x").await;

    assert_eq!(
        moments.closes_and_ends(EndReason::ServiceClosed).await,
        LINGER
    );
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_that_hands_its_stream_over_does_not_close() {
    let upgrading =
        service_fn(|_: Bytes| ready(Ok::<_, BoxError>(Reply::<Bytes>::none().upgrade())));
    let next = service_fn(|mut conn: Connection<_>| async move {
        let _one_byte = conn.read_u8().await;
        conn.close(Linger::default()).await
    });
    let pipeline = Pipeline::new(Lines::default).service(upgrading);
    let (served, mut moments) = serve_told(pipeline.on_upgrade(next));
    let mut client = served.client().await;
    client.send("upgrade\n").await;
    sleep(60 * SECOND).await;
    assert!(moments.0.is_empty(), "an upgrade is no end");

    client.send("x").await;

    assert_eq!(
        moments.closes_and_ends(EndReason::ServiceClosed).await,
        LINGER
    );
}

/// Serves a stack over this kind of socket, has a client `quit` and not close, and checks that the
/// close is heard while the connection is still there.
async fn check_quit<S: Stack>(
    transport: Transport,
    stack: S,
    reason: EndReason,
    quit: impl AsyncFnOnce(&mut Box<dyn Io>, &Handle),
) {
    let (tell, moments) = mpsc::channel(64);
    let (mut moments, secure) = (Moments(moments), tell.clone());
    let plain = telling(stack.clone(), tell);
    let over = Over::behind(transport, Server::builder(), plain, |tls| {
        telling(PreConnectLayer::new(tls).layer(stack), secure)
    })
    .await;
    let handle = over.served.handle();
    let mut client = over.connect().await;
    let live = until_some(|| handle.connections().next()).await;
    let waiting = tokio::spawn({
        let live = live.clone();
        async move { live.closing().await.reason() }
    });

    quit(&mut client, handle).await;

    let (closing, _) = moments.next().await;
    assert_eq!(closing, Heard::Closing(reason), "{transport:?}");
    assert_eq!(waiting.await.expect("no panic"), reason, "{transport:?}");
    assert_eq!(live.phase(), ConnectionPhase::Closing, "{transport:?}");
    assert_eq!(handle.live(), 1, "{transport:?}: it lingers");
    drop(client);
    let (end, _) = moments.next().await;
    assert_eq!(end, Heard::End(reason), "{transport:?}");
}

async fn until_some<T>(mut some: impl FnMut() -> Option<T>) -> T {
    let mut found = None;
    until(|| {
        found = some();
        found.is_some()
    })
    .await;
    found.expect("it was found")
}

#[tokio::test]
async fn closing_is_heard_over_tcp_unix_sockets_and_tls() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(command));
    let quit = async |client: &mut Box<dyn Io>, _: &Handle| {
        client.write_all(b"quit\n").await.expect("it is open");
    };
    let last_request = async |client: &mut Box<dyn Io>, _: &Handle| {
        let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        client.write_all(request).await.expect("it is open");
    };
    for transport in TRANSPORTS {
        let (closed, by_peer) = (EndReason::ServiceClosed, EndReason::PeerClosed);
        let in_flight = pipeline.clone().in_flight(8);
        check_quit(transport, pipeline.clone(), closed, quit).await;
        check_quit(transport, in_flight, closed, quit).await;
        check_quit(transport, pipeline.clone().multiplexed(8), closed, quit).await;
        let http = Http::new(service_fn(http));
        check_quit(transport, http.clone(), by_peer, last_request).await;
        check_quit(transport, http, EndReason::Drained, take_leave).await;
    }
}

/// Begins HTTP/2, and takes leave at a drain as it should, but does not close.
async fn take_leave<Io>(client: &mut Io, handle: &Handle)
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
    const REQUEST: &[u8] = b"\0\0\x06\x01\x05\0\0\0\x01\x82\x86\x41\x01a\x84";
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let begin = [&preface[..], SETTINGS, REQUEST].concat();
    client.write_all(&begin).await.expect("it is open");
    let mut leaves = 0;
    while leaves < 2 {
        let mut head = [0; 9];
        client.read_exact(&mut head).await.expect("a frame comes");
        let mut payload = vec![0; usize::from(head[2])];
        client.read_exact(&mut payload).await.expect("it is whole");
        match head {
            [.., PING, 0, _, _, _, _] => {
                head[4] = 1;
                let answer = [&head[..], &payload].concat();
                client.write_all(&answer).await.expect("it is open");
            }
            // A server that drains says so twice.
            [.., GOAWAY, _, _, _, _, _] => leaves += 1,
            // The end of the response.
            [_, _, _, 0, 1, ..] => handle.shutdown(),
            _ => {}
        }
    }
}

#[tokio::test(start_paused = true)]
async fn http2_closes_before_the_linger() {
    let (served, mut moments) = serve_told(Http::new(service_fn(http)));
    let mut client = served.stream().await;

    take_leave(&mut client, served.handle()).await;

    assert_eq!(moments.closes_and_ends(EndReason::Drained).await, LINGER);
}

#[tokio::test(start_paused = true)]
async fn closing_can_be_waited_for_by_every_handle_and_sends_fail_from_then_on() {
    let (give, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        give.try_send(peer).expect("there is room");
        ready(Ok::<_, Infallible>(service_fn(command)))
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is served");
    let live = served.handle().connections().next().expect("it is there");
    let waiting = tokio::spawn({
        let (peer, live) = (peer.clone(), live.clone());
        async move {
            (
                peer.closing().await,
                live.closing().await,
                peer.info().closing().await,
            )
        }
    });
    settled().await;
    assert!(!waiting.is_finished());

    client.send("quit\n").await;

    let begun = waiting.await.expect("it does not panic");
    for end in [begun.0, begun.1, begun.2] {
        assert_eq!(
            (end.reason(), end.requests()),
            (EndReason::ServiceClosed, 1)
        );
    }
    assert_eq!(live.phase(), ConnectionPhase::Closing);
    assert!(peer.send("late".into()).await.is_err());
    let since = Instant::now();
    peer.closing().await;
    assert_eq!(since.elapsed(), Duration::ZERO, "it is past");
    assert_eq!(peer.closed().await.reason(), EndReason::ServiceClosed);
    assert_eq!(since.elapsed(), LINGER);
}

#[tokio::test(start_paused = true)]
async fn a_callback_that_comes_late_or_panics_keeps_none_from_running() {
    let (tell, mut told) = mpsc::channel(8);
    let hear = move |what: &'static str| {
        let tell = tell.clone();
        move |_: &_| tell.try_send(what).expect("there is room")
    };
    let stack = MapRequest::new(
        Pipeline::new(Lines::default).service(service_fn(command)),
        move |conn: Connection<DuplexStream>| {
            let (hear, info) = (hear.clone(), conn.info().clone());
            conn.on_closing(|_| panic!("in the callback"));
            conn.on_closing(hear("first"));
            conn.on_closing(move |_| {
                info.on_closing(hear("late"));
                info.on_closing(|_| panic!("in a late one"));
                let late = hear("as late");
                info.on_closing(late);
            });
            conn
        },
    );
    let served = serve(stack);
    let mut client = served.client().await;

    client.send("quit\n").await;

    for expected in ["first", "late", "as late"] {
        assert_eq!(told.recv().await, Some(expected));
    }
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
    assert!(told.is_empty());
}

/// Serves connections that are registered under the name that they send, and closed by `quit`.
fn entering(names: &Registry<Bytes, Bytes>) -> Served {
    let names = names.clone();
    serve(
        Pipeline::new(Lines::default).make_service(service_fn(move |peer: Peer<Bytes>| {
            let names = names.clone();
            let enter = service_fn(move |line: Bytes| {
                let answer = match &line[..] {
                    b"quit" => Reply::from(Bytes::from("bye")).close(),
                    _ if names.insert(line.clone(), &peer).is_ok() => Bytes::from("in").into(),
                    _ => Bytes::from("taken").into(),
                };
                ready(Ok::<_, BoxError>(answer))
            });
            ready(Ok::<_, Infallible>(enter))
        })),
    )
}

#[tokio::test(start_paused = true)]
async fn a_registry_frees_a_key_when_closing_begins_or_at_the_end() {
    for (names, while_it_lingers) in [(Registry::new(), "in"), (Registry::until_end(), "taken")] {
        let served = entering(&names);
        let mut ann = served.client().await;
        assert_eq!(ann.ask("ann").await, "in");
        assert_eq!(ann.ask("quit").await, "bye");
        settled().await;
        assert_eq!(served.handle().live(), 1, "it lingers");

        let mut again = served.client().await;
        assert_eq!(again.ask("ann").await, while_it_lingers);

        assert_eq!(served.reason().await, EndReason::ServiceClosed);
        assert_eq!(again.ask("ann").await, "in");
    }
}

#[tokio::test(start_paused = true)]
async fn a_registry_takes_no_connection_that_is_closing() {
    let names = Registry::<_, Bytes>::new();
    let until_end = Registry::<_, Bytes>::until_end();
    let served = entering(&names);
    let mut ann = served.client().await;
    assert_eq!(ann.ask("ann").await, "in");
    let peer = names.get(&Bytes::from("ann")).expect("she is in");
    assert_eq!(ann.ask("quit").await, "bye");
    settled().await;

    names.insert("again".into(), &peer).expect("it is free");
    until_end.insert("again", &peer).expect("it is free");

    assert!(names.is_empty());
    assert_eq!(until_end.len(), 1);
    served.reason().await;
    assert!(until_end.is_empty());
}
