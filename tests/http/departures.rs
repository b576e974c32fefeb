//! A peer of HTTP/1 that stops sending while its request is being answered. If it has only finished
//! sending, it gets its response, within a deadline. If it is gone, that is noticed, whatever it
//! sent before.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::{Request, Response};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::{Layer, service_fn};
use tower_tcp::deadline::Deadlines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::preconnect::{Peek, PreConnectExt, PreConnectLayer, Protocol};
use tower_tcp::testkit::{Served, serve, serve_with};
use tower_tcp::tls::Tls;
use tower_tcp::{EndReason, Server};

use crate::certificates::certified;
use crate::support::{Clients, Ends, settled, until};
use crate::{GET, http, paths};

const NET: Duration = Duration::from_secs(60);
const NEVER: &str = "GET /never HTTP/1.1\r\nhost: a\r\n\r\n";

/// A client's stream.
trait Io: AsyncRead + AsyncWrite + Unpin + Send {
    /// Leaves so that the server cannot answer: by a reset, or over a Unix socket by closing.
    fn vanish(self: Box<Self>) -> io::Result<()>;
}

impl Io for TcpStream {
    fn vanish(self: Box<Self>) -> io::Result<()> {
        self.set_zero_linger()
    }
}

impl Io for TlsStream<TcpStream> {
    fn vanish(self: Box<Self>) -> io::Result<()> {
        self.get_ref().0.set_zero_linger()
    }
}

impl Io for UnixStream {
    fn vanish(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Transport {
    Tcp,
    Tls,
    Unix,
}

const TRANSPORTS: [Transport; 3] = [Transport::Tcp, Transport::Tls, Transport::Unix];

/// A server of [`paths`] over real sockets.
struct Over {
    served: Served<()>,
    transport: Transport,
    client: TlsConnector,
    dir: TempDir,
}

impl Over {
    async fn serve(transport: Transport, deadlines: Deadlines) -> Self {
        let http = Http::new(service_fn(paths)).deadlines(deadlines);
        let dir = tempfile::tempdir().expect("a directory");
        let address = match transport {
            Transport::Unix => format!("unix:{}", dir.path().join("socket").display()),
            Transport::Tcp | Transport::Tls => "127.0.0.1:0".to_owned(),
        };
        let server = Server::bind(&*address).await.expect("it is bound");
        let (config, client) = certified();
        let served = match transport {
            Transport::Tls => {
                // Several streams around the socket.
                let tls = Tls::from(config).when(|_| true);
                let hooks = Peek::new(Protocol::detect).chain(tls);
                let http = PreConnectLayer::new(hooks).layer(http);
                serve_with(server, (), http)
            }
            Transport::Tcp | Transport::Unix => serve_with(server, (), http),
        };
        Self {
            served,
            transport,
            client: TlsConnector::from(client),
            dir,
        }
    }

    /// Waits until a request is being answered.
    async fn has_begun(&self) {
        let handle = self.served.handle();
        until(|| handle.connections().any(|live| live.requests() > 0)).await;
    }

    async fn connect(&self) -> Box<dyn Io> {
        if let Transport::Unix = self.transport {
            let path = self.dir.path().join("socket");
            return Box::new(UnixStream::connect(path).await.expect("it listens"));
        }
        let address = self.served.handle().local_addrs()[0].tcp();
        let io = TcpStream::connect(address.expect("it is TCP")).await;
        let io = io.expect("it listens");
        if let Transport::Tcp = self.transport {
            return Box::new(io);
        }
        let name = ServerName::try_from("localhost").expect("a name");
        let secured = self.client.connect(name, io).await;
        Box::new(secured.expect("the handshake is made"))
    }
}

#[tokio::test]
async fn a_half_close_right_behind_a_request_is_answered_each_time() {
    for transport in TRANSPORTS {
        let over = Over::serve(transport, Deadlines::default()).await;
        for run in 0..200 {
            let mut io = over.connect().await;
            io.write_all(GET.as_bytes()).await.expect("it is open");
            io.shutdown().await.expect("it is open");
            let mut all = String::new();

            let read = timeout(NET, io.read_to_string(&mut all)).await;

            read.expect("in time").expect("it closes in good order");
            assert!(
                all.starts_with("HTTP/1.1 200"),
                "{transport:?} {run}: {all}"
            );
            assert_eq!(over.served.reason().await, EndReason::PeerClosed);
        }
    }
}

/// Returns input that stays unread behind a request without an answer.
fn unread() -> Vec<(&'static str, String)> {
    let post = "POST /never HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n";
    vec![
        ("nothing", NEVER.to_owned()),
        ("a byte", format!("{NEVER}G")),
        ("an empty line", format!("{NEVER}\r\n")),
        ("a request", format!("{NEVER}{GET}")),
        ("many requests", format!("{NEVER}{}", GET.repeat(1000))),
        ("a body", format!("{post}{}", "x".repeat(100_000))),
        ("half a body", format!("{post}{}", "x".repeat(50_000))),
    ]
}

#[tokio::test]
async fn a_peer_that_is_gone_ends_its_request_at_once_whatever_lies_unread() {
    for transport in TRANSPORTS {
        for (what, input) in unread() {
            let deadlines = Deadlines::default();
            let over = Over::serve(transport, deadlines).await;
            let mut io = over.connect().await;
            io.write_all(input.as_bytes()).await.expect("it is open");
            over.has_begun().await;
            let begun = Instant::now();

            io.vanish().expect("it is a socket");

            let ended = timeout(NET, over.served.end()).await;
            let ended = ended.unwrap_or_else(|_| panic!("{transport:?}, {what}: not noticed"));
            assert_eq!(
                ended.reason(),
                EndReason::PeerReset,
                "{transport:?}, {what}"
            );
            let took = begun.elapsed();
            assert!(
                took < Duration::from_secs(5),
                "{transport:?}, {what}: {took:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_peer_that_has_finished_counts_as_gone_after_a_time_whatever_lies_unread() {
    for transport in TRANSPORTS {
        for (what, input) in unread() {
            let deadlines = Deadlines::default().half_closed(Duration::from_millis(100));
            let over = Over::serve(transport, deadlines).await;
            let mut io = over.connect().await;
            io.write_all(input.as_bytes()).await.expect("it is open");
            let begun = Instant::now();

            io.shutdown().await.expect("it is open");

            let ended = timeout(NET, over.served.end()).await;
            let ended = ended.unwrap_or_else(|_| panic!("{transport:?}, {what}: not noticed"));
            assert_eq!(
                ended.reason(),
                EndReason::PeerReset,
                "{transport:?}, {what}"
            );
            let took = begun.elapsed();
            assert!(
                took > Duration::from_millis(90),
                "{transport:?}, {what}: {took:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_reset_behind_a_half_close_ends_the_request_at_once() {
    for transport in TRANSPORTS {
        let over = Over::serve(transport, Deadlines::default().half_closed(None)).await;
        let mut io = over.connect().await;
        io.write_all(NEVER.as_bytes()).await.expect("it is open");
        io.shutdown().await.expect("it is open");
        over.has_begun().await;

        io.vanish().expect("it is a socket");

        let ended = timeout(NET, over.served.end()).await;
        let ended = ended.unwrap_or_else(|_| panic!("{transport:?}: not noticed"));
        assert_eq!(ended.reason(), EndReason::PeerReset, "{transport:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_has_finished_has_ten_seconds_for_its_answer() {
    let served = serve(http());
    let mut client = served.client().await;
    client
        .send("GET /sleep/9 HTTP/1.1\r\nhost: a\r\n\r\n")
        .await;
    client.finish().await;

    let rest = client.rest().await.join("\n");

    assert!(rest.starts_with("HTTP/1.1 200"), "{rest}");
    assert_eq!(served.reason().await, EndReason::PeerClosed);
    let mut client = served.client().await;
    client.send(NEVER).await;
    let begun = Instant::now();
    client.finish().await;

    assert!(client.rest().await.is_empty());

    assert_eq!(begun.elapsed().as_secs(), 10);
    assert_eq!(served.reason().await, EndReason::PeerReset);
}

#[tokio::test(start_paused = true)]
async fn each_pipelined_request_is_answered_behind_a_half_close() {
    let served = serve(http());
    let mut client = served.client().await;
    client
        .send("GET /sleep/9 HTTP/1.1\r\nhost: a\r\n\r\n".repeat(3))
        .await;
    client.finish().await;

    let rest = client.rest().await.join("\n");

    assert_eq!(rest.matches("200 OK").count(), 3);
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_peer_that_has_finished_can_be_none_or_zero() {
    let day = Duration::from_secs(24 * 3600);
    for (time, answered) in [(None, true), (Some(Duration::ZERO), false)] {
        let served = serve(http().deadlines(Deadlines::default().half_closed(time)));
        let mut client = served.client().await;
        let begun = Instant::now();
        client
            .send("GET /sleep/3600 HTTP/1.1\r\nhost: a\r\n\r\n")
            .await;
        client.finish().await;

        let rest = timeout(day, client.rest()).await.expect("in time");

        assert_eq!(!rest.is_empty(), answered);
        assert_eq!(begun.elapsed().as_secs(), if answered { 3600 } else { 0 });
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_that_goes_on_keeps_a_peer_that_has_finished() {
    let service = service_fn(|_: Request<RequestBody>| async {
        let body = stream::iter(0..10).then(|n| async move {
            sleep(Duration::from_secs(9)).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from(n.to_string())))
        });
        Ok::<_, Infallible>(Response::new(StreamBody::new(body)))
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;
    client.send(GET).await;
    client.finish().await;

    let rest = client.rest().await.join("\n");

    assert!(rest.ends_with("0\n"), "{rest}");
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn in_memory_a_peer_that_has_finished_is_noticed_behind_511_unread_bytes() {
    for (unread, noticed) in [(511, true), (512, false)] {
        let served = serve(http());
        let mut client = served.client().await;
        client.send(NEVER).await;
        settled().await;
        // hyper reads none of these: it has begun to answer.
        for byte in "G".repeat(unread).chars() {
            client.send(byte.to_string()).await;
            settled().await;
        }

        client.finish().await;

        let ended = timeout(NET, served.reason()).await;
        let expected = noticed.then_some(EndReason::PeerReset);
        assert_eq!(ended.ok(), expected, "{unread} bytes unread");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_finishes_within_a_body_fails_the_body_at_once() {
    let service = service_fn(|request: Request<RequestBody>| async {
        let read = request.into_body().collect().await;
        Ok::<_, Infallible>(Response::new(match read {
            Ok(_) => "whole".to_owned(),
            Err(err) => err.to_string(),
        }))
    });
    let served = serve(Http::new(service));
    let mut client = served.client().await;
    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nst")
        .await;
    settled().await;
    let begun = Instant::now();
    client.finish().await;

    let rest = client.rest().await.join("\n");

    assert!(
        rest.ends_with("the request body could not be read"),
        "{rest}"
    );
    assert_eq!(begun.elapsed().as_secs(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_read_late_arrives_whole() {
    let service = service_fn(|request: Request<RequestBody>| async {
        sleep(Duration::from_secs(5)).await;
        let read = request.into_body().collect().await;
        let read = read.expect("the body arrives").to_bytes();
        Ok::<_, Infallible>(Response::new(format!("{} bytes", read.len())))
    });
    let served = serve(Http::new(service));
    for finishes in [false, true] {
        let mut client = served.client().await;
        let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 50000\r\n\r\n";
        client.send(head).await;
        settled().await;
        client.send("x".repeat(50_000)).await;
        if finishes {
            client.finish().await;
        }

        let answer = crate::answer(&mut client).await;

        assert_eq!(answer.body, "50000 bytes");
    }
}
