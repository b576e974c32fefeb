//! tokio-tower pipelines requests and keeps their order, but it has gaps, and the crate fills them.

mod support;

use std::future::{Ready, pending, ready};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::{BoxError, EndReason, Peer, Pipeline, Reply};

use support::{Client, Clients, Ends, each_way, serve_stream};

const MS: Duration = Duration::from_millis(1);

/// Counts how often writing is shut down.
struct Watched(DuplexStream, Arc<AtomicUsize>);

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        assert_eq!(self.1.load(Ordering::Relaxed), 0, "nothing comes behind it");
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Waits the requested number of milliseconds. `fail` fails and `close` closes at once, `hang`
/// never completes.
async fn act(request: Bytes) -> Result<Reply<Bytes>, BoxError> {
    match &request[..] {
        b"hang" => pending().await,
        b"fail" => Err("failed".into()),
        b"close" => Ok(Reply::from(request).close()),
        digits => {
            sleep(MS * String::from_utf8_lossy(digits).parse().unwrap_or(0)).await;
            Ok(request.into())
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_stream_is_shut_down_at_the_end() {
    for multiplexed in [false, true] {
        let shut_down = Arc::new(AtomicUsize::new(0));
        let (client, io) = tokio::io::duplex(4096);
        let io = Watched(io, Arc::clone(&shut_down));
        let pipeline = Pipeline::new(Lines::default).service(service_fn(act));
        let served = if multiplexed {
            serve_stream(io, pipeline.multiplexed(8))
        } else {
            serve_stream(io, pipeline.in_flight(8))
        };
        let mut client = Client::new(client);
        client.send("1\n").await;
        client.finish().await;

        let replies = client.rest().await;

        assert_eq!(replies, ["1"]);
        assert_eq!(served.reason().await, EndReason::PeerClosed);
        assert_eq!(shut_down.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_fails_drops_no_finished_reply() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(act));

    for served in each_way(pipeline).into_iter().skip(1) {
        let mut client = served.client().await;
        client.send("0\n0\n0\nfail\n").await;

        assert_eq!(client.rest().await, ["0", "0", "0"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::ServiceError);
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_is_bad_drops_no_finished_reply_and_no_call_in_flight() {
    let pipeline = Pipeline::new(|| Lines::default().max_line(8)).service(service_fn(act));

    for served in each_way(pipeline).into_iter().skip(1) {
        let mut client = served.client().await;
        client.send("0\n0\n20\n123456789\n").await;

        assert_eq!(client.rest().await, ["0", "0", "20"], "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::FrameTooLarge);
    }
}

#[tokio::test(start_paused = true)]
async fn requests_in_flight_are_bounded() {
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&begun);
    let hang = service_fn(move |_: Bytes| {
        counted.fetch_add(1, Ordering::Relaxed);
        pending::<Result<Bytes, BoxError>>()
    });

    for served in each_way(Pipeline::new(Lines::default).service(hang))
        .into_iter()
        .skip(1)
    {
        begun.store(0, Ordering::Relaxed);
        let mut client = served.client().await;
        client.send("x\n".repeat(1000)).await;
        sleep(MS).await;

        assert_eq!(begun.load(Ordering::Relaxed), 8, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn f5_an_idle_connection_holds_no_permit_of_a_shared_limit() {
    let limited = ServiceBuilder::new()
        .concurrency_limit(1)
        .service(service_fn(act));

    for served in each_way(Pipeline::new(Lines::default).service(limited)) {
        let mut idle = Vec::new();
        for _ in 0..4 {
            let mut client = served.client().await;
            client.send("0\n").await;
            client.line().await;
            idle.push(client);
        }
        let begun = Instant::now();
        let mut active = served.client().await;
        active.send("1\n").await;

        assert_eq!(active.line().await, "1", "{}", served.way());
        assert_eq!(begun.elapsed(), MS, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn f6_a_peer_that_does_not_read_holds_no_permit_of_a_shared_limit() {
    let service = service_fn(|request: Bytes| async move {
        sleep(MS).await;
        Ok::<_, BoxError>(vec![request; 1000])
    });
    let limited = ServiceBuilder::new().concurrency_limit(2).service(service);

    for served in each_way(Pipeline::new(Lines::default).service(limited)) {
        let mut stalled = served.client().await;
        let line = "x".repeat(999) + "\n";
        stalled.send(line.repeat(20)).await;
        sleep(1000 * MS).await;
        let begun = Instant::now();
        let mut healthy = served.client().await;
        healthy.send("a\n").await;

        assert_eq!(healthy.line().await, "a", "{}", served.way());
        assert_eq!(begun.elapsed(), MS, "{}", served.way());
    }
}

/// Is ready for one request, then not for half a minute.
struct ReadyOnce(Option<Pin<Box<Sleep>>>);

impl Service<Bytes> for ReadyOnce {
    type Response = Bytes;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Bytes, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match &mut self.0 {
            None => Poll::Ready(Ok(())),
            Some(rest) => rest.as_mut().poll(cx).map(Ok),
        }
    }

    fn call(&mut self, request: Bytes) -> Self::Future {
        self.0 = Some(Box::pin(sleep(30_000 * MS)));
        Box::pin(async move {
            sleep(MS).await;
            Ok(request)
        })
    }
}

fn ready_once(_: Peer<Bytes>) -> Ready<Result<ReadyOnce, BoxError>> {
    ready(Ok(ReadyOnce(None)))
}

#[tokio::test(start_paused = true)]
async fn a_finished_reply_is_flushed_while_the_service_is_not_ready() {
    let pipeline = Pipeline::new(Lines::default).make_service(service_fn(ready_once));

    for served in each_way(pipeline) {
        let begun = Instant::now();
        let mut client = served.client().await;
        client.send("a\nb\n").await;

        assert_eq!(client.line().await, "a", "{}", served.way());
        assert_eq!(begun.elapsed(), MS, "{}", served.way());
        assert_eq!(client.line().await, "b", "{}", served.way());
        assert_eq!(begun.elapsed(), 30_001 * MS, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_reset_is_noticed_while_the_service_is_not_ready() {
    for multiplexed in [false, true] {
        let io = tokio_test::io::Builder::new()
            .read(b"a\nb\n")
            .write(b"a\n")
            .wait(100 * MS)
            .read_error(io::ErrorKind::ConnectionReset.into())
            .build();
        let pipeline = Pipeline::new(Lines::default).make_service(service_fn(ready_once));
        let served = if multiplexed {
            serve_stream(io, pipeline.multiplexed(8))
        } else {
            serve_stream(io, pipeline.in_flight(8))
        };

        let end = served.end().await;

        assert_eq!(end.reason(), EndReason::PeerReset);
        assert!(end.duration() < 200 * MS, "{:?}", end.duration());
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_hangs_cannot_hold_a_closing_connection_open() {
    let pipeline = Pipeline::new(|| Lines::default().max_line(8)).service(service_fn(act));

    for served in each_way(pipeline).into_iter().skip(1) {
        for (last, reason) in [
            ("close", EndReason::ServiceClosed),
            ("fail", EndReason::ServiceError),
        ] {
            let begun = Instant::now();
            let mut client = served.client().await;
            client.send(format!("{last}\nhang\nhang\n")).await;

            client.rest().await;
            drop(client);

            assert_eq!(served.reason().await, reason, "{}", served.way());
            assert_eq!(begun.elapsed(), Duration::ZERO, "{}", served.way());
        }
    }
}
