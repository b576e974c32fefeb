//! A program's use of a connection works the same over memory, TCP, Unix sockets and TLS.

#[path = "support/certificates.rs"]
mod certificates;
mod support;

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use certificates::certified;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response};
use socket2::SockRef;
use support::{Client, Clients, Ends, each_way_over_tcp, over_tcp};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, ServerConfig};
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::pipeline::{Crossing, Event, OnConnectLayer, Upgrade, Watermarks};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve, serve_with};
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Connection, EndReason, Peer, Pipeline, Reply, Rewind, Server};

const SIZE: usize = 4 << 20;

struct Resume;

/// A server that does everything: it greets, answers in order, pushes, waits for its marks and
/// flushes, pauses its input until a timer resumes it, and upgrades to a service that reverses its
/// input.
fn everything<Io>()
-> impl Service<Connection<Io>, Response = EndReason, Error = BoxError, Future: Send>
+ Clone
+ Send
+ 'static
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let make = service_fn(|peer: Peer<Bytes, Resume>| {
        let service = service_fn(move |event| answer(peer.clone(), event));
        std::future::ready(Ok::<_, Infallible>(service))
    });
    let greet = OnConnectLayer::new(|peer: Peer<Bytes, Resume>| async move {
        peer.send("220 ready".into()).await
    });
    Pipeline::new(Lines::default)
        .make_event_service(ServiceBuilder::new().layer(greet).service(make))
        .on_upgrade(service_fn(reverse::<Io>))
}

async fn answer(
    peer: Peer<Bytes, Resume>,
    event: Event<Bytes, Resume>,
) -> Result<Upgrade<Bytes>, BoxError> {
    let line = match event {
        Event::Request(line) => line,
        Event::Message(Resume) => {
            peer.resume_input();
            return Ok(Bytes::from("resumed").into());
        }
    };
    Ok(match &*line {
        b"pause" => {
            peer.pause_input();
            let _timer = peer.post_after(Duration::from_millis(50), Resume)?;
            line.into()
        }
        b"push" => {
            peer.send("push".into()).await?;
            peer.flushed().await?;
            line.into()
        }
        b"stream" => {
            peer.set_watermarks(Watermarks::new(1024, 64 * 1024)?);
            let mut crossings = peer.crossings();
            for _ in 0..SIZE / 4096 {
                peer.send(vec![b'x'; 4095].into()).await?;
            }
            peer.flushed().await?;
            let (mut highs, mut lows) = (0, 0);
            while highs == 0 || lows < highs {
                match crossings.next().await {
                    Some(Crossing::High) => highs += 1,
                    Some(Crossing::Low) => lows += 1,
                    None => return Err("it ended".into()),
                }
            }
            Bytes::from("as many lows as highs").into()
        }
        b"over" => Reply::from(line).upgrade(),
        _ => line.into(),
    })
}

async fn reverse<Io>(mut conn: Connection<Rewind<Io>>) -> Result<(), BoxError>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut all = Vec::new();
    conn.read_to_end(&mut all).await?;
    all.reverse();
    conn.write_all(&all).await?;
    conn.shutdown().await?;
    Ok(())
}

async fn drive<Io, C>(io: Io, served: Served<C>)
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let whole = timeout(Duration::from_secs(60), async {
        let mut client = Client::new(io);
        assert_eq!(client.line().await, "220 ready");
        // The pushed line comes before the reply to `push`, and `pause` is in the middle of one
        // packet.
        client.send("a\npush\npause\nb\nstream\n").await;
        for line in ["a", "push", "push", "pause", "resumed", "b"] {
            assert_eq!(client.line().await, line);
        }
        // The client reads more slowly than the server sends.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut stream = vec![0; SIZE];
        client.0.read_exact(&mut stream).await.expect("it is open");
        assert_eq!(
            stream.iter().filter(|byte| **byte == b'\n').count(),
            SIZE / 4096
        );
        assert_eq!(client.line().await, "as many lows as highs");
        client.send("over\nc\nd").await;
        client.finish().await;
        assert_eq!(client.rest().await, ["over", "d", "c"]);
        drop(client);
        let end = served.end().await;
        assert_eq!((end.reason(), end.requests()), (EndReason::PeerClosed, 6));
        // The bytes from "a" to "over" and those read after the upgrade, each counted once.
        assert_eq!(end.bytes_read(), 30);
    });
    whole.await.expect("it is done in time");
}

#[tokio::test(start_paused = true)]
async fn all_of_it_holds_in_memory() {
    let served = serve(everything());
    let io = served.client().await.0.into_inner();

    drive(io, served).await;
}

#[tokio::test]
async fn all_of_it_holds_over_tcp() {
    let server = Server::bind("127.0.0.1:0").await.expect("it binds");
    let address = server.handle().local_addrs()[0].tcp().expect("it is TCP");
    let served = serve_with(server, (), everything());
    let io = TcpStream::connect(address).await.expect("it listens");

    drive(io, served).await;
}

#[tokio::test]
async fn all_of_it_holds_over_a_unix_socket() {
    let folder = tempfile::tempdir().expect("there is a place for it");
    let path = folder.path().join("socket");
    let server = Server::bind(format!("unix:{}", path.display())).await;
    let served = serve_with(server.expect("it binds"), (), everything());
    let io = UnixStream::connect(&path).await.expect("it listens");

    drive(io, served).await;
}

#[tokio::test]
async fn all_of_it_holds_over_tls() {
    let (config, client) = certified();
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(Tls::from(config)))
        .service(everything());
    let server = Server::bind("127.0.0.1:0").await.expect("it binds");
    let address = server.handle().local_addrs()[0].tcp().expect("it is TCP");
    let served = serve_with(server, (), stack);
    let io = TcpStream::connect(address).await.expect("it listens");
    let name = ServerName::try_from("localhost").expect("a name");
    let connector = TlsConnector::from(client);
    let io = connector.connect(name, io).await.expect("a good handshake");

    drive(io, served).await;
}

/// Serves lines behind TLS, and notes each.
fn noting<Io>(
    config: Arc<ServerConfig>,
    lines: mpsc::Sender<Bytes>,
) -> impl Service<Connection<Io>, Response = EndReason, Error = BoxError, Future: Send>
+ Clone
+ Send
+ 'static
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let note = service_fn(move |line: Bytes| {
        lines.try_send(line.clone()).expect("the test listens");
        std::future::ready(Ok::<_, Infallible>(line))
    });
    ServiceBuilder::new()
        .layer(PreConnectLayer::new(Tls::from(config)))
        .service(Pipeline::new(Lines::default).service(note))
}

/// Performs a TLS handshake, and sends a request and `close_notify` together with its last bytes.
async fn ask_with_the_last_of_the_handshake<Io>(config: Arc<ClientConfig>, io: &mut Io)
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from("localhost").expect("a name");
    let mut session = ClientConnection::new(config, name).expect("a client");
    loop {
        let done = !session.is_handshaking();
        if done {
            let mut request = session.writer();
            request.write_all(b"hello\n").expect("into memory");
            session.send_close_notify();
        }
        let mut flight = Vec::new();
        while session.wants_write() {
            session.write_tls(&mut flight).expect("into memory");
        }
        io.write_all(&flight).await.expect("it is open");
        if done {
            return;
        }
        let mut came = [0; 4096];
        let n = io.read(&mut came).await.expect("it is open");
        session.read_tls(&mut &came[..n]).expect("from memory");
        session.process_new_packets().expect("a good server");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_in_the_last_write_of_a_handshake_is_served_in_memory_though_its_client_is_gone()
{
    let (config, client) = certified();
    let (lines, mut noted) = mpsc::channel(4);
    let served = serve(noting(config, lines));
    let mut io = served.connect().await.expect("it listens");

    ask_with_the_last_of_the_handshake(client, &mut io).await;
    drop(io);

    assert_eq!(served.end().await.requests(), 1);
    assert_eq!(noted.recv().await.as_deref(), Some(&b"hello"[..]));
}

#[tokio::test]
async fn a_request_in_the_last_write_of_a_handshake_is_served_over_a_unix_socket_likewise() {
    let (config, client) = certified();
    let (lines, mut noted) = mpsc::channel(4);
    let folder = tempfile::tempdir().expect("there is a place for it");
    let path = folder.path().join("socket");
    let server = Server::bind(format!("unix:{}", path.display())).await;
    let served = serve_with(server.expect("it binds"), (), noting(config, lines));
    for reads_no_more in [false, true] {
        let mut io = UnixStream::connect(&path).await.expect("it listens");
        ask_with_the_last_of_the_handshake(Arc::clone(&client), &mut io).await;
        let open = reads_no_more.then(|| {
            // The server's writes are refused, although the client has not closed.
            let io = io.into_std().expect("it is registered");
            io.shutdown(Shutdown::Read).expect("it is connected");
            io
        });

        assert_eq!(served.end().await.requests(), 1);
        assert_eq!(noted.recv().await.as_deref(), Some(&b"hello"[..]));
        drop(open);
    }
}

const URGENT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn bytes_behind_urgent_data_over_tcp_are_read_and_the_urgent_byte_is_in_its_place() {
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let addr = server.handle().local_addrs()[0].tcp().unwrap();
    let mut client = std::net::TcpStream::connect(addr).unwrap();
    // Everything has arrived before the server accepts, so the first read ends at the urgent byte.
    send_with_urgent(&mut client, [b"one\ntwo", b"!", b"three\n"]);

    let served =
        tokio::spawn(server.serve(Pipeline::new(Lines::default).service(service_fn(echo))));

    client.set_nonblocking(true).unwrap();
    let mut client = Client::new(TcpStream::from_std(client).unwrap());
    let lines = async { [client.line().await, client.line().await] };
    assert_eq!(timeout(URGENT, lines).await.unwrap(), ["one", "two!three"]);
    served.abort();
}

/// No reply comes before the urgent data. If the client read one, the system would report to the
/// server that there is room to write, and with it the bytes that are still unread.
#[tokio::test]
async fn bytes_behind_urgent_data_over_a_unix_socket_are_read_without_the_urgent_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let server = Server::bind(format!("unix:{}", path.display()))
        .await
        .unwrap();
    let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    if SockRef::from(&one).send_out_of_band(b"!").is_err() {
        eprintln!("skipped: no urgent data over Unix sockets here");
        return;
    }
    send_with_urgent(&mut client, [b"one", b"!", b"two\n"]);

    let served =
        tokio::spawn(server.serve(Pipeline::new(Lines::default).service(service_fn(echo))));

    client.set_nonblocking(true).unwrap();
    let mut client = Client::new(UnixStream::from_std(client).unwrap());
    assert_eq!(timeout(URGENT, client.line()).await.unwrap(), "onetwo");
    served.abort();
}

#[tokio::test]
async fn all_bytes_of_a_large_frame_behind_urgent_data_are_read() {
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let addr = server.handle().local_addrs()[0].tcp().unwrap();
    let mut client = std::net::TcpStream::connect(addr).unwrap();
    let mut rest = [b'x'; 30_000];
    rest[rest.len() - 1] = b'\n';
    send_with_urgent(&mut client, [b"one", b"!", &rest]);
    let codec = || Lines::default().max_line(1 << 20);

    let served = tokio::spawn(server.serve(Pipeline::new(codec).service(service_fn(echo))));

    client.set_nonblocking(true).unwrap();
    let mut client = Client::new(TcpStream::from_std(client).unwrap());
    let read = timeout(URGENT, client.line()).await.unwrap();
    assert_eq!(read.len(), "one!".len() + rest.len() - 1);
    served.abort();
}

#[tokio::test]
async fn a_drain_answers_what_has_arrived_behind_urgent_data() {
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let handle = server.handle();
    let addr = handle.local_addrs()[0].tcp().unwrap();
    let mut client = std::net::TcpStream::connect(addr).unwrap();
    send_with_urgent(&mut client, [b"one\n", b"!", b"two\n"]);
    let served =
        tokio::spawn(server.serve(Pipeline::new(Lines::default).service(service_fn(echo))));
    client.set_nonblocking(true).unwrap();
    let mut client = Client::new(TcpStream::from_std(client).unwrap());
    assert_eq!(timeout(URGENT, client.line()).await.unwrap(), "one");

    handle.shutdown();

    assert_eq!(timeout(URGENT, client.line()).await.unwrap(), "!two");
    drop(client);
    timeout(URGENT, served).await.unwrap().unwrap().unwrap();
}

async fn echo(line: Bytes) -> Result<Bytes, Infallible> {
    Ok(line)
}

/// Sends these parts in turn, the second as urgent data.
fn send_with_urgent<S: Write + AsFd>(client: &mut S, [before, urgent, behind]: [&[u8]; 3]) {
    client.write_all(before).expect("it is connected");
    let sent = SockRef::from(&*client).send_out_of_band(urgent);
    assert_eq!(sent.expect("it is connected"), 1);
    client.write_all(behind).expect("it is connected");
}

/// A client with Nagle's algorithm sends nothing more until the server's system has acknowledged
/// what it has sent. The system delays that by 40 ms, in the hope of a reply.
#[tokio::test]
async fn a_client_with_nagles_algorithm_is_not_delayed_by_frames_that_have_no_reply() {
    let answer_questions = service_fn(|line: Bytes| {
        let reply = line.starts_with(b"ask").then_some(line);
        std::future::ready(Ok::<_, Infallible>(Vec::from_iter(reply)))
    });
    let pipeline = Pipeline::new(Lines::default).service(answer_questions);
    for (served, address) in each_way_over_tcp(pipeline, 8).await {
        let time = time_of_a_round(address, ["note\n", "ask\n"], "ask\n").await;

        assert!(time < DELAYED, "{}: a round takes {time:?}", served.way());
    }
}

#[tokio::test]
async fn a_client_with_nagles_algorithm_is_not_delayed_by_a_body_behind_its_head() {
    let echo = service_fn(async |request: Request<RequestBody>| {
        let body = request.into_body().collect().await?;
        Ok::<_, BoxError>(Response::new(Full::new(body.to_bytes())))
    });
    let (_served, address) = over_tcp("HTTP/1", Http::new(echo)).await;
    let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\n";

    let time = time_of_a_round(address, [head, "the body"], "the body").await;

    assert!(time < DELAYED, "a round takes {time:?}");
}

/// A round that takes longer was delayed. The delay is 40 ms.
const DELAYED: Duration = Duration::from_millis(30);

/// Sends two parts of a request, one by one, and reads to the end of the reply, again and again.
/// Returns the longest time of the quickest quarter of rounds: a busy processor makes some rounds
/// slow, and the system never delays the first rounds.
async fn time_of_a_round(
    address: SocketAddr,
    request: [&'static str; 2],
    end: &'static str,
) -> Duration {
    const ROUNDS: usize = 40;
    let client = tokio::task::spawn_blocking(move || {
        let mut client = std::net::TcpStream::connect(address).expect("it listens");
        let limited = client.set_read_timeout(Some(URGENT));
        limited.expect("it is a socket");
        let mut times = [Duration::ZERO; ROUNDS];
        for time in &mut times {
            let began = Instant::now();
            for part in request {
                client.write_all(part.as_bytes()).expect("it is open");
            }
            let mut reply = Vec::new();
            while !reply.ends_with(end.as_bytes()) {
                let mut byte = [0];
                client.read_exact(&mut byte).expect("a reply comes");
                reply.extend(byte);
            }
            *time = began.elapsed();
        }
        times
    });
    let mut times = client.await.expect("it does not panic");
    times.sort_unstable();
    times[ROUNDS / 4]
}
