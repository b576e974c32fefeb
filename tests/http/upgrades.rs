//! An upgraded stream remains a connection of the server until it ends.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http_body_util::Empty;
use hyper::header::{CONNECTION, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::{Layer, service_fn};
use tower_tcp::deadline::{Deadlines, MinRate};
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::make::ClonePerRequest;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve};
use tower_tcp::tls::Tls;
use tower_tcp::{ConnectionInfo, EndReason};

use crate::certificates::certified;
use crate::http2::{Sender, frame};
use crate::support::{Client, Clients, Ends, settled};
use crate::{answer, connect, http2};

const ECHO: &str = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";

type Reply = Result<Response<Empty<Bytes>>, Infallible>;

fn switching() -> Reply {
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, "echo");
    Ok(response.body(Empty::new()).expect("a response"))
}

/// Sends bytes back, in a task of its own. If `heeds` is set, it says `bye` at a drain.
async fn echo(mut request: Request<RequestBody>, heeds: bool) -> Reply {
    let info = request.extensions().get::<ConnectionInfo>();
    let info = info.expect("each request has it").clone();
    let tunnel = request.method() == Method::CONNECT;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let draining = async {
            match heeds {
                true => info.draining().await,
                false => std::future::pending().await,
            }
        };
        tokio::pin!(draining);
        let mut stream = TokioIo::new(upgrade.await.expect("it is agreed"));
        let mut block = [0; 1024];
        loop {
            let read = tokio::select! {
                read = stream.read(&mut block) => read,
                () = &mut draining => {
                    stream.write_all(b"bye").await.expect("it is open");
                    return;
                }
            };
            match read {
                Ok(n) if n > 0 => stream.write_all(&block[..n]).await.expect("it is open"),
                _ => return,
            }
        }
    });
    if tunnel {
        Ok(Response::new(Empty::new()))
    } else {
        switching()
    }
}

fn http(
    heeds: bool,
) -> Http<
    ClonePerRequest<
        impl tower::Service<
            Request<RequestBody>,
            Response = Response<Empty<Bytes>>,
            Error = Infallible,
            Future: Send,
        > + Clone
        + Send
        + 'static,
    >,
> {
    Http::new(service_fn(move |request| echo(request, heeds)))
}

/// Upgrades, and checks the response. Bytes sent after the request belong to the new protocol.
async fn upgraded<Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(
    client: &mut Client<Io>,
) {
    client.send(format!("{ECHO}hi")).await;
    assert_eq!(answer(client).await.status(), "101");
    let mut block = [0; 2];
    client.0.read_exact(&mut block).await.expect("it is echoed");
    assert_eq!(&block, b"hi");
}

#[tokio::test(start_paused = true)]
async fn an_upgraded_connection_keeps_its_place_until_its_peer_leaves() {
    let served = serve(http(false));
    let mut client = served.client().await;
    upgraded(&mut client).await;

    tokio::time::sleep(Duration::from_secs(3500)).await;
    assert_eq!(served.handle().live(), 1);
    assert_eq!(served.handle().limit().in_use(), 1);
    drop(client);

    let end = served.end().await;
    assert_eq!((end.reason(), end.requests()), (EndReason::PeerClosed, 1));
    assert_eq!(served.handle().limit().in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_upgraded_connection_whose_service_is_done_is_closed_in_good_order() {
    let service = service_fn(|mut request: Request<RequestBody>| async move {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.expect("it is agreed"));
            stream.write_all(b"that was all").await.expect("it is open");
        });
        switching()
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

    client.send(ECHO).await;

    assert_eq!(answer(&mut client).await.status(), "101");
    // The client goes on sending. That must not reset the connection before the written bytes
    // arrive.
    client.send("hi").await;
    assert_eq!(client.rest().await, ["that was all"]);
    drop(client);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_that_nobody_takes_up_ends() {
    let service = service_fn(|_: Request<RequestBody>| async { switching() });
    let served = serve(Http::new(service));
    let mut client = served.client().await;

    client.send(ECHO).await;

    assert_eq!(answer(&mut client).await.status(), "101");
    assert!(client.rest().await.is_empty());
    drop(client);
    served.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_known_to_an_upgraded_connection() {
    let served = serve(http(true));
    let mut client = served.client().await;
    upgraded(&mut client).await;

    served.handle().shutdown();

    assert_eq!(client.rest().await, ["bye"]);
    drop(client);
    assert_eq!(served.reason().await, EndReason::Drained);
    assert_eq!(served.handle().closed().await.drained, 1);
}

#[tokio::test(start_paused = true)]
async fn an_upgraded_connection_that_does_not_heed_a_drain_is_cut_off() {
    let served = serve(http(false));
    let mut client = served.client().await;
    upgraded(&mut client).await;

    served.handle().shutdown_within(Duration::from_secs(5));
    settled().await;
    client.send("on").await;
    let mut block = [0; 2];
    client.0.read_exact(&mut block).await.expect("it goes on");

    assert_eq!(served.reason().await, EndReason::DrainDeadline);
    // The stream is closed, though the task that owns it did not agree.
    assert!(client.rest().await.is_empty());
    assert_eq!(served.handle().closed().await.aborted, 1);
}

#[tokio::test(start_paused = true)]
async fn an_abort_takes_the_stream_from_whoever_has_it() {
    let (told, mut tells) = tokio::sync::mpsc::channel(1);
    let service = service_fn(move |mut request: Request<RequestBody>| {
        let told = told.clone();
        async move {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut stream = TokioIo::new(upgrade.await.expect("it is agreed"));
                let read = stream.read(&mut [0; 16]).await;
                told.send(read.map_err(|err| err.kind()))
                    .await
                    .expect("it is read");
            });
            switching()
        }
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;
    client.send(ECHO).await;
    answer(&mut client).await;
    settled().await;

    served.handle().abort();

    assert_eq!(
        tells.recv().await,
        Some(Err(std::io::ErrorKind::ConnectionAborted))
    );
    assert_eq!(served.reason().await, EndReason::Killed);
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_upgraded_over_tls() {
    let (server, config) = certified();
    let tls = PreConnectLayer::new(Tls::from(server));
    let served = serve(tls.layer(http(false)));
    let name = ServerName::try_from("localhost").expect("a name");
    let stream = TlsConnector::from(config).connect(name, connect(&served).await);
    let mut client = Client::new(stream.await.expect("the handshake is made"));

    upgraded(&mut client).await;

    client.finish().await;
    assert!(client.rest().await.is_empty());
    drop(client);
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

/// A tunnel over HTTP/2.
struct Tunnel {
    incoming: RecvStream,
    outgoing: SendStream<Bytes>,
    _connection: (Sender, JoinHandle<Result<(), h2::Error>>),
}

async fn tunnel(served: &Served) -> Tunnel {
    let (sender, connection) = http2(connect(served).await).await;
    let request = Request::connect("localhost:80").body(());
    let begun = sender.begin(request.expect("a request"), false);
    let (response, outgoing) = begun.expect("it is open");
    let response = response.await.expect("an answer");
    assert_eq!(response.status(), 200);
    Tunnel {
        incoming: response.into_body(),
        outgoing,
        _connection: (sender, connection),
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_over_http2_does_not_rest() {
    let served = serve(http(false));
    let mut tunnel = tunnel(&served).await;

    for _ in 0..20 {
        tokio::time::sleep(Duration::from_secs(60)).await;

        let sent = tunnel.outgoing.send_data("hi".into(), false);
        sent.expect("it is open");
        let echoed = frame(&mut tunnel.incoming).await.expect("it is open");
        assert_eq!(echoed.expect("it is echoed"), "hi");
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_over_http2_has_as_long_as_the_drain() {
    let served = serve(http(false));
    let mut tunnel = tunnel(&served).await;
    settled().await;

    served.handle().shutdown();
    let begun = Instant::now();

    let end = frame(&mut tunnel.incoming).await;
    assert!(matches!(end, Some(Err(_)) | None), "{end:?}");
    assert_eq!(begun.elapsed().as_secs(), 30);
    drop(tunnel);
    assert_eq!(served.reason().await, EndReason::DrainDeadline);
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_tunnel_over_http2_is_done_rests() {
    let served = serve(http(false));
    let Tunnel {
        incoming,
        mut outgoing,
        _connection,
    } = tunnel(&served).await;
    tokio::time::sleep(Duration::from_secs(100)).await;

    let ended = outgoing.send_data(Bytes::new(), true);
    ended.expect("it is open");
    drop((incoming, outgoing));
    let begun = Instant::now();

    assert_eq!(served.reason().await, EndReason::IdleTimeout);
    assert!(begun.elapsed().as_secs() >= 75);
}

#[tokio::test(start_paused = true)]
async fn an_upgraded_stream_that_rests_is_taken_away_after_an_hour_and_closed_in_good_order() {
    let (told, mut read) = tokio::sync::mpsc::channel(1);
    let service = service_fn(move |mut request: Request<RequestBody>| {
        let told = told.clone();
        async move {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut stream = TokioIo::new(upgrade.await.expect("it is agreed"));
                let read = stream.read_u8().await;
                told.send(read.map_err(|err| err.kind()))
                    .await
                    .expect("it is awaited");
            });
            switching()
        }
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;
    client.send(ECHO).await;
    assert_eq!(answer(&mut client).await.status(), "101");
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());

    assert_eq!(begun.elapsed().as_secs(), 3600);
    let aborted = std::io::ErrorKind::ConnectionAborted;
    assert_eq!(read.recv().await, Some(Err(aborted)));
    drop(client);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn an_upgraded_stream_rests_only_while_nothing_moves() {
    let served = serve(http(false));
    let mut client = served.client().await;
    upgraded(&mut client).await;
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(3500)).await;
        client.send("!").await;
        assert_eq!(client.0.read_u8().await.expect("it is echoed"), b'!');
    }
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());

    // Another task reads the bytes, so the byte counters are checked, four times an hour.
    let hour = Duration::from_secs(3600);
    assert!(begun.elapsed() >= hour && begun.elapsed() <= hour * 5 / 4);
    drop(client);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

/// Upgrades, then writes without end.
async fn flood(mut request: Request<RequestBody>) -> Reply {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await.expect("it is agreed"));
        while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    });
    switching()
}

#[tokio::test(start_paused = true)]
async fn an_upgraded_stream_whose_peer_takes_nothing_is_cut_off() {
    let served = serve(Http::new(service_fn(flood)));
    let mut client = served.client().await;
    client.send(ECHO).await;
    assert_eq!(answer(&mut client).await.status(), "101");
    let begun = Instant::now();

    assert_eq!(served.reason().await, EndReason::WriteTimeout);

    // The counters are checked four times.
    let half_a_minute = Duration::from_secs(30);
    assert!(begun.elapsed() >= half_a_minute && begun.elapsed() <= half_a_minute * 5 / 4);
}

/// Turns the other deadlines off, because each of them would cause checks of the stream, too.
#[tokio::test(start_paused = true)]
async fn an_upgraded_stream_whose_peer_is_too_slow_is_cut_off_without_other_deadlines() {
    let window = Duration::from_secs(4);
    let deadlines = Deadlines::default()
        .write(None)
        .upgraded_idle(None)
        .min_rate(MinRate::new(1, window));
    let served = serve(Http::new(service_fn(flood)).deadlines(deadlines));
    let mut client = served.client().await;
    client.send(ECHO).await;
    assert_eq!(answer(&mut client).await.status(), "101");
    let begun = Instant::now();

    assert_eq!(served.reason().await, EndReason::SlowReader);

    assert!(begun.elapsed() >= window && begun.elapsed() <= window * 5 / 4);
}

#[tokio::test(start_paused = true)]
async fn an_old_upgraded_stream_is_told_to_leave_and_taken_away_later() {
    let deadlines = Deadlines::default().max_age(Duration::from_secs(10));
    for (heeds, end) in [(true, 10), (false, 40)] {
        let served = serve(http(heeds).deadlines(deadlines));
        let mut client = served.client().await;
        let begun = Instant::now();
        upgraded(&mut client).await;

        client.rest().await;

        assert_eq!(begun.elapsed().as_secs(), end);
        drop(client);
        assert_eq!(served.reason().await, EndReason::MaxAge);
    }
}

#[tokio::test(start_paused = true)]
async fn an_http2_connection_with_nothing_but_a_resting_tunnel_ends_after_an_hour() {
    let served = serve(http(false));
    let _tunnel = tunnel(&served).await;
    let begun = Instant::now();

    assert_eq!(served.reason().await, EndReason::IdleTimeout);

    assert_eq!(begun.elapsed().as_secs(), 3600);
}
