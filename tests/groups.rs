//! A group of connections begins with its first member and ends with its last, and so does the
//! stream that feeds it.

mod support;

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use futures_util::{FutureExt, StreamExt};
use support::{Client, Clients, Ends, settled};
use tokio::io::DuplexStream;
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::Limits;
use tower_tcp::registry::{Groups, JoinError, SlowPeer};
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{BoxError, EndReason, Peer, Pipeline};

type Rooms = Groups<String, Bytes>;

/// Serves connections that join the room that a line names, or leave it if the line begins with
/// `-`.
fn serve_rooms(rooms: &Rooms) -> Served {
    let rooms = rooms.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        let rooms = rooms.clone();
        let service = service_fn(move |line: Bytes| {
            let (rooms, peer) = (rooms.clone(), peer.clone());
            async move {
                let line = String::from_utf8_lossy(&line).into_owned();
                let answer = match line.strip_prefix('-') {
                    Some(room) if rooms.leave(room, &peer) => "out".to_owned(),
                    Some(_) => "not in".to_owned(),
                    None => match rooms.join(line, &peer).await {
                        Ok(()) => "in".to_owned(),
                        Err(err) => why(&err),
                    },
                };
                Ok::<_, BoxError>(Bytes::from(answer))
            }
        });
        std::future::ready(Ok::<_, BoxError>(service))
    });
    let limits = Limits::default().high_mark(1024);
    let deadlines = Deadlines::default().idle(None).write(None);
    serve(
        Pipeline::new(Lines::default)
            .make_service(make)
            .limits(limits)
            .deadlines(deadlines),
    )
}

fn why(err: &JoinError) -> String {
    match find_cause::<io::Error>(err) {
        Some(cause) => format!("{err}: {cause}"),
        None => err.to_string(),
    }
}

async fn join(served: &Served, room: &str) -> Client<DuplexStream> {
    let mut client = served.client().await;
    assert_eq!(client.ask(room).await, "in");
    client
}

/// A stream that was opened. Its sender is closed once the stream is dropped.
struct Fed {
    room: String,
    frames: mpsc::Sender<Bytes>,
}

impl Fed {
    async fn say(&self, line: &'static str) {
        let said = self.frames.send(line.into()).await;
        said.expect("the stream is not dropped");
    }

    async fn dropped(&self) {
        let dropped = timeout(Duration::from_secs(3600), self.frames.closed());
        dropped.await.expect("the stream is dropped");
    }
}

/// Returns rooms whose streams the test controls, a semaphore with a permit for each stream that
/// may be opened, and the opened streams.
fn fed_rooms(slow: SlowPeer) -> (Rooms, Arc<Semaphore>, mpsc::Receiver<Fed>) {
    let (opened, streams) = mpsc::channel(100);
    let gate = Arc::new(Semaphore::new(0));
    let rooms = {
        let gate = Arc::clone(&gate);
        let open = move |room: String| {
            let (opened, gate) = (opened.clone(), Arc::clone(&gate));
            async move {
                gate.acquire().await.map_err(io::Error::other)?.forget();
                if room == "closed" {
                    return Err(io::Error::other("it is closed"));
                }
                assert_ne!(room, "haunted", "on purpose");
                let (frames, stream) = mpsc::channel(1);
                opened
                    .try_send(Fed { room, frames })
                    .expect("there is room");
                Ok(received(stream))
            }
        };
        Groups::fed_by(open, slow)
    };
    (rooms, gate, streams)
}

fn received<T>(mut from: mpsc::Receiver<T>) -> impl Stream<Item = T> {
    stream::poll_fn(move |cx| from.poll_recv(cx))
}

/// Rooms whose streams open at once.
fn open_rooms(slow: SlowPeer) -> (Rooms, mpsc::Receiver<Fed>) {
    let (rooms, gate, streams) = fed_rooms(slow);
    gate.add_permits(1_000);
    (rooms, streams)
}

#[tokio::test(start_paused = true)]
async fn a_member_that_begins_to_close_is_out_while_it_lingers() {
    let rooms = Rooms::default();
    let served = serve_rooms(&rooms);
    let _client = join(&served, "hall").await;
    let peer = rooms.members("hall").pop().expect("it is in");

    peer.close();
    peer.closing().await;

    assert!(rooms.members("hall").is_empty());
    assert_eq!(served.handle().live(), 1, "it lingers");
}

#[tokio::test(start_paused = true)]
async fn the_first_member_opens_a_feed_and_the_last_one_that_leaves_drops_it() {
    let (rooms, mut streams) = open_rooms(SlowPeer::Wait);
    let served = serve_rooms(&rooms);
    let mut ann = join(&served, "hall").await;
    let fed = streams.recv().await.expect("it is opened");
    let mut bob = join(&served, "hall").await;
    assert_eq!(bob.ask("hall").await, "in", "he is in already");
    assert_eq!((fed.room.as_str(), rooms.len()), ("hall", 1));

    assert_eq!(ann.ask("-hall").await, "out");
    assert_eq!(ann.ask("-hall").await, "not in");
    fed.say("to bob").await;
    assert_eq!(bob.line().await, "to bob");
    assert_eq!(bob.ask("-hall").await, "out");

    fed.dropped().await;
    assert!(rooms.is_empty());
    assert!(ann.hears_nothing().await);
    assert!(streams.try_recv().is_err(), "it was opened once");
}

#[tokio::test(start_paused = true)]
async fn a_member_that_closes_leaves_its_groups() {
    let (rooms, mut streams) = open_rooms(SlowPeer::Wait);
    let served = serve_rooms(&rooms);
    let mut ann = join(&served, "hall").await;
    assert_eq!(ann.ask("attic").await, "in");
    let bob = join(&served, "hall").await;
    let (hall, attic) = (streams.recv().await, streams.recv().await);
    let (hall, attic) = (hall.expect("it is opened"), attic.expect("it is opened"));

    drop(ann);

    attic.dropped().await;
    assert_eq!(rooms.keys().collect::<Vec<_>>(), ["hall"]);
    assert_eq!(rooms.members("hall").len(), 1);
    assert!(!hall.frames.is_closed());
    // Closing has begun, and the peer still reads nothing of the end.
    let peer = rooms.members("hall").pop().expect("bob is in");
    peer.close();
    hall.dropped().await;
    assert!(rooms.is_empty());
    rooms
        .join("hall".into(), &peer)
        .await
        .expect("it is no error");
    assert!(rooms.is_empty(), "it is too late");
    drop(bob);
}

#[tokio::test(start_paused = true)]
async fn all_who_join_wait_until_the_feed_is_open() {
    let (rooms, gate, mut streams) = fed_rooms(SlowPeer::Wait);
    let served = serve_rooms(&rooms);
    let (mut ann, mut bob) = (served.client().await, served.client().await);
    ann.send("hall\n").await;
    settled().await;
    bob.send("hall\n").await;
    assert!(ann.hears_nothing().await);
    assert!(bob.hears_nothing().await);

    // The client whose join opens the feed does not stay.
    drop(ann);
    settled().await;
    gate.add_permits(1);

    assert_eq!(bob.line().await, "in");
    streams.recv().await.expect("it is open").say("hi").await;
    assert_eq!(bob.line().await, "hi");
}

#[tokio::test(start_paused = true)]
async fn a_feed_that_nobody_waits_for_any_more_is_not_opened() {
    let (rooms, gate, mut streams) = fed_rooms(SlowPeer::Wait);
    let served = serve_rooms(&rooms);
    let mut ann = served.client().await;
    ann.send("hall\n").await;
    settled().await;

    drop(ann);
    served.reason().await;
    settled().await;
    gate.add_permits(1);
    settled().await;

    assert!(rooms.is_empty());
    assert!(streams.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_feed_that_cannot_be_opened_is_an_error_for_all_who_wait_and_they_are_no_members() {
    for (room, told) in [
        ("closed", "the group could not be opened: it is closed"),
        ("haunted", "the group could not be opened"),
    ] {
        let (rooms, gate, _streams) = fed_rooms(SlowPeer::Wait);
        let served = serve_rooms(&rooms);
        let (mut ann, mut bob) = (served.client().await, served.client().await);
        ann.send(format!("{room}\n")).await;
        bob.send(format!("{room}\n")).await;
        settled().await;
        assert_eq!(rooms.members(room).len(), 2);

        gate.add_permits(1);

        assert_eq!(
            (ann.line().await, bob.line().await),
            (told.into(), told.into())
        );
        assert!(rooms.is_empty());
        assert_eq!(ann.ask(&format!("-{room}")).await, "not in");
        // The next one tries again.
        bob.send(format!("{room}\n")).await;
        assert!(bob.hears_nothing().await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_of_a_feed_reaches_the_members_of_its_group() {
    let (rooms, mut streams) = open_rooms(SlowPeer::Wait);
    let served = serve_rooms(&rooms);
    let (mut ann, mut bob) = (join(&served, "hall").await, join(&served, "hall").await);
    let mut cid = join(&served, "attic").await;
    let hall = streams.recv().await.expect("it is opened");
    let attic = streams.recv().await.expect("it is opened");

    hall.say("1").await;
    hall.say("2").await;
    attic.say("3").await;

    for member in [&mut ann, &mut bob] {
        assert_eq!(
            (member.line().await, member.line().await),
            ("1".into(), "2".into())
        );
    }
    assert_eq!(cid.line().await, "3");
    let others = rooms.members("hall")[0].info().id();
    let whom = |peer: &Peer<Bytes>| peer.info().id() != others;
    let sent = rooms
        .broadcast("hall", "4".into(), whom, SlowPeer::Skip)
        .await;
    assert_eq!(sent.sent(), 1);
    let sent = rooms
        .broadcast("cellar", "5".into(), |_| true, SlowPeer::Skip)
        .await;
    assert_eq!(sent.sent(), 0, "there is no such group");
}

#[tokio::test(start_paused = true)]
async fn a_feed_that_ends_ends_its_group_and_no_connection() {
    let (rooms, mut streams) = open_rooms(SlowPeer::Wait);
    let served = serve_rooms(&rooms);
    let mut ann = join(&served, "hall").await;
    let fed = streams.recv().await.expect("it is opened");
    fed.say("bye").await;

    drop(fed);

    assert_eq!(ann.line().await, "bye");
    settled().await;
    assert!(rooms.is_empty());
    assert_eq!(ann.ask("hall").await, "in");
    streams.recv().await.expect("it is new").say("hi").await;
    assert_eq!(ann.line().await, "hi");
}

#[tokio::test(start_paused = true)]
async fn the_groups_end_their_feeds_when_they_are_dropped() {
    let (rooms, mut streams) = open_rooms(SlowPeer::Wait);
    let (bob, served, _client) = connected().await;
    rooms.join("hall".into(), &bob).await.expect("it is open");
    let fed = streams.recv().await.expect("it is opened");

    drop(rooms);

    fed.dropped().await;
    bob.close();
    served.reason().await;
}

#[tokio::test(start_paused = true)]
async fn groups_that_are_dropped_leave_nothing_with_their_members() {
    let (bob, _served, _client) = connected().await;
    let key = Arc::new("hall");
    let groups = Groups::new();
    let joined = groups.join(Arc::clone(&key), &bob).await;
    joined.expect("there is no feed");

    drop(groups);

    assert_eq!(Arc::strong_count(&key), 1, "a connection holds the key");
}

/// The stream's own poll makes the last member leave and join again, so its frame is taken by the
/// feed of a group that has ended, while another group has the key.
#[tokio::test(start_paused = true)]
async fn a_group_gets_nothing_of_the_stream_of_an_earlier_one() {
    static ROOMS: OnceLock<Rooms> = OnceLock::new();
    let rooms = ROOMS.get_or_init(|| {
        let opened = AtomicUsize::new(0);
        let open = move |room: String| {
            let number = opened.fetch_add(1, Ordering::Relaxed);
            let frames = stream::iter([number]).map(move |number| {
                let rooms = ROOMS.get().expect("it is in use");
                if number == 0 {
                    let peer = rooms.members(&room).pop().expect("she is in");
                    assert!(rooms.leave(&room, &peer));
                    let joined = pin!(rooms.join(room.clone(), &peer)).now_or_never();
                    assert!(joined.is_none(), "the new feed is not open yet");
                }
                Bytes::from(format!("of stream {number}"))
            });
            std::future::ready(Ok::<_, BoxError>(frames.chain(stream::pending())))
        };
        Groups::fed_by(open, SlowPeer::Wait)
    });
    let served = serve_rooms(rooms);

    let mut ann = served.client().await;
    ann.send("hall\n").await;

    let mut heard = [ann.line().await, ann.line().await];
    heard.sort();
    assert_eq!(heard, ["in", "of stream 1"]);
    assert!(ann.hears_nothing().await);
    assert_eq!(rooms.members("hall").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_slow_member_is_closed_and_holds_no_feed_back() {
    let (rooms, mut streams) = open_rooms(SlowPeer::CloseAfter(Duration::ZERO));
    let served = serve_rooms(&rooms);
    let (mut ann, slow) = (join(&served, "hall").await, join(&served, "hall").await);
    let fed = streams.recv().await.expect("it is opened");
    let line = "x".repeat(1024);

    for _ in 0..1_000 {
        fed.frames
            .send(line.clone().into())
            .await
            .expect("it is taken");
        assert_eq!(ann.line().await, line);
    }

    assert_eq!(served.reason().await, EndReason::SlowReader);
    assert_eq!(rooms.members("hall").len(), 1);
    drop(slow);
}

#[tokio::test(start_paused = true)]
async fn a_slow_member_that_is_waited_for_holds_the_feed_back_and_nothing_is_queued() {
    let (rooms, mut streams) = open_rooms(SlowPeer::Wait);
    let served = serve_rooms(&rooms);
    let (mut ann, slow) = (join(&served, "hall").await, join(&served, "hall").await);
    let fed = streams.recv().await.expect("it is opened");
    let line = "x".repeat(1024);

    let mut said = 0;
    while let Ok(room) = timeout(Duration::from_secs(60), fed.frames.reserve()).await {
        room.expect("it is not dropped").send(line.clone().into());
        said += 1;
        assert!(said < 1_000, "something is queued without a bound");
        settled().await;
    }
    // The last line is still in the channel, because the feed waits for the slow member to take the
    // line before it.
    for _ in 0..said - 1 {
        assert_eq!(ann.line().await, line);
    }

    // Closing ends the wait.
    drop(slow);
    fed.say("on it goes").await;
    assert_eq!(ann.line().await, line);
    assert_eq!(ann.line().await, "on it goes");
}

/// Returns a handle to a connection, with its server and its client.
async fn connected() -> (Peer<Bytes>, Served, Client<DuplexStream>) {
    let (peers, mut made) = mpsc::channel(1);
    let pipeline = Pipeline::new(Lines::default).make_service(service_fn(move |peer| {
        peers.try_send(peer).expect("there is room");
        let echo = service_fn(async |line: Bytes| Ok::<_, BoxError>(line));
        std::future::ready(Ok::<_, BoxError>(echo))
    }));
    let served = serve(pipeline);
    let client = served.client().await;
    let peer = made.recv().await.expect("it is connected");
    (peer, served, client)
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_always_ready_leaves_other_tasks_their_turns() {
    let taken = Arc::new(AtomicUsize::new(0));
    let open = {
        let taken = Arc::clone(&taken);
        move |_room: String| {
            let taken = Arc::clone(&taken);
            let frames = stream::repeat(Bytes::from(vec![b'x'; 1024])).inspect(move |_frame| {
                let before = taken.fetch_add(1, Ordering::Relaxed);
                assert!(before < 10_000, "no other task had a turn");
            });
            std::future::ready(Ok::<_, BoxError>(frames))
        }
    };
    let rooms: Rooms = Groups::fed_by(open, SlowPeer::Skip);
    // The client reads nothing, so each frame is skipped at once.
    let (peer, _served, _client) = connected().await;
    rooms.join("hall".into(), &peer).await.expect("it is open");

    for _turn in 0..1_000 {
        tokio::task::yield_now().await;
        taken.store(0, Ordering::Relaxed);
    }

    assert!(rooms.leave("hall", &peer), "the feed goes on");
    settled().await;
    assert_eq!(Arc::strong_count(&taken), 2, "the stream is dropped");
}

#[tokio::test(start_paused = true)]
async fn a_feed_whose_runtime_is_shut_down_ends_its_group() {
    let (rooms, mut streams) = open_rooms(SlowPeer::Wait);
    let (peer, _served, _client) = connected().await;
    let worker = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime can be had");
    {
        let _entered = worker.enter();
        let joined = pin!(rooms.join("hall".into(), &peer)).now_or_never();
        assert!(joined.is_none(), "the feed is not open yet");
    }
    assert_eq!(rooms.len(), 1);

    // The feed has not had a turn.
    worker.shutdown_background();

    assert!(rooms.is_empty());
    let joined = rooms.join("hall".into(), &peer).await;
    joined.expect("this runtime opens it");
    streams.recv().await.expect("it is opened");
}

/// A broker with one topic for each room, which counts its subscribers.
#[derive(Default)]
struct Broker {
    topics: Mutex<HashMap<String, broadcast::Sender<Bytes>>>,
}

impl Broker {
    fn topic(&self, name: &str) -> broadcast::Sender<Bytes> {
        let mut topics = self.topics.lock().expect("nobody panics");
        let topic = topics.entry(name.to_owned());
        topic
            .or_insert_with(|| broadcast::channel(10_000).0)
            .clone()
    }
}

/// On several threads, members join and leave two rooms all the time. Each publishes a line as soon
/// as it is in, and must get it, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_is_in_misses_nothing_however_others_come_and_go() {
    let broker = Arc::new(Broker::default());
    let rooms: Rooms = {
        let broker = Arc::clone(&broker);
        let open = move |room: String| {
            let broker = Arc::clone(&broker);
            async move {
                tokio::task::yield_now().await;
                let topic = broker.topic(&room).subscribe();
                Ok::<_, BoxError>(stream::unfold(topic, async |mut topic| {
                    let line = topic.recv().await.ok()?;
                    Some((line, topic))
                }))
            }
        };
        Groups::fed_by(open, SlowPeer::Wait)
    };
    let served = serve_rooms(&rooms);
    let mut members = JoinSet::new();
    for member in 0..8 {
        let mut client = served.client().await;
        let broker = Arc::clone(&broker);
        members.spawn(async move {
            let room = if member % 2 == 0 { "hall" } else { "attic" };
            let topic = broker.topic(room);
            for round in 0..100 {
                let mut heard = Vec::new();
                client.send(format!("{room}\n")).await;
                while client.line().await != "in" {}
                let mine = format!("{member}.{round}");
                topic
                    .send(mine.clone().into())
                    .expect("there is a subscriber");
                while heard.last() != Some(&mine) {
                    heard.push(client.line().await);
                }
                client.send(format!("-{room}\n")).await;
                loop {
                    match client.line().await {
                        line if line == "out" => break,
                        line => heard.push(line),
                    }
                }
                let all = heard.len();
                heard.sort();
                heard.dedup();
                assert_eq!(heard.len(), all, "each line comes once");
            }
        });
    }
    while let Some(member) = members.join_next().await {
        member.expect("all are as they must be");
    }

    assert!(rooms.is_empty());
    for room in ["hall", "attic"] {
        let unsubscribed = async {
            while broker.topic(room).receiver_count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        let in_time = timeout(Duration::from_secs(20), unsubscribed).await;
        in_time.expect("the last feed is dropped");
    }
}

/// A key that uses its groups when it is dropped.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Busy(&'static str);

static BUSY: OnceLock<Groups<Busy, Bytes>> = OnceLock::new();

impl Drop for Busy {
    fn drop(&mut self) {
        // Takes all locks.
        let _number = BUSY.get().map(Groups::len);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_may_use_its_groups_when_it_is_dropped() {
    let rooms = Rooms::new();
    let served = serve_rooms(&rooms);
    let (ann, bob) = (join(&served, "hall").await, join(&served, "hall").await);
    let busy = BUSY.get_or_init(|| {
        let open = |key: Busy| {
            let frames = match key.0 {
                "ends" => stream::empty().left_stream(),
                _ => stream::pending().right_stream(),
            };
            std::future::ready(Ok::<_, BoxError>(frames))
        };
        Groups::fed_by(open, SlowPeer::Wait)
    });
    let members = rooms.members("hall");

    // In a thread, because a deadlock would block it.
    let (done, mut is_done) = mpsc::channel(1);
    let runtime = tokio::runtime::Handle::current();
    std::thread::spawn(move || {
        let outside = || pin!(busy.join(Busy("4"), &members[0])).now_or_never();
        let panicked = catch_unwind(AssertUnwindSafe(outside));
        assert!(panicked.is_err(), "a feed needs a runtime");
        let join = |key, peer| runtime.block_on(busy.join(Busy(key), peer));
        for peer in &members {
            for key in ["1", "1", "2", "ends"] {
                join(key, peer).expect("it is open");
            }
        }
        for peer in &members {
            assert!(busy.leave(&Busy("1"), peer));
            peer.close();
            runtime.block_on(peer.closing());
            join("3", peer).expect("it is too late, which is no error");
        }
        done.try_send(()).expect("it is waited for");
    });
    let done = timeout(Duration::from_secs(30), is_done.recv()).await;

    done.expect("it does not deadlock")
        .expect("it does not panic");
    drop((ann, bob));
    served.reason().await;
    served.reason().await;
    assert!(busy.is_empty());
}

/// A key that panics once, at one of its comparisons.
#[derive(Clone)]
struct Shy;

impl Hash for Shy {
    fn hash<H: Hasher>(&self, _state: &mut H) {}
}

/// The number of comparisons until one panics.
static SHY: AtomicUsize = AtomicUsize::new(usize::MAX);

impl PartialEq for Shy {
    fn eq(&self, _other: &Self) -> bool {
        assert_ne!(SHY.fetch_sub(1, Ordering::Relaxed), 1, "on purpose");
        true
    }
}

impl Eq for Shy {}

#[tokio::test(start_paused = true)]
async fn a_key_that_panics_leaves_the_groups_whole() {
    let (peer, _served, _client) = connected().await;
    let groups = Groups::new();
    for at in 1..=2 {
        groups.join(Shy, &peer).await.expect("there is no feed");

        SHY.store(at, Ordering::Relaxed);
        let left = catch_unwind(AssertUnwindSafe(|| groups.leave(&Shy, &peer)));

        assert!(left.is_err(), "it panicked");
        assert_eq!(groups.members(&Shy).len(), 1);
        assert!(groups.leave(&Shy, &peer));
        assert!(groups.is_empty());
    }
}
