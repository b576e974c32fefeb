//! The minimum rate: the connection of a peer that sends or takes single bytes is closed, and that
//! of a peer that is only slow is not.

mod support;

use std::convert::Infallible;
use std::future::ready;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::time::{Instant, sleep};
use tower::{Layer, service_fn};
use tower_tcp::close::Linger;
use tower_tcp::deadline::{DeadlineLayer, Deadlines, MinRate};
use tower_tcp::frame::Lines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::testkit::{Served, serve, serve_with};
use tower_tcp::{BoxError, Connection, ConnectionService, EndReason, Pipeline, Server};

use support::{Client, Clients, Ends, each_way};

const SECOND: Duration = Duration::from_secs(1);

/// A minimum rate of 100 bytes in each 5 s. No other deadline is reached.
fn deadlines() -> Deadlines {
    Deadlines::default()
        .frame(None)
        .write(None)
        .min_rate(MinRate::new(100, 5 * SECOND))
}

/// Returns a reply of 256 KiB.
fn reply() -> Bytes {
    Bytes::from(vec![b'x'; 256 * 1024])
}

/// Serves a pipeline in each way of dispatch.
fn pipelines() -> [Served; 3] {
    let pipeline = Pipeline::new(|| Lines::default().max_line(1 << 20))
        .service(service_fn(|line: Bytes| {
            let reply = if line == "all" { reply() } else { line };
            ready(Ok::<_, BoxError>(reply))
        }))
        .deadlines(deadlines());
    each_way(pipeline)
}

fn http() -> impl ConnectionService<DuplexStream> + Clone {
    Http::new(service_fn(|_: Request<RequestBody>| {
        ready(Ok::<_, Infallible>(Response::new(Full::new(reply()))))
    }))
    .deadlines(deadlines())
}

/// Sends `bytes` once per second until the connection ends. Returns the number of seconds.
async fn drip(client: &mut Client<DuplexStream>, bytes: &[u8]) -> u64 {
    let begun = Instant::now();
    loop {
        client.send(bytes).await;
        let mut block = [0; 1];
        let read = tokio::time::timeout(SECOND, client.0.read(&mut block)).await;
        if let Ok(read) = read {
            assert_eq!(read.unwrap_or(0), 0, "nothing is replied");
            return begun.elapsed().as_secs();
        }
    }
}

/// Takes up to `bytes` bytes at intervals of `every` until the end of the stream. Counts them in
/// `read`.
async fn sip(
    io: &mut (impl AsyncReadExt + Unpin),
    bytes: usize,
    every: Duration,
    read: &mut usize,
) {
    let mut block = vec![0; bytes];
    loop {
        match io.read(&mut block).await {
            Ok(n) if n > 0 => *read += n,
            _ => return,
        }
        sleep(every).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_drips_in_ends_its_connection_after_a_window() {
    for served in pipelines() {
        let mut client = served.client().await;
        sleep(20 * SECOND).await;

        assert_eq!(drip(&mut client, b"x").await, 5, "{}", served.way());
        assert_eq!(served.reason().await, EndReason::SlowSender);
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_comes_slowly_enough_is_answered() {
    for served in pipelines() {
        let mut client = served.client().await;
        for _ in 0..60 {
            client.send([b'x'; 20]).await;
            sleep(SECOND).await;
        }
        client.send("\n").await;

        assert_eq!(client.line().await.len(), 60 * 20, "{}", served.way());
        // Between frames there is no minimum rate.
        sleep(60 * SECOND).await;
        client.send("a\n").await;
        assert_eq!(client.line().await, "a", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn many_short_frames_have_no_least_rate() {
    for served in pipelines() {
        let mut client = served.client().await;
        // Each read ends within a frame.
        for _ in 0..60 {
            client.send("a\nb").await;
            sleep(SECOND).await;
        }
        client.send("\n").await;

        for _ in 0..60 {
            client.line().await;
        }
        assert_eq!(client.line().await, "b", "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_drips_in_ends_its_connection_after_a_window() {
    let served = serve(http());
    let mut client = served.client().await;
    client.send("GET / HTTP/1.1\r\nx: ").await;

    assert_eq!(drip(&mut client, b"x").await, 5);
    assert_eq!(served.reason().await, EndReason::SlowSender);
}

const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

#[tokio::test(start_paused = true)]
async fn a_reply_that_is_taken_byte_by_byte_ends_its_connection() {
    let all = service_fn(|mut conn: Connection<DuplexStream>| async move {
        conn.write_all(&reply()).await?;
        Ok::<_, BoxError>(())
    });
    let [one, in_flight, multiplexed] = pipelines();
    for (way, served, request) in [
        ("one at a time", one, "all\n"),
        ("in flight", in_flight, "all\n"),
        ("multiplexed", multiplexed, "all\n"),
        ("http", serve(http()), GET),
        ("raw", serve(DeadlineLayer::new(deadlines()).layer(all)), ""),
    ] {
        let mut client = served.client().await;
        let begun = Instant::now();
        client.send(request).await;
        let mut read = 0;

        let reason = tokio::select! {
            () = sip(client.0.get_mut(), 1, SECOND, &mut read) => unreachable!("more is written"),
            reason = served.reason() => reason,
        };

        assert_eq!(reason, EndReason::SlowReader, "{way}");
        assert_eq!(begun.elapsed().as_secs(), 5, "{way}");
        assert!(read <= 6, "{way}: {read}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_rest_of_a_reply_that_is_taken_byte_by_byte_ends_its_connection() {
    // The close begins at once, and the reply is too long for its time.
    let served = serve(
        Pipeline::new(Lines::default)
            .service(service_fn(|_: Bytes| {
                ready(Ok::<_, BoxError>(tower_tcp::Reply::from(reply()).close()))
            }))
            .deadlines(deadlines()),
    );
    let mut client = served.client().await;
    client.send("all\n").await;
    let mut read = 0;

    let reason = tokio::select! {
        () = sip(client.0.get_mut(), 1, SECOND, &mut read) => unreachable!("more is written"),
        reason = served.reason() => reason,
    };

    assert_eq!(reason, EndReason::SlowReader);
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_is_taken_slowly_enough_arrives() {
    for served in pipelines() {
        let mut client = served.client().await;
        client.send("all\n").await;
        let mut read = 0;

        sip(client.0.get_mut(), 3_000, 2 * SECOND, &mut read).await;

        assert_eq!(read, reply().len() + 1, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_in_which_no_output_waits_belongs_to_no_window() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(|line: Bytes| {
            let reply = if line == "all" { reply() } else { line };
            ready(Ok::<_, BoxError>(reply))
        }))
        .deadlines(deadlines().min_rate(MinRate::new(1 << 20, 5 * SECOND)));
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        assert_eq!(client.ask("a").await, "a");
        // Each reply waits for half a second, at the beginning and at the end of a window.
        for silence in [4 * SECOND, Duration::ZERO] {
            client.send("all\n").await;
            sleep(SECOND / 2).await;
            let reply = client.line().await;
            assert_eq!(reply.len(), 256 * 1024, "{}", served.way());
            sleep(silence).await;
        }
    }
}

/// The server asks the system what the peer has taken, because the system's buffers take megabytes
/// at once.
#[tokio::test]
async fn a_reader_of_a_socket_is_measured_by_what_it_takes() {
    let rate = MinRate::new(64 * 1024, SECOND / 2);
    let reply = Bytes::from(vec![b'x'; 16 << 20]);
    let stack = Pipeline::new(Lines::default)
        .service(service_fn(move |_: Bytes| {
            ready(Ok::<_, BoxError>(reply.clone()))
        }))
        .deadlines(Deadlines::default().min_rate(rate));
    let server = Server::bind("127.0.0.1:0").await.expect("a free port");
    let served = serve_with(server, (), stack);
    let addr = served.handle().local_addrs()[0].tcp().expect("of TCP");
    let mut client = TcpStream::connect(addr).await.expect("it listens");
    client.write_all(b"all\n").await.expect("it is served");

    let mut read = 0;

    let reason = tokio::select! {
        () = sip(&mut client, 16, SECOND / 10, &mut read) => unreachable!("more is written"),
        reason = tokio::time::timeout(20 * SECOND, served.reason()) => reason,
    };

    assert_eq!(reason.ok(), Some(EndReason::SlowReader));
}

/// For what the peer has not taken, the system reports the memory, which is more than the bytes.
#[tokio::test]
async fn a_reader_of_many_small_writes_over_a_unix_socket_is_not_slow() {
    let rate = MinRate::new(100, SECOND);
    let stack = Pipeline::new(Lines::default)
        .service(service_fn(|line: Bytes| ready(Ok::<_, BoxError>(line))))
        .deadlines(Deadlines::default().min_rate(rate));
    let dir = tempfile::tempdir().expect("there is room");
    let path = dir.path().join("sock");
    let server = Server::bind(format!("unix:{}", path.display())).await;
    let served = serve_with(server.expect("the path is free"), (), stack);
    let client = UnixStream::connect(&path).await.expect("it listens");
    let (mut reading, mut writing) = client.into_split();
    let asking = tokio::spawn(async move {
        // One small reply after the other, until the system holds no more.
        while writing.write_all(b"a line of twenty b.\n").await.is_ok() {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
    });
    let mut read = 0;

    sleep(SECOND / 2).await;

    // In 2 s the peer takes too little for the system to accept more output, which would be in
    // large blocks.
    let reason = tokio::select! {
        () = sip(&mut reading, 100, SECOND / 10, &mut read) => unreachable!("more is written"),
        reason = tokio::time::timeout(2 * SECOND, served.reason()) => reason,
    };

    assert_eq!(reason.ok(), None, "after {read} bytes");
    asking.abort();
}

#[tokio::test]
async fn a_close_has_the_minimum_rate_of_the_deadlines_that_were_set_last() {
    let rate = Deadlines::default().min_rate(MinRate::new(64 * 1024, SECOND / 4));
    let none = Deadlines::default();
    for (first, last, expected) in [(none, rate, true), (rate, none, false)] {
        let pipeline = Pipeline::new(Lines::default)
            .service(service_fn(|_: Bytes| {
                ready(Ok::<_, BoxError>(tower_tcp::Reply::from(reply()).close()))
            }))
            .deadlines(first)
            .linger(Linger::default().time(SECOND / 4))
            .deadlines(last);
        let server = Server::bind("127.0.0.1:0").await.expect("a free port");
        let served = serve_with(server, (), pipeline);
        let addr = served.handle().local_addrs()[0].tcp().expect("of TCP");
        let socket = TcpSocket::new_v4().expect("there is IPv4");
        socket.set_recv_buffer_size(16 * 1024).expect("it is taken");
        let mut client = socket.connect(addr).await.expect("it listens");
        client.write_all(b"all\n").await.expect("it is served");

        let reason = tokio::time::timeout(2 * SECOND, served.reason()).await;

        let expected = expected.then_some(EndReason::SlowReader);
        assert_eq!(reason.ok(), expected);
    }
}
