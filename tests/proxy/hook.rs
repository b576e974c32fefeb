//! The hook, in a server in memory whose peers have TCP addresses.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tower::{Service, ServiceBuilder};
use tower_tcp::bind::{Incoming, Listener};
use tower_tcp::networks::Networks;
use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
use tower_tcp::proxy::{
    Command, ProxyHeader, ProxyHeaderError, ProxyProtocol, Untrusted, Versions,
};
use tower_tcp::testkit::{Served, serve_with};
use tower_tcp::{Address, BoxError, Connection, End, EndReason, Server};

use crate::vectors::{self, Verdict, tcp4, tlv, v2};

const PROXY: &str = "10.0.0.1:1000";
const LINE: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n";

fn tcp(text: &str) -> Address {
    Address::from(text.parse::<std::net::SocketAddr>().expect("an address"))
}

/// The end of a stream, behind its last segment.
#[derive(Clone, Copy)]
enum Then {
    Eof,
    Reset,
    Silence,
}

/// A stream from which each read takes bytes of one segment.
struct Segments {
    left: VecDeque<Bytes>,
    then: Then,
    taken: Arc<AtomicUsize>,
}

impl AsyncRead for Segments {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(segment) = self.left.front_mut() else {
            return match self.then {
                Then::Eof => Poll::Ready(Ok(())),
                Then::Reset => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                Then::Silence => Poll::Pending,
            };
        };
        let n = segment.len().min(buf.remaining());
        buf.put_slice(&segment.split_to(n));
        if !segment.has_remaining() {
            self.left.pop_front();
        }
        self.taken.fetch_add(n, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

struct Peers<Io = Segments>(mpsc::Receiver<(Io, Address)>);

impl<Io: Send + Unpin + 'static> Listener for Peers<Io> {
    type Io = Io;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Io>>> {
        match ready!(self.0.poll_recv(cx)) {
            Some((io, peer)) => Poll::Ready(Ok(Incoming::new(io, peer, tcp("10.0.0.9:443")))),
            None => Poll::Pending,
        }
    }

    fn local_addrs(&self) -> Vec<Address> {
        Vec::new()
    }
}

/// The connection as the service behind the hook sees it.
struct Seen {
    peer: Address,
    client: Address,
    header: Option<ProxyHeader>,
    data: Vec<u8>,
}

struct Run {
    served: Served<mpsc::Sender<(Segments, Address)>>,
    seen: mpsc::Receiver<Seen>,
    taken: Arc<AtomicUsize>,
}

impl Run {
    fn of<H, Io>(hook: H) -> Self
    where
        H: Service<Connection<Segments>, Response = Connection<Io>> + Clone + Send + 'static,
        H::Error: Into<BoxError>,
        H::Future: Send,
        Io: AsyncRead + Unpin + Send + 'static,
    {
        let (peers, listener) = mpsc::channel(1);
        let (told, seen) = mpsc::channel(1);
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(hook))
            .service_fn(move |mut conn: Connection<Io>| {
                let told = told.clone();
                async move {
                    let mut data = Vec::new();
                    let info = conn.info().clone();
                    conn.read_to_end(&mut data).await?;
                    let seen = Seen {
                        peer: info.peer_addr().clone(),
                        client: info.client_addr().clone(),
                        header: info.get().cloned(),
                        data,
                    };
                    told.try_send(seen)
                        .map_err(|_| BoxError::from("the test is over"))
                }
            });
        let served = serve_with(Server::from_listener(Peers(listener)), peers, stack);
        let taken = Arc::default();
        Self {
            served,
            seen,
            taken,
        }
    }

    async fn connect(&self, peer: Address, segments: &[&[u8]], then: Then) {
        self.taken.store(0, Ordering::Relaxed);
        let segments = segments.iter().filter(|segment| !segment.is_empty());
        let segments = Segments {
            left: segments
                .map(|segment| Bytes::copy_from_slice(segment))
                .collect(),
            then,
            taken: Arc::clone(&self.taken),
        };
        let peers = self.served.connector();
        let sent = peers.send((segments, peer)).await;
        assert!(sent.is_ok(), "the server accepts");
    }

    async fn end(&self) -> End {
        self.served.ended().await.expect("the connection ends")
    }

    /// Serves a connection from the proxy to its end.
    async fn serve(&mut self, segments: &[&[u8]]) -> (End, Option<Seen>) {
        self.connect(tcp(PROXY), segments, Then::Eof).await;
        (self.end().await, self.seen.try_recv().ok())
    }
}

fn trusting() -> ProxyProtocol {
    ProxyProtocol::trusting(Networks::parse(["10.0.0.0/8"]).expect("a network"))
}

fn header_error(end: &End) -> Option<ProxyHeaderError> {
    let err: &dyn std::error::Error = end.error()?;
    err.downcast_ref().copied()
}

#[tokio::test(start_paused = true)]
async fn each_vector_gets_its_verdict_in_any_two_segments_and_byte_by_byte() {
    let mut run = Run::of(trusting().max_len(65_551));
    let data = b"data\r\n of the client";
    for vector in vectors::all() {
        let bytes = &vector.bytes;
        // The longest vector consists mostly of zeros, so a few cuts are enough there.
        let cuts = (0..=bytes.len()).filter(|cut| *cut < 300 || cut % 5000 == 0);
        let mut ways: Vec<Vec<&[u8]>> = cuts
            .map(|cut| vec![&bytes[..cut], &bytes[cut..], &data[..]])
            .collect();
        ways.push(Iterator::chain(bytes.chunks(1), data.chunks(1)).collect());
        let all = [bytes, &data[..]].concat();
        ways.push(vec![&all]);
        for way in ways {
            let what = format!("{} in {} segments", vector.name, way.len());
            let (end, seen) = run.serve(&way).await;
            if let Verdict::Refused(err) = vector.verdict {
                assert_eq!(end.reason(), EndReason::ProxyHeader, "{what}");
                assert_eq!(header_error(&end), Some(err), "{what}");
                assert!(seen.is_none(), "{what}");
                continue;
            }
            let seen = seen.unwrap_or_else(|| panic!("{what}: {end:?}"));
            let client = match vector.verdict {
                Verdict::Client(source, _) => source,
                _ => PROXY,
            };
            assert_eq!(
                (seen.peer, seen.client),
                (tcp(PROXY), tcp(client)),
                "{what}"
            );
            assert_eq!(seen.data, data, "{what}");
            assert!(seen.header.is_some(), "{what}");
            assert_eq!(end.bytes_read(), data.len() as u64, "{what}");
            assert_eq!(end.reason(), EndReason::PeerClosed, "{what}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn b10_long_tlvs_byte_by_byte_cost_as_much_for_each_byte_as_short_ones() {
    let mut run = Run::of(trusting().max_len(65_551));
    let (short, long) = (2_000, 64_000);
    let mut least = async |length: usize| {
        let tlvs = [0xe0, 0, 2, 1, 2].repeat(length / 5);
        let header = tcp4(&[&tlvs]);
        let bytes: Vec<_> = header.chunks(1).collect();
        let mut least = Duration::MAX;
        for _ in 0..5 {
            let before = cpu_time();
            let (end, seen) = run.serve(&bytes).await;
            least = least.min(cpu_time() - before);
            assert_eq!(end.reason(), EndReason::PeerClosed);
            assert_eq!(seen.expect("it is served").client, tcp("192.0.2.1:56324"));
        }
        least / u32::try_from(length).expect("a short header")
    };

    let (short, long) = (least(short).await, least(long).await);

    // Work that grows with the square would be 32 times as much.
    assert!(
        long < 4 * short,
        "a byte costs {short:?}, and {long:?} of a long one"
    );
}

/// Returns the time that this thread has run, which other programs do not change.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.try_into().expect("it does not run backwards")
}

#[tokio::test(start_paused = true)]
async fn an_untrusted_peer_is_refused_before_anything_is_read() {
    let mut run = Run::of(trusting());
    for peer in ["192.0.2.9:1", "[2001:db8::1]:1", "[::a00:1]:1"] {
        run.connect(tcp(peer), &[LINE], Then::Silence).await;
        let end = run.end().await;
        assert_eq!(end.reason(), EndReason::Rejected);
        assert_eq!(header_error(&end), Some(ProxyHeaderError::Untrusted));
        assert_eq!(run.taken.load(Ordering::Relaxed), 0);
        assert!(run.seen.try_recv().is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn the_bytes_of_a_direct_peer_are_data_even_if_they_are_a_header() {
    let mut run = Run::of(trusting().untrusted(Untrusted::Direct));
    for data in [LINE, b"hello", b""] {
        run.connect(tcp("192.0.2.9:1"), &[data], Then::Eof).await;
        let end = run.end().await;
        let seen = run.seen.try_recv().expect("it is served");
        assert_eq!(end.reason(), EndReason::PeerClosed);
        assert_eq!(
            (seen.client, seen.data),
            (tcp("192.0.2.9:1"), data.to_vec())
        );
        assert!(seen.header.is_none());
    }
    // From a trusted peer a header is still mandatory.
    let (end, _) = run.serve(&[b"hello"]).await;
    assert_eq!(header_error(&end), Some(ProxyHeaderError::Absent));
}

#[tokio::test(start_paused = true)]
async fn an_ipv4_mapped_peer_is_trusted_as_the_ipv4_address() {
    let run = Run::of(trusting());
    run.connect(tcp("[::ffff:10.0.0.1]:1"), &[LINE], Then::Eof)
        .await;
    assert_eq!(run.end().await.reason(), EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn a_version_that_is_not_accepted_is_refused_by_its_first_bytes() {
    let v2 = tcp4(&[]);
    let both = [(LINE, Versions::V1, 6), (&v2[..], Versions::V2, 12)];
    for (header, versions, _) in both {
        let (end, seen) = Run::of(trusting().versions(versions))
            .serve(&[header])
            .await;
        assert_eq!(end.reason(), EndReason::PeerClosed);
        assert_eq!(seen.expect("it is served").client, tcp("192.0.2.1:56324"));
    }
    for ((header, _, certain), (_, others, _)) in both.iter().zip(both.iter().rev()) {
        let run = Run::of(trusting().versions(*others));
        let bytes: Vec<_> = header.chunks(1).collect();
        run.connect(tcp(PROXY), &bytes, Then::Silence).await;
        assert_eq!(
            header_error(&run.end().await),
            Some(ProxyHeaderError::Version)
        );
        assert_eq!(run.taken.load(Ordering::Relaxed), *certain);
    }
}

#[tokio::test(start_paused = true)]
async fn a_header_may_be_as_long_as_the_limit_and_no_longer() {
    let header = tcp4(&[&tlv(0x04, &[0; 4096 - 16 - 12 - 3])]);
    assert_eq!(header.len(), 4096);
    let (end, seen) = Run::of(trusting()).serve(&[&header]).await;
    assert!(seen.is_some(), "{end:?}");

    let run = Run::of(trusting().max_len(4095));
    // The announced length is enough for the verdict.
    run.connect(tcp(PROXY), &[&header[..16]], Then::Silence)
        .await;
    let end = run.end().await;
    assert_eq!(end.reason(), EndReason::ProxyHeader);
    assert_eq!(header_error(&end), Some(ProxyHeaderError::TooLong(4095)));
    assert!(end.duration() < Duration::from_millis(10));
}

#[tokio::test(start_paused = true)]
async fn no_more_is_read_than_the_longest_header_needs() {
    let endless = vec![b'f'; 100_000];
    for (begins, most) in [
        (&b"PROXY UNKNOWN "[..], 536),
        (&v2(0x21, 0x11, &[&[0; 4000]])[..16], 16 + 4000),
        (&v2(0x20, 0x00, &[])[..], 536),
        (b"\r\n\r\n", 536),
    ] {
        let all = [begins, &endless].concat();
        let run = Run::of(trusting());
        run.connect(tcp(PROXY), &[&all], Then::Silence).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        let refused = run.served.reasons() == [EndReason::ProxyHeader];
        let taken = run.taken.load(Ordering::Relaxed);
        // A connection that is served is read to its end by the service.
        assert!(
            if refused {
                taken <= most
            } else {
                taken == all.len()
            },
            "{taken}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_before_its_first_byte_has_closed_in_good_order() {
    let mut run = Run::of(trusting());
    let (end, seen) = run.serve(&[]).await;
    assert_eq!(end.reason(), EndReason::PeerClosed);
    assert!(end.error().is_none() && seen.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_header_that_the_peer_does_not_complete_is_refused() {
    let mut run = Run::of(trusting());
    for header in [LINE, &tcp4(&[&tlv(0x05, b"id")])] {
        for cut in 1..header.len() {
            let (end, seen) = run.serve(&[&header[..cut]]).await;
            assert_eq!(end.reason(), EndReason::ProxyHeader, "at {cut}");
            assert_eq!(
                header_error(&end),
                Some(ProxyHeaderError::Truncated),
                "at {cut}"
            );
            assert!(seen.is_none());
        }
    }
    run.connect(tcp(PROXY), &[&LINE[..9]], Then::Reset).await;
    assert_eq!(run.end().await.reason(), EndReason::PeerReset);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_complete_its_header_in_time_is_gone_on_time() {
    for begun in [&b""[..], &LINE[..9], &tcp4(&[])[..20]] {
        let run = Run::of(trusting());
        let started = Instant::now();
        run.connect(tcp(PROXY), &[begun], Then::Silence).await;
        assert_eq!(run.end().await.reason(), EndReason::PreConnectTimeout);
        assert_eq!(started.elapsed().as_secs(), 10);
    }
}

#[tokio::test(start_paused = true)]
async fn b9_a_header_that_drips_in_does_not_put_the_deadline_off() {
    let (peers, listener) = mpsc::channel(1);
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(trusting()))
        .service_fn(async |_: Connection<_>| Ok::<_, BoxError>(()));
    let served = serve_with(Server::from_listener(Peers(listener)), (), stack);
    let (mut client, io) = tokio::io::duplex(100);
    peers.send((io, tcp(PROXY))).await.expect("it is open");
    let started = Instant::now();

    for byte in &LINE[..10] {
        client.write_u8(*byte).await.expect("it is open");
        sleep(Duration::from_millis(999)).await;
    }

    let end = served.ended().await.expect("the connection ends");
    assert_eq!(end.reason(), EndReason::PreConnectTimeout);
    assert_eq!(started.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_second_hook_judges_the_sender_that_the_first_header_names() {
    let inner = b"PROXY TCP4 203.0.113.7 198.51.100.1 7 443\r\n";
    for (sender, expected) in [("10.0.0.2", Some("203.0.113.7:7")), ("192.0.2.1", None)] {
        let outer = format!("PROXY TCP4 {sender} 198.51.100.1 56324 443\r\n");
        let mut run = Run::of(trusting().chain(trusting()));
        let (end, seen) = run.serve(&[outer.as_bytes(), inner, b"data"]).await;
        match expected {
            Some(client) => assert_eq!(seen.expect("it is served").client, tcp(client)),
            None => assert_eq!(end.reason(), EndReason::Rejected),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_table_of_connections_has_the_client_and_the_header() {
    let run = Run::of(trusting());
    run.connect(
        tcp(PROXY),
        &[&tcp4(&[&tlv(0x02, b"a.test")])],
        Then::Silence,
    )
    .await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    let handle = run.served.handle();
    let live = handle.connections().next().expect("it is served");
    assert_eq!(live.client_addr(), &tcp("192.0.2.1:56324"));
    assert_eq!(live.peer_addr(), &tcp(PROXY));
    let header: &ProxyHeader = live.get().expect("the header");
    assert_eq!(header.command(), Command::Proxy);
    assert_eq!(header.destination(), Some(&tcp("198.51.100.1:443")));
    assert_eq!(header.tlvs().authority(), Some("a.test"));
}
