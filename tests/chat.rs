//! The `chat` example: its members' abilities, the harm they cannot do each other, and a thousand
//! of them at once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use process::{Client, Example, soon};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tower_tcp::EndReason;
use tower_tcp::testkit::faults;

#[path = "support/process.rs"]
mod process;
#[path = "../examples/chat/rooms.rs"]
mod rooms;
#[path = "../examples/chat/service.rs"]
mod service;
#[path = "../examples/chat/session.rs"]
mod session;

async fn enter(chat: &Example, name: &str) -> Client {
    let mut member = Client::connect(chat.addr()).await;
    assert_eq!(member.line().await, "* welcome! what is your name?");
    let hello = format!("* hello {name}; /help lists the commands");
    assert_eq!(member.ask(name).await, hello);
    member
}

/// Enters the chat and joins a room.
async fn join(chat: &Example, name: &str, room: &str) -> Client {
    let mut member = enter(chat, name).await;
    let joined = format!("* you are in {room}");
    assert_eq!(member.ask(&format!("/join {room}")).await, joined);
    member
}

#[tokio::test]
async fn a_line_goes_to_the_others_in_the_room_and_to_nobody_else() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut bob = join(&chat, "bob", "tea").await;
    let mut eve = join(&chat, "eve", "attic").await;
    assert_eq!(ann.line().await, "* bob joined");

    ann.send("hello there\n").await;

    assert_eq!(bob.line().await, "<ann> hello there");
    // The next line of either member is the answer to its own question, so nothing was sent before.
    assert_eq!(ann.ask("/who").await, "* in tea: ann bob");
    assert_eq!(eve.ask("/who").await, "* in attic: eve");
}

#[tokio::test]
async fn rooms_are_listed_and_gone_with_their_last_member() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut bob = join(&chat, "bob", "tea").await;
    assert_eq!(ann.line().await, "* bob joined");
    assert_eq!(ann.ask("/rooms").await, "* rooms: tea (2)");

    assert_eq!(bob.ask("/join attic").await, "* you are in attic");
    assert_eq!(ann.line().await, "* bob went to attic");
    assert_eq!(ann.ask("/rooms").await, "* rooms: attic (1) tea (1)");
    assert_eq!(bob.ask("/join tea").await, "* you are in tea");

    assert_eq!(ann.line().await, "* bob joined");
    assert_eq!(ann.ask("/rooms").await, "* rooms: tea (2)");
}

#[tokio::test]
async fn one_who_joins_where_he_is_already_is_there_once() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;

    assert_eq!(ann.ask("/join tea").await, "* you are in tea");

    assert_eq!(ann.ask("/who").await, "* in tea: ann");
}

#[tokio::test]
async fn there_are_a_hundred_rooms_and_no_more() {
    let chat = Example::start("chat", &[]).await;
    let mut members = Vec::new();
    for n in 0..100 {
        members.push(join(&chat, &format!("m{n}"), &format!("r{n}")).await);
    }
    let mut ann = enter(&chat, "ann").await;

    let full = "* there are 100 rooms already; join one of them";
    assert_eq!(ann.ask("/join attic").await, full);
    assert_eq!(ann.ask("/join r99").await, "* you are in r99");
}

#[tokio::test]
async fn a_private_message_reaches_one_member_in_whatever_room() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut bob = enter(&chat, "bob").await;

    ann.send("/msg bob just for you\n").await;

    assert_eq!(bob.line().await, "<ann to you> just for you");
    assert_eq!(ann.ask("/msg eve hi").await, "* there is no eve");
    assert_eq!(ann.ask("/msg bob").await, "* say /msg NAME TEXT");
}

#[tokio::test]
async fn who_quits_is_told_goodbye_and_the_room_why() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut bob = join(&chat, "bob", "tea").await;
    assert_eq!(ann.line().await, "* bob joined");

    assert_eq!(bob.ask("/quit").await, "* bye: quit");

    assert_eq!(bob.rest().await, b"");
    assert_eq!(ann.line().await, "* bob left: quit");
}

#[tokio::test]
async fn a_member_that_quits_is_gone_while_the_server_waits_for_it_to_close() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut bob = join(&chat, "bob", "tea").await;
    assert_eq!(ann.line().await, "* bob joined");
    assert_eq!(bob.ask("/quit").await, "* bye: quit");
    let quit = Instant::now();

    assert_eq!(ann.line().await, "* bob left: quit");

    // The server waits 2 s.
    assert!(quit.elapsed() < Duration::from_secs(1));
    let _again = enter(&chat, "bob").await;
}

#[tokio::test]
async fn the_room_is_told_of_those_who_just_go_away() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let bob = join(&chat, "bob", "tea").await;
    assert_eq!(ann.line().await, "* bob joined");

    drop(bob);

    assert_eq!(ann.line().await, "* bob left: peer closed");
}

#[tokio::test]
async fn a_name_is_one_members_until_he_has_left() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let bob = join(&chat, "bob", "tea").await;
    assert_eq!(ann.line().await, "* bob joined");
    let mut other = Client::connect(chat.addr()).await;
    assert_eq!(other.line().await, "* welcome! what is your name?");
    assert_eq!(other.ask("bob").await, "* bob is taken; what else?");

    drop(bob);
    assert_eq!(ann.line().await, "* bob left: peer closed");

    let hello = "* hello bob; /help lists the commands";
    assert_eq!(other.ask("bob").await, hello);
}

#[tokio::test]
async fn names_that_would_deceive_are_refused() {
    let chat = Example::start("chat", &[]).await;
    let mut client = Client::connect(chat.addr()).await;
    assert_eq!(client.line().await, "* welcome! what is your name?");

    let refused = "* a name is of 1 to 20 letters, digits, - and _";
    let (long, longest) = ("x".repeat(21), "x".repeat(20));
    for name in [
        "",
        " ",
        "*",
        "a b",
        "<ann>",
        "\x1b[2J",
        "a\rb",
        "\u{430}nn",
        "a\0",
        &long,
    ] {
        assert_eq!(client.ask(name).await, refused, "{name:?}");
    }

    let hello = format!("* hello {longest}; /help lists the commands");
    assert_eq!(client.ask(&longest).await, hello);
    assert_eq!(client.ask("/join \x1b[2J").await, refused);
}

#[tokio::test]
async fn control_characters_do_not_reach_the_terminals_of_others() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut bob = join(&chat, "bob", "tea").await;
    assert_eq!(ann.line().await, "* bob joined");

    ann.send("a\x1b]0;x\x07\rb\x7f\u{9b}c\u{202e}d\n/msg bob \x08\n")
        .await;
    ann.send(b"\xff\xfe\n").await;
    ann.send("a\u{61c}b\u{200e}c\u{200f}d\n").await;

    assert_eq!(
        bob.line().await,
        "<ann> a\u{fffd}]0;x\u{fffd}\u{fffd}b\u{fffd}\u{fffd}c\u{fffd}d"
    );
    assert_eq!(bob.line().await, "<ann to you> \u{fffd}");
    assert_eq!(bob.line().await, "<ann> \u{fffd}\u{fffd}");
    assert_eq!(bob.line().await, "<ann> a\u{fffd}b\u{fffd}c\u{fffd}d");
}

#[tokio::test]
async fn a_line_that_is_too_long_ends_its_member_alone() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut bob = join(&chat, "bob", "tea").await;
    assert_eq!(ann.line().await, "* bob joined");
    let longest = "x".repeat(1023);

    bob.send(format!("{longest}\n{longest}x\n")).await;

    assert_eq!(ann.line().await, format!("<bob> {longest}"));
    assert_eq!(ann.line().await, "* bob left: frame too large");
    assert_eq!(ann.ask("/who").await, "* in tea: ann");
}

#[tokio::test]
async fn the_first_in_a_room_kicks_and_the_room_is_told_by_whom() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut bob = join(&chat, "bob", "tea").await;
    assert_eq!(ann.line().await, "* bob joined");

    let refused = "* only the member who has been in tea for longest can kick";
    assert_eq!(bob.ask("/kick ann").await, refused);
    assert_eq!(ann.ask("/kick bob").await, "* you have kicked bob");

    assert_eq!(bob.line().await, "* bye: kicked by ann");
    assert_eq!(bob.rest().await, b"");
    drop(bob);
    assert_eq!(ann.line().await, "* bob left: kicked by ann");
}

#[tokio::test]
async fn the_first_in_a_room_kicks_from_there_only() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut eve = join(&chat, "eve", "attic").await;

    let refused = "* only the member who has been in tea for longest can kick";
    assert_eq!(ann.ask("/kick eve").await, refused);

    assert_eq!(ann.ask("/kick zoe").await, "* there is no zoe");
    assert_eq!(eve.ask("/who").await, "* in attic: eve");
}

#[tokio::test]
async fn who_stays_longest_is_the_first_when_the_first_has_left() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut bob = join(&chat, "bob", "tea").await;
    let mut eve = join(&chat, "eve", "tea").await;
    assert_eq!(bob.line().await, "* eve joined");
    assert_eq!(ann.ask("/join attic").await, "* bob joined");
    assert_eq!(bob.line().await, "* ann went to attic");

    assert_eq!(bob.ask("/kick eve").await, "* you have kicked eve");

    assert_eq!(eve.line().await, "* ann went to attic");
    assert_eq!(eve.line().await, "* bye: kicked by bob");
}

#[tokio::test]
async fn an_admin_kicks_anybody() {
    let chat = Example::start("chat", &["--admin", "root"]).await;
    let mut ann = join(&chat, "ann", "tea").await;
    let mut root = enter(&chat, "root").await;

    assert_eq!(root.ask("/kick ann").await, "* you have kicked ann");

    assert_eq!(ann.line().await, "* bye: kicked by root");
}

#[tokio::test]
async fn who_is_silent_is_sent_away_and_who_talks_stays() {
    let chat = Example::start("chat", &["--idle", "2"]).await;
    let mut silent = join(&chat, "silent", "tea").await;
    let mut talker = join(&chat, "talker", "tea").await;
    let mut nameless = Client::connect(chat.addr()).await;
    assert_eq!(nameless.line().await, "* welcome! what is your name?");
    let since = Instant::now();

    // The talker sends all the time, so it is never silent, however long a turn takes.
    let mut turns = tokio::time::interval(Duration::from_millis(100));
    let left = soon("the end of the silent one", async {
        loop {
            turns.tick().await;
            let said = talker.ask("/who").await;
            if said.contains("left") {
                return said;
            }
        }
    })
    .await;

    assert_eq!(left, "* silent left: silent for too long");
    assert!(since.elapsed() > Duration::from_secs(1), "{since:?}");
    assert_eq!(silent.line().await, "* talker joined");
    assert_eq!(silent.line().await, "* bye: silent for too long");
    assert_eq!(nameless.line().await, "* bye: silent for too long");
    assert_eq!(talker.line().await, "* in tea: talker");
}

#[tokio::test]
async fn at_a_shutdown_the_last_line_of_each_member_says_so() {
    let chat = Example::start("chat", &[]).await;
    let mut members = vec![
        join(&chat, "ann", "tea").await,
        enter(&chat, "bob").await,
        Client::connect(chat.addr()).await,
    ];
    assert_eq!(members[2].line().await, "* welcome! what is your name?");

    let ended = tokio::spawn(chat.stop());

    for member in &mut members {
        let rest = String::from_utf8(member.rest().await).unwrap();
        assert_eq!(rest.lines().last(), Some("* bye: the server shuts down"));
    }
    drop(members);
    assert!(ended.await.unwrap().status.success());
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    let chat = Example::start("chat", &[]).await;
    let mut ann = enter(&chat, "ann").await;

    let no_room = "* you are in no room; say /join ROOM";
    assert_eq!(ann.ask("hello").await, no_room);
    assert_eq!(ann.ask("/who").await, no_room);
    let unknown = "* there is no such command; /help lists them";
    assert_eq!(ann.ask("/nick bob").await, unknown);
    assert!(ann.ask("/help").await.contains("/join"));
}

// Many members.

const MEMBERS: usize = 1_000;
const NOT_READING: usize = 10;
const READING: usize = MEMBERS - NOT_READING;
/// The number of lines of 1,000 bytes that are sent at a time. All batches together fill the
/// system's buffers and the high mark several times.
const BATCH: usize = 10;
const BATCHES: usize = 35;

/// Less than the 30 s after which a member that does not read is dropped: a chat that waited for
/// such a member would take that long. Far more than a batch takes.
const WAITED: Duration = Duration::from_secs(10);

/// The number of lines that begin with `<`, of all readers together.
#[derive(Default)]
struct Seen {
    lines: AtomicUsize,
    more: Notify,
}

impl Seen {
    async fn reaches(&self, lines: usize) {
        let reached = async {
            loop {
                let more = self.more.notified();
                if self.lines.load(Ordering::SeqCst) >= lines {
                    return;
                }
                more.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), reached)
            .await
            .unwrap_or_else(|_| panic!("{:?} of {lines} lines came", self.lines));
    }
}

/// Reads everything, and counts the members' lines.
async fn count(mut stream: TcpStream, seen: Arc<Seen>) {
    let mut buffer = vec![0; 4096];
    let mut line_begins = true;
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        let mut said = 0;
        for &byte in &buffer[..read] {
            said += usize::from(line_begins && byte == b'<');
            line_begins = byte == b'\n';
        }
        if said > 0 {
            seen.lines.fetch_add(said, Ordering::SeqCst);
            seen.more.notify_one();
        }
    }
}

/// Connects a member and joins the one room. A member that will not read gets its own receive
/// buffer size.
async fn member(addr: SocketAddr, name: &str, receive_buffer: Option<u32>) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket can be had");
    if let Some(bytes) = receive_buffer {
        socket
            .set_recv_buffer_size(bytes)
            .expect("any size will do");
    }
    let stream = soon("a connection", socket.connect(addr)).await;
    let mut stream = stream.expect("the server listens");
    let enter = format!("{name}\n/join hall\n");
    let sent = stream.write_all(enter.as_bytes()).await;
    sent.expect("the server reads");
    let joined: &[u8] = b"* you are in hall\n";
    let mut said = Vec::new();
    while !said.windows(joined.len()).any(|part| part == joined) {
        let read = soon("being in the hall", stream.read_buf(&mut said)).await;
        let read = read.expect("the connection lasts");
        assert!(read > 0, "{}", String::from_utf8_lossy(&said));
    }
    stream
}

fn raise_the_limit_of_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("it may be raised so far");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_members_do_not_wait_for_ten_that_never_read() {
    raise_the_limit_of_descriptors();
    let chat = Example::start("chat", &["--patience", "2"]).await;
    let seen = Arc::new(Seen::default());
    for n in 0..READING {
        let stream = member(chat.addr(), &format!("m{n}"), None).await;
        tokio::spawn(count(stream, Arc::clone(&seen)));
    }
    let mut silent = Vec::new();
    for n in 0..NOT_READING {
        silent.push(member(chat.addr(), &format!("never-{n}"), Some(4096)).await);
    }
    let mut speaker = member(chat.addr(), "speaker", None).await;
    let before = chat.resident();

    let line = format!("{}\n", "x".repeat(990));
    let mut slowest = Duration::ZERO;
    let mut most = before;
    for batch in 1..=BATCHES {
        let sent = Instant::now();
        speaker
            .write_all(line.repeat(BATCH).as_bytes())
            .await
            .unwrap();
        seen.reaches(READING * BATCH * batch).await;
        slowest = slowest.max(sent.elapsed());
        most = most.max(chat.resident());
    }

    assert!(slowest < WAITED, "{slowest:?}");
    let mut lines = READING * BATCH * BATCHES;
    while chat.so_far(&["connection.closed"]).len() < NOT_READING {
        speaker.write_all(b"are you there?\n").await.unwrap();
        lines += READING;
        seen.reaches(lines).await;
        sleep(Duration::from_millis(100)).await;
    }
    let ends = chat
        .logged(NOT_READING, &["connection.closed", "\"slow_reader\""])
        .await;
    assert_eq!(ends.len(), NOT_READING);
    println!(
        "{BATCH} lines to all in at most {slowest:?}; resident {before} KiB, then at most {most} \
         KiB"
    );
    assert!(most < before + 8 * 1024, "{before} KiB, then {most} KiB");
    let lines = seen.lines.load(Ordering::SeqCst);
    let sent = Instant::now();
    speaker.write_all(b"still here?\n").await.unwrap();
    seen.reaches(lines + READING).await;
    assert!(sent.elapsed() < WAITED, "{:?}", sent.elapsed());
    assert_eq!(chat.so_far(&["connection.closed"]).len(), NOT_READING);
    drop(silent);
}

#[tokio::test(start_paused = true)]
async fn every_fault_at_every_byte_leaves_whole_lines_and_no_name_or_seat_behind() {
    let input = "ann\n/join tea\nhello\n/who\n/rooms\n/msg ann hi\n/join attic\n/nothing\n/quit\n";
    let output = "* welcome! what is your name?\n\
        * hello ann; /help lists the commands\n\
        * you are in tea\n\
        * in tea: ann\n\
        * rooms: tea (1)\n\
        <ann to you> hi\n\
        * you are in attic\n\
        * there is no such command; /help lists them\n\
        * bye: quit\n";
    let minutes = Duration::from_secs(600);
    let stack = move || {
        let chat = rooms::Chat::new(Vec::new(), Duration::from_secs(5));
        service::chat(Arc::new(chat), minutes)
    };

    let check = faults::check(stack, input, output);
    let farewells = EndReason::ALL
        .iter()
        .map(|reason| session::farewell(*reason));
    let check = farewells.fold(check, |check, farewell| {
        check.farewell([&farewell[..], b"\n"].concat())
    });
    check.await.unwrap();
}
