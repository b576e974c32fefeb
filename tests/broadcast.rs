//! A burst of broadcasts to a group is stored once, however many members have not taken it. It
//! keeps the order of each sender, and follows the policy for each slow member.

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, stream};
use support::{Client, Clients, Ends, settled};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::{CodecExt, Lines};
use tower_tcp::pipeline::{Closed, Limits};
use tower_tcp::registry::{Broadcast, Groups, SlowPeer};
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{BoxError, EndReason, Peer, Pipeline};

type Line = Arc<str>;
type Rooms = Groups<&'static str, Line>;

const HALL: &str = "hall";
const HIGH: usize = 1024;

/// A room, and a server whose clients join it.
struct Hall {
    rooms: Rooms,
    served: Served,
    clients: Vec<Client<DuplexStream>>,
    peers: Vec<Peer<Line>>,
    made: mpsc::Receiver<Peer<Line>>,
}

/// Merges two lines into one, for which the codec writes the same bytes.
fn joined(first: &mut Line, next: &Line) -> bool {
    if *next.as_ref() == *"alone" {
        return false;
    }
    *first = [first, "\n", next].concat().into();
    true
}

impl Hall {
    async fn of(members: usize) -> Self {
        Self::with(Groups::new(), members).await
    }

    async fn that_merges(members: usize) -> Self {
        Self::with(Groups::new().merge_with(joined), members).await
    }

    async fn with(rooms: Rooms, members: usize) -> Self {
        let (peers, made) = mpsc::channel(256);
        let make = service_fn(move |peer: Peer<Line>| {
            peers.try_send(peer).expect("there is room");
            let silent = service_fn(async |_: Bytes| Ok::<_, BoxError>(None::<Line>));
            std::future::ready(Ok::<_, BoxError>(silent))
        });
        let codec =
            || Lines::default().map_encode(|line: Line| Bytes::copy_from_slice(line.as_bytes()));
        let deadlines = Deadlines::default().first_byte(None).idle(None).write(None);
        let pipeline = Pipeline::new(codec)
            .make_service(make)
            .limits(Limits::default().high_mark(HIGH))
            .deadlines(deadlines);
        let mut hall = Self {
            rooms,
            served: serve(pipeline),
            clients: Vec::new(),
            peers: Vec::new(),
            made,
        };
        for _ in 0..members {
            let peer = hall.enter().await;
            hall.rooms
                .join(HALL, &peer)
                .await
                .expect("there is no feed");
        }
        hall
    }

    /// Connects a client that is not a member yet.
    async fn enter(&mut self) -> Peer<Line> {
        self.clients.push(self.served.client().await);
        let peer = self.made.recv().await.expect("it is served");
        settled().await;
        self.peers.push(peer.clone());
        peer
    }

    /// Says something before any other task runs.
    fn say(&self, line: impl Into<Line>, slow: SlowPeer) -> Broadcast {
        let said = self.rooms.broadcast(HALL, line.into(), |_| true, slow);
        said.now_or_never().expect("it waits for nobody")
    }

    fn tell(&self, member: usize, line: &str) -> Result<(), Closed> {
        let told = self.peers[member].send(line.into());
        told.now_or_never().expect("there is room")
    }

    async fn hears(&mut self, member: usize, lines: &[&str]) {
        for line in lines {
            let heard = timeout(Duration::from_secs(1), self.clients[member].line()).await;
            assert_eq!(heard.expect("it comes"), *line);
        }
    }

    async fn hears_no_more(&mut self, member: usize) {
        assert!(self.clients[member].hears_nothing().await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_held_once_however_many_have_not_taken_it() {
    let mut hall = Hall::of(10).await;
    let lines: Vec<Line> = (0..16).map(|n| n.to_string().into()).collect();
    for line in &lines {
        assert_eq!(hall.say(Arc::clone(line), SlowPeer::Skip).sent(), 10);
    }
    for line in &lines {
        assert_eq!(Arc::strong_count(line), 2, "here, and once for all members");
    }
    assert_eq!(hall.peers[3].buffered().frames(), 16);
    for member in 0..10 {
        for line in &lines {
            hall.hears(member, &[line]).await;
        }
    }
    assert!(lines.iter().all(|line| Arc::strong_count(line) == 1));
}

/// A turn that ended between two of the broadcasts would let the members take the first.
#[tokio::test(start_paused = true)]
async fn a_burst_to_very_many_is_held_once_too() {
    let hall = Hall::of(200).await;
    let rooms = hall.rooms.clone();
    let saying = tokio::spawn(async move {
        for burst in 0..30 {
            let lines: Vec<Line> = (0..16).map(|n| format!("{burst} {n}").into()).collect();
            for line in &lines {
                let said = rooms.broadcast(HALL, Arc::clone(line), |_| true, SlowPeer::Skip);
                assert_eq!(said.await.sent(), 200);
            }
            for line in &lines {
                assert_eq!(Arc::strong_count(line), 2, "here, and once for all members");
            }
        }
    });
    saying.await.expect("each burst is held once");
}

/// No member takes a frame, so no broadcast waits.
#[tokio::test(start_paused = true)]
async fn bursts_without_end_leave_other_tasks_their_turns() {
    let hall = Hall::of(200).await;
    for member in 0..200 {
        stuff(&hall, member).await;
    }
    let reached = Arc::new(AtomicUsize::new(0));
    for some in [false, true] {
        let (rooms, reached) = (hall.rooms.clone(), Arc::clone(&reached));
        let first = hall.peers[0].info().id();
        let saying = tokio::spawn({
            let reached = Arc::clone(&reached);
            async move {
                loop {
                    let whom = |peer: &Peer<Line>| {
                        let before = reached.fetch_add(1, Ordering::Relaxed);
                        assert!(before < 1_024, "no other task had a turn");
                        !some || peer.info().id() != first
                    };
                    rooms
                        .broadcast(HALL, "hi".into(), whom, SlowPeer::Skip)
                        .await;
                }
            }
        });
        for _turn in 0..1_000 {
            tokio::task::yield_now().await;
            reached.store(0, Ordering::Relaxed);
        }
        assert!(!saying.is_finished(), "it goes on");
        saying.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_keeps_no_frame_that_all_have_taken() {
    let hall = Hall::of(2).await;
    let line: Line = "hi".into();
    hall.say(Arc::clone(&line), SlowPeer::Skip);
    settled().await;
    assert_eq!(Arc::strong_count(&line), 1);
}

#[tokio::test(start_paused = true)]
async fn what_one_member_is_sent_keeps_its_place_in_a_burst() {
    let mut hall = Hall::of(2).await;
    hall.say("one", SlowPeer::Skip);
    hall.tell(0, "aside").expect("it is open");
    hall.say("two", SlowPeer::Skip);
    hall.say("three", SlowPeer::Skip);
    hall.hears(0, &["one", "aside", "two", "three"]).await;
    hall.hears(1, &["one", "two", "three"]).await;
}

#[tokio::test(start_paused = true)]
async fn merged_frames_of_a_burst_are_one_frame_with_the_bytes_of_all() {
    let mut hall = Hall::that_merges(3).await;
    let lines: Vec<Line> = (0..64).map(|n| n.to_string().into()).collect();
    for line in &lines {
        assert_eq!(hall.say(Arc::clone(line), SlowPeer::Skip).sent(), 3);
    }
    assert_eq!(hall.peers[0].buffered().frames(), 1);
    hall.say("beyond", SlowPeer::Skip);
    assert_eq!(hall.peers[0].buffered().frames(), 2, "64 at most are one");
    hall.tell(0, "aside").expect("it is open");
    for line in ["after", "alone", "the last"] {
        hall.say(line, SlowPeer::Skip);
    }
    // The burst goes on behind the frame that only one member was sent.
    assert_eq!(
        hall.peers[0].buffered().frames(),
        5,
        "merged, alone with the last, and an aside"
    );
    assert_eq!(hall.peers[1].buffered().frames(), 4);
    for member in 0..3 {
        for line in &lines {
            hall.hears(member, &[line]).await;
        }
        hall.hears(member, &["beyond"]).await;
        if member == 0 {
            hall.hears(member, &["aside"]).await;
        }
        hall.hears(member, &["after", "alone", "the last"]).await;
        hall.hears_no_more(member).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_frames_of_a_feed_are_merged_too() {
    let lines: Vec<Line> = (0..8).map(|n| n.to_string().into()).collect();
    let open = {
        let lines = lines.clone();
        move |_| std::future::ready(Ok::<_, BoxError>(stream::iter(lines.clone())))
    };
    static MERGED: AtomicUsize = AtomicUsize::new(0);
    let merge = |first: &mut Line, next: &Line| {
        MERGED.fetch_add(1, Ordering::Relaxed);
        joined(first, next)
    };
    let rooms = Groups::fed_by(open, SlowPeer::Skip).merge_with(merge);
    // A later call has no effect.
    let rooms = rooms.merge_with(|_, _| false);
    let mut hall = Hall::with(rooms, 1).await;
    for line in &lines {
        hall.hears(0, &[line]).await;
    }
    assert_eq!(MERGED.load(Ordering::Relaxed), 7);
}

#[tokio::test(start_paused = true)]
async fn bursts_of_two_groups_arrive_in_the_order_in_which_they_were_sent() {
    let mut hall = Hall::of(2).await;
    for peer in &hall.peers {
        let joined = hall.rooms.join("attic", peer).await;
        joined.expect("there is no feed");
    }
    for n in 0..4 {
        hall.say(format!("hall {n}"), SlowPeer::Skip);
        let line = format!("attic {n}").into();
        let said = hall
            .rooms
            .broadcast("attic", line, |_| true, SlowPeer::Skip);
        assert_eq!(said.now_or_never().map(|it| it.sent()), Some(2));
    }
    for n in 0..4 {
        for member in 0..2 {
            let (first, second) = (format!("hall {n}"), format!("attic {n}"));
            hall.hears(member, &[&first, &second]).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_flush_in_a_burst_waits_for_what_was_said_before_it_and_no_more() {
    let mut hall = Hall::of(2).await;
    hall.say("before", SlowPeer::Skip);
    hall.say("x".repeat(10), SlowPeer::Skip);
    let peer = hall.peers[0].clone();
    let mut flushed = std::pin::pin!(peer.flushed());
    assert!(flushed.as_mut().now_or_never().is_none());
    hall.say("after", SlowPeer::Skip);
    flushed.await.expect("it is open");
    hall.hears(0, &["before", "xxxxxxxxxx", "after"]).await;
}

#[tokio::test(start_paused = true)]
async fn who_joins_or_leaves_within_a_burst_gets_the_part_in_which_it_is_a_member() {
    let mut hall = Hall::of(2).await;
    let late = hall.enter().await;
    hall.say("one", SlowPeer::Skip);
    let joined = hall.rooms.join(HALL, &late).now_or_never();
    joined.expect("it does not wait").expect("there is no feed");
    assert_eq!(hall.say("two", SlowPeer::Skip).sent(), 3);
    assert!(hall.rooms.leave(HALL, &hall.peers[0]));
    assert_eq!(hall.say("three", SlowPeer::Skip).sent(), 2);
    hall.hears(0, &["one", "two"]).await;
    hall.hears(1, &["one", "two", "three"]).await;
    hall.hears(2, &["two", "three"]).await;
    hall.hears_no_more(0).await;
}

#[tokio::test(start_paused = true)]
async fn a_burst_for_some_leaves_the_others_out() {
    let mut hall = Hall::of(3).await;
    let not_first = hall.peers[0].info().id();
    hall.say("all", SlowPeer::Skip);
    let some = hall.rooms.broadcast(
        HALL,
        "some".into(),
        |peer| peer.info().id() != not_first,
        SlowPeer::Skip,
    );
    assert_eq!(some.now_or_never().map(|it| it.sent()), Some(2));
    hall.say("all again", SlowPeer::Skip);
    hall.hears(0, &["all", "all again"]).await;
    hall.hears(1, &["all", "some", "all again"]).await;
    hall.hears(2, &["all", "some", "all again"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_member_that_closes_within_a_burst_gets_the_part_before() {
    let mut hall = Hall::of(2).await;
    hall.say("one", SlowPeer::Skip);
    hall.peers[0].close();
    assert_eq!(hall.say("two", SlowPeer::Skip).sent(), 1);
    hall.hears(1, &["one", "two"]).await;
    assert_eq!(hall.clients[0].rest().await, ["one"]);
}

/// Fills the stream of a member, and its output up to the high mark.
async fn stuff(hall: &Hall, member: usize) {
    let stuffing = "x".repeat(128 * 1024);
    hall.tell(member, &stuffing).expect("it is open");
    settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_member_above_its_mark_is_left_out_of_a_burst_and_the_others_share_it() {
    let mut hall = Hall::of(4).await;
    stuff(&hall, 0).await;
    let lines: Vec<Line> = (0..16).map(|n| n.to_string().into()).collect();
    for line in &lines {
        let said = hall.say(Arc::clone(line), SlowPeer::Skip);
        assert_eq!((said.sent(), said.skipped()), (3, 1));
        assert_eq!(Arc::strong_count(line), 2);
    }
    assert_eq!(hall.peers[0].buffered().frames(), 0);
    for member in 1..4 {
        for line in &lines {
            hall.hears(member, &[line]).await;
        }
    }
    let said = hall.say("bye", SlowPeer::CloseAfter(Duration::ZERO));
    assert_eq!((said.sent(), said.closed()), (3, 1));
    assert_eq!(hall.served.reason().await, EndReason::SlowReader);
}

/// The frame before the burst has brought the member's output to the high mark, so the member's
/// task does not take the burst.
#[tokio::test(start_paused = true)]
async fn a_burst_that_a_member_cannot_take_any_more_grows_no_longer() {
    let mut hall = Hall::of(1).await;
    hall.tell(0, &"x".repeat(128 * 1024)).expect("it is open");
    assert_eq!(hall.say("queued", SlowPeer::Skip).sent(), 1);
    settled().await;
    assert_eq!(hall.peers[0].buffered().frames(), 1);
    let said = hall.say("not any more", SlowPeer::Skip);
    assert_eq!((said.sent(), said.skipped()), (0, 1));
    hall.clients[0].line().await;
    hall.hears(0, &["queued"]).await;
    hall.say("now", SlowPeer::Skip);
    hall.hears(0, &["now"]).await;
}

/// Each frame reaches the high mark, so the task takes one at a time.
#[tokio::test(start_paused = true)]
async fn a_burst_of_large_frames_is_taken_in_parts_and_gives_its_room_back() {
    let mut hall = Hall::of(2).await;
    for round in 0..40 {
        let lines: Vec<Line> = (0..20)
            .map(|n| format!("{round} {n} {}", "x".repeat(40 * HIGH)).into())
            .collect();
        for line in &lines {
            assert_eq!(hall.say(Arc::clone(line), SlowPeer::Wait).sent(), 2);
        }
        settled().await;
        assert!(hall.peers[0].buffered().frames() > 10, "the rest waits");
        for member in 0..2 {
            for line in &lines {
                hall.hears(member, &[line]).await;
            }
        }
        assert_eq!(hall.peers[0].buffered().frames(), 0);
    }
    let refused = (0..1_000).find(|_| hall.peers[0].try_send("x".into()).is_err());
    assert_eq!(refused, Some(16), "as much room as at the beginning");
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_bounded_and_waits_for_the_tasks_of_its_members() {
    let mut hall = Hall::of(2).await;
    let (rooms, mut sent) = (hall.rooms.clone(), 0);
    loop {
        let line = sent.to_string().into();
        let said = rooms.broadcast(HALL, line, |_| true, SlowPeer::Skip);
        let mut said = std::pin::pin!(said);
        sent += 1;
        if said.as_mut().now_or_never().is_none() {
            assert_eq!(said.await.sent(), 2, "it waits for no peer");
            break;
        }
        assert!(sent < 2_000, "the queues are bounded");
    }
    for member in 0..2 {
        for n in 0..sent {
            hall.hears(member, &[&n.to_string()]).await;
        }
    }
}

/// Senders on several threads speak to all and to each. Some members come and go.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_member_hears_each_sender_in_order_and_misses_nothing() {
    hear_each_sender_in_order(Hall::of(6).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_member_hears_each_sender_in_order_in_merged_frames_too() {
    hear_each_sender_in_order(Hall::that_merges(6).await).await;
}

async fn hear_each_sender_in_order(mut hall: Hall) {
    const SENDERS: usize = 4;
    const LINES: usize = 300;
    let guest = hall.enter().await;
    let mut senders = JoinSet::new();
    for sender in 0..SENDERS {
        let (rooms, peers) = (hall.rooms.clone(), hall.peers[..6].to_vec());
        senders.spawn(async move {
            for n in 0..LINES {
                let line: Line = format!("{sender} {n}").into();
                if n % 7 == sender {
                    for peer in &peers {
                        peer.send(Arc::clone(&line)).await.expect("it is open");
                    }
                    continue;
                }
                rooms.broadcast(HALL, line, |_| true, SlowPeer::Wait).await;
            }
        });
    }
    let rooms = hall.rooms.clone();
    let coming = tokio::spawn(async move {
        loop {
            rooms.join(HALL, &guest).await.expect("there is no feed");
            tokio::task::yield_now().await;
            rooms.leave(HALL, &guest);
            tokio::task::yield_now().await;
        }
    });
    let mut visitor = hall.clients.pop().expect("the guest");
    let visits = tokio::spawn(async move {
        loop {
            visitor.line().await;
        }
    });
    let mut readers = JoinSet::new();
    for mut client in hall.clients.drain(..) {
        readers.spawn(async move {
            let mut next = HashMap::new();
            for _ in 0..SENDERS * LINES {
                let line = timeout(Duration::from_secs(60), client.line()).await;
                let line = line.expect("it misses nothing");
                let (sender, n) = line.split_once(' ').expect("a number and a number");
                let next = next.entry(sender.to_owned()).or_insert(0);
                assert_eq!(n, next.to_string(), "of sender {sender}");
                *next += 1;
            }
        });
    }
    while let Some(read) = readers.join_next().await {
        read.expect("all in order");
    }
    while let Some(sent) = senders.join_next().await {
        sent.expect("all sent");
    }
    coming.abort();
    visits.abort();
}
