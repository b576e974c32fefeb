//! Pipeline over a stream that does everything a stream may do: short reads and writes, pending
//! without a reason, an error at any operation. No finished reply is lost, nothing is out of order,
//! and every connection ends for the right reason.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

mod support;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::time::sleep;
use tower::service_fn;
use tower_tcp::frame::Lines;
use tower_tcp::{BoxError, End, EndReason, Pipeline, Reply};

use support::{Ends, serve_stream};

/// A stream that keeps the rules and is as unhelpful as they allow.
struct Faulty {
    io: DuplexStream,
    random: u64,
    /// The first operation that fails, counted from 0, and the number of operations so far.
    fails_at: usize,
    operations: Arc<AtomicUsize>,
}

impl Faulty {
    fn next(&mut self) -> u64 {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Decides whether an operation proceeds, and how many bytes it may take.
    fn poll_operation(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.next().is_multiple_of(4) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.operations.fetch_add(1, Ordering::Relaxed) >= self.fails_at {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(1 + usize::try_from(self.next() % 16).unwrap()))
    }
}

impl AsyncRead for Faulty {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let most = ready!(self.poll_operation(cx))?;
        let mut bytes = [0; 16];
        let mut part = ReadBuf::new(&mut bytes[..most.min(buf.remaining())]);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut part))?;
        buf.put_slice(part.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Faulty {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let most = ready!(self.poll_operation(cx))?;
        Pin::new(&mut self.io).poll_write(cx, &buf[..most.min(buf.len())])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_operation(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_operation(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// A request: its action, and how many milliseconds it takes.
#[derive(Clone, Copy, Debug)]
enum Request {
    Echo(u8),
    Silent(u8),
    Twice(u8),
    Fail(u8),
    Close(u8),
    /// Not a request, but a line that is too long.
    Bad,
}

impl Request {
    fn line(self, n: usize) -> String {
        match self {
            Self::Echo(delay) => format!("e {delay} {n}\n"),
            Self::Silent(delay) => format!("s {delay} {n}\n"),
            Self::Twice(delay) => format!("t {delay} {n}\n"),
            Self::Fail(delay) => format!("f {delay} {n}\n"),
            Self::Close(delay) => format!("c {delay} {n}\n"),
            Self::Bad => "x".repeat(40) + "\n",
        }
    }
}

async fn act(request: Bytes) -> Result<Reply<Bytes>, BoxError> {
    let text = String::from_utf8_lossy(&request).into_owned();
    let delay = text.split(' ').nth(1).unwrap().parse().unwrap();
    sleep(Duration::from_millis(delay)).await;
    match text.as_bytes()[0] {
        b's' => Ok(Reply::none()),
        b't' => Ok(vec![request.clone(), request].into()),
        b'f' => Err("failed".into()),
        b'c' => Ok(Reply::from(request).close()),
        _ => Ok(request.into()),
    }
}

/// Returns the replies that a client must see, and the expected end reason.
fn oracle(requests: &[Request]) -> (String, EndReason) {
    let mut replies = String::new();
    for (n, request) in requests.iter().enumerate() {
        let line = request.line(n);
        match request {
            Request::Echo(_) => replies += &line,
            Request::Silent(_) => {}
            Request::Twice(_) => replies += &line.repeat(2),
            Request::Fail(_) => return (replies, EndReason::ServiceError),
            Request::Close(_) => return (replies + &line, EndReason::ServiceClosed),
            Request::Bad => return (replies, EndReason::FrameTooLarge),
        }
    }
    (replies, EndReason::PeerClosed)
}

/// With several requests in flight, a later fault of the input may be recorded before the end that
/// an earlier request causes. The first reason wins.
fn is_right(seen: EndReason, first: EndReason, requests: &[Request], in_flight: usize) -> bool {
    let read_ahead = match seen {
        EndReason::FrameTooLarge => requests.iter().any(|last| matches!(last, Request::Bad)),
        EndReason::PeerClosed => first.is_orderly(),
        _ => false,
    };
    seen == first || (in_flight > 1 && read_ahead)
}

struct Outcome {
    replies: String,
    end: End,
    operations: usize,
}

/// Runs a connection to its end. The client sends all requests at once, then only reads.
fn run(requests: &[Request], seed: u64, in_flight: usize, fails_at: usize) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let (client, io) = tokio::io::duplex(64);
        let operations = Arc::new(AtomicUsize::new(0));
        let io = Faulty {
            io,
            random: seed | 1,
            fails_at,
            operations: Arc::clone(&operations),
        };
        let pipeline = Pipeline::new(|| Lines::default().max_line(32)).service(service_fn(act));
        let served = if in_flight == 1 {
            serve_stream(io, pipeline)
        } else {
            serve_stream(io, pipeline.in_flight(in_flight))
        };
        let text: String = requests
            .iter()
            .enumerate()
            .map(|(n, request)| request.line(n))
            .collect();
        let (mut read, mut write) = tokio::io::split(client);
        let sending = async move {
            // After an end that the server chose, nothing reads the rest.
            drop(write.write_all(text.as_bytes()).await);
            drop(write.shutdown().await);
        };
        let reading = async move {
            let mut replies = Vec::new();
            drop(read.read_to_end(&mut replies).await);
            String::from_utf8(replies).unwrap()
        };
        let (_, replies, end) = tokio::join!(sending, reading, served.end());
        while served.handle().live() > 0 {
            tokio::task::yield_now().await;
        }
        Outcome {
            replies,
            end,
            operations: operations.load(Ordering::Relaxed),
        }
    })
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let request = prop_oneof![
        8 => (0..20_u8).prop_map(Request::Echo),
        2 => (0..20_u8).prop_map(Request::Silent),
        2 => (0..20_u8).prop_map(Request::Twice),
        1 => (0..20_u8).prop_map(Request::Fail),
        1 => (0..20_u8).prop_map(Request::Close),
        1 => Just(Request::Bad),
    ];
    prop::collection::vec(request, 0..30)
}

proptest! {
    #[test]
    fn every_request_is_answered_in_order_up_to_the_end_whatever_the_stream_does(
        requests in requests(),
        seed: u64,
        in_flight in 1..6_usize,
    ) {
        let (replies, reason) = oracle(&requests);

        let outcome = run(&requests, seed, in_flight, usize::MAX);

        prop_assert_eq!(outcome.replies, replies);
        let right = is_right(outcome.end.reason(), reason, &requests, in_flight);
        prop_assert!(right, "{:?}", outcome.end);
    }
}

#[test]
fn a_stream_may_fail_at_any_operation() {
    let requests = [
        Request::Echo(3),
        Request::Twice(0),
        Request::Silent(1),
        Request::Echo(0),
        Request::Echo(7),
        Request::Close(0),
        Request::Echo(0),
    ];
    let (replies, reason) = oracle(&requests);

    for in_flight in [1, 4] {
        for seed in 1..20 {
            let whole = run(&requests, seed, in_flight, usize::MAX);
            assert!(is_right(whole.end.reason(), reason, &requests, in_flight));

            for fails_at in 0..whole.operations {
                let cut = run(&requests, seed, in_flight, fails_at);

                let context = format!("in_flight {in_flight}, seed {seed}, at {fails_at}");
                assert!(replies.starts_with(&cut.replies), "{context}");
                // A failure after the last reply changes nothing. An earlier one means that the
                // peer is gone.
                let expected = match cut.end.reason() {
                    EndReason::ServiceClosed | EndReason::PeerClosed => cut.replies == replies,
                    EndReason::PeerReset => true,
                    _ => false,
                };
                assert!(expected, "{context}: {:?} {}", cut.end, cut.replies);
            }
        }
    }
}
