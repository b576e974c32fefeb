//! Close: the last bytes arrive, whatever the peer does, and a peer that leaves costs nothing.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

mod support;

use std::future::{pending, poll_fn, ready};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufWriter, DuplexStream};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tower::service_fn;
use tower_tcp::bind::{Socket, SocketOptions};
use tower_tcp::close::Linger;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::{Served, serve, serve_with};
use tower_tcp::{BoxError, Connection, ConnectionPhase, EndReason, Pipeline, Reply, Server};

use support::{Client, Clients, Ends, each_way};

const SECOND: Duration = Duration::from_secs(1);

/// The limit of every wait on the real clock.
const NET: Duration = Duration::from_secs(60);

const MEGABYTE: usize = 1_000_000;

/// Connects to the server's only address.
async fn connect(served: &Served<()>) -> TcpStream {
    let addr = served.handle().local_addrs()[0].tcp().expect("it is TCP");
    TcpStream::connect(addr).await.expect("the server listens")
}

/// Closes a socket with a reset.
fn reset(client: TcpStream) {
    SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .expect("the socket is open");
    drop(client);
}

/// Waits until every resource of the connections has been released.
async fn all_given_back(served: &Served<()>) {
    let given_back = async {
        while served.handle().live() > 0 || served.handle().limit().in_use() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(NET, given_back).await.expect("all is given back");
}

/// The moment at which the client resets the connection.
#[derive(Clone, Copy, Debug)]
enum Reset {
    BeforeRequest,
    MidRequest,
    WhileServiceRuns,
    MidResponse,
    AfterResponse,
}

async fn d1(when: Reset) {
    let in_hand = Arc::new(AtomicUsize::new(0));
    let held = Arc::clone(&in_hand);
    let large = Bytes::from(vec![b'x'; 20 * MEGABYTE]);
    let service = service_fn(move |request: Bytes| {
        let guard = InHand::begin(&held);
        let large = large.clone();
        async move {
            let _guard = guard;
            match &request[..] {
                b"hang" => pending().await,
                b"large" => Ok::<_, BoxError>(large),
                _ => Ok(request),
            }
        }
    });
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let pipeline = Pipeline::new(Lines::default).service(service);
    let served = serve_with(server, (), pipeline);

    for trial in 0..200 {
        let mut client = connect(&served).await;
        match when {
            Reset::BeforeRequest => {}
            Reset::MidRequest => client.write_all(b"half of a li").await.unwrap(),
            Reset::WhileServiceRuns => {
                client.write_all(b"hang\n").await.unwrap();
                let begun = async {
                    while in_hand.load(Ordering::Relaxed) == 0 {
                        tokio::task::yield_now().await;
                    }
                };
                timeout(NET, begun).await.unwrap();
            }
            Reset::MidResponse => {
                client.write_all(b"large\n").await.unwrap();
                client.read_exact(&mut [0; 1000]).await.unwrap();
            }
            Reset::AfterResponse => {
                client.write_all(b"a\n").await.unwrap();
                client.read_exact(&mut [0; 2]).await.unwrap();
            }
        }
        reset(client);

        let reason = timeout(NET, served.reason()).await.unwrap();

        assert_eq!(reason, EndReason::PeerReset, "{when:?}, trial {trial}");
    }
    all_given_back(&served).await;
    assert_eq!(in_hand.load(Ordering::Relaxed), 0);
}

/// Counts requests in progress.
struct InHand(Arc<AtomicUsize>);

impl InHand {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn d1_a_reset_before_the_request_costs_nothing() {
    d1(Reset::BeforeRequest).await;
}

#[tokio::test]
async fn d1_a_reset_within_the_request_costs_nothing() {
    d1(Reset::MidRequest).await;
}

#[tokio::test]
async fn d1_a_reset_while_the_service_runs_drops_the_call() {
    d1(Reset::WhileServiceRuns).await;
}

#[tokio::test]
async fn d1_a_reset_within_the_response_costs_nothing() {
    d1(Reset::MidResponse).await;
}

#[tokio::test]
async fn d1_a_reset_behind_the_response_costs_nothing() {
    d1(Reset::AfterResponse).await;
}

#[tokio::test]
async fn d2_a_half_closed_connection_gets_all_its_replies() {
    let slow = service_fn(|request: Bytes| async move {
        tokio::task::yield_now().await;
        Ok::<_, BoxError>(request)
    });
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let served = serve_with(server, (), Pipeline::new(Lines::default).service(slow));
    let mut client = Client::new(connect(&served).await);
    client.send("1\n2\n3\n").await;
    client.finish().await;

    let replies = client.rest().await;

    assert_eq!(replies, ["1", "2", "3"]);
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

/// Sends a request, and more input that stays unread. Returns how many bytes of the reply arrived
/// before the end.
async fn fetch_with_unread_input(served: &Served<()>, unread: usize) -> std::io::Result<usize> {
    let (mut read, mut write) = connect(served).await.into_split();
    let sending = tokio::spawn(async move {
        write.write_all(b"get\n").await?;
        write.write_all(&vec![b'x'; unread]).await?;
        write.shutdown().await
    });
    let mut reply = Vec::new();
    let received = timeout(NET, read.read_to_end(&mut reply)).await;
    sending.await.expect("it does not panic")?;
    received.expect("the stream ends")
}

#[tokio::test]
async fn d7_a_close_with_unread_input_delivers_every_byte() {
    let megabyte = service_fn(|_: Bytes| {
        let reply = Reply::from(Bytes::from(vec![b'x'; MEGABYTE - 1]));
        ready(Ok::<_, BoxError>(reply.close()))
    });
    let linger = Linger::default().bytes(4 * MEGABYTE);
    let pipeline = Pipeline::new(Lines::default).service(megabyte);
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let served = serve_with(server, (), pipeline.linger(linger));

    for trial in 0..20 {
        let received = fetch_with_unread_input(&served, 2 * MEGABYTE).await;

        assert_eq!(received.unwrap(), MEGABYTE, "trial {trial}");
        assert_eq!(served.reason().await, EndReason::ServiceClosed);
    }
}

#[tokio::test]
async fn d7_a_raw_service_that_closes_delivers_every_byte() {
    let raw = service_fn(|mut conn: Connection<Socket>| async move {
        conn.write_all(&vec![b'x'; MEGABYTE]).await?;
        conn.close(Linger::default().bytes(4 * MEGABYTE)).await?;
        Ok::<_, BoxError>(())
    });
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let served = serve_with(server, (), raw);

    for trial in 0..20 {
        let received = fetch_with_unread_input(&served, 2 * MEGABYTE).await;

        assert_eq!(received.unwrap(), MEGABYTE, "trial {trial}");
        let end = served.end().await;
        assert_eq!(end.bytes_written(), MEGABYTE as u64);
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_close_is_waited_for_two_seconds() {
    let farewell = service_fn(|line: Bytes| ready(Ok::<_, BoxError>(Reply::from(line).close())));

    for served in each_way(Pipeline::new(Lines::default).service(farewell)) {
        let begun = Instant::now();
        let mut client = served.client().await;
        client.send("bye\n").await;
        let replies = client.rest().await;
        let at_the_end = begun.elapsed();

        let reason = served.reason().await;

        assert_eq!(replies, ["bye"], "{}", served.way());
        assert_eq!(at_the_end, Duration::ZERO, "{}", served.way());
        assert_eq!(begun.elapsed(), 2 * SECOND, "{}", served.way());
        assert_eq!(reason, EndReason::ServiceClosed);
    }
}

/// When the close begins, some output is not acknowledged yet. Soon after, all of it is.
#[tokio::test]
async fn a_peer_that_takes_the_rest_and_does_not_close_is_waited_for_once() {
    let reply = vec![b'x'; 200_000];
    let farewell = service_fn(move |_: Bytes| {
        let reply = Reply::from(Bytes::from(reply.clone()));
        ready(Ok::<_, BoxError>(reply.close()))
    });
    let pipeline = Pipeline::new(Lines::default).service(farewell);
    let options = SocketOptions::default().send_buffer(MEGABYTE);
    let builder = Server::builder().socket_options(options);
    let server = builder.listen("127.0.0.1:0").bind().await.unwrap();
    let served = serve_with(server, (), pipeline.linger(Linger::default().time(SECOND)));
    let mut client = connect(&served).await;
    client.write_all(b"bye\n").await.unwrap();
    let closes = || {
        let mut open = served.handle().connections();
        open.any(|live| live.phase() == ConnectionPhase::Closing)
    };
    let closing = async {
        while !closes() {
            tokio::task::yield_now().await;
        }
    };
    timeout(NET, closing).await.expect("it closes");
    let begun = Instant::now();

    let mut replies = Vec::new();
    client.read_to_end(&mut replies).await.unwrap();
    let reason = served.reason().await;

    assert_eq!(replies.len(), 200_001);
    assert_eq!(reason, EndReason::ServiceClosed);
    // If the first check came after a second, the close would take two seconds.
    assert!(begun.elapsed() < SECOND * 9 / 5, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_closes_is_not_waited_for() {
    let farewell = service_fn(|line: Bytes| ready(Ok::<_, BoxError>(Reply::from(line).close())));
    let served = serve(Pipeline::new(Lines::default).service(farewell));
    let begun = Instant::now();
    let mut client = served.client().await;
    client.send("bye\n").await;
    client.rest().await;
    client.finish().await;

    served.reason().await;

    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_sends_on_is_read_up_to_a_bound() {
    let farewell = service_fn(|line: Bytes| ready(Ok::<_, BoxError>(Reply::from(line).close())));
    let linger = Linger::default().bytes(100_000).time(3600 * SECOND);
    let pipeline = Pipeline::new(Lines::default).service(farewell);
    let served = serve(pipeline.linger(linger));
    let mut client = served.client().await;
    client.send("bye\n").await;
    client.rest().await;

    let mut sent = 0;
    while client.0.write_all(&[b'x'; 1000]).await.is_ok() {
        sent += 1000;
    }

    // The 64 KiB that were still in the memory stream at the close count as sent.
    assert!((100_000..=170_000).contains(&sent), "{sent}");
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn d4_a_peer_that_reads_nothing_of_the_end_is_let_go() {
    let farewell = service_fn(|_: Bytes| {
        let reply = Reply::from(Bytes::from(vec![b'x'; MEGABYTE]));
        ready(Ok::<_, BoxError>(reply.close()))
    });

    for served in each_way(Pipeline::new(Lines::default).service(farewell)) {
        let begun = Instant::now();
        let mut client = served.client().await;
        client.send("bye\n").await;

        let reason = served.reason().await;

        assert_eq!(begun.elapsed(), 30 * SECOND, "{}", served.way());
        assert_eq!(reason, EndReason::WriteTimeout, "{}", served.way());
    }
}

/// On the paused clock, a task that never waits would stop the time.
#[tokio::test(start_paused = true)]
async fn a_close_that_may_take_almost_no_time_does_not_spin() {
    let raw = service_fn(|conn: Connection<DuplexStream>| async move {
        let mut conn = conn.map_io(|io| BufWriter::with_capacity(MEGABYTE, io));
        conn.write_all(&vec![b'x'; MEGABYTE / 2]).await?;
        let mut closing = pin!(conn.close(Linger::default().write(Duration::from_nanos(1))));
        let mut polls = 0;
        poll_fn(|cx| {
            polls += 1;
            assert!(polls < 100, "it spins");
            closing.as_mut().poll(cx)
        })
        .await?;
        Ok::<_, BoxError>(())
    });
    let served = serve(raw);
    let _client = served.stream().await;

    assert_eq!(served.reason().await, EndReason::WriteTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_raw_service_that_is_done_has_closed_and_one_that_read_to_the_end_was_left() {
    let raw = service_fn(|mut conn: Connection<DuplexStream>| async move {
        if conn.read_u8().await? == b'r' {
            conn.read_to_end(&mut Vec::new()).await?;
        }
        Ok::<_, BoxError>(())
    });
    let served = serve(raw);

    for (text, reason) in [
        ("read", EndReason::PeerClosed),
        ("done", EndReason::ServiceClosed),
        ("", EndReason::Truncated),
    ] {
        let mut client = served.client().await;
        client.send(text).await;
        client.finish().await;

        assert_eq!(served.reason().await, reason, "{text}");
    }
}
