//! Memory: a peer can make the server hold only so much, and a request allocates nothing when
//! requests run one at a time.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

#[path = "support/certificates.rs"]
mod certificates;
mod support;

use std::alloc::System;
use std::future::ready;
use std::io::{self, Read, Write};
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::coop::unconstrained;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::codec::LengthDelimitedCodec;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::frame::{Block, Lines};
use tower_tcp::http::hyper::{Request, Response};
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::pipeline::{Limits, Session, SessionService};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::registry::{SlowPeer, broadcast};
use tower_tcp::testkit::{Served, memory, serve, serve_with};
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Peer, Pipeline, Server};
use tracing::subscriber::NoSubscriber;

use certificates::certified;
use support::{Clients, Ends, Streams, each_way};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const MS: Duration = Duration::from_millis(1);

/// Runs one test at a time, because allocations are counted for the whole process. Each test has
/// its own thread, whose cached blocks are freed when it ends.
fn alone<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true);
    let run = || runtime.build().unwrap().block_on(test());

    let done = thread::scope(|scope| scope.spawn(run).join());

    done.unwrap_or_else(|panicked| resume_unwind(panicked));
}

/// Returns the number of bytes allocated now.
fn held() -> isize {
    let stats = ALLOCATOR.stats();
    let bytes = |n: usize| isize::try_from(n).unwrap();
    // Both numbers include reallocations.
    bytes(stats.bytes_allocated) - bytes(stats.bytes_deallocated)
}

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

/// Has 10,000 requests answered, a hundred at once. Returns the allocations per request.
async fn allocations_a_request(served: Served) -> f64 {
    let mut client = served.client().await.0.into_inner();
    let requests = b"fifteen letters\n".repeat(100);
    let mut replies = vec![0; requests.len()];
    let mut exchange = async || {
        for _ in 0..100 {
            client.write_all(&requests).await.unwrap();
            client.read_exact(&mut replies).await.unwrap();
        }
    };
    // Let the memory stream and the thread's blocks grow first.
    exchange().await;
    let before = ALLOCATOR.stats();

    exchange().await;

    let after = ALLOCATOR.stats();
    let allocations = after.allocations + after.reallocations;
    (allocations - before.allocations - before.reallocations) as f64 / 10_000.0
}

#[test]
fn a_request_that_is_answered_at_once_allocates_nothing() {
    alone(async || {
        for served in each_way(Pipeline::new(Lines::default).service(service_fn(echo))) {
            let way = served.way().to_owned();

            let allocations = allocations_a_request(served).await;

            assert!(allocations < 0.02, "{allocations} a request, {way}");
        }
    });
}

#[test]
fn a_request_that_waits_allocates_nothing_alone_and_once_among_others() {
    alone(async || {
        let service = service_fn(async |line: Bytes| {
            tokio::task::yield_now().await;
            echo(line).await
        });
        for served in each_way(Pipeline::new(Lines::default).service(service)) {
            let way = served.way().to_owned();

            let allocations = allocations_a_request(served).await;

            let most = if way == "one at a time" { 0.05 } else { 1.05 };
            assert!(allocations < most, "{allocations} a request, {way}");
        }
    });
}

struct Patient(usize);

impl Session<Bytes> for Patient {
    type Reply = Bytes;
    type Error = BoxError;

    async fn call(&mut self, line: Bytes) -> Result<Bytes, BoxError> {
        tokio::task::yield_now().await;
        self.0 += 1;
        echo(line).await
    }
}

#[test]
fn a_request_to_a_session_allocates_nothing_one_at_a_time() {
    alone(async || {
        let make =
            service_fn(|_: Peer<Bytes>| ready(Ok::<_, BoxError>(SessionService::new(Patient(0)))));
        let served = serve(Pipeline::new(Lines::default).make_service(make));

        let allocations = allocations_a_request(served).await;

        assert!(allocations < 0.05, "{allocations} a request");
    });
}

/// Sends 400,000 lines and reads nothing. Returns how many bytes the server took, and how many it
/// holds for the connection.
async fn never_read(served: &Served) -> (usize, isize) {
    let mut client = served.client().await.0.into_inner();
    sleep(MS).await;
    let before = held();
    let lines = "fifteen letters\n".repeat(1000);
    let mut sent = 0;
    for _ in 0..400 {
        match tokio::time::timeout(MS, client.write(lines.as_bytes())).await {
            Ok(written) => sent += written.unwrap(),
            Err(_full) => break,
        }
    }
    let held = held() - before;
    drop(client);
    (sent, held)
}

#[test]
fn j1_a_peer_that_never_reads_is_read_no_more() {
    alone(async || {
        for served in each_way(Pipeline::new(Lines::default).service(service_fn(echo))) {
            never_read(&served).await;
            let (sent, held) = never_read(&served).await;

            // The memory stream's two buffers of 64 KiB, the high mark, the read-ahead and a block
            // in use. Buffers grow by doubling.
            assert!(sent < 500_000, "{}: took {sent}", served.way());
            assert!(held < 1_000_000, "{}: holds {held}", served.way());
        }
    });
}

#[test]
fn c3_announced_lengths_cost_nothing_before_the_bytes_come() {
    alone(async || {
        let codec = || {
            LengthDelimitedCodec::builder()
                .max_frame_length(8 << 20)
                .new_codec()
        };
        let service = service_fn(|frame: BytesMut| ready(Ok::<_, BoxError>(frame.freeze())));
        let pipeline = Pipeline::new(codec)
            .service(service)
            .limits(Limits::default().max_frame(8 << 20));

        for served in each_way(pipeline) {
            let mut clients = Vec::new();
            for _ in 0..1000 {
                let client = served.client().await.0.into_inner();
                clients.push(client);
            }
            // Each has answered once, so that everything a connection always needs is allocated.
            for client in &mut clients {
                client.write_all(&[0, 0, 0, 1, b'x']).await.unwrap();
                client.read_exact(&mut [0; 5]).await.unwrap();
            }
            let before = held();

            for client in &mut clients {
                client
                    .write_all(&(8_u32 << 20).to_be_bytes())
                    .await
                    .unwrap();
            }
            sleep(MS).await;

            let each = (held() - before) / 1000;
            assert!(each <= 16 * 1024, "{}: {each} bytes each", served.way());
        }
    });
}

/// A peer that sends one piece in each turn of the connection's task, and nothing after the last.
/// It reads at most `takes` bytes.
///
/// It is not a `DuplexStream`, because the buffers of one would count.
struct Stalling {
    pieces: Arc<Vec<Vec<u8>>>,
    sent: usize,
    of_piece: usize,
    turn_is_over: bool,
    takes: usize,
}

impl Stalling {
    fn new(pieces: &Arc<Vec<Vec<u8>>>, takes: usize) -> Self {
        Self {
            pieces: Arc::clone(pieces),
            sent: 0,
            of_piece: 0,
            turn_is_over: false,
            takes,
        }
    }
}

impl AsyncRead for Stalling {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.turn_is_over) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(piece) = self.pieces.get(self.sent) else {
            return Poll::Pending;
        };
        let left = &piece[self.of_piece..];
        let n = left.len().min(buf.remaining());
        buf.put_slice(&left[..n]);
        let done = n == left.len();
        self.of_piece = if done { 0 } else { self.of_piece + n };
        self.sent += usize::from(done);
        self.turn_is_over = done;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stalling {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = buf.len().min(self.takes);
        self.takes -= n;
        if n == 0 {
            return Poll::Pending;
        }
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The largest frame in bytes: more than a power of two, because buffers grow by doubling.
const FRAME: usize = 160 * 1024;

const MARK: usize = 64 * 1024;

fn line(len: usize) -> Vec<u8> {
    let mut line = vec![b'x'; len];
    line.push(b'\n');
    line
}

/// The input shapes that might make the server hold more than it should.
fn shapes() -> [(&'static str, Vec<Vec<u8>>); 7] {
    [
        ("a frame short of its end", vec![vec![b'x'; FRAME - 1]]),
        (
            "that, a little at a time",
            vec![vec![b'x'; 16]; FRAME / 16 - 1],
        ),
        (
            "that, behind tiny frames",
            vec![b"\n".repeat(10_000), vec![b'x'; FRAME - 1]],
        ),
        ("tiny frames", vec![b"x\n".repeat(500_000)]),
        ("large frames", vec![line(FRAME - 1); 16]),
        (
            "a large frame behind almost the mark",
            vec![line(MARK - 2), line(FRAME - 1).repeat(2)],
        ),
        (
            "a large frame in two parts, behind almost the mark, and more",
            vec![
                line(MARK - 2),
                vec![b'x'; FRAME - 1],
                b"\nfifteen letters\n".repeat(10_000),
            ],
        ),
    ]
}

#[test]
fn a_peer_that_stalls_or_never_reads_holds_a_frame_the_mark_and_16_kib_at_most() {
    alone(async || {
        let limits = Limits::default().max_frame(FRAME).high_mark(MARK);
        let pipeline = Pipeline::new(|| Lines::default().max_line(FRAME));
        let pipeline = pipeline.service(service_fn(echo)).limits(limits);
        for way in ["one at a time", "in flight", "multiplexed"] {
            let (streams, listener) = mpsc::channel(1);
            let server = Server::from_listener(Streams(listener));
            let _served = match way {
                "in flight" => serve_with(server, (), pipeline.clone().in_flight(8)),
                "multiplexed" => serve_with(server, (), pipeline.clone().multiplexed(8)),
                _ => serve_with(server, (), pipeline.clone()),
            };
            let connect = async |pieces: &Arc<_>, takes| {
                let stream = Stalling::new(pieces, takes);
                assert!(streams.send(stream).await.is_ok(), "it listens");
                sleep(MS).await;
            };
            for (shape, pieces) in shapes() {
                let pieces = Arc::new(pieces);
                let before = held();

                // Enough connections to make the thread's blocks negligible.
                for _ in 0..16 {
                    connect(&pieces, 1000).await;
                }

                let held = (held() - before) / 16;
                let most = isize::try_from(FRAME + MARK + 16 * 1024).unwrap();
                assert!(held <= most, "{way}, {shape}: {held} of {most}");
            }
        }
    });
}

#[test]
fn replies_that_wait_beside_a_call_hold_what_they_are() {
    alone(async || {
        let service = service_fn(async |line: Bytes| {
            if line == "hang" {
                drop(line);
                return std::future::pending().await;
            }
            echo(line).await
        });
        let (streams, listener) = mpsc::channel(1);
        let server = Server::from_listener(Streams(listener));
        let _served = serve_with(server, (), Pipeline::new(Lines::default).service(service));
        let connect = async |pieces: &Arc<_>| {
            let stream = Stalling::new(pieces, 0);
            assert!(streams.send(stream).await.is_ok(), "it listens");
            sleep(MS).await;
        };
        let replies = |count| [line(1023).repeat(count), b"hang\n".to_vec()].concat();
        let pieces = Arc::new(vec![replies(20)]);
        // The thread gets a large block to write into first.
        connect(&Arc::new(vec![replies(60)])).await;
        let before = held();

        for _ in 0..16 {
            connect(&pieces).await;
        }

        let held = (held() - before) / 16;
        assert!(held < (20 + 8) * 1024, "{held}");
    });
}

/// The connection's task has no turn, so its queue is full after 16 frames. Its peer is not slow.
#[test]
fn a_broadcast_that_waits_for_very_many_holds_48_bytes_for_each() {
    const MANY: usize = 1024;
    alone(async || {
        let (peers, mut made) = mpsc::channel(1);
        let make = service_fn(move |peer: Peer<Bytes>| {
            peers.try_send(peer).unwrap();
            ready(Ok::<_, BoxError>(service_fn(echo)))
        });
        let served = serve(Pipeline::new(Lines::default).make_service(make));
        let _client = served.client().await;
        let peer = made.recv().await.unwrap();
        let all = vec![peer; MANY];

        let before = held();
        let sends = broadcast(all.iter().cloned(), "hi".into(), SlowPeer::Skip);
        let mut sends = Box::pin(unconstrained(sends));
        assert!(sends.as_mut().now_or_never().is_none());

        let each = (held() - before) / isize::try_from(MANY).unwrap();
        assert!(each <= 48, "{each} bytes for each");
        assert_eq!(sends.await.sent(), MANY);
    });
}

#[test]
fn a_connection_that_rests_holds_nothing_of_the_frames_it_had() {
    alone(async || {
        let (streams, listener) = mpsc::channel(1);
        let server = Server::from_listener(Streams(listener));
        let pipeline = Pipeline::new(Lines::default).service(service_fn(echo));
        let _served = serve_with(server, (), pipeline);
        let pieces = Arc::new(vec![line(60_000)]);
        let connect = async || {
            let stream = Stalling::new(&pieces, usize::MAX);
            assert!(streams.send(stream).await.is_ok(), "it listens");
            sleep(MS).await;
        };
        connect().await;
        let before = held();

        for _ in 0..8 {
            connect().await;
        }

        let each = (held() - before) / 8;
        assert!(each <= 4096, "{each} bytes each");
    });
}

/// Uses real sockets, because the runtime's part of a socket counts. The client uses the standard
/// library, which allocates nothing here.
#[test]
fn a_connection_allocates_seven_times_at_most() {
    alone(async || {
        // Without a subscriber, tracing formats the span's fields for a possible logger.
        let _quiet = tracing::subscriber::set_global_default(NoSubscriber::new());
        let server = Server::bind("127.0.0.1:0").await.unwrap();
        let address = server.handle().local_addrs()[0].tcp().unwrap();
        let stack = ServiceBuilder::new()
            .layer(ConnectionTraceLayer::new())
            .service(Pipeline::new(Lines::default).service(service_fn(echo)));
        let task = tokio::spawn(server.serve(stack));
        let clients = move |n: usize| {
            for _ in 0..n {
                let mut client = std::net::TcpStream::connect(address).unwrap();
                client
                    .set_read_timeout(Some(Duration::from_secs(10)))
                    .unwrap();
                client.write_all(b"fifteen letters\n").unwrap();
                client.read_exact(&mut [0; 16]).unwrap();
                client.shutdown(std::net::Shutdown::Write).unwrap();
                assert_eq!(client.read(&mut [0; 16]).unwrap(), 0);
            }
        };
        spawn_blocking(move || clients(64)).await.unwrap();
        let before = ALLOCATOR.stats();

        spawn_blocking(move || clients(256)).await.unwrap();

        let after = ALLOCATOR.stats();
        let allocations = after.allocations + after.reallocations;
        let allocations = allocations - before.allocations - before.reallocations;
        // The 32 are not of one connection: a blocking thread, and the growth of the table.
        assert!(
            allocations <= 256 * 7 + 32,
            "{allocations} of 256 connections"
        );
        task.abort();
    });
}

/// Uses real sockets, as above. An unoptimised future is larger than the one of ARCHITECTURE.md.
#[test]
fn a_resting_connection_holds_1440_bytes() {
    alone(async || {
        let _quiet = tracing::subscriber::set_global_default(NoSubscriber::new());
        let server = Server::bind("127.0.0.1:0").await.unwrap();
        let address = server.handle().local_addrs()[0].tcp().unwrap();
        let stack = ServiceBuilder::new()
            .layer(ConnectionTraceLayer::new())
            .service(Pipeline::new(Lines::default).service(service_fn(echo)));
        let task = tokio::spawn(server.serve(stack));
        let mut clients = Vec::with_capacity(512);
        let mut connect = async |n: usize| {
            let more = spawn_blocking(move || {
                let client = |_| {
                    let mut client = std::net::TcpStream::connect(address).unwrap();
                    client
                        .set_read_timeout(Some(Duration::from_secs(10)))
                        .unwrap();
                    client.write_all(b"fifteen letters\n").unwrap();
                    client.read_exact(&mut [0; 16]).unwrap();
                    client
                };
                (0..n).map(client).collect::<Vec<_>>()
            });
            clients.extend(more.await.unwrap());
            tokio::task::yield_now().await;
        };
        connect(256).await;
        let before = held();

        connect(256).await;

        // The table's rows may have grown in one of the two rounds.
        let each = (held() - before) / 256;
        assert!(each <= 1440, "{each} bytes each");
        task.abort();
    });
}

/// Has a request of HTTP/1 answered.
async fn get(client: &mut DuplexStream) {
    const OK: &[u8] = b"\r\n\r\nhello";
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let mut reply = Vec::with_capacity(256);
    while !reply.ends_with(OK) {
        assert_ne!(client.read_buf(&mut reply).await.unwrap(), 0);
    }
}

async fn hello(_: Request<RequestBody>) -> Result<Response<String>, BoxError> {
    Ok(Response::new("hello".to_owned()))
}

#[test]
fn an_http1_connection_at_rest_holds_no_buffers_after_any_number_of_requests() {
    alone(async || {
        let served = serve(Http::new(service_fn(hello)));
        let before = held();
        let mut clients = Vec::with_capacity(100);
        for _ in 0..100 {
            let mut client = served.client().await.0.into_inner();
            get(&mut client).await;
            clients.push(client);
        }
        sleep(200 * MS).await;
        let once = held();

        // In a test an unoptimised future is larger, and the pipe of each client counts.
        let each = (once - before) / 100;
        assert!(each <= 4096, "{each} bytes each");
        for requests in [2, 20] {
            for client in &mut clients {
                for _ in 0..requests {
                    get(client).await;
                }
            }
            sleep(200 * MS).await;

            let more = (held() - once) / 100;

            assert!(more <= 512, "{more} bytes more after {requests} more");
        }
    });
}

#[test]
fn a_router_can_add_three_extensions_to_a_request_without_another_allocation() {
    #[derive(Clone)]
    struct Path;
    #[derive(Clone)]
    struct Parameters;
    #[derive(Clone)]
    struct Uri;

    async fn route(mut request: Request<RequestBody>) -> Result<Response<String>, BoxError> {
        let before = ALLOCATOR.stats().bytes_allocated;
        request.extensions_mut().insert(Path);
        request.extensions_mut().insert(Parameters);
        request.extensions_mut().insert(Uri);
        assert_eq!(ALLOCATOR.stats().bytes_allocated, before);
        hello(request).await
    }

    alone(async || {
        let served = serve(Http::new(service_fn(route)));
        get(&mut served.client().await.0.into_inner()).await;
    });
}

#[test]
fn a_busy_http1_connection_keeps_its_buffers_between_requests() {
    alone(async || {
        let served = serve(Http::new(service_fn(hello)));
        let mut client = served.client().await.0.into_inner();
        for _ in 0..3 {
            get(&mut client).await;
        }
        let before = ALLOCATOR.stats().bytes_allocated;

        for _ in 0..100 {
            get(&mut client).await;
            sleep(90 * MS).await;
        }

        let each = (ALLOCATOR.stats().bytes_allocated - before) / 100;
        assert!(each < 8192, "{each} bytes a request");
    });
}

#[test]
fn a_resting_connection_over_tls_holds_2700_bytes_less_than_a_bare_stream_of_tokio_rustls() {
    alone(async || {
        let (server, client) = certified();
        let shake = async |io: DuplexStream| {
            let name = ServerName::try_from("localhost").unwrap();
            let connector = TlsConnector::from(Arc::clone(&client));
            let mut client = connector.connect(name, io).await.unwrap();
            client.write_all(b"fifteen letters\n").await.unwrap();
            client.read_exact(&mut [0; 16]).await.unwrap();
            sleep(MS).await;
            client
        };
        // Echoes once, then keeps the stream.
        let acceptor = TlsAcceptor::from(Arc::clone(&server));
        let bare = async || {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let acceptor = acceptor.clone();
            let accepted = async move {
                let mut stream = acceptor.accept(near).await.unwrap();
                let mut line = [0; 16];
                stream.read_exact(&mut line).await.unwrap();
                stream.write_all(&line).await.unwrap();
                stream.flush().await.unwrap();
                Box::new(stream)
            };
            tokio::join!(accepted, shake(far))
        };
        let stack = ServiceBuilder::new()
            .layer(ConnectionTraceLayer::new())
            .layer(PreConnectLayer::new(Tls::from(Arc::clone(&server))))
            .service(Pipeline::new(Lines::default).service(service_fn(echo)));
        let (listener, connector) = memory();
        // Started without the harness, because its record of ends would count.
        tokio::spawn(Server::from_listener(listener).serve(stack));
        let ours = async || shake(connector.connect().await.unwrap()).await;
        let warm = (bare().await, ours().await);
        let mut all = (Vec::with_capacity(16), Vec::with_capacity(16));
        let start = held();

        for _ in 0..16 {
            all.0.push(bare().await);
        }
        let between = held();
        for _ in 0..16 {
            all.1.push(ours().await);
        }

        let (bare, ours) = ((between - start) / 16, (held() - between) / 16);
        drop((warm, all));
        // The bare stream keeps a buffer of 4,096 bytes to read into.
        assert!(ours + 2700 <= bare, "{ours} bytes beside {bare}");
    });
}

#[test]
fn kept_frames_of_many_connections_share_their_blocks() {
    alone(async || {
        let kept = Arc::new(Mutex::new(Vec::with_capacity(1000)));
        let keeps = Arc::clone(&kept);
        let service = service_fn(move |frame: Bytes| {
            keeps.lock().unwrap().push(frame);
            ready(Ok::<_, BoxError>(Bytes::from_static(&[b'k'; 16])))
        });
        let block = || Block::new(std::num::NonZeroUsize::new(16).unwrap());
        let served = serve(Pipeline::new(block).service(service));
        let mut clients = Vec::new();
        for _ in 0..1000 {
            let mut client = served.client().await.0.into_inner();
            client.write_all(&[b'x'; 16]).await.unwrap();
            client.read_exact(&mut [0; 16]).await.unwrap();
            clients.push(client);
        }
        sleep(MS).await;
        assert_eq!(kept.lock().unwrap().len(), 1000);
        let before = held();

        // Clearing frees only memory that nothing else holds.
        kept.lock().unwrap().clear();

        let blocks = (before - held()) / (64 * 1024);
        assert!(blocks <= 4, "1,000 frames of 16 bytes held {blocks} blocks");
    });
}
