//! Endings over TCP, TLS and Unix sockets, in each way of serving. Helpers of the files below.

mod cut_off;
mod drain;
mod permits;

#[path = "../support/certificates.rs"]
mod certificates;
#[path = "../support/over.rs"]
mod over;
#[path = "../support/mod.rs"]
mod support;

use std::future::pending;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONNECTION, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tower::{Layer, Service, service_fn};
use tower_tcp::bind::SocketOptions;
use tower_tcp::deadline::{DeadlineLayer, Deadlines};
use tower_tcp::frame::Lines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::{BoxError, Connection, Pipeline, Reply, Server, ServerBuilder};

use over::{Io, Over, Transport};
use support::Ends;

/// The limit of every wait.
const NET: Duration = Duration::from_secs(60);
/// A deadline that passes during a test.
const SHORT: Duration = Duration::from_millis(300);
/// More bytes than the system takes for a peer that reads nothing, if the send buffer is small.
const LARGE: usize = 2_000_000;

fn large() -> Bytes {
    Bytes::from(vec![b'x'; LARGE])
}

/// Builds servers whose sockets hold little.
fn small() -> ServerBuilder {
    Server::builder().socket_options(SocketOptions::default().send_buffer(64 * 1024))
}

async fn lines(line: Bytes) -> Result<Reply<Bytes>, BoxError> {
    Ok(match &line[..] {
        b"large" => large().into(),
        // Over a Unix socket, the system takes less at once.
        b"last" => Reply::from(large().split_to(1_000_000)).close(),
        b"last over unix" => Reply::from(large().split_to(150_000)).close(),
        b"hang" => pending().await,
        _ => line.into(),
    })
}

async fn web(mut request: Request<RequestBody>) -> Result<Response<Full<Bytes>>, BoxError> {
    if let Some(protocol) = request.headers().get(UPGRADE).cloned() {
        let response = Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, &protocol);
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let stream = TokioIo::new(upgrade.await?);
            bare(stream, protocol.as_bytes()).await
        });
        return Ok(response.body(Full::default())?);
    }
    let body = match request.uri().path() {
        "/large" => large(),
        "/hang" => pending().await,
        "/read" => request.into_body().collect().await?.to_bytes(),
        _ => Bytes::from("ok"),
    };
    Ok(Response::new(Full::new(body)))
}

/// Serves the stream itself.
async fn bare<S>(mut stream: S, what: &[u8]) -> Result<(), BoxError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match what {
        b"large" => Ok(stream.write_all(&large()).await?),
        b"hang" => pending().await,
        what => Ok(stream.write_all(what).await?),
    }
}

/// Serves the stream itself, from its first line on.
#[derive(Clone)]
struct Raw;

impl<S> Service<Connection<S>> for Raw
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Response = ();
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<(), BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut conn: Connection<S>) -> Self::Future {
        Box::pin(async move {
            let mut what = Vec::new();
            loop {
                match conn.read_u8().await? {
                    b'\n' => return bare(conn, &what).await,
                    byte => what.push(byte),
                }
            }
        })
    }
}

/// The protocol of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaks {
    Lines,
    Http1,
    Http2,
    /// HTTP/1 up to an upgrade.
    Upgraded,
    Raw,
}

impl Speaks {
    /// Returns the request for `what`.
    fn request(self, what: &str) -> Vec<u8> {
        let upgrade = format!("connection: upgrade\r\nupgrade: {what}\r\n");
        match self {
            Self::Lines | Self::Raw => format!("{what}\n").into(),
            Self::Http1 => format!("GET /{what} HTTP/1.1\r\nhost: a\r\n\r\n").into(),
            Self::Upgraded => format!("GET / HTTP/1.1\r\nhost: a\r\n{upgrade}\r\n").into(),
            Self::Http2 => http2(what),
        }
    }
}

/// Returns the beginning of HTTP/2 with windows that hold any response.
fn http2_begins() -> Vec<u8> {
    let settings = b"\0\0\x06\x04\0\0\0\0\0\0\x04\x02\0\0\0";
    let window_update = b"\0\0\x04\x08\0\0\0\0\0\x02\0\0\0";
    [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        settings,
        window_update,
    ]
    .concat()
}

/// Returns the beginning of HTTP/2 with a request.
fn http2(path: &str) -> Vec<u8> {
    let length = u8::try_from(1 + path.len()).expect("it is short");
    let head = [
        b"\x82\x86\x41\x01a\x44",
        &[length, b'/'][..],
        path.as_bytes(),
    ]
    .concat();
    let size = u8::try_from(head.len()).expect("it is short");
    let frame = [&[0, 0, size][..], b"\x01\x05\0\0\0\x01", &head].concat();
    [http2_begins(), frame].concat()
}

/// A server with its protocol.
struct Way {
    over: Over,
    speaks: Speaks,
}

impl Way {
    /// Starts a server for each way of serving over this transport.
    async fn each(
        transport: Transport,
        builder: impl Fn() -> ServerBuilder,
        deadlines: Deadlines,
    ) -> Vec<Self> {
        let mut ways = Self::of_lines(transport, &builder, deadlines).await;
        let http = Http::new(service_fn(web)).deadlines(deadlines);
        for speaks in [Speaks::Http1, Speaks::Http2, Speaks::Upgraded] {
            let name = format!("{speaks:?}");
            let over = Over::serve(transport, &name, builder(), http.clone()).await;
            ways.push(Self { over, speaks });
        }
        let raw = DeadlineLayer::new(deadlines).layer(Raw);
        let over = Over::serve(transport, "raw", builder(), raw).await;
        let speaks = Speaks::Raw;
        ways.push(Self { over, speaks });
        ways
    }

    /// Starts a server for each way of dispatch over this transport.
    async fn of_lines(
        transport: Transport,
        builder: impl Fn() -> ServerBuilder,
        deadlines: Deadlines,
    ) -> Vec<Self> {
        let pipeline = Pipeline::new(Lines::default)
            .service(service_fn(lines))
            .deadlines(deadlines);
        let ways = Over::each_way(transport, builder, pipeline).await;
        let speaks = Speaks::Lines;
        ways.map(|over| Self { over, speaks }).into()
    }

    /// Connects, and sends a request.
    async fn ask(&self, what: &str) -> Box<dyn Io> {
        self.over.send(&self.speaks.request(what)).await
    }

    fn name(&self) -> &str {
        self.over.served.way()
    }
}
