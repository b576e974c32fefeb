//! Faults that were found by reading the code, each with a test that would have shown it.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::ListenerExt;
use tower_tcp::close::Linger;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{Event, Limits};
use tower_tcp::testkit::{Served, memory, serve, serve_with};
use tower_tcp::{BoxError, Connection, EndReason, Handle, Peer, Pipeline, Reply, Server};

use support::{Clients, Ends, panic_if, serve_stream, settled};

mod support;

async fn echo(line: Bytes) -> Result<Bytes, Infallible> {
    Ok(line)
}

/// A raw service that ignores everything.
async fn deaf(_conn: Connection<DuplexStream>) -> Result<(), BoxError> {
    std::future::pending().await
}

async fn cut_off_at(server: Served, after: Duration, reason: EndReason) {
    let begun = Instant::now();
    assert_eq!(server.reason().await, reason);
    assert_eq!(begun.elapsed(), after);
    let report = server.handle().closed().await;
    assert_eq!((report.drained, report.aborted), (0, 1));
    assert_eq!(server.handle().live(), 0);
}

// The drain woke the connection's task and consumed its waker, so the abort woke nothing.

#[tokio::test(start_paused = true)]
async fn a_raw_service_that_heeds_no_drain_is_cut_off_at_the_deadline() {
    let server = serve(service_fn(deaf));
    let _client = server.client().await;
    settled().await;

    server.handle().shutdown_within(Duration::from_secs(7));

    cut_off_at(server, Duration::from_secs(7), EndReason::DrainDeadline).await;
}

#[tokio::test(start_paused = true)]
async fn a_raw_service_that_heeds_no_drain_is_cut_off_by_an_abort() {
    let server = serve(service_fn(deaf));
    let _client = server.client().await;
    settled().await;

    server.handle().shutdown();
    settled().await;
    server.handle().abort();

    cut_off_at(server, Duration::ZERO, EndReason::Killed).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_stalls_in_its_close_is_cut_off_at_the_deadline() {
    let big = service_fn(|_line: Bytes| async {
        let reply = Bytes::from(vec![b'x'; 1 << 20]);
        Ok::<_, Infallible>(Reply::from(reply).close())
    });
    let server = serve(Pipeline::new(Lines::default).service(big));
    let mut client = server.client().await;
    client.send("go\n").await;
    settled().await;

    server.handle().shutdown_within(Duration::from_secs(7));

    cut_off_at(server, Duration::from_secs(7), EndReason::DrainDeadline).await;
}

// The deadline of the first frame kept running while reads ended inside frames, however many frames
// were complete.

#[tokio::test(start_paused = true)]
async fn a_sender_whose_reads_end_inside_of_frames_is_not_late() {
    let server = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    let mut client = server.client().await;
    client.send("a").await;

    for _ in 0..120 {
        sleep(Duration::from_secs(1)).await;
        client.send("\na").await;
        assert_eq!(client.line().await, "a");
    }

    assert_eq!(server.handle().live(), 1);
}

// Read-ahead that ended with the stream could exceed the pipeline's `max_frame`.

#[tokio::test(start_paused = true)]
async fn the_largest_frame_holds_for_what_is_delivered_at_the_end() {
    let slow = service_fn(|line: Bytes| async move {
        sleep(Duration::from_secs(1)).await;
        Ok::<_, Infallible>(line)
    });
    let lines = || Lines::default().deliver_unterminated();
    let limits = Limits::default().max_frame(1_000);
    let server = serve(Pipeline::new(lines).service(slow).limits(limits));
    let mut client = server.client().await;

    client.send("ok\n").await;
    settled().await;
    client.send("x".repeat(5_000)).await;
    client.finish().await;

    assert_eq!(client.rest().await, ["ok"]);
    assert_eq!(server.reason().await, EndReason::FrameTooLarge);
}

// A connection that reached its maximum age while its service was being made was dropped at once.

#[tokio::test(start_paused = true)]
async fn a_connection_that_comes_of_age_in_its_make_service_is_served_what_it_asked() {
    let make = service_fn(|_peer: Peer<Bytes>| async {
        sleep(Duration::from_secs(5)).await;
        Ok::<_, Infallible>(service_fn(echo))
    });
    let deadlines = Deadlines::default().max_age(Duration::from_secs(2));
    let pipeline = Pipeline::new(Lines::default)
        .make_service(make)
        .deadlines(deadlines);
    let server = serve(pipeline);
    let mut client = server.client().await;

    client.send("asked\n").await;

    assert_eq!(client.rest().await, ["asked"]);
    drop(client);
    assert_eq!(server.reason().await, EndReason::MaxAge);
}

// Read-ahead was dropped when a stream ended without its closing alert, as a TLS stream may.

#[tokio::test(start_paused = true)]
async fn what_was_read_before_a_stream_was_cut_off_is_answered() {
    /// Ends with an error, as a TLS stream does without `close_notify`.
    struct CutOff(DuplexStream);

    impl AsyncRead for CutOff {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let before = buf.filled().len();
            std::task::ready!(Pin::new(&mut self.0).poll_read(cx, buf))?;
            Poll::Ready(if buf.filled().len() == before {
                Err(io::ErrorKind::UnexpectedEof.into())
            } else {
                Ok(())
            })
        }
    }

    impl AsyncWrite for CutOff {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    let slow = service_fn(|line: Bytes| async move {
        sleep(Duration::from_secs(1)).await;
        Ok::<_, Infallible>(line)
    });
    let lines = || Lines::default().deliver_unterminated();
    let (client, stream) = tokio::io::duplex(1024);
    let server = serve_stream(CutOff(stream), Pipeline::new(lines).service(slow));
    let mut client = support::Client::new(client);

    client.send("a\nb\nc\nhalf").await;
    client.finish().await;

    assert_eq!(client.rest().await, ["a", "b", "c"]);
    assert_eq!(server.reason().await, EndReason::Truncated);
}

// A raw service's write to a peer that does not read was reported as the service's own error, with
// a warning.

#[tokio::test(start_paused = true)]
async fn a_raw_service_that_cannot_close_has_a_peer_that_does_not_read() {
    /// Takes no bytes, and never ends.
    struct Stuck;

    impl AsyncRead for Stuck {
        fn poll_read(
            self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
            _buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Stuck {
        fn poll_write(
            self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
            _buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    let raw = service_fn(|conn: Connection<Stuck>| async move {
        conn.close(Linger::default()).await?;
        Ok::<_, BoxError>(())
    });
    let server = serve_stream(Stuck, raw);
    let begun = Instant::now();

    assert_eq!(server.reason().await, EndReason::WriteTimeout);
    assert_eq!(begun.elapsed(), Duration::from_secs(30));
}

// A stream that is always ready kept its connection's task, and so the thread, forever.

#[tokio::test(start_paused = true)]
async fn a_stream_of_nothing_takes_no_one_elses_turn() {
    let given = Arc::new(AtomicUsize::new(0));
    let giving = Arc::clone(&given);
    let endless = service_fn(move |_line: Bytes| {
        let giving = Arc::clone(&giving);
        async move {
            let nothing = futures_util::stream::repeat_with(move || {
                giving.fetch_add(1, Ordering::Relaxed);
                Ok(Bytes::new())
            });
            Ok::<_, Infallible>(Reply::stream(nothing))
        }
    });
    let server = serve(Pipeline::new(Empty::default).service(endless));
    let mut client = server.client().await;
    client.send("go\n").await;

    // Counted in turns, because a paused clock stands still while any task can run.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }

    assert!(
        given.load(Ordering::Relaxed) > 10_000,
        "it goes on, turn by turn"
    );
    server.handle().abort();
    assert_eq!(server.handle().closed().await.aborted, 1);
}

/// Reads lines, and writes frames of zero bytes.
#[derive(Default)]
struct Empty(Lines);

impl tokio_util::codec::Decoder for Empty {
    type Item = Bytes;
    type Error = tower_tcp::frame::LinesError;

    fn decode(&mut self, buf: &mut bytes::BytesMut) -> Result<Option<Bytes>, Self::Error> {
        self.0.decode(buf)
    }
}

impl tokio_util::codec::Encoder<Bytes> for Empty {
    type Error = io::Error;

    fn encode(&mut self, _frame: Bytes, _buf: &mut bytes::BytesMut) -> io::Result<()> {
        Ok(())
    }
}

// A timer that came due while the service was busy was not counted among the dropped messages at
// the end.

#[tokio::test(start_paused = true)]
async fn a_timer_that_is_due_and_not_delivered_is_a_message_that_was_dropped() {
    let make = service_fn(|peer: Peer<Bytes, u8>| async move {
        Ok::<_, Infallible>(service_fn(move |_event: Event<Bytes, u8>| {
            let peer = peer.clone();
            async move {
                for after in [1, 2, 3600] {
                    let after = Duration::from_secs(after);
                    peer.post_after(after, 0).expect("there is room");
                }
                sleep(Duration::from_secs(5)).await;
                Ok::<_, Infallible>(Reply::from(Bytes::from("bye")).close())
            }
        }))
    });
    let server = serve(Pipeline::new(Lines::default).make_event_service(make));
    let mut client = server.client().await;

    assert_eq!(client.ask("go").await, "bye");
    drop(client);

    assert_eq!(server.end().await.messages_dropped(), 2);
}

// An abort dropped the reason that it replaced while holding a lock that the reason's own `Drop`
// takes.

/// A user's error that uses its connection when it is dropped.
#[derive(Debug)]
struct ComesBack(Peer<Bytes>);

impl std::fmt::Display for ComesBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the session is over")
    }
}

impl std::error::Error for ComesBack {}

impl Drop for ComesBack {
    fn drop(&mut self) {
        self.0.on_end(|_| {});
    }
}

#[test]
fn an_error_that_comes_back_to_its_connection_as_it_is_dropped_blocks_nobody() {
    let (done, ended) = std::sync::mpsc::channel();
    // A thread of its own, because the fault would block it.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        runtime.expect("it can be built").block_on(async {
            let make = service_fn(|peer: Peer<Bytes>| async move {
                peer.close_because(ComesBack(peer.clone()));
                peer.abort();
                Ok::<_, Infallible>(service_fn(echo))
            });
            let server = serve(Pipeline::new(Lines::default).make_service(make));
            let _client = server.client().await;
            let reason = server.reason().await;
            assert!(done.send(reason).is_ok(), "the test waits for it");
        });
    });

    let reason = ended.recv_timeout(Duration::from_secs(20));

    assert_eq!(reason, Ok(EndReason::Aborted));
}

// A message that the service was not ready for was left behind when part of a request came.

type Opened = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The service of events that is not ready until it is opened, and tells what it was called with.
#[derive(Clone)]
struct Gated {
    gate: watch::Receiver<bool>,
    waiting: Arc<Mutex<Option<Opened>>>,
    calls: mpsc::Sender<String>,
}

impl Service<Event<Bytes, &'static str>> for Gated {
    type Response = Option<Bytes>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Option<Bytes>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        let mut waiting = self.waiting.lock().expect("no call panicked");
        let mut gate = self.gate.clone();
        let open = waiting.get_or_insert_with(|| {
            Box::pin(async move { drop(gate.wait_for(|open| *open).await) })
        });
        ready!(open.as_mut().poll(cx));
        *waiting = None;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, event: Event<Bytes, &'static str>) -> Self::Future {
        let call = match event {
            Event::Request(line) => String::from_utf8_lossy(&line).into_owned(),
            Event::Message(message) => message.to_owned(),
        };
        self.calls.try_send(call).expect("there is room");
        std::future::ready(Ok(None))
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_waited_for_the_service_is_delivered_before_later_requests() {
    for (input, expected) in [
        ("par", &["message"][..]),
        ("a\nb\n", &["message", "a", "b"]),
    ] {
        let (open, gate) = watch::channel(false);
        let (calls, mut called) = mpsc::channel(8);
        let (tell, mut peers) = mpsc::channel(1);
        let gated = Gated {
            gate,
            waiting: Arc::default(),
            calls,
        };
        let make = service_fn(move |peer: Peer<Bytes, &'static str>| {
            tell.try_send(peer).expect("there is one connection");
            std::future::ready(Ok::<_, Infallible>(gated.clone()))
        });
        let served = serve(Pipeline::new(Lines::default).make_event_service(make));
        let mut client = served.client().await;
        let peer = peers.recv().await.expect("it is made");
        peer.post("message").await.expect("the connection is open");
        settled().await;
        client.send(input).await;
        settled().await;

        open.send_replace(true);
        settled().await;

        let calls: Vec<_> = std::iter::from_fn(|| called.try_recv().ok()).collect();
        assert_eq!(calls, expected, "{input:?}");
    }
}

// The lame-duck phase read the deadline of the shutdown only once, when the phase began.

#[tokio::test(start_paused = true)]
async fn a_deadline_that_is_brought_forward_ends_a_lame_duck() {
    let (listener, connector) = memory();
    let server = Server::builder()
        .lame_duck(Duration::from_secs(60))
        .build(listener);
    let stuck = service_fn(|_: Bytes| std::future::pending::<Result<Bytes, Infallible>>());
    let pipeline = Pipeline::new(Lines::default).service(stuck);
    let served = serve_with(server, connector, pipeline);
    let mut client = served.client().await;
    client.send("never\n").await;
    settled().await;
    served.handle().shutdown();
    settled().await;

    served.handle().shutdown_within(Duration::from_secs(7));

    cut_off_at(served, Duration::from_secs(7), EndReason::DrainDeadline).await;
}

// If a drain began within a poll, the connection assumed that it had read all that had arrived.

/// A stream that begins a drain in the middle of a read, and returns `Pending` although bytes have
/// arrived, as tokio does once a task's budget is spent.
struct DrainsInRead {
    io: DuplexStream,
    drain: Arc<Mutex<Option<Handle>>>,
}

impl AsyncRead for DrainsInRead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let handle = self.drain.lock().expect("nobody panicked").take();
        if let Some(handle) = handle {
            handle.shutdown();
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for DrainsInRead {
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

#[tokio::test(start_paused = true)]
async fn a_request_that_had_arrived_as_a_drain_began_within_a_poll_is_answered() {
    let drain = Arc::new(Mutex::new(None));
    let drains = Arc::clone(&drain);
    let (listener, connector) = memory();
    let server = Server::from_listener(listener.map_io(move |io| DrainsInRead {
        io,
        drain: Arc::clone(&drains),
    }));
    let pipeline = Pipeline::new(Lines::default).service(service_fn(echo));
    let served = serve_with(server, connector, pipeline);
    let mut client = served.client().await;
    assert_eq!(client.ask("before").await, "before");
    settled().await;

    *drain.lock().expect("nobody panicked") = Some(served.handle().clone());
    client.send("at the drain\n").await;

    assert_eq!(client.line().await, "at the drain");
}

// The error of a connection's service was searched for its reason outside of the guard for panics,
// so such a panic ended the connection with `Killed`, and nothing said why.

#[derive(Debug)]
struct PanicsAsItIsSearched;

impl std::fmt::Display for PanicsAsItIsSearched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("it failed")
    }
}

impl std::error::Error for PanicsAsItIsSearched {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        panic_if(true);
        None
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_that_panics_as_it_is_searched_ends_its_connection_with_panic() {
    let stack = service_fn(|conn: Connection<DuplexStream>| async move {
        drop(conn);
        Err::<(), _>(PanicsAsItIsSearched)
    });
    let server = serve(stack);
    let _client = server.client().await;

    assert_eq!(server.reason().await, EndReason::Panic);
}

// A message that waited was dropped just before the graceful close, and its panic made the close
// abrupt.

/// A message, or an error, that panics when it is dropped.
#[derive(Debug, thiserror::Error)]
#[error("it is closed")]
struct PanicsAsItIsDropped;

impl Drop for PanicsAsItIsDropped {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "as it is dropped");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_lingers_although_a_dropped_message_panics() {
    let (tell, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes, PanicsAsItIsDropped>| {
        tell.try_send(peer).expect("there is room");
        let answer = service_fn(|event: Event<Bytes, PanicsAsItIsDropped>| async move {
            sleep(Duration::from_secs(1)).await;
            Ok::<_, BoxError>(match event {
                Event::Request(line) => Some(line),
                Event::Message(_) => None,
            })
        });
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let server = serve(Pipeline::new(Lines::default).make_event_service(make));
    let mut client = server.client().await;
    let peer: Peer<_, PanicsAsItIsDropped> = peers.recv().await.expect("it is served");
    client.send("one\n").await;
    settled().await;
    peer.post(PanicsAsItIsDropped).await.expect("there is room");

    peer.close();

    assert_eq!(client.rest().await, ["one"]);
    let begun = Instant::now();
    assert_eq!(server.reason().await, EndReason::Panic);
    assert_eq!(begun.elapsed(), Duration::from_secs(2));
}

// The panic of an error that was replaced went through the abort, so the connections after it, and
// then the server, did not end in good order.

#[tokio::test(start_paused = true)]
async fn an_abort_ends_all_connections_although_their_errors_panic_as_they_are_dropped() {
    let (tell, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room");
        let hang = service_fn(|_: Bytes| std::future::pending::<Result<Bytes, BoxError>>());
        std::future::ready(Ok::<_, Infallible>(hang))
    });
    let mut server = serve(Pipeline::new(Lines::default).make_service(make));
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = server.client().await;
        client.send("hang\n").await;
        settled().await;
        let peer = peers.recv().await.expect("it is served");
        peer.close_because(PanicsAsItIsDropped);
        clients.push(client);
    }
    settled().await;

    server.handle().abort();

    assert_eq!(server.report().await.aborted, 3);
    assert_eq!(server.reasons(), [EndReason::Killed; 3]);
}

// A limit dropped the waker of its last poll while it was locked, and the drop of a waker can drop
// a task, and with it a permit of the same limit.

/// A waker that reads a limit when it is dropped.
struct ReadsLimit(ConnectionLimit);

impl Wake for ReadsLimit {
    fn wake(self: Arc<Self>) {}
}

impl Drop for ReadsLimit {
    fn drop(&mut self) {
        assert!(self.0.in_use() <= 1);
    }
}

#[test]
fn a_waker_may_use_the_limit_when_it_is_dropped() {
    let (tell, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let limit = ConnectionLimit::new(1);
        let mut service = limit.layer().layer(service_fn(echo));
        let mut poll_with = |waker: Waker| {
            assert!(
                service
                    .poll_ready(&mut Context::from_waker(&waker))
                    .is_ready()
            );
        };
        poll_with(Arc::new(ReadsLimit(limit.clone())).into());
        poll_with(Arc::new(ReadsLimit(limit.clone())).into());
        drop(service);
        tell.send(()).expect("the test waits");
    });

    let done = done.recv_timeout(Duration::from_secs(10));
    assert_eq!(done, Ok(()), "it is not locked twice");
}
