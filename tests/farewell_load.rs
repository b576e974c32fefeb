//! Under load, over each kind of socket, the farewell of a drain is the last frame, and no client
//! takes it for a reply. One protocol is like memcached's, whose clients count replies. The other
//! is like MQTT's, in which the server also sends frames that nobody requested.

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/over.rs"]
mod over;
mod support;

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::future::join_all;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_util::codec::{Decoder, Encoder};
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{InFlight, Multiplexed};
use tower_tcp::{BoxError, EndReason, Peer, Pipeline, Server};

use over::{Over, Stack, TRANSPORTS};
use support::{Clients, Ends, each_way};

/// The limit of every wait on the real clock.
const NET: Duration = Duration::from_secs(60);

const CLIENTS: usize = 16;

/// The number of replies, to all clients together, after which the drain begins.
const WARM: usize = 2_000;

/// Loads a server, and drains it. Returns all that each client has read.
///
/// Each client sends `request(0)`, `request(1)` and so on without end, and never waits for a reply.
/// The drain begins when [`WARM`] more replies have been counted.
async fn drained_under_load(
    mut over: Over,
    request: fn(u32) -> Vec<u8>,
    replies: &AtomicUsize,
) -> Vec<Vec<u8>> {
    let before = replies.load(Ordering::Relaxed);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let io = over.connect().await;
        clients.push(tokio::spawn(load(io, request)));
    }
    let warm = async {
        while replies.load(Ordering::Relaxed) < before + WARM {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(NET, warm).await.expect("requests are answered");

    let report = timeout(NET, over.served.shutdown()).await;
    let report = report.expect("it ends").expect("in good order");

    assert_eq!(report.aborted, 0);
    let read = timeout(NET, join_all(clients)).await;
    let read = read.expect("the clients see the end").into_iter();
    read.map(|read| read.expect("the end comes without a reset"))
        .collect()
}

/// Sends requests until the server closes. Returns what the server has sent.
async fn load<Io: AsyncRead + AsyncWrite>(io: Io, request: fn(u32) -> Vec<u8>) -> Vec<u8> {
    let (mut reads, mut writes) = tokio::io::split(io);
    let send = async {
        for n in 0.. {
            if writes.write_all(&request(n)).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        pending::<()>().await
    };
    let mut read = Vec::new();
    let all = async { reads.read_to_end(&mut read).await.expect("no reset") };
    tokio::select! {
        () = send => {}
        _ = all => {}
    }
    read
}

/// Runs a pipeline in each way of dispatch over each kind of socket, and hands what each client has
/// read to a check, which is told whether replies keep their order.
async fn each_way_and_transport<F, K, T>(
    pipeline: impl FnOnce(Arc<AtomicUsize>) -> Pipeline<F, K, T>,
    request: fn(u32) -> Vec<u8>,
    check: impl Fn(Vec<u8>, bool),
) where
    Pipeline<F, K, T>: Stack,
    Pipeline<F, K, T, InFlight>: Stack,
    Pipeline<F, K, T, Multiplexed>: Stack,
{
    let replies = Arc::default();
    let pipeline = pipeline(Arc::clone(&replies));
    for transport in TRANSPORTS {
        let ways = Over::each_way(transport, Server::builder, pipeline.clone()).await;
        for (over, in_order) in ways.into_iter().zip([true, true, false]) {
            for read in drained_under_load(over, request, &replies).await {
                check(read, in_order);
            }
        }
    }
}

// A protocol whose clients count replies.

#[tokio::test]
async fn a_client_that_counts_its_replies_never_takes_the_farewell_for_one() {
    let request = |n: u32| format!("get {n}\r\n").into_bytes();
    let pipeline = |replies: Arc<AtomicUsize>| {
        let get = service_fn(move |line: Bytes| {
            let replies = Arc::clone(&replies);
            async move {
                if line.ends_with(b"7") {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                replies.fetch_add(1, Ordering::Relaxed);
                Ok::<_, Infallible>(line)
            }
        });
        Pipeline::new(Lines::crlf)
            .service(get)
            .farewell(|_, _| Bytes::from("SERVER_ERROR shutting down"))
    };
    let check = |read: Vec<u8>, in_order: bool| {
        let read = String::from_utf8(read).expect("text");
        let replies = read.strip_suffix("SERVER_ERROR shutting down\r\n");
        let replies = replies.expect("the farewell is last").lines();
        let mut replies: Vec<u32> = replies
            .map(|reply| reply[4..].parse().expect("a reply's number"))
            .collect();
        if !in_order {
            replies.sort_unstable();
        }
        assert!(replies.iter().copied().eq(0..replies.len() as u32));
    };
    each_way_and_transport(pipeline, request, check).await;
}

// A protocol with frames that nobody requested.

const CONNECT: u8 = 0x10;
const CONNACK: u8 = 0x20;
const PUBLISH: u8 = 0x32;
const PUBACK: u8 = 0x40;
const PINGREQ: u8 = 0xc0;
const PINGRESP: u8 = 0xd0;
const DISCONNECT: u8 = 0xe0;

/// A packet as MQTT has them: a type, a length of one byte, and as many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet(u8, Bytes);

impl Packet {
    fn new(kind: u8, body: impl Into<Vec<u8>>) -> Self {
        Self(kind, Bytes::from(body.into()))
    }

    fn bytes(&self) -> Vec<u8> {
        let len = u8::try_from(self.1.len()).expect("a short packet");
        [&[self.0, len], &*self.1].concat()
    }
}

/// The codec. It learns the version of the protocol from the client's first packet.
#[derive(Default)]
struct Mqtt {
    version: Option<u8>,
}

impl Decoder for Mqtt {
    type Item = Packet;
    type Error = BoxError;

    fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Packet>, BoxError> {
        let &[kind, len, ..] = &**input else {
            return Ok(None);
        };
        if input.len() < 2 + usize::from(len) {
            return Ok(None);
        }
        input.advance(2);
        let body = input.split_to(len.into()).freeze();
        if kind == CONNECT {
            self.version = body.first().copied();
        }
        Ok(Some(Packet(kind, body)))
    }
}

impl Encoder<Packet> for Mqtt {
    type Error = BoxError;

    /// Before version 5 a server does not send `DISCONNECT`.
    fn encode(&mut self, packet: Packet, output: &mut BytesMut) -> Result<(), BoxError> {
        if packet.0 != DISCONNECT || self.version == Some(5) {
            output.put_slice(&packet.bytes());
        }
        Ok(())
    }
}

/// Returns the farewell, with the reason codes of MQTT 5 (section 3.14.2.1).
fn disconnect(reason: EndReason) -> Packet {
    let code = match reason {
        EndReason::Drained => 0x8b,     // server shutting down
        EndReason::IdleTimeout => 0x8d, // keep alive timeout
        EndReason::MaxAge => 0xa0,      // maximum connect time
        _ => 0x80,                      // unspecified error
    };
    Packet::new(DISCONNECT, [code])
}

/// Makes a server that sends each client's messages back to it, and counts them.
macro_rules! mqtt {
    ($count:expr) => {{
        let count: Arc<AtomicUsize> = $count;
        let make = service_fn(move |peer: Peer<Packet>| {
            let count = Arc::clone(&count);
            async move {
                let session = service_fn(move |Packet(kind, body): Packet| {
                    let (peer, count) = (peer.clone(), Arc::clone(&count));
                    async move {
                        Ok::<_, BoxError>(match kind {
                            CONNECT => {
                                let keepalive = Duration::from_secs(body[1].into());
                                peer.set_idle(keepalive.mul_f32(1.5));
                                Some(Packet::new(CONNACK, [0]))
                            }
                            PUBLISH => {
                                count.fetch_add(1, Ordering::Relaxed);
                                // In a drain it may be too late to send this. Without a `PUBACK`,
                                // the client publishes it again.
                                let id = body.slice(..4);
                                match peer.send(Packet(PUBLISH, body)).await {
                                    Ok(()) => Some(Packet(PUBACK, id)),
                                    Err(_closed) => None,
                                }
                            }
                            PINGREQ => Some(Packet::new(PINGRESP, [])),
                            _ => None,
                        })
                    }
                });
                Ok::<_, Infallible>(session)
            }
        });
        Pipeline::new(Mqtt::default)
            .make_service(make)
            .farewell(|_, reason| disconnect(reason))
    }};
}

#[tokio::test]
async fn a_client_that_gets_frames_at_any_time_gets_the_farewell_last() {
    let request = |n: u32| match n {
        0 => Packet::new(CONNECT, [5, 60]).bytes(),
        n => Packet::new(PUBLISH, n.to_be_bytes()).bytes(),
    };
    let check = |read: Vec<u8>, in_order: bool| {
        let mut read = BytesMut::from(&*read);
        let mut packets = Vec::new();
        while let Some(packet) = Mqtt::default().decode(&mut read).expect("it is whole") {
            packets.push(packet);
        }
        assert!(read.is_empty(), "no half of a packet");
        assert_eq!(packets.pop(), Some(Packet::new(DISCONNECT, [0x8b])));
        let of = |kind| {
            let some = packets.iter().filter(move |packet| packet.0 == kind);
            some.map(|packet| packet.1.clone()).collect::<Vec<_>>()
        };
        let (mut published, mut acknowledged) = (of(PUBLISH), of(PUBACK));
        assert_eq!(packets.len(), 1 + published.len() + acknowledged.len());
        if !in_order {
            published.sort_unstable();
            acknowledged.sort_unstable();
        }
        assert_eq!(published, acknowledged);
        let numbers = (1..=acknowledged.len() as u32).map(|n| n.to_be_bytes());
        assert!(
            acknowledged
                .into_iter()
                .eq(numbers.map(|n| Bytes::copy_from_slice(&n)))
        );
    };
    each_way_and_transport(|count| mqtt!(count), request, check).await;
}

#[tokio::test(start_paused = true)]
async fn the_farewell_says_why_the_connection_ends_in_the_clients_version() {
    let pipeline = mqtt!(Arc::default());
    let aged = Deadlines::default().max_age(Duration::from_secs(50));
    for served in each_way(pipeline.deadlines(aged)) {
        for (version, keepalive, rest) in [
            (5, 10, vec![DISCONNECT, 1, 0x8d]),
            (5, 60, vec![DISCONNECT, 1, 0xa0]),
            (4, 10, vec![]),
        ] {
            let mut client = served.stream().await;
            let connect = Packet::new(CONNECT, [version, keepalive]).bytes();
            client.write_all(&connect).await.expect("it is open");
            let mut read = Vec::new();
            client.read_to_end(&mut read).await.expect("no reset");

            let expected = [&[CONNACK, 1, 0], &*rest].concat();
            assert_eq!(read, expected, "{}", served.way());
        }
    }
}
