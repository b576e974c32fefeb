//! A registry finds connections by the program's own keys, sends to many of them, and forgets them
//! when they end.

mod support;

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use support::{Client, Clients, Ends, each_way, settled};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, DuplexStream};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tower::service_fn;
use tower::util::BoxCloneSyncService;
use tower_tcp::bind::SocketOptions;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::make::MakePerConnection;
use tower_tcp::pipeline::{Limits, Watermarks};
use tower_tcp::registry::{KeyTaken, Registry, SlowPeer, broadcast};
use tower_tcp::testkit::{Served, serve, serve_with};
use tower_tcp::{BoxError, EndReason, Peer, Pipeline, Reply, Server};

/// The number of keys of one connection. A peer could cause this many with a few megabytes of
/// names.
const MANY: usize = 400_000;

type Names = Registry<String, Bytes>;
type Make = BoxCloneSyncService<Peer<Bytes>, Enter, BoxError>;
type Enter = BoxCloneSyncService<Bytes, Bytes, BoxError>;

/// A service that enters its connection under each line it gets.
fn naming(names: &Names) -> Pipeline<fn() -> Lines, MakePerConnection<Make>, Bytes> {
    let names = names.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        let names = names.clone();
        let enter = service_fn(move |line: Bytes| {
            let name = String::from_utf8_lossy(&line).into_owned();
            let answer = match names.insert(name, &peer) {
                Ok(()) => "in",
                Err(KeyTaken) => "taken",
            };
            std::future::ready(Ok::<_, BoxError>(answer.into()))
        });
        std::future::ready(Ok::<_, BoxError>(Enter::new(enter)))
    });
    let codec: fn() -> Lines = Lines::default;
    let limits = Limits::default().high_mark(1024);
    let deadlines = Deadlines::default().idle(None).write(None);
    Pipeline::new(codec)
        .make_service(Make::new(make))
        .limits(limits)
        .deadlines(deadlines)
}

async fn enter(served: &Served, name: &str) -> Client<DuplexStream> {
    let mut client = served.client().await;
    assert_eq!(client.ask(name).await, "in", "{}", served.way());
    client
}

fn peer(names: &Names, name: &str) -> Peer<Bytes> {
    names.get(&name.to_owned()).expect("it is in")
}

fn sorted(names: &Names) -> Vec<String> {
    let mut all: Vec<_> = names.iter().map(|(name, _)| name).collect();
    all.sort();
    all
}

#[tokio::test(start_paused = true)]
async fn connections_are_found_by_their_keys() {
    let names = Names::new();
    for served in each_way(naming(&names)) {
        let mut ann = enter(&served, "ann").await;
        let _bob = enter(&served, "bob").await;

        let found = names.get(&"ann".to_owned()).expect("she is in");
        found.send("psst".into()).await.expect("it is open");

        assert_eq!(ann.line().await, "psst");
        assert!(names.get(&"cid".to_owned()).is_none());
        assert_eq!((names.len(), names.is_empty()), (2, false));
        assert_eq!(sorted(&names), ["ann", "bob"]);
        drop((ann, _bob));
        served.reason().await;
        served.reason().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_is_of_one_connection_and_a_connection_may_have_many() {
    let names = Names::new();
    let served = serve(naming(&names));
    let mut ann = enter(&served, "ann").await;
    let mut bob = enter(&served, "bob").await;

    assert_eq!(bob.ask("ann").await, "taken");
    assert_eq!(ann.ask("ann").await, "in", "it is hers already");
    assert_eq!(ann.ask("operator").await, "in");

    assert_eq!(sorted(&names), ["ann", "bob", "operator"]);
}

#[tokio::test(start_paused = true)]
async fn an_end_of_any_kind_takes_a_connection_out() {
    let names = Names::new();
    let get = |name: &str| names.get(&name.to_owned()).expect("it is in");
    for served in each_way(naming(&names)) {
        let clients = [
            enter(&served, "leaves").await,
            enter(&served, "is closed").await,
            enter(&served, "is aborted").await,
        ];
        let [leaves, mut is_closed, is_aborted] = clients;

        drop(leaves);
        get("is closed").close();
        get("is aborted").abort();
        is_closed.rest().await;
        drop((is_closed, is_aborted));
        for _ in 0..3 {
            served.reason().await;
        }

        assert!(names.is_empty(), "{}: {:?}", served.way(), sorted(&names));
        // The keys are free again.
        drop(enter(&served, "leaves").await);
        served.reason().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_has_ended_is_not_entered() {
    let names = Names::new();
    let served = serve(naming(&names));
    let client = enter(&served, "ann").await;
    let ann = names.get(&"ann".to_owned()).expect("she is in");
    drop(client);
    served.reason().await;

    let late = names.insert("late".to_owned(), &ann);

    assert_eq!(late, Ok(()));
    assert!(names.is_empty());
}

#[tokio::test(start_paused = true)]
async fn one_who_is_taken_out_goes_on_and_the_end_of_it_takes_nobody_else_out() {
    let names = Names::new();
    let served = serve(naming(&names));
    let mut first = enter(&served, "ann").await;

    let removed = names.remove(&"ann".to_owned());
    let _second = enter(&served, "ann").await;

    assert!(removed.is_some());
    assert_eq!(first.ask("other").await, "in");
    drop(first);
    served.reason().await;
    assert_eq!(sorted(&names), ["ann"]);
    assert!(names.remove(&"nobody".to_owned()).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_second_login_replaces_the_first_whose_end_leaves_it_alone() {
    let names = Names::new();
    let served = serve(naming(&names));
    let mut first = enter(&served, "ann").await;
    let mut second = enter(&served, "second").await;
    let (ann, again) = (peer(&names, "ann"), peer(&names, "second"));

    let replaced = names.replace("ann".to_owned(), &again).expect("she was in");

    assert_eq!(replaced.info().id(), ann.info().id());
    assert_eq!(peer(&names, "ann").info().id(), again.info().id());
    assert_eq!(first.ask("other").await, "in", "the first goes on");
    replaced.close_because("logged in elsewhere");
    first.rest().await;
    drop(first);
    served.reason().await;
    assert_eq!(sorted(&names), ["ann", "second"]);
    assert_eq!(peer(&names, "ann").info().id(), again.info().id());
    assert_eq!(second.ask("ann").await, "in", "it is the second's");
    drop(second);
    served.reason().await;
    assert!(names.is_empty(), "the second's end removes it");
}

#[tokio::test(start_paused = true)]
async fn a_connection_removes_its_own_entry_and_not_that_of_the_one_that_replaced_it() {
    let names = Names::new();
    let served = serve(naming(&names));
    let _first = enter(&served, "ann").await;
    let _second = enter(&served, "second").await;
    let (ann, again) = (peer(&names, "ann"), peer(&names, "second"));
    let key = "ann".to_owned();
    names.replace(key.clone(), &again).expect("she was in");

    assert!(!names.remove_peer(&key, &ann));

    assert_eq!(sorted(&names), ["ann", "second"]);
    assert!(names.remove_peer(&key, &again));
    assert_eq!(sorted(&names), ["second"]);
    assert!(!names.remove_peer(&key, &again), "nobody has it any more");
}

#[tokio::test(start_paused = true)]
async fn a_connection_keeps_its_key_over_an_upgrade_to_another_pipeline() {
    let names = Names::new();
    let entering = names.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        entering
            .insert("ann".to_owned(), &peer)
            .expect("it is free");
        let over = service_fn(|_line: Bytes| {
            std::future::ready(Ok::<_, BoxError>(
                Reply::from(Bytes::from("over")).upgrade(),
            ))
        });
        std::future::ready(Ok::<_, BoxError>(over))
    });
    let own = names.clone();
    let next = service_fn(move |peer: Peer<Bytes>| {
        let names = own.clone();
        let answers = service_fn(move |line: Bytes| {
            let (key, other) = ("ann".to_owned(), "other".to_owned());
            let answer = match &*line {
                b"insert" => format!("{:?}", names.insert(key, &peer)),
                b"replace" => {
                    names.insert(other, &peer).expect("it is free");
                    format!("{}", names.replace(key, &peer).is_some())
                }
                b"remove" => format!("{}", names.remove_peer(&key, &peer)),
                _ => "no command".to_owned(),
            };
            std::future::ready(Ok::<_, BoxError>(Bytes::from(answer)))
        });
        std::future::ready(Ok::<_, BoxError>(answers))
    });
    let upgraded = Pipeline::new(Lines::default).make_service(next);
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let served = serve(pipeline.on_upgrade(upgraded));

    for (command, answer) in [
        ("insert", "Ok(())"),
        ("replace", "false"),
        ("remove", "true"),
    ] {
        let mut client = served.client().await;
        assert_eq!(client.ask("upgrade").await, "over");
        let before = peer(&names, "ann");

        assert_eq!(client.ask(command).await, answer, "{command}");

        assert!(before.send(Bytes::from("lost")).await.is_err());
        if command != "remove" {
            // The old handle does not take the entry back.
            assert_eq!(names.insert("ann".to_owned(), &before), Ok(()));
            assert!(names.replace("ann".to_owned(), &before).is_none());
            let ann = peer(&names, "ann");
            ann.send(Bytes::from("hello"))
                .await
                .expect("it is the new one");
            assert_eq!(client.line().await, "hello", "{command}");
        }
        drop(client);
        served.reason().await;
        assert!(names.is_empty(), "{command}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_is_taken_over_again_and_again_and_the_last_one_has_it() {
    let names = Names::new();
    let served = serve(naming(&names));
    let mut clients = Vec::new();
    for n in 0..10 {
        clients.push(enter(&served, &n.to_string()).await);
    }
    for n in 0..10 {
        let taken = names.replace("ann".to_owned(), &peer(&names, &n.to_string()));
        assert_eq!(taken.is_some(), n > 0);
    }
    let last = clients.pop().expect("there are ten");
    drop(clients);
    for _ in 0..9 {
        served.reason().await;
    }

    assert_eq!(sorted(&names), ["9", "ann"]);
    drop(last);
    served.reason().await;
    assert!(names.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_has_the_key_or_has_ended_replaces_none() {
    let names = Names::new();
    let served = serve(naming(&names));
    let _ann = enter(&served, "ann").await;
    let gone = enter(&served, "gone").await;
    let (ann, ended) = (peer(&names, "ann"), peer(&names, "gone"));
    drop(gone);
    served.reason().await;

    assert!(names.replace("ann".to_owned(), &ann).is_none());
    assert!(names.replace("ann".to_owned(), &ended).is_none());
    assert!(names.replace("gone".to_owned(), &ended).is_none());

    assert_eq!(sorted(&names), ["ann"]);
    assert_eq!(peer(&names, "ann").info().id(), ann.info().id());
}

#[tokio::test(start_paused = true)]
async fn coming_and_going_leaves_nothing_behind() {
    let names = Names::new();
    let served = serve(naming(&names));
    let _ann = enter(&served, "ann").await;
    let ann = names.get(&"ann".to_owned()).expect("she is in");
    let rooms = Registry::new();
    let room = Arc::new("room");

    for _ in 0..1_000 {
        rooms.insert(Arc::clone(&room), &ann).expect("it is free");
        rooms.remove(&room).expect("she is in");
    }

    // Neither the registry nor its end callbacks have kept the key.
    assert_eq!(Arc::strong_count(&room), 1);
}

#[tokio::test]
async fn a_connection_leaves_very_many_keys_in_little_time() {
    let (peers, mut made) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let peers = peers.clone();
        async move {
            peers.send(peer).await?;
            Ok::<_, BoxError>(service_fn(async |line: Bytes| Ok::<_, Infallible>(line)))
        }
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));
    let _client = served.client().await;
    let peer = made.recv().await.expect("one is connected");
    let names = Registry::new();
    for key in 0..MANY {
        names.insert(key, &peer).expect("it is free");
    }

    let begun = Instant::now();
    (0..MANY)
        .rev()
        .step_by(2)
        .for_each(|key| drop(names.remove(&key)));
    (0..MANY)
        .step_by(2)
        .for_each(|key| drop(names.remove(&key)));

    assert!(names.is_empty());
    // Far more than it takes. A search through all keys for each would take minutes.
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[tokio::test(start_paused = true)]
async fn a_registry_may_be_gone_before_its_connections() {
    let names = Names::new();
    let served = serve(naming(&names));
    let client = enter(&served, "ann").await;
    let ann = names.get(&"ann".to_owned()).expect("she is in");
    let key = Arc::new("room");
    for room in [Registry::new(), Registry::until_end()] {
        room.insert(Arc::clone(&key), &ann).expect("it is free");

        drop(room);

        assert_eq!(Arc::strong_count(&key), 1, "a connection holds the key");
    }
    drop(client);

    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn a_broadcast_reaches_those_who_are_picked() {
    let names = Names::new();
    let served = serve(naming(&names));
    let mut ann = enter(&served, "ann").await;
    let mut bob = enter(&served, "bob").await;
    let mut cid = enter(&served, "cid").await;

    let sent = names
        .broadcast("hi".into(), |name, _| name != "bob", SlowPeer::Wait)
        .await;

    assert_eq!((sent.sent(), sent.skipped(), sent.closed()), (2, 0, 0));
    assert_eq!(ann.line().await, "hi");
    assert_eq!(cid.line().await, "hi");
    assert!(bob.hears_nothing().await);
}

#[tokio::test(start_paused = true)]
async fn a_broadcast_can_pick_a_frame_for_each() {
    let names = Names::new();
    let served = serve(naming(&names));
    let mut ann = enter(&served, "ann").await;
    let mut bob = enter(&served, "bob").await;
    let mut cid = enter(&served, "cid").await;

    let pick = |name: &String, _: &_| (name != "cid").then(|| format!("dear {name}").into());
    let broadcast = names.broadcast_with(pick, SlowPeer::Skip).await;

    assert_eq!((broadcast.sent(), broadcast.skipped()), (2, 0));
    assert_eq!(ann.line().await, "dear ann");
    assert_eq!(bob.line().await, "dear bob");
    assert!(cid.hears_nothing().await);
}

#[tokio::test(start_paused = true)]
async fn a_broadcast_to_peers_from_elsewhere_keeps_the_same_policy() {
    let names = Names::new();
    let (_served, mut quick, _slow) = with_one_slow(&names).await;
    let peers: Vec<_> = names.iter().map(|(_, peer)| peer).collect();

    let sent = broadcast(peers.iter().cloned(), "hi".into(), SlowPeer::Skip).await;
    assert_eq!((sent.sent(), sent.skipped(), sent.closed()), (3, 1, 0));
    all_hear(&mut quick).await;

    let sent = broadcast(peers, "hi".into(), SlowPeer::CloseAfter(Duration::ZERO)).await;
    assert_eq!((sent.sent(), sent.skipped(), sent.closed()), (3, 0, 1));
    all_hear(&mut quick).await;
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_broadcasts_makes_no_reader_a_slow_one() {
    let names = Names::new();
    let served = serve(naming(&names));
    let mut ann = enter(&served, "ann").await;

    // More than the connection's queue holds, without a turn of its task in between.
    for _ in 0..100 {
        let sent = names
            .broadcast(
                "hi".into(),
                |_, _| true,
                SlowPeer::CloseAfter(Duration::ZERO),
            )
            .await;
        assert_eq!(sent.sent(), 1);
    }

    for _ in 0..100 {
        assert_eq!(ann.line().await, "hi");
    }
}

/// Connects three readers, and one peer that does not read: its stream is full, and its output has
/// reached the high mark.
async fn with_one_slow(names: &Names) -> (Served, Vec<Client<DuplexStream>>, Client<DuplexStream>) {
    let served = serve(naming(names));
    let slow = enter(&served, "slow").await;
    let peer = names.get(&"slow".to_owned()).expect("it is in");
    let stuffed = peer.send("x".repeat(128 * 1024).into());
    stuffed.await.expect("it is open");
    settled().await;
    let mut quick = Vec::new();
    for name in ["ann", "bob", "cid"] {
        quick.push(enter(&served, name).await);
    }
    (served, quick, slow)
}

async fn all_hear(quick: &mut [Client<DuplexStream>]) {
    for client in quick {
        let heard = timeout(Duration::from_secs(1), client.line()).await;
        assert_eq!(heard.expect("it is not held up"), "hi");
    }
}

#[tokio::test(start_paused = true)]
async fn many_who_wait_for_a_flush_make_no_broadcast_wait() {
    let names = Names::new();
    let served = serve(naming(&names));
    let _stalled = enter(&served, "stalled").await;
    let peer = names.get(&"stalled".to_owned()).expect("it is in");
    peer.set_watermarks(Watermarks::below(1 << 20));
    // As much as the stream holds, plus half of the high mark.
    let stuffed = peer.send("x".repeat(600 * 1024).into());
    stuffed.await.expect("it is open");
    settled().await;
    let mut waiting = Vec::new();
    for _ in 0..64 {
        let peer = peer.clone();
        waiting.push(tokio::spawn(async move { peer.flushed().await }));
    }
    settled().await;

    for _ in 0..64 {
        let broadcast = names.broadcast("hi".into(), |_, _| true, SlowPeer::Skip);
        let sent = timeout(Duration::from_secs(1), broadcast).await;
        assert_eq!(sent.expect("it is not held up").sent(), 1);
    }

    assert!(waiting.iter().all(|waiting| !waiting.is_finished()));
}

#[tokio::test(start_paused = true)]
async fn a_slow_peer_can_be_skipped() {
    let names = Names::new();
    let (_served, mut quick, mut slow) = with_one_slow(&names).await;

    let sent = names
        .broadcast("hi".into(), |_, _| true, SlowPeer::Skip)
        .await;

    assert_eq!((sent.sent(), sent.skipped(), sent.closed()), (3, 1, 0));
    all_hear(&mut quick).await;
    assert_eq!(slow.line().await.len(), 128 * 1024);
    assert!(slow.hears_nothing().await);
    assert_eq!(slow.ask("goes on").await, "in");
}

#[tokio::test(start_paused = true)]
async fn a_slow_peer_can_be_closed_with_a_reason_of_its_own() {
    let names = Names::new();
    let (served, mut quick, slow) = with_one_slow(&names).await;

    let sent = names
        .broadcast(
            "hi".into(),
            |_, _| true,
            SlowPeer::CloseAfter(Duration::ZERO),
        )
        .await;

    assert_eq!((sent.sent(), sent.skipped(), sent.closed()), (3, 0, 1));
    all_hear(&mut quick).await;
    assert_eq!(served.reason().await, EndReason::SlowReader);
    assert_eq!(sorted(&names), ["ann", "bob", "cid"]);
    drop(slow);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_nothing_for_the_time_is_closed_and_not_before() {
    let second = Duration::from_secs(1);
    let names = Names::new();
    for served in each_way(naming(&names)) {
        let mut slow = enter(&served, "slow").await;
        let peer = peer(&names, "slow");
        let stuffed = peer.send("x".repeat(256 * 1024).into());
        stuffed.await.expect("it is open");
        settled().await;
        let hi = async || {
            let slow = SlowPeer::CloseAfter(5 * second);
            let sent = names.broadcast("hi".into(), |_, _| true, slow).await;
            (sent.sent(), sent.skipped(), sent.closed())
        };

        assert_eq!(hi().await, (0, 1, 0), "{}", served.way());
        sleep(4 * second).await;
        assert_eq!(hi().await, (0, 1, 0), "the time is not over");
        let taken = slow.0.fill_buf().await.expect("it is open").len();
        slow.0.consume(taken);
        sleep(4 * second).await;
        assert_eq!(hi().await, (0, 1, 0), "it has taken something");
        sleep(5 * second).await;
        assert_eq!(hi().await, (0, 0, 1), "the time is over");

        assert_eq!(served.reason().await, EndReason::SlowReader);
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_has_taken_something_just_before_the_time_is_over_is_not_closed() {
    let names = Names::new();
    for served in each_way(naming(&names)) {
        let mut slow = enter(&served, "slow").await;
        let peer = peer(&names, "slow");
        let stuffed = peer.send("x".repeat(256 * 1024).into());
        stuffed.await.expect("it is open");
        settled().await;
        let hi = async || {
            let slow = SlowPeer::CloseAfter(Duration::from_secs(16));
            let sent = names.broadcast("hi".into(), |_, _| true, slow).await;
            (sent.skipped(), sent.closed())
        };
        assert_eq!(hi().await, (1, 0), "{}", served.way());
        sleep(Duration::from_millis(15_500)).await;
        assert_eq!(hi().await, (1, 0), "{}", served.way());
        let taken = slow.0.fill_buf().await.expect("it is open").len();
        slow.0.consume(taken);
        sleep(Duration::from_millis(600)).await;

        assert_eq!(hi().await, (1, 0), "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_reads_all_the_time_is_not_closed_by_a_burst() {
    let names = Names::new();
    for served in each_way(naming(&names)) {
        let mut steady = enter(&served, "steady").await;
        let peer = peer(&names, "steady");
        let reading = tokio::spawn(async move {
            let mut lines = 0;
            // One at a time, and far slower than they are sent.
            while steady.line().await.len() == 10_000 {
                lines += 1;
                sleep(Duration::from_millis(10)).await;
            }
            lines
        });

        let mut sent = 0;
        for _ in 0..2_000 {
            let slow = SlowPeer::CloseAfter(Duration::from_secs(1));
            let line = "x".repeat(10_000);
            let broadcast = names.broadcast(line.into(), |_, _| true, slow).await;
            assert_eq!(broadcast.closed(), 0, "{}", served.way());
            sent += broadcast.sent();
            assert!(peer.buffered().bytes() < 16 * 1024, "memory is bounded");
            sleep(Duration::from_millis(1)).await;
        }

        assert!((100..1_000).contains(&sent), "{sent}");
        peer.send("done".into()).await.expect("it is open");
        assert_eq!(reading.await.expect("it does not panic"), sent);
        served.reason().await;
    }
}

#[tokio::test]
async fn a_burst_over_tcp_closes_no_reader_that_reads_all_the_time() {
    let names = Names::new();
    let server = Server::bind("127.0.0.1:0").await.expect("it is free");
    let served = serve_with(server, (), naming(&names));
    let addr = served.handle().local_addrs()[0].tcp().expect("it is TCP");
    let mut client = Client::new(TcpStream::connect(addr).await.expect("it listens"));
    assert_eq!(client.ask("steady").await, "in");
    let reading = tokio::spawn(async move { while client.line().await != "done" {} });

    let line = Bytes::from("x".repeat(100_000));
    for _ in 0..200 {
        let slow = SlowPeer::CloseAfter(Duration::from_secs(10));
        let sent = names.broadcast(line.clone(), |_, _| true, slow).await;
        assert_eq!(sent.closed(), 0);
    }

    let steady = peer(&names, "steady");
    let done = steady.send("done".into());
    timeout(Duration::from_secs(30), done)
        .await
        .expect("it reads")
        .expect("it is open");
    reading.await.expect("it does not panic");
}

/// The system lets the server write again only once a third of its buffer is free.
#[tokio::test]
async fn a_reader_that_empties_a_large_buffer_slowly_is_not_closed() {
    let names = Names::new();
    let options = SocketOptions::default().send_buffer(512 * 1024);
    let server = Server::builder().socket_options(options);
    let server = server.listen("127.0.0.1:0").bind().await;
    let served = serve_with(server.expect("it is free"), (), naming(&names));
    let addr = served.handle().local_addrs()[0].tcp().expect("it is TCP");
    let socket = TcpSocket::new_v4().expect("there is IPv4");
    socket.set_recv_buffer_size(16 * 1024).expect("it is taken");
    let mut client = Client::new(socket.connect(addr).await.expect("it listens"));
    assert_eq!(client.ask("steady").await, "in");
    let reading = tokio::spawn(async move {
        let mut block = [0; 4096];
        while client.0.read(&mut block).await.is_ok_and(|n| n > 0) {
            sleep(Duration::from_millis(20)).await;
        }
    });

    let line = Bytes::from("x".repeat(10_000));
    let (began, mut skipped) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(3) {
        let slow = SlowPeer::CloseAfter(Duration::from_secs(1));
        let sent = names.broadcast(line.clone(), |_, _| true, slow).await;
        assert_eq!(sent.closed(), 0, "it takes something all the time");
        skipped += sent.skipped();
        sleep(Duration::from_millis(10)).await;
    }

    assert!(skipped > 10, "it was found slow {skipped} times");
    reading.abort();
}

#[tokio::test(start_paused = true)]
async fn a_slow_peer_can_be_waited_for_and_holds_up_no_other() {
    let names = Names::new();
    let (_served, mut quick, mut slow) = with_one_slow(&names).await;
    let sending = tokio::spawn({
        let names = names.clone();
        async move {
            names
                .broadcast("hi".into(), |_, _| true, SlowPeer::Wait)
                .await
        }
    });

    all_hear(&mut quick).await;
    assert!(!sending.is_finished());
    assert_eq!(slow.line().await.len(), 128 * 1024);

    assert_eq!(slow.line().await, "hi");
    let sent = sending.await.expect("it does not panic");
    assert_eq!((sent.sent(), sent.skipped(), sent.closed()), (4, 0, 0));
}

/// Sends without end to 1,000 peers, none of which takes a frame, so no broadcast waits.
#[tokio::test(start_paused = true)]
async fn a_task_that_broadcasts_without_end_leaves_other_tasks_their_turns() {
    let names = Names::new();
    let (_served, _quick, _slow) = with_one_slow(&names).await;
    let peer = peer(&names, "slow");
    let (many, listed) = (Names::new(), vec![peer.clone(); 1_000]);
    for n in 0..1_000 {
        let entered = many.insert(n.to_string(), &peer);
        entered.expect("a number is given once");
    }
    let reached = Arc::new(AtomicUsize::new(0));
    let reach = {
        let reached = Arc::clone(&reached);
        move |_: &Peer<Bytes>| {
            let before = reached.fetch_add(1, Ordering::Relaxed);
            assert!(before < 1_000, "no other task had a turn");
            true
        }
    };

    let by_key = tokio::spawn({
        let reach = reach.clone();
        async move {
            loop {
                let whom = |_: &String, peer: &_| reach(peer);
                many.broadcast("hi".into(), whom, SlowPeer::Skip).await;
            }
        }
    });
    for _turn in 0..1_000 {
        tokio::task::yield_now().await;
        reached.store(0, Ordering::Relaxed);
    }
    by_key.abort();
    settled().await;
    let by_list = tokio::spawn(async move {
        loop {
            let peers = listed.iter().filter(|peer| reach(peer)).cloned();
            broadcast(peers, "hi".into(), SlowPeer::Skip).await;
        }
    });
    for _turn in 0..1_000 {
        tokio::task::yield_now().await;
        reached.store(0, Ordering::Relaxed);
    }

    assert!(!by_list.is_finished(), "it goes on");
    by_list.abort();
}

#[tokio::test(start_paused = true)]
async fn one_or_those_who_are_picked_can_be_closed() {
    let names = Names::new();
    let served = serve(naming(&names));
    let mut clients = Vec::new();
    for name in ["ann", "bob", "cid", "dan"] {
        clients.push(enter(&served, name).await);
    }

    let one = names.close(&"ann".to_owned());
    let nobody = names.close(&"zoe".to_owned());
    let picked = names.close_where(|name, _| name == "bob" || name == "cid");

    assert_eq!((one, nobody, picked), (true, false, 2));
    for client in &mut clients[..3] {
        assert!(client.rest().await.is_empty());
    }
    clients.drain(..3);
    for _ in 0..3 {
        assert_eq!(served.reason().await, EndReason::ServiceClosed);
    }
    assert_eq!(sorted(&names), ["dan"]);
    assert_eq!(clients[0].ask("still").await, "in");
}

#[tokio::test(start_paused = true)]
async fn a_server_knows_its_connections_without_a_registry() {
    let names = Names::new();
    let served = serve(naming(&names));
    let mut ann = enter(&served, "ann").await;
    let mut bob = enter(&served, "bob").await;
    let id = |name: &str| names.get(&name.to_owned()).expect("it is in").info().id();
    let (ann_id, bob_id) = (id("ann"), id("bob"));

    let mut all: Vec<_> = served
        .handle()
        .connections()
        .map(|live| live.id())
        .collect();
    all.sort();
    let one = served.handle().connection(ann_id).expect("she is there");
    one.close();
    let end = tokio::spawn(async move { one.closed().await });

    assert_eq!(all, [ann_id, bob_id]);
    assert!(ann.rest().await.is_empty());
    drop(ann);
    let end = end.await.expect("it does not panic");
    assert_eq!(
        (end.reason(), end.requests()),
        (EndReason::ServiceClosed, 1)
    );
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
    assert!(served.handle().connection(ann_id).is_none());
    assert_eq!(bob.ask("still").await, "in");
}

/// A key whose clone reports itself, then blocks its shard until it is released.
#[derive(PartialEq, Eq, Hash)]
struct Key(usize);

static CLONED: Barrier = Barrier::new(2);
static LET_GO: Barrier = Barrier::new(2);

impl Clone for Key {
    fn clone(&self) -> Self {
        if self.0 == 0 {
            CLONED.wait();
            LET_GO.wait();
        }
        Self(self.0)
    }
}

#[tokio::test(start_paused = true)]
async fn many_who_come_and_go_do_not_queue_behind_one_lock() {
    let names = Names::new();
    let served = serve(naming(&names));
    let _ann = enter(&served, "ann").await;
    let ann = names.get(&"ann".to_owned()).expect("she is in");
    let keys: Registry<Key, Bytes> = Registry::new();
    // The key is also cloned on insertion, before it is in a shard.
    let insert = std::thread::spawn({
        let keys = keys.clone();
        move || keys.insert(Key(0), &ann)
    });
    CLONED.wait();
    LET_GO.wait();
    insert
        .join()
        .expect("it does not panic")
        .expect("it is free");

    let reading = std::thread::spawn({
        let keys = keys.clone();
        move || keys.iter().count()
    });
    CLONED.wait();
    let (tell, told) = std::sync::mpsc::channel();
    for key in 1..=64 {
        let (keys, tell) = (keys.clone(), tell.clone());
        std::thread::spawn(move || tell.send(keys.get(&Key(key)).is_some()));
    }
    drop(tell);

    // While one shard is locked, all others go on. About four of 64 keys share the locked one.
    for _ in 0..32 {
        let found = told.recv_timeout(Duration::from_secs(60));
        assert_eq!(
            found,
            Ok(false),
            "it does not wait for the one that is locked"
        );
    }
    LET_GO.wait();
    assert_eq!(reading.join().expect("it does not panic"), 1);
    assert_eq!(told.iter().count(), 32);
}

#[tokio::test(start_paused = true)]
async fn a_key_is_found_by_what_it_borrows() {
    let names = Names::new();
    let served = serve(naming(&names));
    let _ann = enter(&served, "ann").await;
    let peer = names.get("ann").expect("she is in");

    assert!(names.remove_peer("ann", &peer));
    names.insert("ann".into(), &peer).expect("it is free");
    assert!(names.remove("ann").is_some());
    assert!(!names.close("ann"));
}

/// A key that uses its registry when it is dropped.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Busy(&'static str);

static BUSY: OnceLock<Registry<Busy, Bytes>> = OnceLock::new();

impl Drop for Busy {
    fn drop(&mut self) {
        // Takes all locks.
        let _number = BUSY.get().map(Registry::len);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_may_use_its_registry_when_it_is_dropped() {
    let names = Names::new();
    let served = serve(naming(&names));
    let ann = enter(&served, "ann").await;
    let bob = enter(&served, "bob").await;
    let busy = BUSY.get_or_init(Registry::new);
    let (of_ann, of_bob) = (peer(&names, "ann"), peer(&names, "bob"));

    // In a thread, because a deadlock would block it.
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        busy.insert(Busy("1"), &of_ann).expect("it is free");
        busy.insert(Busy("1"), &of_ann).expect("it is hers");
        busy.insert(Busy("1"), &of_bob).expect_err("it is taken");
        assert!(busy.replace(Busy("1"), &of_bob).is_some());
        assert!(busy.replace(Busy("1"), &of_bob).is_none());
        assert!(busy.remove(&Busy("1")).is_some());
        busy.insert(Busy("2"), &of_ann).expect("it is free");
        busy.insert(Busy("3"), &of_bob).expect("it is free");
        done.send((of_ann, of_bob)).expect("it is waited for");
    });
    let (of_ann, of_bob) = is_done
        .recv_timeout(Duration::from_secs(30))
        .expect("it does not deadlock");

    drop((ann, bob));
    served.reason().await;
    served.reason().await;
    assert!(busy.is_empty());
    busy.insert(Busy("4"), &of_ann).expect("it is too late");
    assert!(busy.replace(Busy("4"), &of_bob).is_none());
}
