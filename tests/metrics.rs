//! Metrics: each connection is counted once, with the reason that `on_end` reports; figures from
//! the table agree with the load; nothing is reported twice.

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/recorded.rs"]
mod recorded;
mod support;

use std::collections::VecDeque;
use std::future::{pending, ready};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use metrics::set_default_local_recorder;
use rustix::io::Errno;
use tokio::io::DuplexStream;
#[cfg(target_os = "linux")]
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::{Incoming, Listener};
use tower_tcp::frame::Lines;
use tower_tcp::observe::RequestMetricsLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{self, MemoryListener, Served, serve, serve_with};
use tower_tcp::tls::Tls;
use tower_tcp::{
    Address, BoxError, Connection, ConnectionPhase, EndReason, Peer, Pipeline, Reply, Server,
};

use certificates::certified;
use recorded::Recorded;
use support::{Client, Clients, Ends, settled};

const SECOND: Duration = Duration::from_secs(1);

/// Does what the request says.
async fn act(peer: Peer<Bytes>, request: Bytes) -> Result<Reply<Bytes>, BoxError> {
    match &request[..] {
        b"close" => Ok(Reply::from(request).close()),
        b"abort" => {
            peer.abort();
            pending().await
        }
        b"fail" => Err("as asked".into()),
        b"panic" => panic!("as asked"),
        b"hang" => pending().await,
        _ => Ok(request.into()),
    }
}

fn acting() -> Served {
    let make = service_fn(|peer: Peer<Bytes>| {
        ready(Ok::<_, BoxError>(service_fn(move |request| {
            act(peer.clone(), request)
        })))
    });
    serve(
        Pipeline::new(|| Lines::default().max_line(16))
            .make_service(make)
            .in_flight(4),
    )
}

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

/// Waits until no connection is open.
async fn all_gone<C>(served: &Served<C>) {
    while served.handle().live() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn k1_each_connection_is_counted_once_by_the_reason_that_on_end_is_told() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let served = acting();
    let mut reasons = Vec::new();
    for text in [
        "",
        "a\n",
        "half",
        "0123456789abcdefg",
        "close\n",
        "abort\n",
        "fail\n",
        "panic\n",
        "a\n",
    ] {
        let mut client = served.client().await;
        client.send(text).await;
        client.finish().await;
        reasons.push(served.reason().await);
        drop(client);
    }
    let mut hangs = served.client().await;
    hangs.send("hang\n").await;
    settled().await;
    served.handle().shutdown_within(SECOND);
    reasons.push(served.reason().await);
    all_gone(&served).await;

    let ended = "tower_tcp.ended_connections";
    for reason in EndReason::ALL {
        let told = reasons.iter().filter(|told| *told == reason).count();
        let attributes = [
            ("close.reason", reason.as_str()),
            ("close.initiator", reason.initiator().as_str()),
        ];
        assert_eq!(recorded.sum(ended, &attributes), told as f64, "{reason}");
    }
    assert_eq!(recorded.sum(ended, &[]), 10.0);
    assert_eq!(recorded.sum("tower_tcp.accepted_connections", &[]), 10.0);
    assert_eq!(recorded.times("tower_tcp.connection.duration", &[]), 10);
    assert_eq!(recorded.sum("tower_tcp.connection.duration", &[]), 1.001);
    assert!(reasons.contains(&EndReason::DrainDeadline), "{reasons:?}");
}

#[tokio::test(start_paused = true)]
async fn those_who_are_not_let_in_are_counted_as_rejected_too() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let hook = service_fn(|conn: Connection<DuplexStream>| async move {
        match conn.info().peer_addr() {
            Address::Memory(1) => Err(BoxError::from("not this one")),
            Address::Memory(2 | 3) => pending().await,
            _ => Ok(conn),
        }
    });
    let full = service_fn(|_: Connection<DuplexStream>| ready(Ok::<_, BoxError>(())));
    let stack = ServiceBuilder::new()
        .layer(ConnectionLimit::new(3).layer().overflow(full))
        .layer(PreConnectLayer::new(hook).pending(1))
        .service(Pipeline::new(Lines::default).service(service_fn(echo)));
    let served = serve(stack);
    let mut reasons = Vec::new();

    let _refused = served.client().await;
    reasons.push(served.reason().await);
    let _evicted = served.client().await;
    let _late = served.client().await;
    reasons.push(served.reason().await);
    reasons.push(served.reason().await);
    let mut let_in = Vec::new();
    for _ in 0..3 {
        let mut client = served.client().await;
        client.ask("hi").await;
        let_in.push(client);
    }
    let _over = served.client().await;
    reasons.push(served.reason().await);
    let_in.clear();
    for _ in 0..3 {
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
    all_gone(&served).await;

    let expected = [
        EndReason::Rejected,
        EndReason::PreConnectEvicted,
        EndReason::PreConnectTimeout,
        EndReason::LimitExceeded,
    ];
    assert_eq!(reasons, expected);
    for reason in expected {
        for metric in [
            "tower_tcp.rejected_connections",
            "tower_tcp.ended_connections",
        ] {
            let counted = recorded.sum(metric, &[("close.reason", reason.as_str())]);
            assert_eq!(counted, 1.0, "{metric} {reason}");
        }
    }
    assert_eq!(recorded.sum("tower_tcp.rejected_connections", &[]), 4.0);
    assert_eq!(recorded.sum("tower_tcp.ended_connections", &[]), 7.0);
}

#[tokio::test(start_paused = true)]
async fn a_collection_tells_how_many_are_in_each_phase() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let hook = service_fn(|conn: Connection<DuplexStream>| async move {
        match conn.info().peer_addr() {
            Address::Memory(1) => pending().await,
            _ => Ok::<_, BoxError>(conn),
        }
    });
    let make = service_fn(|peer: Peer<Bytes>| {
        ready(Ok::<_, BoxError>(service_fn(move |request| {
            act(peer.clone(), request)
        })))
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service(Pipeline::new(Lines::default).make_service(make));
    let served = serve(stack);
    let _in_hooks = served.client().await;
    let _served = (served.client().await, served.client().await);
    let mut leaving = served.client().await;
    leaving.send("hang\n").await;
    let mut closing = served.client().await;
    closing.send("close\n").await;
    settled().await;
    let last = served
        .handle()
        .connections()
        .find(|live| live.requests() > 0 && live.bytes_written() == 0);
    last.expect("it hangs").close();
    settled().await;

    served.handle().collect_metrics();

    let live = |phase: ConnectionPhase| {
        recorded.sum("tower_tcp.active_connections", &[("phase", phase.as_str())])
    };
    let phases: Vec<_> = ConnectionPhase::ALL
        .iter()
        .map(|phase| live(*phase))
        .collect();
    assert_eq!(phases, [1.0, 2.0, 1.0, 1.0]);
    assert_eq!(recorded.sum("tower_tcp.connection_limit", &[]), 10_000.0);

    served.handle().limit().set_unlimited();
    served.handle().collect_metrics();
    let limit = recorded.sum("tower_tcp.connection_limit", &[]);
    assert_eq!(limit, f64::INFINITY);
    assert_eq!(recorded.sum("tower_tcp.drain.remaining", &[]), 0.0);
}

#[tokio::test(start_paused = true)]
async fn k5_what_was_up_is_down_again_when_all_have_left() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let served = acting();
    let mut clients = [served.client().await, served.client().await];
    for client in &mut clients {
        client.send("hang\n").await;
    }
    settled().await;
    served.handle().shutdown();
    served.handle().collect_metrics();
    for client in clients {
        drop(client);
        served.end().await;
    }
    all_gone(&served).await;

    served.handle().collect_metrics();

    assert_eq!(recorded.sum("tower_tcp.active_connections", &[]), 0.0);
    assert_eq!(recorded.sum("tower_tcp.drain.remaining", &[]), 0.0);
}

#[tokio::test(start_paused = true)]
async fn bytes_and_requests_agree_with_the_load_however_often_they_are_collected() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let served = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    let (mut bytes, mut requests) = (0, 0);
    let mut staying = Vec::new();
    for n in 0..50 {
        let mut client = served.client().await;
        for _ in 0..=n {
            client.ask("sixteen bytes..").await;
            (bytes, requests) = (bytes + 16, requests + 1);
        }
        // While some connections are open and some are closed.
        if n % 3 == 0 {
            served.handle().collect_metrics();
        }
        if n % 2 == 0 {
            staying.push(client);
        } else {
            drop(client);
            served.end().await;
        }
        if n % 5 == 0 {
            served.handle().collect_metrics();
        }
    }
    served.handle().collect_metrics();
    served.handle().collect_metrics();

    let moved = |direction| recorded.sum("tower_tcp.connection.io", &[("direction", direction)]);
    assert_eq!(moved("read"), f64::from(bytes));
    assert_eq!(moved("write"), f64::from(bytes));
    assert_eq!(recorded.sum("tower_tcp.requests", &[]), f64::from(requests));
}

#[tokio::test]
async fn nothing_is_told_twice_while_connections_leave() {
    const CONNECTIONS: u32 = 2_000;
    let recorded = Arc::new(Recorded::default());
    let served = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    let done = Arc::new(AtomicBool::new(false));
    let collector = std::thread::spawn({
        let (recorded, handle) = (Arc::clone(&recorded), served.handle().clone());
        let done = Arc::clone(&done);
        move || {
            let _guard = set_default_local_recorder(&*recorded);
            while !done.load(Ordering::Acquire) {
                handle.collect_metrics();
            }
            handle.collect_metrics();
        }
    });

    for _ in 0..CONNECTIONS {
        let mut client = served.client().await;
        client.ask("sixteen bytes..").await;
        drop(client);
        served.end().await;
    }
    all_gone(&served).await;
    done.store(true, Ordering::Release);
    collector.join().unwrap();

    assert_eq!(
        recorded.sum("tower_tcp.requests", &[]),
        f64::from(CONNECTIONS)
    );
    let read = recorded.sum("tower_tcp.connection.io", &[("direction", "read")]);
    assert_eq!(read, f64::from(16 * CONNECTIONS));
}

#[tokio::test(start_paused = true)]
async fn a_drain_tells_who_is_still_waited_for() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let served = acting();
    let mut hanging = [served.client().await, served.client().await];
    for client in &mut hanging {
        client.send("hang\n").await;
    }
    let _idle = served.client().await;
    settled().await;
    served.handle().shutdown();
    served.end().await;
    settled().await;

    served.handle().collect_metrics();

    let phase = [("phase", "draining")];
    assert_eq!(recorded.sum("tower_tcp.drain.remaining", &[]), 2.0);
    assert_eq!(recorded.sum("tower_tcp.active_connections", &phase), 2.0);
}

#[tokio::test(start_paused = true)]
async fn a_server_with_a_name_counts_under_it() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let (listener, connector) = testkit::memory();
    let server = Server::builder().name("smtp").build(listener);
    let served = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    drop(served.stream().await);
    served.end().await;
    all_gone(&served).await;

    served.handle().collect_metrics();

    let all = recorded.series(None, &[]);
    let named = recorded.series(None, &[("server.name", "smtp")]);
    assert!(named.len() > 5, "{named:?}");
    assert_eq!(named.len(), all.len(), "{all:?}");
}

/// Fails with the given errors before it accepts the first connection.
struct Failing(MemoryListener, VecDeque<io::Error>);

impl Listener for Failing {
    type Io = DuplexStream;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<DuplexStream>>> {
        match self.1.pop_front() {
            Some(failure) => Poll::Ready(Err(failure)),
            None => self.0.poll_accept(cx),
        }
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.0.local_addrs()
    }
}

#[tokio::test(start_paused = true)]
async fn failed_accepts_are_counted_by_what_failed_and_what_is_done_about_it() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let (listener, connector) = testkit::memory();
    let errors = [
        Errno::MFILE.into(),
        Errno::CONNABORTED.into(),
        Errno::MFILE.into(),
        io::Error::other("who knows"),
    ];
    let server = Server::from_listener(Failing(listener, errors.into()));
    let served = serve_with(
        server,
        connector,
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    let mut client = served.client().await;
    client.ask("hi").await;
    drop(served);

    let counted = |error, action| {
        let attributes = [("error.type", error), ("action", action)];
        recorded.sum("tower_tcp.accept.errors", &attributes)
    };
    assert_eq!(counted("emfile", "back_off"), 2.0);
    assert_eq!(counted("econnaborted", "retry"), 1.0);
    assert_eq!(counted("_OTHER", "back_off"), 1.0);
    assert_eq!(recorded.sum("tower_tcp.accept.errors", &[]), 4.0);
}

#[tokio::test(start_paused = true)]
async fn handshakes_are_timed_and_their_failures_told_apart() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let (server, client) = certified();
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(Tls::from(server)).deadline(7 * SECOND))
        .service(Pipeline::new(Lines::default).service(service_fn(echo)));
    let served = serve(stack);

    let name = ServerName::try_from("localhost").unwrap();
    let io = served.client().await.0.into_inner();
    let good = TlsConnector::from(Arc::clone(&client))
        .connect(name, io)
        .await;
    Client::new(good.unwrap()).ask("hi").await;
    served.end().await;
    drop(served.client().await);
    served.end().await;
    let mut plain = served.client().await;
    plain.send("GET / HTTP/1.1\r\n\r\n").await;
    served.end().await;
    let _silent = served.client().await;
    served.end().await;

    let handshakes = "tower_tcp.tls_handshake.duration";
    let with = |key, value| recorded.times(handshakes, &[(key, value)]);
    assert_eq!(with("tls.protocol.version", "1.3"), 1);
    assert_eq!(with("error.type", "truncated"), 1);
    assert_eq!(with("error.type", "tls_handshake_failed"), 1);
    assert_eq!(with("error.type", "canceled"), 1);
    assert_eq!(recorded.times(handshakes, &[]), 4);
    assert_eq!(recorded.sum(handshakes, &[("error.type", "canceled")]), 7.0);
}

#[tokio::test(start_paused = true)]
async fn requests_are_measured_by_how_they_ended() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let mut service = ServiceBuilder::new()
        .layer(RequestMetricsLayer::with_attributes([("server.name", "x")]))
        .service_fn(|request: &'static str| async move {
            match request {
                "sleep" => sleep(2 * SECOND).await,
                "hang" => pending().await,
                _ => {}
            }
            if request == "fail" {
                Err("as asked")
            } else {
                Ok(())
            }
        });
    let mut call = |request| service.call(request);
    call("now").await.unwrap();
    call("sleep").await.unwrap();
    call("fail").await.unwrap_err();
    timeout(5 * SECOND, call("hang")).await.unwrap_err();
    drop(call("never polled"));

    let duration = "tower_tcp.request.duration";
    let (failed, canceled) = (
        [("error.type", "service_error")],
        [("error.type", "canceled")],
    );
    assert_eq!(recorded.times(duration, &[("server.name", "x")]), 5);
    assert_eq!(recorded.times(duration, &failed), 1);
    assert_eq!(recorded.times(duration, &canceled), 2);
    assert_eq!(recorded.sum(duration, &canceled), 5.0);
    assert_eq!(recorded.sum(duration, &[]), 7.0);
    assert_eq!(recorded.sum("tower_tcp.requests.active", &[]), 0.0);
}

#[tokio::test(start_paused = true)]
async fn requests_that_run_are_counted_over_all_connections() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let hang = ServiceBuilder::new()
        .layer(RequestMetricsLayer::new())
        .service_fn(|_: Bytes| pending::<Result<Bytes, BoxError>>());
    let served = serve(Pipeline::new(Lines::default).service(hang).in_flight(4));
    let mut clients = [served.client().await, served.client().await];
    for client in &mut clients {
        client.send("a\nb\n").await;
    }

    settled().await;

    assert_eq!(recorded.sum("tower_tcp.requests.active", &[]), 4.0);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_length_of_the_accept_queue_is_that_of_the_backlog() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let mut builder = Server::builder();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        builder = builder.listen(address);
    }
    // Nothing accepts, because the server is not being served yet.
    let server = builder.bind().await.unwrap();
    let handle = server.handle();
    let mut clients = Vec::new();
    for address in handle.local_addrs() {
        for _ in 0..3 {
            let address = address.tcp().unwrap();
            clients.push(TcpStream::connect(address).await.unwrap());
        }
    }

    // The last of the three packets of a connection may still be on its way.
    let length = timeout(30 * SECOND, async {
        loop {
            handle.collect_metrics();
            let length = recorded.sum("tower_tcp.accept_queue.length", &[]);
            if length >= 6.0 {
                return length;
            }
            tokio::task::yield_now().await;
        }
    });

    assert_eq!(length.await.expect("all are in the backlog"), 6.0);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn nobody_waits_in_the_accept_queue_of_a_server_that_is_gone() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let handle = server.handle();
    let address = handle.local_addrs()[0].tcp().unwrap();
    let _waits = TcpStream::connect(address).await.unwrap();
    timeout(30 * SECOND, async {
        while recorded.sum("tower_tcp.accept_queue.length", &[]) < 1.0 {
            handle.collect_metrics();
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it is in the backlog");
    drop(server);

    handle.collect_metrics();

    assert_eq!(recorded.sum("tower_tcp.accept_queue.length", &[]), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_listen_on_tcp_has_no_accept_queue_to_tell_of() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let served = acting();

    served.handle().collect_metrics();

    let length = recorded.series(Some("tower_tcp.accept_queue.length"), &[]);
    assert!(length.is_empty(), "{length:?}");
}
