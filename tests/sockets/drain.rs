//! A drain has times of its own for each state of a connection, and its report says how each
//! connection ended.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tower::service_fn;
use tower_tcp::deadline::{Deadlines, DrainDeadlines, MinRate};
use tower_tcp::frame::Lines;
use tower_tcp::{EndReason, Pipeline};

use crate::over::{Io, Over, TRANSPORTS, Transport};
use crate::support::{Ends, until};
use crate::{NET, SHORT, Speaks, Way, lines, small};

/// Longer than it takes to bring all connections into their state.
const LONG: Duration = Duration::from_secs(3);

/// Returns the first bytes of a connection, or `None` if its protocol does not have the state.
type First = fn(Speaks) -> Option<Vec<u8>>;

/// The name of a state in which a drain finds a connection, the deadlines, the bytes that lead
/// there, and the reason of the end.
type State = (&'static str, Deadlines, First, EndReason);

fn answered(speaks: Speaks) -> Option<Vec<u8>> {
    let is_last = matches!(speaks, Speaks::Upgraded | Speaks::Raw);
    (!is_last).then(|| speaks.request("small"))
}

fn large(speaks: Speaks) -> Option<Vec<u8>> {
    Some(speaks.request("large"))
}

fn hanging(speaks: Speaks) -> Option<Vec<u8>> {
    Some(speaks.request("hang"))
}

/// Half of a frame, of a head, or of a preface.
fn half(speaks: Speaks) -> Option<Vec<u8>> {
    let whole = match speaks {
        Speaks::Lines | Speaks::Http1 => speaks.request("small"),
        Speaks::Http2 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        Speaks::Upgraded | Speaks::Raw => return None,
    };
    Some(whole[..whole.len() / 2].to_vec())
}

fn half_a_body(speaks: Speaks) -> Option<Vec<u8>> {
    let post = b"POST /read HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nst";
    (speaks == Speaks::Http1).then(|| post.to_vec())
}

fn states() -> [State; 7] {
    let drain = DrainDeadlines::default();
    let drain = drain.last_request(SHORT).goodbye(SHORT);
    let with = |drain| Deadlines::default().drain(drain);
    let slow = with(drain.frame(None)).min_rate(MinRate::new(1_000_000, LONG));
    let writes = with(drain).write(LONG);
    let in_half = with(drain.frame(SHORT));
    let in_body = with(drain.body(SHORT));
    [
        ("rests", with(drain), answered, EndReason::Drained),
        ("half", in_half, half, EndReason::FrameTimeout),
        ("half a body", in_body, half_a_body, EndReason::BodyTimeout),
        ("slow half", slow, half, EndReason::SlowSender),
        ("takes nothing", writes, large, EndReason::WriteTimeout),
        ("reads slowly", slow, large, EndReason::SlowReader),
        ("hangs", with(drain), hanging, EndReason::DrainDeadline),
    ]
}

/// Drains a server whose connection is in this state.
async fn drain(mut way: Way, mut peer: Box<dyn Io>, first: &[u8], state: &str, ends: EndReason) {
    let name = format!("{}, {state}", way.name());
    let is_blocked = first == way.speaks.request("large");
    let handle = way.over.served.handle().clone();
    peer.write_all(first).await.expect("the server reads");
    peer.flush().await.expect("the server reads");
    until(|| {
        handle
            .connections()
            .any(|live| match live.unacknowledged() {
                unacknowledged if is_blocked => unacknowledged > Some(10_000),
                _ => live.bytes_read() == first.len() as u64,
            })
    })
    .await;

    match ends {
        EndReason::DrainDeadline => handle.shutdown_within(SHORT),
        _ => handle.shutdown(),
    }

    if !is_blocked {
        let read = timeout(NET, peer.read_to_end(&mut Vec::new())).await;
        // If it is cut off, this is an error.
        let _read = read.expect("the server closes");
    }
    let report = timeout(NET, way.over.served.report()).await;
    let report = report.expect("it ends");
    assert_eq!(way.over.served.reasons(), [ends], "{name}");
    let counts = (report.drained, report.timed_out, report.aborted);
    let expected = match ends {
        EndReason::Drained => (1, 0, 0),
        EndReason::DrainDeadline => (0, 0, 1),
        _ => (0, 1, 0),
    };
    assert_eq!(counts, expected, "{name}");
    // Long before the deadline of a shutdown.
    assert!(report.duration < 4 * LONG, "{name}: {:?}", report.duration);
}

#[tokio::test]
async fn each_connection_has_the_time_of_its_state_and_is_reported_as_it_ended() {
    let mut cases = Vec::new();
    for (state, deadlines, first, ends) in states() {
        for transport in TRANSPORTS {
            for way in Way::each(transport, small, deadlines).await {
                if let Some(first) = first(way.speaks) {
                    // Connects before any state begins: a handshake takes time, and a state may
                    // last only a short time.
                    let peer = way.over.connect().await;
                    cases.push(async move { drain(way, peer, &first, state, ends).await });
                }
            }
        }
    }

    join_all(cases).await;
}

#[tokio::test]
async fn half_a_handshake_holds_a_drain_for_a_second() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(lines));
    let mut over = Over::serve(Transport::Tls, "lines", small(), pipeline).await;
    let mut client = TcpStream::connect(over.addr()).await.expect("it listens");
    // The beginning of a record with a `ClientHello`.
    let half = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    client.write_all(&half).await.expect("it is open");
    let handle = over.served.handle().clone();
    until(|| handle.live() == 1).await;

    handle.shutdown();

    let report = timeout(NET, over.served.report()).await.expect("it ends");
    assert_eq!((report.drained, report.timed_out), (1, 0));
    assert_eq!(over.served.reasons(), [EndReason::Drained]);
    assert!(report.duration >= Duration::from_secs(1));
    assert!(report.duration < LONG, "{:?}", report.duration);
}
