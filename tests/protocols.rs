//! Several protocols in one program, told apart by listener or by ALPN. Each connection reaches its
//! own service, through its own hooks. `tests/peek.rs` covers the choice by first bytes. These are
//! the patterns of `PROTOCOLS.md`.

#[path = "support/certificates.rs"]
mod certificates;
mod support;

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use certificates::certified;
use support::{Client, Clients, Ends};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{AlertDescription, ClientConfig, Error as TlsError};
use tower::limit::ConcurrencyLimitLayer;
use tower::steer::Steer;
use tower::util::BoxCloneService;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::PipelineFuture;
use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
use tower_tcp::testkit::{Served, memory, serve};
use tower_tcp::tls::{Tls, TlsInfo};
use tower_tcp::{Address, BoxError, Connection, EndReason, Pipeline, Server};

/// The limit of every wait that needs the kernel.
const NET: Duration = Duration::from_secs(20);

/// Answers each line with a word.
fn says<Io>(
    word: &'static str,
) -> impl Service<Connection<Io>, Response = EndReason, Error = BoxError, Future = PipelineFuture>
+ Clone
+ Send
+ 'static
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let say = move |_: Bytes| ready(Ok::<_, Infallible>(Bytes::from_static(word.as_bytes())));
    Pipeline::new(Lines::default).service(service_fn(say))
}

/// Performs the TLS handshake on a connection.
async fn encrypt<Io>(client: &Arc<ClientConfig>, io: Io) -> std::io::Result<TlsStream<Io>>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from("localhost").expect("a name");
    TlsConnector::from(Arc::clone(client))
        .connect(name, io)
        .await
}

mod by_alpn {
    use super::*;

    type TlsConnection = Connection<tower_tcp::tls::TlsStream<DuplexStream>>;

    struct Running {
        served: Served,
        client: ClientConfig,
    }

    /// Starts a server that speaks HTTP/2, HTTP/1.1 and, as a fallback, a protocol of its own.
    fn start() -> Running {
        let (server, client) = certified();
        let (mut server, client) = (Arc::unwrap_or_clone(server), Arc::unwrap_or_clone(client));
        server.alpn_protocols = ["h2", "http/1.1", "mine/1"].map(Vec::from).into();
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(Tls::from(Arc::new(server))))
            .service_fn(
                |conn: TlsConnection| match conn.info().get().and_then(TlsInfo::alpn) {
                    Some(b"h2") => says("h2").oneshot(conn),
                    Some(b"http/1.1") => says("http/1.1").oneshot(conn),
                    Some(b"mine/1") => says("mine/1").oneshot(conn),
                    _ => says("none").oneshot(conn),
                },
            );
        Running {
            served: serve(stack),
            client,
        }
    }

    impl Running {
        async fn connect(&self, offers: &[&str]) -> std::io::Result<TlsStream<DuplexStream>> {
            let mut client = self.client.clone();
            client.alpn_protocols = offers.iter().map(|id| Vec::from(*id)).collect();
            let io = self.served.client().await.0.into_inner();
            encrypt(&Arc::new(client), io).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_agreed_chooses_the_service() {
        let server = start();
        for (offers, agreed) in [
            (&["h2", "http/1.1"][..], "h2"),
            (&["http/1.1"], "http/1.1"),
            (&["mine/1"], "mine/1"),
            (&["foreign", "mine/1"], "mine/1"),
            (&[], "none"),
        ] {
            let io = server.connect(offers).await.unwrap();

            assert_eq!(Client::new(io).ask("who").await, agreed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_offered_reaches_no_service() {
        let server = start();

        let refused = server.connect(&["foreign"]).await.unwrap_err();

        let alert = find_cause::<TlsError>(&refused);
        let no_protocol = TlsError::AlertReceived(AlertDescription::NoApplicationProtocol);
        assert_eq!(alert, Some(&no_protocol));
        let end = server.served.end().await;
        assert_eq!(end.reason(), EndReason::TlsHandshakeFailed);
    }
}

mod by_listener {
    use super::*;

    #[tokio::test]
    async fn a_listener_has_hooks_and_a_service_of_its_own() {
        let (server_config, client) = certified();
        let server = Server::builder()
            .listen_all(["127.0.0.1:0", "127.0.0.1:0"])
            .bind()
            .await
            .unwrap();
        let [plain, encrypted] = server
            .handle()
            .local_addrs()
            .iter()
            .map(|address| address.tcp().unwrap())
            .collect::<Vec<_>>()
            .try_into()
            .unwrap();
        let is_encrypted = move |address: &Address| {
            // With a wildcard address, only the port could be compared.
            address.tcp().map(|addr| addr.port()) == Some(encrypted.port())
        };
        let tls = Tls::from(server_config).when(move |info| is_encrypted(info.local_addr()));
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(tls))
            .service_fn(move |conn: Connection<_>| {
                if is_encrypted(conn.info().local_addr()) {
                    says("encrypted").oneshot(conn)
                } else {
                    says("plain").oneshot(conn)
                }
            });
        tokio::spawn(server.serve(stack));

        let asked = async {
            let io = TcpStream::connect(plain).await.unwrap();
            assert_eq!(Client::new(io).ask("who").await, "plain");
            let io = TcpStream::connect(encrypted).await.unwrap();
            let io = encrypt(&client, io).await.unwrap();
            assert_eq!(Client::new(io).ask("who").await, "encrypted");
        };
        timeout(NET, asked).await.expect("answers");
    }

    #[tokio::test(start_paused = true)]
    async fn servers_side_by_side_share_a_limit_and_end_by_one_signal() {
        let limit = ConnectionLimit::new(2);
        let start = |word| {
            let (listener, connector) = memory();
            let server = Server::builder().limit(limit.clone()).build(listener);
            (server.handle(), connector, server.serve(says(word)))
        };
        let (web, to_web, web_serves) = start("web");
        let (desk, to_desk, desk_serves) = start("desk");
        let both = tokio::spawn(async { tokio::try_join!(web_serves, desk_serves) });
        let mut first = Client::new(to_web.connect().await.unwrap());
        let mut second = Client::new(to_desk.connect().await.unwrap());
        assert_eq!(first.ask("who").await, "web");
        assert_eq!(second.ask("who").await, "desk");
        let mut third = Client::new(to_desk.connect().await.unwrap());
        third.send("who\n").await;
        assert!(third.hears_nothing().await);
        drop(first);
        assert_eq!(third.line().await, "desk");

        // Two calls of `signal::install` do the same.
        web.shutdown();
        desk.shutdown();

        let (web, desk) = both.await.unwrap().unwrap();
        assert_eq!((web.drained, desk.drained), (0, 2));
    }
}

mod the_choice {
    use super::*;

    /// `PROTOCOLS.md` uses `oneshot` for branches that are not always ready, because `Steer` waits
    /// for all of its branches.
    #[tokio::test(start_paused = true)]
    async fn of_stock_steer_waits_for_branches_that_are_not_chosen() {
        type Branch = BoxCloneService<Connection<DuplexStream>, EndReason, BoxError>;
        let one = ServiceBuilder::new()
            .layer(ConcurrencyLimitLayer::new(1))
            .service(says("one"));
        let stack = Steer::new(
            [Branch::new(one), Branch::new(says("any"))],
            |conn: &Connection<DuplexStream>, _: &[Branch]| match conn.info().peer_addr() {
                Address::Memory(1) => 0,
                _ => 1,
            },
        );
        let behind_a_hook = ServiceBuilder::new()
            .layer(PreConnectLayer::new(service_fn(
                |conn: Connection<DuplexStream>| ready(Ok::<_, Infallible>(conn)),
            )))
            .service(stack);
        let served = serve(behind_a_hook);
        let mut first = served.client().await;
        assert_eq!(first.ask("who").await, "one");

        let mut second = served.client().await;
        second.send("who\n").await;

        assert!(second.hears_nothing().await, "it needs no place in `one`");
        drop(first);
        assert_eq!(second.line().await, "any");
    }
}
