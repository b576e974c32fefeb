//! Deadlines: each one closes its connection exactly on time, and is extended only by what should
//! extend it.

mod support;

use std::future::{pending, ready};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex,
};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, advance, sleep, sleep_until, timeout};
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::close::Linger;
use tower_tcp::deadline::{Deadlines, DrainDeadlines};
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::Limits;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Connector, Served, memory_with_buffer, serve, serve_with};
use tower_tcp::{BoxError, Connection, EndReason, Peer, Pipeline, Reply, Server};

use support::{Client, Clients, Ends, each_way, each_way_over_tcp, serve_stream, settled};

const SECOND: Duration = Duration::from_secs(1);

/// Waits the requested number of seconds, then returns the request.
async fn delayed(request: Bytes) -> Result<Bytes, BoxError> {
    sleep(SECOND * String::from_utf8_lossy(&request).parse().unwrap_or(0)).await;
    Ok(request)
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_is_closed_after_a_minute() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
        let begun = Instant::now();
        let mut client = served.client().await;

        client.rest().await;

        assert_eq!(begun.elapsed(), 60 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::FirstByteTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn d6_a_frame_has_half_a_minute_whatever_drips_in() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
        let begun = Instant::now();
        let client = served.client().await;
        let (read, mut write) = tokio::io::split(client.0.into_inner());
        let dripping = tokio::spawn(async move {
            sleep(5 * SECOND).await;
            while write.write_all(b"x").await.is_ok() {
                sleep(7 * SECOND).await;
            }
        });
        let mut client = support::Client::new(tokio::io::join(read, tokio::io::sink()));

        client.rest().await;

        assert_eq!(begun.elapsed(), 35 * SECOND, "{}", served.way());
        assert_eq!(served.reason().await, EndReason::FrameTimeout);
        dripping.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_frame_begins_anew_with_each_frame() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
        let mut client = served.client().await;

        for _ in 0..4 {
            client.send("a").await;
            sleep(29 * SECOND).await;
            client.send("b\n").await;
            assert_eq!(client.line().await, "ab", "{}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_has_its_time_whatever_the_connection_waited_for_before() {
    let deadlines = Deadlines::default().idle(300 * SECOND);
    let pipeline = Pipeline::new(Lines::default).service(service_fn(delayed));
    for served in each_way(pipeline.deadlines(deadlines)) {
        let mut client = served.client().await;
        // The connection waits for the rest of a frame and for the next frame, in turn. Then it is
        // idle for longer than a frame may take.
        for idle in [SECOND, 100 * SECOND] {
            client.send("a").await;
            sleep(SECOND).await;
            client.send("b\n").await;
            assert_eq!(client.line().await, "ab", "{}", served.way());
            sleep(idle).await;
        }
        client.send("c").await;
        let begun = Instant::now();

        client.rest().await;

        assert_eq!(begun.elapsed(), 30 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::FrameTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_connection_is_idle_75_seconds_after_its_last_reply_whatever_is_pushed() {
    let make = service_fn(|peer: Peer<Bytes>| {
        tokio::spawn(async move {
            while peer.send("still here?".into()).await.is_ok() {
                sleep(7 * SECOND).await;
            }
        });
        ready(Ok::<_, BoxError>(service_fn(delayed)))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let begun = Instant::now();
        let mut client = served.client().await;
        sleep(10 * SECOND).await;
        client.send("200\n").await;

        let lines = client.rest().await;

        assert!(lines.contains(&"200".to_owned()), "{}", served.way());
        assert_eq!(begun.elapsed(), 285 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::IdleTimeout);
    }
}

/// A reply that takes its reader 80 s, at 1,000 bytes a second.
const SLOWLY_READ: usize = 80_000;

/// Reads a reply of [`SLOWLY_READ`] bytes, of which the stream holds only a little at a time.
async fn read_slowly(client: &mut Client<DuplexStream>) {
    for _ in 0..SLOWLY_READ / 1000 {
        sleep(SECOND).await;
        let read = client.0.read_exact(&mut [0; 1000]).await;
        read.expect("the whole reply arrives");
    }
}

fn with_long_replies(deadlines: Deadlines) -> Served<Connector> {
    let reply = service_fn(|line: Bytes| {
        let long = Bytes::from(vec![b'x'; SLOWLY_READ - 1]);
        ready(Ok::<_, BoxError>(if line == "long" { long } else { line }))
    });
    let (listener, connector) = memory_with_buffer(1000);
    let pipeline = Pipeline::new(Lines::default).service(reply);
    let server = Server::builder().build(listener);
    serve_with(server, connector, pipeline.deadlines(deadlines))
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_idle_once_its_peer_has_taken_the_reply() {
    let served = with_long_replies(Deadlines::default());
    let mut client = served.client().await;
    client.send("long\n").await;
    read_slowly(&mut client).await;
    let begun = Instant::now();

    sleep(70 * SECOND).await;
    assert_eq!(client.ask("short").await, "short");

    assert!(client.rest().await.is_empty());
    assert_eq!(begun.elapsed(), (70 + 75) * SECOND);
    drop(client);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_draining_pipeline_waits_for_another_frame_once_its_peer_has_taken_the_reply() {
    let drain = DrainDeadlines::default().next_frame(10 * SECOND);
    let served = with_long_replies(Deadlines::default().drain(drain));
    let mut client = served.client().await;
    client.send("long\n").await;
    settled().await;

    served.handle().shutdown_within(100 * SECOND);
    read_slowly(&mut client).await;
    sleep(9 * SECOND).await;

    assert_eq!(client.ask("short").await, "short");
    drop(client);
    assert_eq!(served.reason().await, EndReason::Drained);
}

/// A stream whose input stays unknown to the runtime until the gate opens, as that of a socket
/// while the process is stopped.
struct Gated {
    io: DuplexStream,
    open: watch::Receiver<bool>,
    opened: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Gated {
    fn new(io: DuplexStream, open: watch::Receiver<bool>) -> Self {
        Self {
            io,
            open,
            opened: Box::pin(ready(())),
        }
    }
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while !*self.open.borrow() {
            let mut open = self.open.clone();
            self.opened = Box::pin(async move { drop(open.wait_for(|open| *open).await) });
            std::task::ready!(self.opened.as_mut().poll(cx));
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Gated {
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
async fn g5_what_arrived_while_the_process_was_stopped_is_answered_whatever_deadline_passed() {
    let (client, server) = duplex(4096);
    let (gate, open) = watch::channel(true);
    let served = serve_stream(
        Gated::new(server, open),
        Pipeline::new(Lines::default).service(service_fn(delayed)),
    );
    let mut client = support::Client::new(client);
    client.send("0\n").await;
    assert_eq!(client.line().await, "0");

    gate.send_replace(false);
    sleep(SECOND).await;
    client.send("0\n").await;
    advance(120 * SECOND).await;
    sleep(SECOND / 100).await;
    gate.send_replace(true);

    assert_eq!(client.line().await, "0");
    let answered = Instant::now();
    client.rest().await;
    assert_eq!(answered.elapsed(), 75 * SECOND);
    drop(client);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn g5_a_peer_that_was_silent_while_the_process_was_stopped_is_not_kept() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
        let mut client = served.client().await;
        client.send("0\n").await;
        assert_eq!(client.line().await, "0", "{}", served.way());

        advance(120 * SECOND).await;
        let resumed = Instant::now();
        client.rest().await;

        assert!(resumed.elapsed() < SECOND / 10, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::IdleTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn g5_a_hook_that_was_stopped_with_the_process_takes_in_what_arrived() {
    let (done, hook_done) = watch::channel(false);
    let hook = service_fn(move |conn: Connection<DuplexStream>| {
        let mut done = hook_done.clone();
        async move {
            drop(done.wait_for(|done| *done).await);
            Ok::<_, BoxError>(conn)
        }
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service(Pipeline::new(Lines::default).service(service_fn(delayed)));
    let served = serve(stack);
    let mut client = served.client().await;
    client.send("0\n").await;
    sleep(SECOND).await;

    advance(60 * SECOND).await;
    sleep(SECOND / 100).await;
    done.send_replace(true);

    assert_eq!(client.line().await, "0");
}

#[tokio::test(start_paused = true)]
async fn an_idle_limit_of_none_lets_a_connection_rest_for_ever() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(Deadlines::default().idle(None).first_byte(None));

    for served in each_way(pipeline) {
        let mut client = served.client().await;
        for _ in 0..2 {
            sleep(10_000 * SECOND).await;
            client.send("a\n").await;

            assert_eq!(client.line().await, "a", "{}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn d9_a_peer_that_takes_nothing_for_half_a_minute_is_let_go() {
    let large = service_fn(|_: Bytes| ready(Ok::<_, BoxError>(Bytes::from(vec![b'x'; 300_000]))));

    for served in each_way(Pipeline::new(Lines::default).service(large)) {
        let begun = Instant::now();
        let mut client = served.client().await;
        client.send("a\n").await;
        // The peer reads a little, which extends the deadline, and then nothing more.
        sleep(20 * SECOND).await;
        let mut some = [0; 1000];
        tokio::io::AsyncReadExt::read_exact(&mut client.0, &mut some)
            .await
            .unwrap();

        let reason = served.reason().await;

        assert_eq!(reason, EndReason::WriteTimeout, "{}", served.way());
        assert_eq!(begun.elapsed(), 50 * SECOND, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_old_answers_what_it_has_read_and_closes() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(Deadlines::default().max_age(45 * SECOND));

    for served in each_way(pipeline) {
        let begun = Instant::now();
        let mut client = served.client().await;
        sleep(40 * SECOND).await;
        client.send("20\n1\n").await;

        let mut replies = client.rest().await;

        replies.sort();
        assert_eq!(replies, ["1", "20"], "{}", served.way());
        assert!(begun.elapsed() >= 60 * SECOND, "{}", served.way());
        assert!(begun.elapsed() <= 61 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::MaxAge, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn connections_of_one_moment_retire_at_different_ones() {
    let deadlines = Deadlines::default()
        .first_byte(None)
        .max_age(100 * SECOND)
        .max_age_jitter(50 * SECOND);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(deadlines)
        .linger(Linger::default().time(Duration::ZERO));
    let served = serve(pipeline);
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(served.client().await);
    }

    let mut ages = Vec::new();
    for _ in 0..100 {
        let end = served.end().await;
        assert_eq!(end.reason(), EndReason::MaxAge);
        ages.push(end.duration());
    }

    // With a uniform distribution a hundred samples leave the lowest or the highest fifth empty
    // once in two thousand million runs.
    assert!(
        ages[0] >= 100 * SECOND && ages[0] < 110 * SECOND,
        "{ages:?}"
    );
    assert!(
        ages[99] > 140 * SECOND && ages[99] <= 151 * SECOND,
        "{ages:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_make_service_has_ten_seconds() {
    let make = service_fn(|_: Peer<Bytes>| async {
        pending::<()>().await;
        Ok::<_, BoxError>(service_fn(delayed))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let begun = Instant::now();
        let mut client = served.client().await;
        client.send("a\n").await;

        client.rest().await;

        assert_eq!(begun.elapsed(), 10 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::MakeServiceError);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_has_ten_seconds_after_the_peer_has_finished_sending() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
        let mut client = served.client().await;
        client.send("9\n3600\n").await;
        sleep(5 * SECOND).await;
        client.finish().await;
        let finished = Instant::now();

        assert_eq!(client.line().await, "9", "{}", served.way());
        let replied = Instant::now();
        assert_eq!(replied - finished, 4 * SECOND, "{}", served.way());
        assert_eq!(client.rest().await, [""; 0], "{}", served.way());
        assert_eq!(replied.elapsed(), 10 * SECOND, "{}", served.way());
        assert_eq!(served.reason().await, EndReason::PeerReset);
    }
}

#[tokio::test(start_paused = true)]
async fn every_request_before_a_half_close_is_answered_if_each_takes_less_than_its_time() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
        let replies = served.exchange("9\n9\n18\n27\n").await;

        let way = served.way();
        if way == "one at a time" {
            // The third has no reply in its ten seconds.
            assert_eq!(replies, "9\n9\n");
            assert_eq!(served.reason().await, EndReason::PeerReset);
        } else {
            assert_eq!(replies, "9\n9\n18\n27\n", "{way}");
            assert_eq!(served.reason().await, EndReason::PeerClosed, "{way}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_closed_peer_may_be_given_for_ever() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(Deadlines::default().half_closed(None));
    for served in each_way(pipeline) {
        assert_eq!(
            served.exchange("3000\n").await,
            "3000\n",
            "{}",
            served.way()
        );
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test]
async fn a_reset_behind_a_half_close_ends_the_calls_at_once() {
    let hang = service_fn(|_: Bytes| pending::<Result<Bytes, BoxError>>());
    let pipeline = Pipeline::new(Lines::default)
        .service(hang)
        .deadlines(Deadlines::default().half_closed(None));
    for (served, address) in each_way_over_tcp(pipeline, 2).await {
        let mut client = TcpStream::connect(address).await.expect("it listens");
        client.write_all(b"x\n").await.expect("it is open");
        client.shutdown().await.expect("it is open");
        // The server reads the end of input.
        sleep(SECOND / 10).await;

        client.set_zero_linger().expect("it is a socket");
        drop(client);

        let reason = timeout(5 * SECOND, served.reason()).await;
        let reason = reason.unwrap_or_else(|_| panic!("{}: it is not noticed", served.way()));
        assert_eq!(reason, EndReason::PeerReset, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_its_service_has_ten_seconds_after_a_half_close() {
    let limit = GlobalConcurrencyLimitLayer::new(1);
    let stack = ServiceBuilder::new().layer(limit).service_fn(delayed);
    for served in each_way(Pipeline::new(Lines::default).service(stack)) {
        let mut holder = served.client().await;
        holder.send("100\n").await;
        support::settled().await;
        let begun = Instant::now();

        assert_eq!(served.exchange("0\n").await, "", "{}", served.way());
        assert_eq!(begun.elapsed(), 10 * SECOND, "{}", served.way());
        assert_eq!(served.reason().await, EndReason::PeerReset);
        assert_eq!(holder.line().await, "100");
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_closed_peer_that_reads_slowly_gets_the_whole_of_its_reply() {
    let large = service_fn(|_: Bytes| ready(Ok::<_, BoxError>(Bytes::from(vec![b'x'; 400_000]))));
    for served in each_way(Pipeline::new(Lines::default).service(large)) {
        let mut client = served.client().await;
        client.send("\n").await;
        client.finish().await;
        let begun = Instant::now();
        let mut read = 0;
        let mut piece = [0; 20_000];
        loop {
            sleep(9 * SECOND).await;
            match client.0.read(&mut piece).await.expect("it is open") {
                0 => break,
                n => read += n,
            }
        }

        assert_eq!(read, 400_001, "{}", served.way());
        assert!(begun.elapsed() > 60 * SECOND, "{}", served.way());
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_awaits_the_end_of_its_own_connection_has_half_a_minute() {
    let waits = service_fn(|peer: Peer<Bytes>| {
        ready(Ok::<_, BoxError>(service_fn(move |line: Bytes| {
            let peer = peer.clone();
            async move {
                if line == "close" {
                    peer.close();
                    let _end = peer.closed().await;
                }
                Ok::<_, BoxError>(line)
            }
        })))
    });
    for served in each_way(Pipeline::new(Lines::default).make_service(waits)) {
        let mut client = served.client().await;
        client.send("first\nclose\nbehind\n").await;
        let begun = Instant::now();

        let replies = client.rest().await;

        assert_eq!(begun.elapsed(), 30 * SECOND, "{}", served.way());
        assert_eq!(replies[0], "first", "{}", served.way());
        assert!(!replies.contains(&"close".to_owned()), "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::ServiceClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_closed_by_the_handle_gives_its_calls_half_a_minute() {
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
        for (seconds, replied) in [(29, true), (31, false)] {
            let mut client = served.client().await;
            client.send(format!("{seconds}\n")).await;
            support::settled().await;
            for connection in served.handle().connections() {
                connection.close();
            }

            let replies = client.rest().await;

            assert_eq!(replies.len(), usize::from(replied), "{}", served.way());
            drop(client);
            assert_eq!(served.reason().await, EndReason::ServiceClosed);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_hangs_behind_a_bad_frame_has_half_a_minute() {
    let codec = || Lines::default().max_line(10);
    for served in each_way(Pipeline::new(codec).service(service_fn(delayed))) {
        if served.way() == "one at a time" {
            continue;
        }
        let mut client = served.client().await;
        client.send("20\n45\n3600\nmuch too long\n").await;
        let begun = Instant::now();

        assert_eq!(client.rest().await, ["20", "45"], "{}", served.way());

        assert_eq!(begun.elapsed(), 75 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::FrameTooLarge);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_hangs_at_the_maximum_age_has_half_a_minute() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(Deadlines::default().max_age(5 * SECOND));
    for served in each_way(pipeline) {
        let begun = Instant::now();
        let mut client = served.client().await;
        client.send("20\n3600\n").await;

        assert_eq!(client.rest().await, ["20"], "{}", served.way());

        assert_eq!(begun.elapsed(), 50 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::MaxAge);
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_while_its_calls_run_in_a_drain_counts_as_gone_after_ten_seconds() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(Deadlines::default().max_age(60 * SECOND));
    for drain in ["of the server", "of the connection", "at its maximum age"] {
        for served in each_way(pipeline.clone()) {
            let mut client = served.client().await;
            client.send("3600\n").await;
            support::settled().await;
            match drain {
                "of the server" => served.handle().shutdown(),
                "of the connection" => served.handle().connections().for_each(|conn| conn.close()),
                _ => sleep(60 * SECOND).await,
            }
            sleep(2 * SECOND).await;
            let left = Instant::now();

            drop(client);

            let reason = served.reason().await;
            assert_eq!(reason, EndReason::PeerReset, "{} {drain}", served.way());
            assert_eq!(left.elapsed(), 10 * SECOND, "{} {drain}", served.way());
        }
    }
}

/// Answers each request with a stream that never yields a frame.
async fn silent(_: Bytes) -> Result<Reply<Bytes>, BoxError> {
    Ok(Reply::stream(futures_util::stream::pending()))
}

/// Serves such streams. The receiver yields the peers.
fn silent_streams() -> ([Served; 3], mpsc::Receiver<Peer<Bytes>>) {
    let (tell, peers) = mpsc::channel(3);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room");
        ready(Ok::<_, BoxError>(service_fn(silent)))
    });
    (
        each_way(Pipeline::new(Lines::default).make_service(make)),
        peers,
    )
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_while_its_last_reply_streams_counts_as_gone_after_ten_seconds() {
    for by_server in [true, false] {
        let (ways, mut peers) = silent_streams();
        for served in ways {
            let mut client = served.client().await;
            let peer = peers.recv().await.expect("it is served");
            client.send("stream\n").await;
            settled().await;
            if by_server {
                served.handle().shutdown();
            } else {
                peer.close();
            }
            sleep(2 * SECOND).await;
            let left = Instant::now();

            drop(client);

            let reason = served.reason().await;
            assert_eq!(reason, EndReason::PeerReset, "{}", served.way());
            assert_eq!(left.elapsed(), 10 * SECOND, "{}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_streams_in_a_drain_has_half_a_minute_once_the_program_closes() {
    let (ways, mut peers) = silent_streams();
    for served in ways {
        let mut client = served.client().await;
        let peer = peers.recv().await.expect("it is served");
        client.send("stream\n").await;
        settled().await;
        served.handle().shutdown_within(3600 * SECOND);
        sleep(2 * SECOND).await;
        let closed = Instant::now();

        peer.close();

        assert!(client.rest().await.is_empty(), "{}", served.way());
        assert_eq!(closed.elapsed(), 30 * SECOND, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_behind_its_bad_frame_counts_as_gone_after_ten_seconds() {
    let codec = || Lines::default().max_line(10);
    for served in each_way(Pipeline::new(codec).service(service_fn(delayed))) {
        if served.way() == "one at a time" {
            continue;
        }
        let mut client = served.client().await;
        client.send("3600\nmuch too long\n").await;
        support::settled().await;
        let left = Instant::now();

        drop(client);

        assert_eq!(served.reason().await, EndReason::FrameTooLarge);
        assert_eq!(left.elapsed(), 10 * SECOND, "{}", served.way());
    }
}

/// Sets every deadline to the same time.
fn all(time: Duration) -> Deadlines {
    Deadlines::default()
        .first_byte(time)
        .frame(time)
        .idle(time)
        .write(time)
        .half_closed(time)
        .last_calls(time)
        .max_age(time)
        .max_age_jitter(time)
        .make_service(time)
}

#[tokio::test(start_paused = true)]
async fn g2_what_comes_as_a_deadline_passes_is_answered_or_late_and_never_both() {
    let cases = [
        ("", 60 * SECOND, "0\n", EndReason::FirstByteTimeout),
        ("0", 30 * SECOND, "\n", EndReason::FrameTimeout),
        ("0\n", 75 * SECOND, "0\n", EndReason::IdleTimeout),
    ];
    // `client_first` says whose timer is created first: the client's or the server's.
    for (case, client_first) in cases.iter().flat_map(|case| [(case, true), (case, false)]) {
        let (before, after, then, late) = *case;
        for at in [after - SECOND / 1000, after, after + SECOND / 1000] {
            for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
                let begun = Instant::now();
                let timer = client_first.then(|| Box::pin(sleep(at)));
                let mut client = served.stream().await;
                client.write_all(before.as_bytes()).await.unwrap();
                for _ in 0..10 {
                    tokio::task::yield_now().await;
                }
                timer.unwrap_or_else(|| Box::pin(sleep(at))).await;
                // It may be closed already.
                drop(client.write_all(then.as_bytes()).await);
                drop(client.shutdown().await);
                let replies = support::read_to_end(client).await;

                let closed = begun.elapsed();
                let reason = served.reason().await;
                let what = format!("{} {before:?} {at:?} {client_first}", served.way());
                let before = usize::from(before.ends_with('\n'));
                let replies = replies.lines().count() - before;
                let answered = (replies, reason, closed) == (1, EndReason::PeerClosed, at);
                let was_late = (replies, reason, closed) == (0, late, after.max(at));
                let outcome = format!("{what}: {replies} replies, {reason} after {closed:?}");
                assert!(answered || was_late, "{outcome}");
                assert!(answered || at >= after, "{outcome}");
                assert!(was_late || at <= after, "{outcome}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn g7_five_thousand_deadlines_at_one_instant_keep_no_other_connection_waiting() {
    let silent = 5000;
    let served = serve(Pipeline::new(Lines::default).service(service_fn(delayed)));
    let begun = Instant::now();
    let mut all = Vec::new();
    for _ in 0..silent {
        all.push(served.stream().await);
    }
    assert_eq!(begun.elapsed(), Duration::ZERO);
    let mut busy = served.client().await;
    sleep(59 * SECOND).await;

    for _ in 0..2000 {
        let asked = Instant::now();
        assert_eq!(busy.ask("0").await, "0");
        assert_eq!(asked.elapsed(), Duration::ZERO);
        sleep(SECOND / 1000).await;
    }

    drop(all);
    for _ in 0..silent {
        assert_eq!(served.reason().await, EndReason::FirstByteTimeout);
    }
    assert_eq!(busy.ask("0").await, "0");
    assert_eq!(served.handle().live(), 1);
}

#[tokio::test(start_paused = true)]
async fn g6_the_longest_time_there_is_is_no_limit_and_no_panic() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(all(Duration::MAX))
        .linger(Linger::default().time(Duration::MAX).write(Duration::MAX));
    let stack = ServiceBuilder::new()
        .layer(
            PreConnectLayer::new(service_fn(|conn: Connection<DuplexStream>| {
                ready(Ok::<_, BoxError>(conn))
            }))
            .deadline(Duration::MAX),
        )
        .service(pipeline);
    let served = serve(stack);
    let mut client = served.client().await;
    client.send("1\n").await;
    let reply = client.line().await;
    sleep(100_000 * SECOND).await;
    client.send("2\n").await;
    let late = client.line().await;
    served.handle().shutdown_within(Duration::MAX);
    client.rest().await;
    drop(client);

    assert_eq!((&reply[..], &late[..]), ("1", "2"));
    assert_eq!(served.reason().await, EndReason::Drained);
    assert_eq!(served.handle().closed().await.drained, 1);
}

#[tokio::test(start_paused = true)]
async fn g6_no_time_at_all_ends_connections_at_once_and_is_no_panic() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(all(Duration::ZERO))
        .linger(Linger::default().time(Duration::ZERO).write(Duration::ZERO));

    for served in each_way(pipeline) {
        for text in ["", "half", "1\n1\n"] {
            let begun = Instant::now();
            let mut client = served.client().await;
            client.send(text).await;
            let end = served.end().await;
            drop(client);

            assert_ne!(end.reason(), EndReason::Panic, "{}", served.way());
            assert!(begun.elapsed() <= 2 * SECOND, "{} {end:?}", served.way());
        }
    }
}

/// A hook that is never ready.
#[derive(Clone)]
struct NeverReady;

impl Service<Connection<DuplexStream>> for NeverReady {
    type Response = Connection<DuplexStream>;
    type Error = BoxError;
    type Future = std::future::Ready<Result<Connection<DuplexStream>, BoxError>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Pending
    }

    fn call(&mut self, conn: Connection<DuplexStream>) -> Self::Future {
        ready(Ok(conn))
    }
}

#[tokio::test(start_paused = true)]
async fn the_pre_connect_deadline_covers_the_wait_for_the_hook() {
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(NeverReady))
        .service(Pipeline::new(Lines::default).service(service_fn(delayed)));
    let served = serve(stack);
    let begun = Instant::now();
    let client = served.client().await;

    let reason = served.reason().await;

    assert_eq!(reason, EndReason::PreConnectTimeout);
    assert_eq!(begun.elapsed(), 10 * SECOND);
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn b8_the_pre_connect_deadline_covers_the_hook() {
    let through = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&through);
    let slow = service_fn(|conn: Connection<DuplexStream>| async move {
        pending::<()>().await;
        Ok::<_, BoxError>(conn)
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(slow).deadline(5 * SECOND))
        .service_fn(move |_: Connection<DuplexStream>| {
            seen.store(true, Ordering::Relaxed);
            ready(Ok::<_, BoxError>(()))
        });
    let served = serve(stack);
    let begun = Instant::now();
    let client = served.client().await;

    let reason = served.reason().await;

    assert_eq!(reason, EndReason::PreConnectTimeout);
    assert_eq!(begun.elapsed(), 5 * SECOND);
    assert!(!through.load(Ordering::Relaxed));
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn the_pre_connect_deadline_is_over_once_the_hook_is_through() {
    let pass = service_fn(|conn: Connection<DuplexStream>| ready(Ok::<_, BoxError>(conn)));
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(pass).deadline(SECOND))
        .service(Pipeline::new(Lines::default).service(service_fn(delayed)));
    let served = serve(stack);
    let mut client = served.client().await;
    sleep(30 * SECOND).await;

    client.send("5\n").await;

    assert_eq!(client.line().await, "5");
}

#[tokio::test(start_paused = true)]
async fn b20_a_full_pre_connect_budget_evicts_the_oldest() {
    let begun = Instant::now();
    let slow = service_fn(move |conn: Connection<DuplexStream>| async move {
        sleep_until(begun + 8 * SECOND).await;
        Ok::<_, BoxError>(conn)
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(slow).pending(2))
        .service(Pipeline::new(Lines::default).service(service_fn(delayed)));
    let served = serve(stack);
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(served.client().await);
        sleep(SECOND).await;
    }

    let evicted = served.end().await;
    for client in &mut clients[1..] {
        client.send("0\n").await;
        assert_eq!(client.line().await, "0");
    }

    assert_eq!(evicted.reason(), EndReason::PreConnectEvicted);
    assert_eq!(evicted.duration(), 2 * SECOND);
    assert_eq!(served.handle().live(), 2);
}

/// Takes one unit of the budget that tokio gives a task for each turn. When the budget is spent,
/// everything else has to wait.
async fn costly(request: Bytes) -> Result<Bytes, BoxError> {
    tokio::task::consume_budget().await;
    Ok(request)
}

#[tokio::test(start_paused = true)]
async fn a_deadline_is_kept_whatever_the_turn_before_it_has_cost() {
    for requests in 100..150 {
        for served in each_way(Pipeline::new(Lines::default).service(service_fn(costly))) {
            let mut client = served.client().await;

            client.send("a\n".repeat(requests)).await;

            client.rest().await;
            let reason = served.reason().await;
            assert_eq!(
                reason,
                EndReason::IdleTimeout,
                "{}, {requests}",
                served.way()
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn half_a_frame_holds_a_drain_for_three_seconds_or_less() {
    for (begun_before, holds) in [(SECOND, 3), (28 * SECOND, 2)] {
        for served in each_way(Pipeline::new(Lines::default).service(service_fn(delayed))) {
            let mut client = served.client().await;
            client.send("ha").await;
            sleep(begun_before).await;
            let begun = Instant::now();

            served.handle().shutdown();

            assert!(client.rest().await.is_empty(), "{}", served.way());
            assert_eq!(begun.elapsed(), holds * SECOND, "{}", served.way());
            drop(client);
            assert_eq!(served.reason().await, EndReason::FrameTimeout);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_is_begun_in_a_drain_has_three_seconds_from_its_first_byte() {
    let drain = DrainDeadlines::default().next_frame(10 * SECOND);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(Deadlines::default().drain(drain));
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("0\n").await;
        assert_eq!(client.line().await, "0", "{}", served.way());

        served.handle().shutdown();
        sleep(8 * SECOND).await;
        client.send("ha").await;
        let begun = Instant::now();

        assert!(client.rest().await.is_empty(), "{}", served.way());
        assert_eq!(begun.elapsed(), 3 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::FrameTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn a_resting_pipeline_may_be_given_time_for_other_frames() {
    let drain = DrainDeadlines::default().next_frame(3 * SECOND);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(Deadlines::default().drain(drain));
    for asks in [true, false] {
        for served in each_way(pipeline.clone()) {
            let mut client = served.client().await;
            client.send("0\n").await;
            assert_eq!(client.line().await, "0", "{}", served.way());
            let begun = Instant::now();

            served.handle().shutdown();
            sleep(2 * SECOND).await;
            if asks {
                client.send("1\n2\n").await;
                sleep(4 * SECOND).await;
                client.send("0\n").await;
                assert_eq!(client.rest().await, ["1", "2", "0"], "{}", served.way());
            } else {
                assert!(client.rest().await.is_empty(), "{}", served.way());
                assert_eq!(begun.elapsed(), 3 * SECOND, "{}", served.way());
            }

            drop(client);
            assert_eq!(served.reason().await, EndReason::Drained);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_slow_call_a_draining_pipeline_still_waits_for_another_frame() {
    /// Wakes every second, so the task of its connection is polled, too.
    async fn step_by_step(line: Bytes) -> Result<Bytes, BoxError> {
        let seconds = String::from_utf8_lossy(&line).parse().unwrap_or(0);
        for _ in 0..seconds {
            sleep(SECOND).await;
        }
        Ok(line)
    }
    let drain = DrainDeadlines::default().next_frame(2 * SECOND);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(step_by_step))
        .deadlines(Deadlines::default().drain(drain));
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        client.send("5\n").await;
        sleep(SECOND / 2).await;

        served.handle().shutdown();
        assert_eq!(client.line().await, "5", "{}", served.way());
        sleep(SECOND).await;
        client.send("0\n").await;
        let begun = Instant::now();

        assert_eq!(client.rest().await, ["0"], "{}", served.way());
        assert_eq!(begun.elapsed(), 2 * SECOND, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::Drained);
    }
}

#[tokio::test(start_paused = true)]
async fn a_draining_pipeline_serves_no_longer_than_ten_times_the_time_for_a_frame() {
    let drain = DrainDeadlines::default().next_frame(SECOND);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(Deadlines::default().drain(drain));
    // With the second kind of pieces, a part of a frame has always arrived.
    for (first, pieces) in [("", "0\n"), ("0", "\n0")] {
        for served in each_way(pipeline.clone()) {
            let mut client = served.client().await;
            client.send("0\n").await;
            assert_eq!(client.line().await, "0", "{}", served.way());
            let begun = Instant::now();

            served.handle().shutdown();
            client.send(first).await;
            let mut served_for = Duration::ZERO;
            loop {
                sleep(SECOND / 2).await;
                let sent = client.0.write_all(pieces.as_bytes()).await;
                if sent.is_err() || client.line().await.is_empty() {
                    break;
                }
                served_for = begun.elapsed();
            }

            let way = served.way();
            assert!(served_for >= 9 * SECOND, "{way} {pieces:?}: {served_for:?}");
            assert!(
                served_for <= 10 * SECOND,
                "{way} {pieces:?}: {served_for:?}"
            );
            drop(client);
            assert_eq!(served.reason().await, EndReason::Drained);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_draining_pipeline_waits_for_the_first_frame_too() {
    let drain = DrainDeadlines::default().next_frame(2 * SECOND);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(delayed))
        .deadlines(Deadlines::default().drain(drain));
    for asks in [true, false] {
        for served in each_way(pipeline.clone()) {
            let mut client = served.client().await;
            sleep(SECOND).await;
            let begun = Instant::now();

            served.handle().shutdown();
            if asks {
                sleep(SECOND).await;
                assert_eq!(client.ask("0").await, "0", "{}", served.way());
            }

            assert!(client.rest().await.is_empty(), "{}", served.way());
            let ends = if asks { 3 } else { 2 };
            assert_eq!(begun.elapsed(), ends * SECOND, "{}", served.way());
            drop(client);
            assert_eq!(served.reason().await, EndReason::Drained);
        }
    }
}

/// A client that sends another request for each reply, so that the socket is never empty.
#[tokio::test]
async fn a_drain_answers_what_had_arrived_and_not_what_is_sent_later() {
    const IN_FLIGHT: usize = 2;
    const OUTSTANDING: usize = 5;
    let slow = service_fn(|line: Bytes| async {
        sleep(Duration::from_millis(5)).await;
        Ok::<_, BoxError>(line)
    });
    let pipeline = Pipeline::new(Lines::default).service(slow);
    for (served, address) in each_way_over_tcp(pipeline, IN_FLIGHT).await {
        let way = served.way();
        let client = TcpStream::connect(address).await.expect("it listens");
        let mut client = Client::new(client);
        client.send("x\n".repeat(OUTSTANDING)).await;
        assert_eq!(client.line().await, "x");

        served.handle().shutdown();
        let mut replies = 1;
        let until_closed = async {
            while client.0.write_all(b"x\n").await.is_ok() && client.line().await == "x" {
                replies += 1;
            }
        };
        let closed = timeout(5 * SECOND, until_closed).await;

        closed.unwrap_or_else(|_| panic!("{way}: it is still served"));
        assert!(replies >= OUTSTANDING, "{way}: {replies} replies");
        drop(client);
        assert_eq!(served.reason().await, EndReason::Drained);
    }
}

#[tokio::test(start_paused = true)]
async fn one_value_sets_the_times_of_hooks_too() {
    let hook = service_fn(|_: Connection<DuplexStream>| {
        std::future::pending::<Result<Connection<DuplexStream>, BoxError>>()
    });
    let drain = DrainDeadlines::default().pre_connect(2 * SECOND);
    let deadlines = Deadlines::default().pre_connect(7 * SECOND).drain(drain);
    for (drains, seconds, reason) in [
        (false, 7.0, EndReason::PreConnectTimeout),
        (true, 2.0, EndReason::Drained),
    ] {
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(hook).deadlines(deadlines))
            .service(Pipeline::new(Lines::default).service(service_fn(delayed)));
        let served = serve(stack);
        let client = served.client().await;
        support::settled().await;
        let begun = Instant::now();
        if drains {
            served.handle().shutdown();
        }

        let ended = served.reason().await;

        let elapsed = begun.elapsed().as_secs_f64().round();
        assert_eq!((ended, elapsed), (reason, seconds));
        drop(client);
    }
}

#[tokio::test(start_paused = true)]
async fn g6_the_largest_number_there_is_is_no_limit_and_no_panic() {
    const ALL: usize = usize::MAX;
    let limits = Limits::default()
        .max_frame(ALL)
        .high_mark(ALL)
        .push_queue(ALL)
        .messages(ALL)
        .read_ahead(ALL);
    let pipeline = Pipeline::new(Lines::default)
        .make_service(service_fn(|peer: Peer<Bytes>| async move {
            peer.send(Bytes::from_static(b"hello")).await?;
            Ok::<_, BoxError>(service_fn(delayed))
        }))
        .limits(limits)
        .linger(Linger::default().bytes(ALL));
    for served in [
        serve(pipeline.clone()),
        serve(pipeline.clone().in_flight(ALL)),
        serve(pipeline.multiplexed(ALL)),
    ] {
        let mut client = served.client().await;
        assert_eq!(client.line().await, "hello");
        assert_eq!(client.ask("1").await, "1");
        drop(client);
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}
