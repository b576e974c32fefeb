//! Deadlines of connections over the kernel's sockets and over TLS.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::header::{CONNECTION, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::{Layer, Service, service_fn};
use tower_tcp::bind::Socket;
use tower_tcp::deadline::Deadlines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve_with};
use tower_tcp::tls::{Tls, TlsStream};
use tower_tcp::{BoxError, Connection, ConnectionInfo, EndReason, Server};

use crate::GET;
use crate::certificates::certified;
use crate::support::{Client, Ends};

const NET: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);

/// Sends `request` over TCP and over TLS, and reads until the connection closes. Returns the bytes
/// and the end reason of each.
async fn over_sockets<P, S>(plain: P, secured: S, request: &str) -> [(String, EndReason); 2]
where
    P: Service<Connection<Socket>, Error = BoxError> + Send + 'static,
    P::Response: 'static,
    P::Future: Send + 'static,
    S: Service<Connection<TlsStream<Socket>>, Error = BoxError> + Clone + Send + 'static,
    S::Response: 'static,
    S::Future: Send + 'static,
{
    let (server, config) = certified();
    let secured = PreConnectLayer::new(Tls::from(server)).layer(secured);
    let (served, io) = listening(plain).await;
    let first = talk(io, served, request).await;
    let (served, io) = listening(secured).await;
    let name = ServerName::try_from("localhost").expect("a name");
    let io = TlsConnector::from(config).connect(name, io).await;
    [
        first,
        talk(io.expect("the handshake is made"), served, request).await,
    ]
}

async fn listening<S>(stack: S) -> (Served<()>, TcpStream)
where
    S: Service<Connection<Socket>, Error = BoxError> + Send + 'static,
    S::Response: 'static,
    S::Future: Send + 'static,
{
    let server = Server::bind("127.0.0.1:0").await.expect("it is bound");
    let address = server.handle().local_addrs()[0].tcp().expect("it is TCP");
    let served = serve_with(server, (), stack);
    (
        served,
        TcpStream::connect(address).await.expect("it listens"),
    )
}

async fn talk<Io>(io: Io, served: Served<()>, request: &str) -> (String, EndReason)
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let talked = timeout(NET, async {
        let mut client = Client::new(io);
        client.send(request).await;
        let mut all = String::new();
        client
            .0
            .read_to_string(&mut all)
            .await
            .expect("it closes in good order");
        drop(client);
        (all, served.reason().await)
    });
    talked.await.expect("in time")
}

async fn echo(mut request: Request<RequestBody>) -> Result<Response<Empty<Bytes>>, Infallible> {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let stream = TokioIo::new(upgrade.await.expect("it is agreed"));
        let (mut read, mut write) = tokio::io::split(stream);
        tokio::io::copy(&mut read, &mut write).await
    });
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, "echo");
    Ok(response.body(Empty::new()).expect("a response"))
}

#[tokio::test]
async fn a_connection_whose_service_is_not_made_is_closed_in_good_order_over_tcp_and_tls() {
    type Made = tower::util::BoxCloneService<Request<RequestBody>, Response<String>, Infallible>;
    let make = service_fn(|_: ConnectionInfo| async { Err::<Made, _>("no") });
    let http = Http::make_service(make);

    for (all, reason) in over_sockets(http.clone(), http, GET).await {
        assert!(all.is_empty(), "{all}");
        assert_eq!(reason, EndReason::MakeServiceError);
    }
}

#[tokio::test]
async fn an_upgraded_stream_that_rests_is_closed_over_tcp_and_tls() {
    let deadlines = Deadlines::default().upgraded_idle(SHORT);
    let http = Http::new(service_fn(echo)).deadlines(deadlines);
    let request = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nhi";

    for (all, reason) in over_sockets(http.clone(), http, request).await {
        assert!(
            all.starts_with("HTTP/1.1 101") && all.ends_with("hi"),
            "{all}"
        );
        assert_eq!(reason, EndReason::IdleTimeout);
    }
}

async fn read(request: Request<RequestBody>) -> Result<Response<String>, Infallible> {
    let read = request.into_body().collect().await;
    Ok(Response::new(match read {
        Ok(_) => "whole".to_owned(),
        Err(err) => err.to_string(),
    }))
}

#[tokio::test]
async fn a_body_that_stalls_is_answered_and_closed_over_tcp_and_tls() {
    let http = Http::new(service_fn(read)).deadlines(Deadlines::default().body(SHORT));
    let request = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nst";

    for (all, reason) in over_sockets(http.clone(), http, request).await {
        assert!(all.ends_with("arrived within 200ms"), "{all}");
        assert_eq!(reason, EndReason::BodyTimeout);
    }
}
