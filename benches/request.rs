//! What a request costs in process, without a kernel: a pipeline beside a hand-written loop over the same in-memory stream.
//!
//! `cargo bench --bench request` prints nanoseconds a request for 1, 16 and 128 requests ahead of the answers, for each way of dispatch, and the
//! ratio to the loop: the median of five rounds, in which all of them take turns, so that a drift of the machine hits all alike.

use std::convert::Infallible;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::Instant;
use tower::service_fn;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::{self, Connector};
use tower_tcp::{BoxError, Connection, Pipeline, Server};

const LINE: &[u8] = b"0123456789abcdef\n";
const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_millis(300);

/// The ceiling: no framing library, one read and one write a wake-up.
async fn by_hand(mut conn: Connection<DuplexStream>) -> Result<(), BoxError> {
    let (mut input, mut output) = (BytesMut::with_capacity(8192), BytesMut::with_capacity(8192));
    while conn.read_buf(&mut input).await? > 0 {
        while let Some(at) = memchr::memchr(b'\n', &input) {
            output.extend_from_slice(&input[..=at]);
            input.advance(at + 1);
        }
        conn.write_all(&output).await?;
        output.clear();
    }
    Ok(())
}

async fn echo(line: Bytes) -> Result<Bytes, Infallible> {
    Ok(line)
}

/// Nanoseconds a request, with so many ahead.
async fn load(connector: &Connector, ahead: usize) -> std::io::Result<f64> {
    let mut client = connector.connect().await?;
    let batch = LINE.repeat(ahead);
    let mut answers = vec![0; batch.len()];
    let (begun, mut requests) = (Instant::now(), 0);
    while begun.elapsed() < TIME {
        client.write_all(&batch).await?;
        client.read_exact(&mut answers).await?;
        requests += ahead;
    }
    Ok(begun.elapsed().as_nanos() as f64 / requests as f64)
}

macro_rules! servers {
    ($($name:literal: $stack:expr,)*) => {
        vec![$({
            let (listener, connector) = testkit::memory();
            tokio::spawn(Server::from_listener(listener).serve($stack).into_future());
            ($name, connector)
        },)*]
    };
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let servers = servers! {
        "by hand": service_fn(by_hand),
        "one at a time": Pipeline::new(Lines::default).service(service_fn(echo)),
        "in_flight(64)": Pipeline::new(Lines::default).service(service_fn(echo)).in_flight(64),
        "multiplexed(64)": Pipeline::new(Lines::default).service(service_fn(echo)).multiplexed(64),
    };
    println!("{:16}{:>8}{:>12}{:>8}", "", "ahead", "ns/request", "ratio");
    for ahead in [1, 16, 128] {
        let mut times = vec![Vec::new(); servers.len()];
        for _ in 0..ROUNDS {
            for (n, (_, connector)) in servers.iter().enumerate() {
                times[n].push(load(connector, ahead).await?);
            }
        }
        for times in &mut times {
            times.sort_by(f64::total_cmp);
        }
        let base = times[0][ROUNDS / 2];
        for ((name, _), times) in servers.iter().zip(&times) {
            let median = times[ROUNDS / 2];
            println!("{name:16}{ahead:>8}{median:>12.0}{:>8.2}", median / base);
        }
    }
    Ok(())
}
