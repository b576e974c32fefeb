//! TLS in front of a whole server in memory: whatever happens to a handshake, its permit is
//! released.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection};
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::frame::Lines;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{self, Served, serve_with};
use tower_tcp::tls::Tls;
use tower_tcp::{EndReason, Peer, Pipeline, Server};

use certificates::certified;
use support::{Clients, Ends};

#[path = "support/certificates.rs"]
mod certificates;
mod support;

struct Running {
    served: Served,
    limit: ConnectionLimit,
    client: Arc<ClientConfig>,
}

/// Starts an echo server behind TLS, with a connection limit of one.
fn start() -> Running {
    let (server, client) = certified();
    let (listener, connector) = testkit::memory();
    let limit = ConnectionLimit::new(1);
    let echo = service_fn(|_peer: Peer<Bytes>| async {
        Ok::<_, Infallible>(service_fn(|line: Bytes| async {
            Ok::<_, Infallible>(line)
        }))
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(Tls::from(server)))
        .service(Pipeline::new(Lines::default).make_service(echo));
    let server = Server::builder().limit(limit.clone()).build(listener);
    Running {
        served: serve_with(server, connector, stack),
        limit,
        client,
    }
}

impl Running {
    async fn connect(&self) -> TlsStream<DuplexStream> {
        let io = self.served.stream().await;
        let name = ServerName::try_from("localhost").expect("a name");
        let connector = TlsConnector::from(Arc::clone(&self.client));
        connector.connect(name, io).await.expect("a good handshake")
    }

    /// Returns the first bytes of a client.
    fn hello(&self) -> Vec<u8> {
        let name = ServerName::try_from("localhost").expect("a name");
        let mut client = ClientConnection::new(Arc::clone(&self.client), name).expect("a client");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("into memory");
        hello
    }
}

/// Has the server send a line back.
async fn is_served(client: &mut TlsStream<DuplexStream>) {
    client.write_all(b"still here\n").await.expect("it is open");
    let mut answer = [0; 11];
    client.read_exact(&mut answer).await.expect("it is served");
    assert_eq!(&answer, b"still here\n");
}

#[tokio::test(start_paused = true)]
async fn b18_a_client_that_leaves_in_the_handshake_is_one_failure_and_gives_its_place_back() {
    let server = start();
    let hello = server.hello();

    for cut in 0..1_000 {
        let mut client = server.served.stream().await;
        // From nothing to the whole hello. Some clients also read the server's answer and send
        // nothing more.
        client
            .write_all(&hello[..cut % (hello.len() + 1)])
            .await
            .unwrap();
        if cut % 2 == 0 {
            client.shutdown().await.unwrap();
            client.read_to_end(&mut Vec::new()).await.unwrap();
        }
        drop(client);
        assert_eq!(server.served.reason().await, EndReason::TlsHandshakeFailed);
    }

    let mut good = server.connect().await;
    is_served(&mut good).await;
    drop(good);
    server.served.end().await;
    tokio::task::yield_now().await;
    assert_eq!(
        (server.served.handle().live(), server.limit.in_use()),
        (0, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn b21_a_flood_of_complete_handshakes_leaves_others_their_turns() {
    let mut server = start();
    Arc::make_mut(&mut server.client).resumption = Resumption::disabled();
    server.limit.set(64);
    let mut good = server.connect().await;
    let (flooders, handshakes) = (8, Arc::new(AtomicUsize::new(0)));
    let server = Arc::new(server);

    // These tasks run on the same thread as those of the server, and take turns with them.
    let flood: JoinSet<_> = (0..flooders)
        .map(|_| {
            let (server, handshakes) = (Arc::clone(&server), Arc::clone(&handshakes));
            async move {
                for _ in 0..16 {
                    drop(server.connect().await);
                    handshakes.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
        .collect();
    let others = tokio::spawn(async move {
        let mut most = 0;
        loop {
            let before = handshakes.load(Ordering::Relaxed);
            if before == 16 * flooders {
                return most;
            }
            good.write_all(b"hello\n").await.unwrap();
            good.read_exact(&mut [0; 6]).await.unwrap();
            most = most.max(handshakes.load(Ordering::Relaxed) - before);
        }
    });
    flood.join_all().await;
    let most = others.await.unwrap();

    // In the round trip of a request, each flooder can complete one handshake, and another that was
    // about to end.
    assert!(most <= 2 * flooders, "{most} handshakes before one reply");
}

/// Returns a TLS record with a part of a handshake.
fn record(handshake: &[u8]) -> Vec<u8> {
    let length = u16::try_from(handshake.len()).expect("a short one");
    [&b"\x16\x03\x01"[..], &length.to_be_bytes(), handshake].concat()
}

#[tokio::test(start_paused = true)]
async fn b22_an_empty_or_huge_first_message_is_refused_and_nothing_panics() {
    let server = start();
    let part = [b'x'; 1 << 14];
    // Handshake message 1 is the ClientHello. Its length has three bytes.
    for (what, begin, rest) in [
        ("an empty record", record(b""), vec![]),
        ("an empty hello", record(b"\x01\x00\x00\x00"), vec![]),
        (
            "a huge record",
            b"\x16\x03\x01\xff\xff".to_vec(),
            part.to_vec(),
        ),
        ("a huge hello", record(b"\x01\xff\xff\xff"), record(&part)),
        (
            "empty records",
            record(b"\x01\x00\x01\x00"),
            record(b"").repeat(1000),
        ),
    ] {
        let mut client = server.served.stream().await;

        client.write_all(&begin).await.expect("it is open");
        let mut sent = 0;
        while !rest.is_empty() && sent < 1 << 24 && client.write_all(&rest).await.is_ok() {
            sent += rest.len();
        }

        let reason = server.served.reason().await;
        assert_eq!(reason, EndReason::TlsHandshakeFailed, "{what}");
        assert!(sent < 1 << 20, "{what}: {sent} bytes were taken");
    }

    let mut good = server.connect().await;
    is_served(&mut good).await;
}

#[tokio::test(start_paused = true)]
async fn b22_a_hello_of_several_records_is_served() {
    for (names, bytes) in [(50, 10_000), (100, 20_000), (250, 50_000)] {
        let mut server = start();
        // The server has no ALPN, so it ignores these names.
        let alpn = (0..names).map(|n| vec![n; 200]).collect();
        Arc::make_mut(&mut server.client).alpn_protocols = alpn;
        assert!(server.hello().len() > bytes);

        let mut good = server.connect().await;

        is_served(&mut good).await;
    }
}

#[tokio::test(start_paused = true)]
async fn b24_a_flood_of_key_updates_ends_its_connection_alone() {
    let server = start();
    for _ in 0..3 {
        let mut client = server.connect().await;
        client.write_all(b"hello\n").await.unwrap();
        client.read_exact(&mut [0; 6]).await.unwrap();

        // The server may have closed already.
        for _ in 0..1_000 {
            drop(client.get_mut().1.refresh_traffic_keys());
            drop(client.flush().await);
        }
        let replied = client.read_to_end(&mut Vec::new()).await;

        assert!(replied.is_err(), "{replied:?}");
        drop(client);
        let end = server.served.end().await;
        assert_eq!(end.reason(), EndReason::IoError, "{end:?}");
        assert!(server.served.reasons().is_empty());
    }

    let mut good = server.connect().await;
    // A few key updates are in order.
    for _ in 0..10 {
        good.get_mut().1.refresh_traffic_keys().unwrap();
        is_served(&mut good).await;
    }
}

#[tokio::test(start_paused = true)]
async fn h2_half_a_handshake_holds_a_drain_for_a_second() {
    let server = start();
    let hello = server.hello();
    let mut silent = server.served.stream().await;
    silent.write_all(&hello[..hello.len() / 2]).await.unwrap();
    tokio::task::yield_now().await;

    server.served.handle().shutdown();
    let begun = tokio::time::Instant::now();

    assert_eq!(server.served.reason().await, EndReason::Drained);
    assert_eq!(begun.elapsed().as_secs(), 1);
    assert_eq!(server.served.handle().closed().await.aborted, 0);
}
