//! Several protocols on one port, told apart by their first bytes. Each connection reaches the
//! service of its protocol with every byte delivered once. A connection that sends too little to
//! decide is held for a bounded time, in bounded memory.

#[path = "support/certificates.rs"]
mod certificates;
mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use certificates::certified;
use support::{Client, Clients, Ends, serve_stream, settled};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection};
use tower::limit::ConcurrencyLimitLayer;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::close::Linger;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::OnConnectLayer;
use tower_tcp::preconnect::{
    Detection, Peek, PreConnectElapsed, PreConnectExt, PreConnectLayer, Protocol, Unknown,
    UnknownProtocol,
};
use tower_tcp::testkit::{Served, serve};
use tower_tcp::tls::{Tls, TlsInfo};
use tower_tcp::{BoxError, Connection, EndReason, Peer, Pipeline, Rewind};

const SEC: Duration = Duration::from_secs(1);

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

type Memory = Connection<DuplexStream>;

/// Reads to the end. Answers with `name` and what it read.
async fn tell<Io>(name: &str, mut conn: Connection<Io>) -> Result<(), BoxError>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut all = Vec::new();
    conn.read_to_end(&mut all).await?;
    conn.write_all(name.as_bytes()).await?;
    conn.write_all(&all).await?;
    conn.close(Linger::default()).await?;
    Ok(())
}

/// Returns a stack that answers each connection with its detected protocol, behind the given hook.
fn told<H, Io>(
    hook: H,
) -> impl Service<Memory, Response = (), Error = BoxError, Future: Send> + Send + 'static
where
    H: Service<Connection<DuplexStream>, Response = Connection<Io>> + Clone + Send + 'static,
    H::Error: Into<BoxError>,
    H::Future: Send,
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service_fn(|conn: Connection<Io>| async move {
            let name = match conn.info().get::<Protocol>() {
                Some(Protocol::Tls) => "tls: ",
                Some(Protocol::Http2) => "http2: ",
                Some(Protocol::Http1) => "http1: ",
                _ => "none: ",
            };
            tell(name, conn).await
        })
}

fn refusing() -> Served {
    serve(told(Peek::new(Protocol::detect)))
}

fn passing() -> Served {
    serve(told(Peek::new(Protocol::detect).unknown(Unknown::Pass)))
}

/// Sends bytes and the end. Returns all that comes back.
async fn exchange(mut client: DuplexStream, bytes: &[u8]) -> Vec<u8> {
    client.write_all(bytes).await.expect("the server reads");
    client.shutdown().await.expect("it is open");
    let mut all = Vec::new();
    let reading = client.read_to_end(&mut all);
    let read = timeout(3600 * SEC, reading).await.expect("it ends");
    read.expect("it ends in good order");
    all
}

fn server_name() -> ServerName<'static> {
    ServerName::try_from("localhost").expect("a name")
}

/// Returns the first bytes of a TLS client.
fn hello(client: &Arc<ClientConfig>) -> Vec<u8> {
    let mut client = ClientConnection::new(Arc::clone(client), server_name()).expect("a client");
    let mut hello = Vec::new();
    client.write_tls(&mut hello).expect("into memory");
    hello
}

mod what_is_known {
    use super::*;

    /// Returns the first bytes of each protocol, and the expected answer.
    fn beginnings() -> [(Vec<u8>, &'static [u8]); 4] {
        let (_, client) = certified();
        [
            (hello(&client), b"tls: "),
            (PREFACE.to_vec(), b"http2: "),
            (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(), b"http1: "),
            (b"hello\n".to_vec(), b"none: "),
        ]
    }

    #[tokio::test(start_paused = true)]
    async fn each_protocol_is_found_and_every_byte_is_read_again() {
        for (bytes, name) in beginnings() {
            let served = passing();
            let client = served.client().await.0.into_inner();

            let answer = exchange(client, &bytes).await;

            assert_eq!(answer, [name, &bytes].concat());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_may_come_one_at_a_time() {
        for (bytes, name) in beginnings() {
            let served = passing();
            let mut client = served.client().await.0.into_inner();
            let (first, rest) = bytes.split_at(bytes.len().min(30));
            for byte in first {
                client.write_all(&[*byte]).await.unwrap();
                settled().await;
            }

            let answer = exchange(client, rest).await;

            assert_eq!(answer, [name, &bytes].concat());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn peeked_bytes_are_read_again_in_pieces_of_any_size() {
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(Peek::new(Protocol::detect)))
            .service_fn(|mut conn: Connection<Rewind<DuplexStream>>| async move {
                for byte in PREFACE {
                    assert_eq!(conn.read_u8().await?, *byte);
                }
                tell("the rest: ", conn).await
            });
        let served = serve(stack);
        let client = served.client().await.0.into_inner();

        let answer = exchange(client, &[PREFACE, b"and more"].concat()).await;

        assert_eq!(answer, b"the rest: and more");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_found_is_told_as_soon_as_it_is() {
        for (bytes, _) in beginnings() {
            let found = Arc::new(tokio::sync::Notify::new());
            let tell = Arc::clone(&found);
            let stack = ServiceBuilder::new()
                .layer(PreConnectLayer::new(
                    Peek::new(Protocol::detect).unknown(Unknown::Pass),
                ))
                .service_fn(move |conn: Connection<Rewind<DuplexStream>>| {
                    tell.notify_one();
                    async move {
                        conn.draining().await;
                        Ok::<_, BoxError>(())
                    }
                });
            let served = serve(stack);
            let mut client = served.client().await;

            client.send(&bytes).await;

            timeout(SEC, found.notified()).await.expect("it is found");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn peeked_bytes_are_counted_once() {
        for (bytes, _) in beginnings() {
            let served = passing();
            let client = served.client().await.0.into_inner();

            exchange(client, &bytes).await;

            assert_eq!(served.end().await.bytes_read(), bytes.len() as u64);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_detector_of_ones_own_is_asked_with_all_bytes_so_far() {
        #[derive(Debug, PartialEq)]
        struct Version(u8);
        fn detect(first: &[u8]) -> Detection<Version> {
            match first {
                [b'v', version] => Detection::Yes(Version(*version)),
                [b'v'] => Detection::NotYet,
                _ => Detection::No,
            }
        }
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(Peek::new(detect).bytes(2)))
            .service_fn(|conn: Connection<Rewind<DuplexStream>>| async move {
                assert_eq!(conn.info().get(), Some(&Version(b'7')));
                assert_eq!(conn.get_ref().buffered(), b"v7");
                tell("told: ", conn).await
            });
        let served = serve(stack);
        let mut client = served.client().await.0.into_inner();
        client.write_all(b"v").await.unwrap();
        settled().await;

        let answer = exchange(client, b"7 and more").await;

        assert_eq!(answer, b"told: v7 and more");
    }
}

mod what_is_not_known {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn is_refused_at_once() {
        let served = refusing();
        let mut client = served.client().await;
        let begun = Instant::now();

        client.send("HELLO").await;

        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::Rejected);
        assert!(end.error().unwrap().is::<UnknownProtocol>(), "{end:?}");
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn passes_at_once_if_it_may() {
        let served = passing();
        let client = served.client().await.0.into_inner();
        let begun = Instant::now();

        let answer = exchange(client, b"HELLO").await;

        assert_eq!(answer, b"none: HELLO");
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    /// Never decides.
    fn never(_: &[u8]) -> Detection<()> {
        Detection::NotYet
    }

    #[tokio::test(start_paused = true)]
    async fn is_refused_when_as_much_was_read_as_may_be() {
        let served = serve(told(Peek::new(never).bytes(64)));
        let mut client = served.client().await;
        client.send([b'x'; 63]).await;
        settled().await;
        assert!(served.ends().is_empty());

        client.send("x").await;

        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::Rejected);
        assert!(end.error().unwrap().is::<UnknownProtocol>(), "{end:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn is_not_read_beyond_what_may_be() {
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(
                Peek::new(never).bytes(100).unknown(Unknown::Pass),
            ))
            .service_fn(|conn: Connection<Rewind<DuplexStream>>| async move {
                assert_eq!(conn.get_ref().buffered().len(), 100);
                tell("none: ", conn).await
            });
        let served = serve(stack);
        let megabyte: Vec<_> = (0..=u8::MAX).cycle().take(1 << 20).collect();
        let client = served.client().await.0.into_inner();

        let answer = exchange(client, &megabyte).await;

        assert!(
            answer == [b"none: ", &*megabyte].concat(),
            "lost or doubled"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn is_known_by_one_byte_at_least() {
        let served = serve(told(
            Peek::new(|first: &[u8]| match first {
                b"x" => Detection::Yes(Protocol::Http1),
                _ => Detection::No,
            })
            .bytes(0),
        ));
        let client = served.client().await.0.into_inner();

        assert_eq!(exchange(client, b"xyz").await, b"http1: xyz");
    }
}

mod silence {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn is_refused_at_the_deadline() {
        for first in [&b""[..], &PREFACE[..12], b"GE", b"\x16\x03\x01"] {
            let served = refusing();
            let mut client = served.client().await;
            let begun = Instant::now();

            client.send(first).await;

            let end = served.end().await;
            assert_eq!(end.reason(), EndReason::PreConnectTimeout);
            assert!(end.error().unwrap().is::<PreConnectElapsed>(), "{end:?}");
            assert_eq!(begun.elapsed().as_secs(), 5);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn passes_at_the_deadline_with_what_there_is() {
        let served = passing();
        let mut client = served.client().await;
        client.send(&PREFACE[..12]).await;
        sleep(6 * SEC).await;

        let answer = exchange(client.0.into_inner(), &PREFACE[12..]).await;

        assert_eq!(answer, [b"none: ", PREFACE].concat());
    }

    #[tokio::test(start_paused = true)]
    async fn of_a_peer_that_waits_for_a_greeting_ends_with_it() {
        let greet =
            OnConnectLayer::new(
                |peer: Peer<Bytes>| async move { peer.send("220 ready".into()).await },
            );
        let echo = service_fn(|_: Peer<Bytes>| async {
            Ok::<_, Infallible>(service_fn(|line: Bytes| async {
                Ok::<_, Infallible>(line)
            }))
        });
        let peek = Peek::new(Protocol::detect)
            .deadline(SEC)
            .unknown(Unknown::Pass);
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(peek))
            .service(Pipeline::new(Lines::default).make_service(greet.layer(echo)));
        let served = serve(stack);
        let mut client = served.client().await;
        let begun = Instant::now();

        assert_eq!(client.line().await, "220 ready");

        assert_eq!(begun.elapsed().as_secs(), 1);
        assert_eq!(client.ask("hi").await, "hi");
    }

    #[tokio::test(start_paused = true)]
    async fn between_bytes_does_not_put_the_deadline_off() {
        let served = refusing();
        let mut client = served.client().await;
        let begun = Instant::now();

        for byte in &PREFACE[..5] {
            client.send([*byte]).await;
            sleep(9 * SEC / 10).await;
        }

        assert_eq!(served.reason().await, EndReason::PreConnectTimeout);
        assert_eq!(begun.elapsed().as_secs(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_deadline_meets_that_of_the_layer() {
        let peek = Peek::new(Protocol::detect)
            .deadline(None)
            .unknown(Unknown::Pass);
        let served = serve(told(peek));
        let _client = served.client().await;
        let begun = Instant::now();

        assert_eq!(served.reason().await, EndReason::PreConnectTimeout);

        assert_eq!(begun.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_pushes_the_oldest_out() {
        let peek = Peek::new(Protocol::detect);
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(peek).pending(1))
            .service_fn(|conn: Connection<Rewind<DuplexStream>>| tell("told: ", conn));
        let served = serve(stack);
        let mut first = served.client().await;
        first.send("GE").await;
        settled().await;

        let second = served.client().await.0.into_inner();

        assert_eq!(served.reason().await, EndReason::PreConnectEvicted);
        assert_eq!(exchange(second, b"GET /").await, b"told: GET /");
    }
}

mod a_peer_that_leaves {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn without_a_byte_has_closed() {
        let served = refusing();

        drop(served.client().await);

        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }

    #[tokio::test(start_paused = true)]
    async fn undecided_is_truncated() {
        let served = refusing();
        let mut client = served.client().await;
        client.send(&PREFACE[..12]).await;

        drop(client);

        assert_eq!(served.reason().await, EndReason::Truncated);
    }

    #[tokio::test(start_paused = true)]
    async fn undecided_leaves_its_bytes_and_its_end_to_the_service_if_it_may_pass() {
        for bytes in [&b""[..], b"GE", &PREFACE[..12]] {
            let served = passing();
            let client = served.client().await.0.into_inner();

            let answer = exchange(client, bytes).await;

            assert_eq!(answer, [b"none: ", bytes].concat());
            assert_eq!(served.reason().await, EndReason::PeerClosed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn by_a_reset_does_not_pass() {
        let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let io = tokio_test::io::Builder::new()
            .read(b"GE")
            .read_error(reset)
            .build();
        let hook = PreConnectLayer::new(Peek::new(Protocol::detect).unknown(Unknown::Pass));
        let stack = ServiceBuilder::new()
            .layer(hook)
            .service_fn(|conn: Connection<_>| tell("none: ", conn));

        let served = serve_stream(io, stack);

        assert_eq!(served.reason().await, EndReason::PeerReset);
    }
}

mod with_tls {
    use super::*;

    /// Looks for TLS, then for HTTP/1, or for nothing more if ALPN has agreed on a protocol.
    fn hook(
        server: Arc<tokio_rustls::rustls::ServerConfig>,
    ) -> impl Service<
        Connection<DuplexStream>,
        Response = Connection<impl AsyncRead + AsyncWrite + Unpin + Send + 'static>,
        Error = BoxError,
        Future: Send,
    > + Clone
    + Send
    + 'static {
        let peek = Peek::new(Protocol::detect).unknown(Unknown::Pass);
        let without_alpn = |tls: &TlsInfo| tls.alpn().is_none();
        peek.clone()
            .chain(Tls::from(server).when(|info| info.get() == Some(&Protocol::Tls)))
            .chain(peek.when(move |info| info.get().is_some_and(without_alpn)))
    }

    /// Returns a server, a connection to it, and a TLS client configuration.
    async fn served() -> (Served, DuplexStream, Arc<ClientConfig>) {
        let (server, client) = certified();
        let served = serve(told(hook(server)));
        let io = served.client().await.0.into_inner();
        (served, io, client)
    }

    /// Delivers one byte a turn.
    fn byte_by_byte(io: DuplexStream) -> DuplexStream {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let (mut from_client, mut to_client) = tokio::io::split(far);
        let (mut from_server, mut to_server) = tokio::io::split(io);
        tokio::spawn(async move {
            while let Ok(byte) = from_client.read_u8().await {
                to_server.write_u8(byte).await?;
                tokio::task::yield_now().await;
            }
            to_server.shutdown().await
        });
        tokio::spawn(async move {
            tokio::io::copy(&mut from_server, &mut to_client).await?;
            to_client.shutdown().await
        });
        near
    }

    async fn exchange_tls(io: DuplexStream, client: Arc<ClientConfig>, bytes: &[u8]) -> Vec<u8> {
        let connecting = TlsConnector::from(client).connect(server_name(), io);
        let mut client = connecting.await.expect("a good handshake");
        client.write_all(bytes).await.expect("the server reads");
        client.shutdown().await.expect("it is open");
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.expect("it ends well");
        all
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_spoken_inside_is_found_as_in_the_clear() {
        for (bytes, name) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "http1: "),
            (PREFACE, "http2: "),
        ] {
            let expected = [name.as_bytes(), bytes].concat();

            let (_served, io, _) = served().await;
            assert_eq!(exchange(io, bytes).await, expected);
            let (_served, io, client) = served().await;
            assert_eq!(exchange_tls(io, client, bytes).await, expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_in_single_bytes_is_one() {
        let (_served, io, client) = served().await;

        let answer = exchange_tls(byte_by_byte(io), client, b"GET / HTTP/1.1\r\n\r\n").await;

        assert_eq!(answer, b"http1: GET / HTTP/1.1\r\n\r\n");
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_is_read_inside_is_counted() {
        let (served, io, client) = served().await;

        exchange_tls(io, client, PREFACE).await;

        assert_eq!(served.end().await.bytes_read(), PREFACE.len() as u64);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_agreed_by_alpn_is_not_looked_for() {
        let (server, client) = certified();
        let mut agreed = (Arc::unwrap_or_clone(server), Arc::unwrap_or_clone(client));
        agreed.0.alpn_protocols = vec![b"h2".into()];
        agreed.1.alpn_protocols = vec![b"h2".into()];
        let served = serve(told(hook(Arc::new(agreed.0))));
        let io = served.client().await.0.into_inner();

        // Without ALPN the peek would find HTTP/1 here.
        let answer = exchange_tls(io, Arc::new(agreed.1), b"GET / HTTP/1.1\r\n\r\n").await;

        assert_eq!(answer, b"tls: GET / HTTP/1.1\r\n\r\n");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_waited_for_once() {
        let (_served, io, _) = served().await;
        let mut client = Client::new(io);
        let begun = Instant::now();
        sleep(5 * SEC + SEC / 10).await;

        client.send("hello").await;
        client.finish().await;

        assert_eq!(client.rest().await, ["none: hello"]);
        assert!(begun.elapsed() < 6 * SEC);
    }

    #[tokio::test(start_paused = true)]
    async fn what_only_begins_like_it_fails_in_the_handshake() {
        let (served, mut io, _) = served().await;

        io.write_all(b"\x16\x03\x01\x00\x05\x01nonsense")
            .await
            .unwrap();

        assert_eq!(served.reason().await, EndReason::TlsHandshakeFailed);
    }
}

mod routing {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_for_the_service_that_was_chosen_and_for_no_other() {
        let one = ServiceBuilder::new()
            .layer(ConcurrencyLimitLayer::new(1))
            .service_fn(|conn: Connection<Rewind<DuplexStream>>| tell("one: ", conn));
        let any = service_fn(|conn: Connection<Rewind<DuplexStream>>| tell("any: ", conn));
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(
                Peek::new(Protocol::detect).unknown(Unknown::Pass),
            ))
            .service_fn(move |conn: Connection<Rewind<DuplexStream>>| {
                let (one, any) = (one.clone(), any);
                async move {
                    match conn.info().get::<Protocol>() {
                        Some(Protocol::Http1) => one.oneshot(conn).await,
                        _ => any.oneshot(conn).await,
                    }
                }
            });
        let served = serve(stack);
        let mut holds = served.client().await;
        holds.send("GET 1").await;
        settled().await;
        let (mut waits, mut other) = (served.client().await, served.client().await);
        waits.send("GET 2").await;
        waits.finish().await;

        other.send("hello").await;
        other.finish().await;

        assert_eq!(other.rest().await, ["any: hello"]);
        assert!(waits.hears_nothing().await);
        holds.finish().await;
        assert_eq!(holds.rest().await, ["one: GET 1"]);
        assert_eq!(waits.rest().await, ["one: GET 2"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_peeks_in_a_task_of_its_own_does_not_delay_a_drain() {
    let hook = service_fn(|conn: Memory| async move {
        let peek = Peek::new(Protocol::detect).deadline(None);
        tokio::spawn(peek.oneshot(conn)).await?
    });
    let mut served = serve(told(hook));
    let _silent = served.client().await;
    settled().await;
    let begun = Instant::now();

    served.handle().shutdown();
    served.closed().await.expect("it ends in good order");

    assert_eq!(served.reason().await, EndReason::Drained);
    assert_eq!(begun.elapsed(), SEC);
}
