//! Slow peers: one that takes anything within its deadline is served to the last byte, and one that
//! takes nothing is ended on time.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/http2.rs"]
mod http2;
mod support;

use std::future::ready;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt, join_all};
use futures_util::stream;
use http_body_util::Full;
use hyper::{Request, Response};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::{Layer, Service, service_fn};
use tower_tcp::bind::{Socket, SocketOptions};
use tower_tcp::deadline::{DeadlineLayer, Deadlines};
use tower_tcp::frame::Lines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve_with};
use tower_tcp::tls::{Tls, TlsStream};
use tower_tcp::{BoxError, Connection, ConnectionPhase, EndReason, Peer, Pipeline, Reply, Server};

use certificates::certified;
use http2::{frame, http2_with};
use support::{Client, Ends};

/// The limit of every wait on the real clock.
const NET: Duration = Duration::from_secs(120);
const SECOND: Duration = Duration::from_secs(1);
const LARGE: usize = 12_000_000;

/// A stream of which little is read at a time, with a pause before the next read, until some time
/// has passed.
struct Slow<Io> {
    io: Io,
    bytes: usize,
    pause: Duration,
    until: Instant,
    next: Pin<Box<Sleep>>,
}

impl<Io> Slow<Io> {
    fn new(io: Io, bytes: usize, pause: Duration, slow_for: Duration) -> Self {
        Self {
            io,
            bytes,
            pause,
            until: Instant::now() + slow_for,
            next: Box::pin(sleep(Duration::ZERO)),
        }
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Slow<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if Instant::now() > self.until {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        ready!(self.next.as_mut().poll(cx));
        let mut some = vec![0; self.bytes.min(buf.remaining())];
        let mut some = ReadBuf::new(&mut some);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut some))?;
        buf.put_slice(some.filled());
        let next = Instant::now() + self.pause;
        self.next.as_mut().reset(next);
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Slow<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

async fn listening<S>(stack: S) -> Served<()>
where
    S: Service<Connection<Socket>, Error = BoxError> + Send + 'static,
    S::Response: 'static,
    S::Future: Send + 'static,
{
    serve_with(Server::bind("127.0.0.1:0").await.unwrap(), (), stack)
}

async fn connect(served: &Served<()>) -> TcpStream {
    let address = served.handle().local_addrs()[0].tcp().expect("it is TCP");
    TcpStream::connect(address).await.expect("it listens")
}

/// Puts TLS around a stack, and around a client's stream.
fn secured<S>(stack: S) -> (impl Layered, TlsConnector)
where
    S: Service<Connection<TlsStream<Socket>>, Error = BoxError> + Clone + Send + 'static,
    S::Response: 'static,
    S::Future: Send + 'static,
{
    let (server, client) = certified();
    let stack = PreConnectLayer::new(Tls::from(server)).layer(stack);
    (stack, TlsConnector::from(client))
}

trait Layered:
    Service<Connection<Socket>, Error = BoxError, Response: 'static, Future: Send + 'static>
    + Send
    + 'static
{
}

impl<S> Layered for S where
    S: Service<Connection<Socket>, Error = BoxError, Response: 'static, Future: Send + 'static>
        + Send
        + 'static
{
}

async fn handshake<Io: AsyncRead + AsyncWrite + Unpin>(
    tls: TlsConnector,
    io: Io,
) -> tokio_rustls::client::TlsStream<Io> {
    let name = ServerName::try_from("localhost").expect("a name");
    tls.connect(name, io).await.expect("the handshake is made")
}

fn line() -> Bytes {
    Bytes::from(vec![b'x'; LARGE - 1])
}

fn in_one_piece(_: Bytes) -> impl Future<Output = Result<Bytes, BoxError>> + Send {
    ready(Ok(line()))
}

fn in_many_pieces(_: Bytes) -> impl Future<Output = Result<Reply<Bytes>, BoxError>> + Send {
    let pieces = (0..LARGE / 1_000).map(|_| Ok(Bytes::from_static(&[b'x'; 999])));
    ready(Ok(Reply::stream(stream::iter(pieces))))
}

async fn web(_: Request<RequestBody>) -> Result<Response<Full<Bytes>>, BoxError> {
    Ok(Response::new(Full::new(line())))
}

/// A service of the stream itself.
async fn raw<Io: AsyncRead + AsyncWrite + Unpin>(mut conn: Connection<Io>) -> Result<(), BoxError> {
    conn.write_all(&line()).await?;
    conn.write_all(b"\n").await?;
    Ok(conn.close(Default::default()).await?)
}

const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

/// Sends a request and reads to the end. Returns the number of bytes.
async fn ask<Io: AsyncRead + AsyncWrite + Unpin>(mut io: Io, request: &str) -> usize {
    io.write_all(request.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    // At an error, the bytes that came before it count.
    let _cut_off = io.read_to_end(&mut all).await;
    all.len()
}

/// Sends a request over HTTP/2 with windows that hold the whole response. Returns the number of
/// bytes of the body.
async fn ask_http2<Io>(io: Io) -> usize
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (requests, conn) = http2_with(io, |builder| {
        builder
            .initial_window_size(1 << 25)
            .initial_connection_window_size(1 << 25);
    })
    .await;
    let request = Request::get("http://a/").body(());
    let response = requests.send_request(request.unwrap()).await.unwrap();
    let mut body = response.into_body();
    let mut all = 0;
    while let Some(Ok(frame)) = frame(&mut body).await {
        all += frame.len();
    }
    drop((requests, body));
    let _ended = conn.await;
    all
}

fn slow<Io>(io: Io) -> Slow<Io> {
    Slow::new(io, 20_000, SECOND / 20, 8 * SECOND)
}

/// Serves a peer that takes 400 kB a second from a socket that holds megabytes.
async fn steady<S>(way: &'static str, stack: S, request: &str) -> (&'static str, usize, EndReason)
where
    S: Layered,
{
    let served = listening(stack).await;
    let all = ask(slow(connect(&served).await), request).await;
    (way, all, served.reason().await)
}

type Case = BoxFuture<'static, (&'static str, usize, EndReason)>;

#[tokio::test]
async fn a_peer_that_takes_a_little_within_each_deadline_receives_everything() {
    let deadlines = Deadlines::default().write(SECOND * 3 / 2);
    let one = Pipeline::new(Lines::default)
        .service(service_fn(in_one_piece))
        .deadlines(deadlines);
    let many = Pipeline::new(Lines::default)
        .service(service_fn(in_many_pieces))
        .deadlines(deadlines);
    let http = Http::new(service_fn(web)).deadlines(deadlines);
    let raw_stack = DeadlineLayer::new(deadlines).layer(service_fn(raw::<Socket>));
    let close = "a\n";
    let make = service_fn(|peer: Peer<Bytes>| {
        tokio::spawn(async move {
            for _ in 0..LARGE / 1_000 {
                peer.send(Bytes::from_static(&[b'x'; 999])).await.unwrap();
            }
            peer.close();
        });
        ready(Ok::<_, BoxError>(service_fn(|_: Bytes| {
            ready(Ok::<_, BoxError>(Reply::none()))
        })))
    });
    let pushed = Pipeline::new(Lines::default)
        .make_service(make)
        .deadlines(deadlines);
    let cases: Vec<Case> = vec![
        until_whole("one frame", one.clone()).boxed(),
        until_whole("many frames", many.clone()).boxed(),
        until_whole("in flight", one.clone().in_flight(8)).boxed(),
        until_whole("multiplexed", one.clone().multiplexed(8)).boxed(),
        steady("pushed", pushed, close).boxed(),
        steady("raw", raw_stack, close).boxed(),
        steady("HTTP/1", http.clone(), GET).boxed(),
        http2_case(http.clone()).boxed(),
        tls_case("TLS", one.clone(), close).boxed(),
        tls_case("HTTP/1 over TLS", http, GET).boxed(),
        unix_case(one).boxed(),
    ];

    let all = timeout(NET, join_all(cases)).await.expect("in time");

    for (way, bytes, reason) in all {
        assert!(bytes >= LARGE - 1, "{way}: {bytes} {reason}");
        assert!(reason.is_orderly(), "{way}: {reason}");
    }
}

async fn until_whole<S: Layered>(way: &'static str, stack: S) -> (&'static str, usize, EndReason) {
    let served = listening(stack).await;
    let mut client = slow(connect(&served).await);
    client.write_all(b"a\n").await.unwrap();
    let mut all = vec![0; LARGE];
    let whole = client.read_exact(&mut all).await.is_ok();
    drop(client);
    (way, if whole { LARGE } else { 0 }, served.reason().await)
}

async fn http2_case<S: Layered>(stack: S) -> (&'static str, usize, EndReason) {
    let served = listening(stack).await;
    let all = ask_http2(slow(connect(&served).await)).await;
    ("HTTP/2", all, served.reason().await)
}

async fn tls_case<S>(way: &'static str, stack: S, request: &str) -> (&'static str, usize, EndReason)
where
    S: Service<Connection<TlsStream<Socket>>, Error = BoxError> + Clone + Send + 'static,
    S::Response: 'static,
    S::Future: Send + 'static,
{
    let (stack, tls) = secured(stack);
    let served = listening(stack).await;
    let mut client = handshake(tls, slow(connect(&served).await)).await;
    client.write_all(request.as_bytes()).await.unwrap();
    let mut all = vec![0; LARGE];
    let whole = client.read_exact(&mut all).await.is_ok();
    let _closed = client.shutdown().await;
    drop(client);
    (way, if whole { LARGE } else { 0 }, served.reason().await)
}

async fn unix_case<S: Layered>(stack: S) -> (&'static str, usize, EndReason) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("slow");
    let server = Server::bind(format!("unix:{}", path.display())).await;
    let served = serve_with(server.unwrap(), (), stack);
    let io = UnixStream::connect(&path).await.unwrap();
    // A Unix socket holds little, so this peer is slower.
    let mut client = Slow::new(io, 5_000, SECOND / 10, 8 * SECOND);
    client.write_all(b"a\n").await.unwrap();
    let mut all = vec![0; LARGE];
    let whole = client.read_exact(&mut all).await.is_ok();
    drop(client);
    let bytes = if whole { LARGE } else { 0 };
    ("Unix", bytes, served.reason().await)
}

/// Asks, takes nothing, and measures how long the connection lasts.
async fn silent<S: Layered>(way: &'static str, stack: S, request: &str) -> Case2 {
    let served = listening(stack).await;
    let mut client = connect(&served).await;
    client.write_all(request.as_bytes()).await.unwrap();
    let begun = Instant::now();
    let reason = served.reason().await;
    let lasted = begun.elapsed();
    drop(client);
    (way, reason, lasted)
}

type Case2 = (&'static str, EndReason, Duration);

#[tokio::test]
async fn a_peer_that_takes_nothing_is_ended_on_time() {
    let deadlines = Deadlines::default().write(SECOND);
    let one = Pipeline::new(Lines::default)
        .service(service_fn(in_one_piece))
        .deadlines(deadlines);
    let http = Http::new(service_fn(web)).deadlines(deadlines);
    let raw = DeadlineLayer::new(deadlines).layer(service_fn(raw::<Socket>));
    let cases = vec![
        silent("one", one.clone(), "a\n").boxed(),
        silent("in flight", one.clone().in_flight(8), "a\n").boxed(),
        silent("HTTP/1", http, GET).boxed(),
        silent("raw", raw, "").boxed(),
    ];

    for (way, reason, lasted) in timeout(NET, join_all(cases)).await.expect("in time") {
        assert_eq!(reason, EndReason::WriteTimeout, "{way}");
        assert!(
            lasted >= SECOND && lasted < SECOND * 3 / 2,
            "{way}: {lasted:?}"
        );
    }
}

const TAIL: usize = 3_000_000;

/// Reads 500 kB a second and sends a few bytes all the while, as long as it can. Returns how much
/// arrived.
async fn chatty<Io>(io: Io, request: &str) -> usize
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (read, mut write) = tokio::io::split(io);
    let mut read = Slow::new(read, 25_000, SECOND / 20, NET);
    write.write_all(request.as_bytes()).await.unwrap();
    let sending = tokio::spawn(async move {
        while write.write_all(b"more\n").await.is_ok() {
            sleep(SECOND / 10).await;
        }
    });
    let mut all = Vec::new();
    let _cut_off = read.read_to_end(&mut all).await;
    sending.abort();
    all.len()
}

#[tokio::test]
async fn the_last_answer_reaches_a_slow_reader_that_goes_on_sending() {
    let quit = || {
        Pipeline::new(Lines::default).service(service_fn(|_: Bytes| {
            let line = Bytes::from(vec![b'x'; TAIL - 1]);
            ready(Ok::<_, BoxError>(Reply::from(line).close()))
        }))
    };
    let large = || {
        Pipeline::new(Lines::default).service(service_fn(|line: Bytes| {
            let large = || Bytes::from(vec![b'x'; TAIL - 1]);
            ready(Ok::<_, BoxError>((line == "a").then(large)))
        }))
    };
    let http = || {
        Http::new(service_fn(|_: Request<RequestBody>| {
            let body = Full::new(Bytes::from(vec![b'x'; TAIL]));
            ready(Ok::<_, BoxError>(Response::new(body)))
        }))
    };
    let over_tcp = |way: &'static str, stack| async move {
        let served = listening(stack).await;
        let all = chatty(connect(&served).await, "a\n").await;
        (way, all, served.reason().await)
    };
    let drained = async {
        let served = listening(large()).await;
        let client = connect(&served).await;
        let handle = served.handle().clone();
        tokio::spawn(async move {
            sleep(SECOND / 5).await;
            handle.shutdown();
        });
        let all = chatty(client, "a\n").await;
        ("drain", all, served.reason().await)
    };
    let closed_http = async {
        let served = listening(http()).await;
        let all = chatty(connect(&served).await, GET).await;
        ("HTTP/1", all, served.reason().await)
    };
    let over_tls = async {
        let (stack, tls) = secured(quit());
        let served = listening(stack).await;
        let io = handshake(tls, connect(&served).await).await;
        let all = chatty(io, "a\n").await;
        ("TLS", all, served.reason().await)
    };
    let https = async {
        let (stack, tls) = secured(http());
        let served = listening(stack).await;
        let io = handshake(tls, connect(&served).await).await;
        let all = chatty(io, GET).await;
        ("HTTP/1 over TLS", all, served.reason().await)
    };
    let cases: Vec<BoxFuture<'_, _>> = vec![
        over_tcp("quit", quit()).boxed(),
        drained.boxed(),
        closed_http.boxed(),
        over_tls.boxed(),
        https.boxed(),
    ];

    let all = timeout(NET, join_all(cases)).await.expect("in time");

    for (way, bytes, reason) in all {
        assert!(bytes >= TAIL, "{way}: {bytes} {reason}");
    }
}

#[tokio::test]
async fn the_system_holds_no_more_unsent_than_it_may() {
    for (unsent, most) in [(None, usize::MAX), (Some(64 * 1024), 1_000_000)] {
        let options = SocketOptions::default();
        let options = unsent.map_or(options.clone(), |bytes| options.unsent(bytes));
        let bound = Server::builder()
            .listen("127.0.0.1:0")
            .socket_options(options)
            .bind();
        let pipeline = Pipeline::new(Lines::default).service(service_fn(in_one_piece));
        let served = serve_with(bound.await.unwrap(), (), pipeline);
        let mut client = connect(&served).await;
        client.write_all(b"a\n").await.unwrap();
        client.read_u8().await.unwrap();
        sleep(SECOND / 2).await;

        let open = served.handle().connections().next().expect("it is open");
        let held = open.unacknowledged().expect("Linux tells");

        let held = usize::try_from(held).unwrap();
        assert!(held < most, "{held}");
        assert!(unsent.is_some() || held > 1_000_000, "{held}");
    }
}

#[tokio::test]
async fn what_is_written_before_a_shutdown_aborts_reaches_a_peer_that_reads() {
    const LEN: usize = 1_000_000;
    let whole = service_fn(|_: Bytes| {
        let line = Bytes::from(vec![b'.'; LEN]);
        ready(Ok::<_, BoxError>(Reply::from(line).close()))
    });
    let served = listening(Pipeline::new(Lines::default).service(whole)).await;
    let mut client = Client::new(connect(&served).await);
    client.send("a\n").await;
    let connection = loop {
        let first = served.handle().connections().next();
        match first {
            Some(connection) if connection.phase() == ConnectionPhase::Closing => break connection,
            _ => tokio::task::yield_now().await,
        }
    };

    served.handle().shutdown_within(Duration::ZERO);

    let end = connection.closed().await;
    let mut reply = Vec::new();
    client
        .0
        .read_to_end(&mut reply)
        .await
        .expect("an orderly end");
    assert_eq!(end.reason(), EndReason::DrainDeadline);
    // All of the reply, unless the system is short of memory.
    assert!(end.bytes_written() > 0);
    assert_eq!(reply.len() as u64, end.bytes_written());
}

#[tokio::test]
async fn a_raw_service_may_name_a_slow_reader_and_still_say_so() {
    let told = service_fn(|mut conn: Connection<Socket>| async move {
        conn.set_end_reason(EndReason::SlowReader);
        conn.write_all(b"too slow\n").await?;
        Ok::<_, BoxError>(())
    });
    let served = listening(told).await;

    let mut last = String::new();
    let mut client = connect(&served).await;
    client
        .read_to_string(&mut last)
        .await
        .expect("an orderly end");

    assert_eq!(last, "too slow\n");
}

#[tokio::test]
async fn a_program_sees_what_a_peer_has_not_taken() {
    let large = service_fn(|_: Bytes| ready(Ok::<_, BoxError>(Bytes::from(vec![b'x'; 999_999]))));
    let served = listening(Pipeline::new(Lines::default).service(large)).await;
    let mut client = connect(&served).await;
    client.write_all(b"a\n").await.unwrap();
    let open = served.handle().connections().next().expect("it is open");
    let unacknowledged = || open.unacknowledged();
    let some = async {
        while unacknowledged().is_none_or(|left| left < 100_000) {
            sleep(SECOND / 100).await;
        }
    };
    timeout(NET, some).await.expect("it waits for the peer");

    let mut all = vec![0; 1_000_000];
    client.read_exact(&mut all).await.unwrap();

    let none = async {
        while unacknowledged() != Some(0) {
            sleep(SECOND / 100).await;
        }
    };
    timeout(NET, none).await.expect("the peer has taken it all");
}
