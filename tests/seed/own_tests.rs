//! POE's own tests, ported.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::ready;
use std::io::{Read, Seek};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::codec::{Decoder, Encoder, Framed};
use tower::{ServiceBuilder, service_fn};
use tower_tcp::bind::Endpoint;
use tower_tcp::close::Linger;
use tower_tcp::frame::{Block, InOut, Lines, LinesError};
use tower_tcp::pipeline::Event;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, memory_with_buffer, serve, serve_with};
use tower_tcp::{Address, BoxError, Connection, EndReason, Handle, Peer, Pipeline, Reply, Server};

use super::support::{Client, Clients, Ends};
use super::{Journal, echo, soon, text};

/// Greets, answers any line with a dismissal, and shuts the server down when the client has left.
async fn conversation(endpoint: impl Into<Endpoint>) {
    let journal = Journal::default();
    let noted = journal.clone();
    let server = Server::bind(endpoint).await.expect("a port is free");
    let handle = server.handle();
    let address = handle.local_addrs()[0].tcp().expect("it is of TCP");
    let make = service_fn(move |peer: Peer<Bytes>| {
        let (noted, handle) = (noted.clone(), handle.clone());
        async move {
            noted.note("connected");
            let at_end = noted.clone();
            peer.on_end(move |_| {
                at_end.note("disconnected");
                handle.shutdown();
            });
            peer.send("I will be serving you today!".into()).await?;
            Ok::<_, BoxError>(service_fn(move |line: Bytes| {
                noted.note(text(&line));
                ready(Ok::<_, BoxError>(Bytes::from("Go away.")))
            }))
        }
    });
    let pipeline = Pipeline::new(Lines::crlf).make_service(make);
    let served = tokio::spawn(server.serve(pipeline));

    let socket = TcpStream::connect(address).await.expect("it listens");
    let mut client = Client::new(socket);
    client.send("I am your new client!\r\n").await;
    let heard = [soon(client.line()).await, soon(client.line()).await];
    drop(client);

    assert_eq!(heard, ["I will be serving you today!", "Go away."]);
    let report = soon(served).await.expect("it does not panic");
    assert_eq!(report.expect("it ends in good order").aborted, 0);
    assert_eq!(
        journal.all(),
        ["connected", "I am your new client!", "disconnected"]
    );
}

#[tokio::test]
async fn t1_a_conversation_runs_from_the_greeting_to_the_servers_end() {
    let free: std::net::SocketAddr = ([127, 0, 0, 1], 0).into();

    conversation(free).await;
}

#[tokio::test]
async fn t2_the_same_conversation_runs_at_port_0_by_name() {
    conversation("127.0.0.1:0").await;
}

#[tokio::test(start_paused = true)]
async fn t3_each_connection_has_what_its_make_service_captured() {
    let args = (
        String::new(),
        Arc::new(7),
        HashMap::from([("key", "value")]),
        vec![1, 2],
    );
    let scalar = Arc::clone(&args.1);
    let (seen, mut all_seen) = mpsc::channel(2);
    let make = service_fn(move |_: Peer<Bytes>| {
        seen.try_send(args.clone()).expect("there is room for two");
        ready(Ok::<_, Infallible>(service_fn(echo)))
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));

    for _ in 0..2 {
        assert_eq!(served.client().await.ask("hi").await, "hi");
    }

    for _ in 0..2 {
        let (empty, shared, map, list) = all_seen.recv().await.expect("both are connected");
        assert_eq!(empty, "");
        assert!(Arc::ptr_eq(&shared, &scalar));
        assert_eq!(map["key"], "value");
        assert_eq!(list, [1, 2]);
    }
}

enum Handler {
    Inline,
    Object,
    Package,
}

#[tokio::test(start_paused = true)]
async fn t4_messages_reach_the_connection_they_were_sent_to_in_order() {
    let journal = Journal::default();
    let noted = journal.clone();
    let make = service_fn(move |peer: Peer<Bytes, Handler>| {
        let noted = noted.clone();
        async move {
            for message in [Handler::Inline, Handler::Object, Handler::Package] {
                peer.post(message).await?;
            }
            peer.send("I will be serving you today!".into()).await?;
            let id = peer.info().peer_addr().to_string();
            Ok::<_, BoxError>(service_fn(move |event: Event<Bytes, Handler>| {
                let (word, reply) = match event {
                    Event::Request(line) => (text(&line), Some(Bytes::from("Go away."))),
                    Event::Message(Handler::Inline) => ("inline".into(), None),
                    Event::Message(Handler::Object) => ("object".into(), None),
                    Event::Message(Handler::Package) => ("package".into(), None),
                };
                noted.note(format!("{id} {word}"));
                ready(Ok::<_, BoxError>(reply))
            }))
        }
    });
    let served = serve(Pipeline::new(Lines::default).make_event_service(make));

    for _ in 0..2 {
        let mut client = served.client().await;
        assert_eq!(client.line().await, "I will be serving you today!");
        assert_eq!(client.ask("hello").await, "Go away.");
    }

    let words = ["inline", "object", "package", "hello"];
    let expected: Vec<_> = [1, 2]
        .iter()
        .flat_map(|n| words.map(|word| format!("memory:{n} {word}")))
        .collect();
    assert_eq!(journal.all(), expected);
}

#[tokio::test]
async fn t5_a_unix_server_that_is_told_to_end_before_it_serves_ends_without_a_word() {
    let mut log = tempfile::tempfile().expect("a temporary file");
    let writer = Arc::new(log.try_clone().expect("a descriptor is free"));
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(writer)
        .finish();
    let guard = tracing::subscriber::set_default(subscriber);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("server");
    let server = Server::bind(Endpoint::unix(&path)).await.expect("it binds");
    let echo = Pipeline::new(Lines::default).service(service_fn(echo));

    server.handle().shutdown();
    let report = soon(server.serve(echo)).await;
    drop(guard);

    assert_eq!(report.expect("it ends in good order").drained, 0);
    assert!(!path.exists());
    let mut said = String::new();
    log.rewind().expect("it is a file");
    log.read_to_string(&mut said).expect("it is text");
    let ours: Vec<_> = said.lines().filter(|l| l.contains("tower_tcp")).collect();
    assert!(ours.is_empty(), "{ours:?}");
}

#[tokio::test(start_paused = true)]
async fn t8_an_acceptor_serves_the_bare_stream() {
    let journal = Journal::default();
    let noted = journal.clone();
    let acceptor = service_fn(move |conn: Connection<DuplexStream>| {
        let noted = noted.clone();
        async move {
            noted.note("accept");
            let mut lines = Framed::new(conn, Lines::crlf());
            let line = lines.next().await.ok_or("no line came")??;
            noted.note("input");
            let echoed = format!("echo: {}", text(&line));
            lines.send(echoed.into()).await?;
            noted.note("flush");
            lines.into_inner().close(Linger::default()).await?;
            noted.note("stop");
            Ok::<_, BoxError>(())
        }
    });
    let served = serve(acceptor);

    let mut client = served.client().await;
    client.send("quit\r\n").await;
    let heard = client.rest().await;
    drop(client);
    let reason = served.reason().await;
    served.handle().shutdown();

    assert_eq!(heard, ["echo: quit"]);
    assert_eq!(reason, EndReason::ServiceClosed);
    assert_eq!(served.handle().closed().await.aborted, 0);
    assert_eq!(journal.all(), ["accept", "input", "flush", "stop"]);
}

#[tokio::test(start_paused = true)]
async fn t9_callbacks_come_once_each_and_in_order() {
    let journal = Journal::default();
    let noted = journal.clone();
    let hook = service_fn(move |conn: Connection<DuplexStream>| {
        noted.note("pre-connect");
        ready(Ok::<_, BoxError>(conn))
    });
    let noted = journal.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        let noted = noted.clone();
        noted.note("connected");
        let at_end = noted.clone();
        peer.on_end(move |_| at_end.note("disconnected"));
        ready(Ok::<_, BoxError>(service_fn(move |line: Bytes| {
            let (noted, peer) = (noted.clone(), peer.clone());
            async move {
                noted.note("input");
                peer.send(format!("echo: {}", text(&line)).into()).await?;
                peer.flushed().await?;
                noted.note("flushed");
                Ok::<_, BoxError>(Reply::<Bytes>::none().close())
            }
        })))
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service(Pipeline::new(Lines::default).make_service(make));
    let served = serve(stack);

    let mut client = served.client().await;
    client.send("quit\n").await;
    let heard = client.rest().await;
    drop(client);

    assert_eq!(heard, ["echo: quit"]);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
    assert_eq!(
        journal.all(),
        [
            "pre-connect",
            "connected",
            "input",
            "flushed",
            "disconnected"
        ]
    );
}

/// Counts the open connections, and the lines that arrived.
#[derive(Clone, Default)]
struct Counts {
    open: Arc<AtomicUsize>,
    most_open: Arc<AtomicUsize>,
    connects: Arc<AtomicUsize>,
    lines: Arc<AtomicUsize>,
}

impl Counts {
    fn enter(&self) {
        self.connects.fetch_add(1, Ordering::Relaxed);
        let open = 1 + self.open.fetch_add(1, Ordering::Relaxed);
        self.most_open.fetch_max(open, Ordering::Relaxed);
    }

    fn leave(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    fn answer(&self, line: &Bytes) -> Bytes {
        let n = 1 + self.lines.fetch_add(1, Ordering::Relaxed);
        format!("echo: {} #{n}", text(line)).into()
    }
}

/// Connects nine clients at once to a server of `limit` connections. The client that is told it is
/// the ninth shuts the server down.
async fn nine_clients(served: Served, counts: &Counts, limit: usize) {
    served.handle().limit().set(limit);
    let mut clients = Vec::new();
    for n in 1..=9 {
        let mut client = served.client().await;
        clients.push(tokio::spawn(async move {
            let answer = client.ask(&format!("hello {n}")).await;
            let (echoed, number) = answer.split_once(" #").expect("it has a number");
            assert_eq!(echoed, format!("echo: hello {n}"));
            if number == "9" {
                client.send("quit\n").await;
            }
            client.finish().await;
            client.rest().await;
        }));
    }

    for client in clients {
        client.await.expect("every client is served");
    }

    assert_eq!(served.handle().closed().await.aborted, 0);
    assert_eq!(counts.connects.load(Ordering::Relaxed), 9);
    assert_eq!(counts.most_open.load(Ordering::Relaxed), limit);
    assert_eq!(counts.open.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn t10_an_acceptor_at_a_limit_of_one_serves_nine_in_turn() {
    let counts = Counts::default();
    let (counted, (tell, mut told)) = (counts.clone(), mpsc::channel::<()>(1));
    let acceptor = service_fn(move |conn: Connection<DuplexStream>| {
        let (counts, tell) = (counted.clone(), tell.clone());
        async move {
            counts.enter();
            let mut lines = Framed::new(conn, Lines::default());
            while let Some(line) = lines.next().await {
                match line? {
                    quit if &*quit == b"quit" => tell.send(()).await?,
                    line => lines.send(counts.answer(&line)).await?,
                }
            }
            counts.leave();
            Ok::<_, BoxError>(())
        }
    });
    let served = serve(acceptor);
    let handle = served.handle().clone();
    tokio::spawn(async move {
        told.recv().await;
        handle.shutdown();
    });

    nine_clients(served, &counts, 1).await;
}

#[tokio::test(start_paused = true)]
async fn t11_a_pipeline_at_a_limit_of_four_serves_nine_and_may_be_closed_twice() {
    let counts = Counts::default();
    let (counted, (tell, mut told)) = (counts.clone(), mpsc::channel::<()>(1));
    let make = service_fn(move |peer: Peer<Bytes>| {
        let (counts, tell) = (counted.clone(), tell.clone());
        counts.enter();
        let (at_end, again) = (counts.clone(), peer.clone());
        peer.on_end(move |_| {
            at_end.leave();
            again.close();
            again.close();
        });
        ready(Ok::<_, Infallible>(service_fn(move |line: Bytes| {
            let quits = &*line == b"quit";
            if quits {
                tell.try_send(()).expect("only one says so");
            }
            let answer = (!quits).then(|| counts.answer(&line));
            ready(Ok::<_, Infallible>(answer))
        })))
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));
    let handle = served.handle().clone();
    tokio::spawn(async move {
        told.recv().await;
        handle.shutdown();
    });

    nine_clients(served, &counts, 4).await;
}

fn rot13(line: &Bytes) -> Bytes {
    let turned = |byte: &u8| match byte.to_ascii_lowercase() {
        b'a'..=b'm' => byte + 13,
        b'n'..=b'z' => byte - 13,
        _ => *byte,
    };
    line.iter().map(turned).collect()
}

/// Has a text encoded with ROT13 twice, and asserts that it is unchanged.
async fn turn_twice<Io>(client: &mut Client<Io>)
where
    Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let once = client.ask("1: this is a test").await;
    assert_eq!(once, "1: guvf vf n grfg");
    let twice = client.ask(&once.replacen('1', "2", 1)).await;
    assert_eq!(twice, "2: this is a test");
}

#[tokio::test(start_paused = true)]
async fn t12_a_server_of_one_connection_turns_text_that_comes_in_tens_of_bytes() {
    let (listener, connector) = memory_with_buffer(10);
    let server = Server::from_listener(listener);
    let handle = server.handle();
    let flushes = Arc::new(AtomicUsize::new(0));
    let (once, counted) = (handle.clone(), Arc::clone(&flushes));
    let acceptor = service_fn(move |conn: Connection<DuplexStream>| {
        once.shutdown();
        let flushes = Arc::clone(&counted);
        async move {
            let mut lines = Framed::new(conn, Lines::default());
            while let Some(line) = lines.next().await {
                lines.send(rot13(&line?)).await?;
                flushes.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, BoxError>(())
        }
    });
    let served = serve_with(server, (), acceptor);

    let mut client = Client::new(connector.connect().await.expect("it listens"));
    turn_twice(&mut client).await;
    let refused = connector.connect().await.is_err();
    drop(client);

    assert!(refused);
    assert_eq!(served.reason().await, EndReason::Drained);
    assert_eq!(flushes.load(Ordering::Relaxed), 2);
    assert_eq!(handle.closed().await.drained, 1);
}

#[tokio::test]
async fn t13_the_same_dialogue_runs_over_ipv6() {
    let Ok(server) = Server::bind("[::1]:0").await else {
        eprintln!("skipped: no IPv6 here");
        return;
    };
    let address = server.handle().local_addrs()[0]
        .tcp()
        .expect("it is of TCP");
    let (tell, mut told) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer.info().peer_addr().clone())
            .expect("one comes");
        ready(Ok::<_, Infallible>(service_fn(move |line: Bytes| {
            let peer = peer.clone();
            async move {
                peer.send(rot13(&line)).await?;
                peer.flushed().await?;
                Ok::<_, BoxError>(Reply::<Bytes>::none())
            }
        })))
    });
    let served = serve_with(server, (), Pipeline::new(Lines::default).make_service(make));

    let socket = TcpStream::connect(address).await.expect("it listens");
    let own = socket.local_addr().expect("it is connected");
    let mut client = Client::new(socket);
    soon(turn_twice(&mut client)).await;
    served.handle().shutdown();
    let left = soon(client.rest()).await;
    drop(client);

    assert!(left.is_empty());
    assert_eq!(told.recv().await, Some(Address::Tcp(own)));
    assert_eq!(soon(served.handle().closed()).await.aborted, 0);
}

#[tokio::test]
async fn t14_five_clients_of_a_name_are_each_answered_once_and_the_last_end_ends_the_server() {
    let journal = Journal::default();
    let server = Server::bind("localhost:0").await.expect("it is known");
    let handle = server.handle();
    let address = handle.local_addrs()[0].tcp().expect("it is of TCP");
    let (noted, ender) = (journal.clone(), handle.clone());
    let make = service_fn(move |peer: Peer<Bytes>| {
        let (noted, ender): (Journal, Handle) = (noted.clone(), ender.clone());
        noted.note("connect");
        let at_end = noted.clone();
        peer.on_end(move |_| {
            at_end.note("disconnect");
            if at_end.count("disconnect") == 5 {
                ender.shutdown();
            }
        });
        ready(Ok::<_, Infallible>(service_fn(move |line: Bytes| {
            let (noted, peer) = (noted.clone(), peer.clone());
            async move {
                noted.note(text(&line));
                peer.send("from server".into()).await?;
                peer.flushed().await?;
                noted.note("flush");
                peer.close();
                Ok::<_, BoxError>(Reply::<Bytes>::none())
            }
        })))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let served = tokio::spawn(server.serve(pipeline));

    let clients = (0..5).map(|_| async move {
        let socket = TcpStream::connect(address).await.expect("it listens");
        let mut client = Client::new(socket);
        client.send("from client\n").await;
        client.rest().await
    });
    let heard = soon(join_all(clients)).await;

    assert_eq!(heard, vec![["from server"]; 5]);
    let report = soon(served).await.expect("it does not panic");
    assert_eq!(report.expect("it ends in good order").aborted, 0);
    for what in ["connect", "from client", "flush", "disconnect"] {
        assert_eq!(journal.count(what), 5, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn t15_blocks_are_put_together_from_whatever_pieces_come() {
    const SIZE: NonZeroUsize = NonZeroUsize::new(16).expect("it is not zero");
    let blocks = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&blocks);
    let service = service_fn(move |block: Bytes| {
        let done = &*block == b"DONE............";
        if !done {
            assert_eq!(&*block, b"0123456789abcdef");
            counted.fetch_add(1, Ordering::Relaxed);
        }
        let reply = Reply::<Bytes>::none();
        ready(Ok::<_, Infallible>(if done {
            reply.close()
        } else {
            reply
        }))
    });
    let (listener, connector) = memory_with_buffer(24);
    let pipeline = Pipeline::new(|| Block::new(SIZE)).service(service);
    let served = serve_with(Server::from_listener(listener), (), pipeline);

    let mut client = connector.connect().await.expect("it listens");
    for _ in 0..5 {
        let two = b"0123456789abcdef".repeat(2);
        client.write_all(&two).await.expect("it reads");
        sleep(Duration::from_millis(100)).await;
    }
    client
        .write_all(b"DONE............")
        .await
        .expect("it reads");
    let end = client.read_u8().await.expect_err("nothing is sent");
    drop(client);

    assert_eq!(end.kind(), std::io::ErrorKind::UnexpectedEof);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
    assert_eq!(blocks.load(Ordering::Relaxed), 10);
}

#[tokio::test(start_paused = true)]
async fn t16_a_codec_can_be_given_in_all_the_ways_there_are() {
    let with_options = || Lines::crlf().max_line(1000);
    let prototype = Lines::crlf();
    let cloned = move || prototype.clone();

    answers(Lines::crlf).await;
    answers(with_options).await;
    answers(cloned.clone()).await;
    answers(|| InOut::new(Lines::crlf(), Lines::crlf())).await;
    answers(move || InOut::new(Lines::crlf(), with_options())).await;
    let proto = cloned.clone();
    answers(move || InOut::new(Lines::crlf(), proto())).await;
    answers(move || InOut::new(with_options(), Lines::crlf())).await;
    answers(move || InOut::new(with_options(), with_options())).await;
    let proto = cloned.clone();
    answers(move || InOut::new(with_options(), proto())).await;
    let proto = cloned.clone();
    answers(move || InOut::new(proto(), Lines::crlf())).await;
    let proto = cloned.clone();
    answers(move || InOut::new(proto(), with_options())).await;
    answers(move || InOut::new(cloned(), cloned())).await;
}

/// Serves with codecs made by `codec`: answers one request, then closes.
async fn answers<F, C>(codec: F)
where
    F: Fn() -> C + Clone + Send + 'static,
    C: Decoder<Item = Bytes, Error = LinesError> + Encoder<Bytes, Error = LinesError>,
    C: Send + 'static,
{
    let service = service_fn(|line: Bytes| {
        let answer = match &*line {
            b"GET / HTTP/1.0" => Reply::none(),
            b"" => Reply::from(Bytes::from("HTTP/1.0 200 OK\r\n")).close(),
            _ => Reply::from(Bytes::from("HTTP/1.0 400 Bad Request\r\n")).close(),
        };
        ready(Ok::<_, Infallible>(answer))
    });
    let served = serve(Pipeline::new(codec).service(service));

    let mut client = served.client().await;
    client.send("GET / HTTP/1.0\r\n\r\n").await;
    let heard = client.rest().await;
    drop(client);

    assert_eq!(heard, ["HTTP/1.0 200 OK", ""]);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}
