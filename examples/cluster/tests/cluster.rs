//! Tests three nodes as processes, with a real NATS: which lines are lost when a member does not
//! read, when a node is killed, when NATS hangs, and when each node is replaced. Also tests, with a
//! real HAProxy in front, that new members are served while the nodes are replaced.
//!
//! `CLUSTER_SIZE=300,10000 cargo test -- --nocapture` counts the lost lines with 300 members and
//! 10,000 lines.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// The time limit of each wait, far longer than any wait takes.
const NET: Duration = Duration::from_secs(120);
/// The maximum number of lines that are said and not yet heard by their speaker.
const AHEAD: usize = 32;

async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match timeout(NET, future).await {
        Ok(done) => done,
        Err(_elapsed) => panic!("{what}: not within {NET:?}"),
    }
}

fn signal(child: &Child, signal: Signal) {
    let pid = child.id().expect("it was not waited for");
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a process"), signal).expect("it is ours");
}

/// Starts a NATS server. Returns `None` if it is not installed.
async fn start_nats() -> Option<(Child, String)> {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let at = free.local_addr().expect("it has an address");
    drop(free);
    let started = Command::new("nats-server")
        .args(["--addr", "127.0.0.1", "--port", &at.port().to_string()])
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let nats = match started {
        Ok(nats) => nats,
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            assert!(
                std::env::var_os("CI").is_none(),
                "nats-server is not installed, and CI must not skip what needs it: see .ci/run"
            );
            eprintln!("skipped: nats-server is not installed");
            return None;
        }
        Err(err) => panic!("nats-server does not start: {err}"),
    };
    Some((nats, at.to_string()))
}

/// A running node. Dropping it kills the process.
struct Node {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    addr: SocketAddr,
}

impl Node {
    async fn start(args: &[&str], path: Option<&str>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cluster"));
        command.args(args).stdout(Stdio::piped()).kill_on_drop(true);
        if let Some(path) = path {
            command.env("PATH", path);
        }
        let mut child = command.spawn().expect("it starts");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let mut stdout = BufReader::new(stdout).lines();
        let addr = loop {
            let line = soon("an address", stdout.next_line()).await;
            let line = line.expect("stdout is text").expect("it listens");
            if let Some(addr) = line.strip_prefix("listening on ") {
                break addr.parse().expect("an address of TCP");
            }
        };
        Self {
            child,
            stdout,
            addr,
        }
    }

    async fn of(nats: &str, name: &str, listen: &str) -> Self {
        let args = [
            "--nats", nats, "--name", name, "--listen", listen, "--leave", "1",
        ];
        Self::start(&args, None).await
    }

    /// Waits until the node has exited successfully, and returns the report that it prints.
    async fn ended(mut self) -> String {
        let mut report = String::new();
        while let Some(line) = soon("its end", self.stdout.next_line())
            .await
            .expect("text")
        {
            report = line;
        }
        let status = soon("its end", self.child.wait()).await;
        assert!(status.expect("it is ours").success());
        report
    }
}

/// The lines that one member has heard.
#[derive(Default)]
struct Heard {
    heap: Mutex<Heap>,
    more: Notify,
}

#[derive(Default)]
struct Heap {
    /// The number of times that each numbered line was heard.
    said: HashMap<usize, usize>,
    /// The number of the last line that was heard from each member.
    last: HashMap<String, usize>,
    /// All other lines, and `END`.
    told: Vec<String>,
}

impl Heap {
    fn push(&mut self, line: String) {
        let Some((who, number)) = said(&line) else {
            self.told.push(line);
            return;
        };
        let last = self.last.insert(who.to_owned(), number);
        assert!(
            last.is_none_or(|last| last <= number),
            "{number} comes too late"
        );
        *self.said.entry(number).or_default() += 1;
    }
}

/// Returns a numbered line. It is long, so that fewer unread lines make a member count as slow.
fn numbered(line: usize) -> String {
    format!("#{line} {:200}\n", "")
}

/// Returns the speaker and the number of a numbered line.
fn said(line: &str) -> Option<(&str, usize)> {
    let (who, rest) = line.split_once("> #")?;
    let (number, _rest) = rest.split_once(' ')?;
    Some((who, number.parse().ok()?))
}

impl Heard {
    fn heap(&self) -> MutexGuard<'_, Heap> {
        self.heap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn collect(self: Arc<Self>, read: OwnedReadHalf) {
        let mut read = BufReader::new(read).lines();
        loop {
            // A node that is killed resets its connections.
            let line = read.next_line().await.ok().flatten();
            let end = line.is_none();
            self.heap().push(line.unwrap_or_else(|| END.to_owned()));
            self.more.notify_waiters();
            if end {
                return;
            }
        }
    }

    /// Waits until `look` returns `Some`.
    async fn until<T>(&self, what: &str, mut look: impl FnMut(&Heap) -> Option<T>) -> T {
        let found = async {
            loop {
                let more = self.more.notified();
                tokio::pin!(more);
                more.as_mut().enable();
                if let Some(found) = look(&self.heap()) {
                    return found;
                }
                more.await;
            }
        };
        match timeout(NET, found).await {
            Ok(found) => found,
            Err(_elapsed) => panic!("{what}: not within {NET:?}: {:#?}", self.heap().told),
        }
    }

    async fn line(&self, start: &str) {
        let look = |heap: &Heap| {
            heap.told
                .iter()
                .any(|it| it.starts_with(start))
                .then_some(())
        };
        self.until(start, look).await;
    }
}

const END: &str = "(the end)";

/// A member of the room, connected.
struct Member {
    node: SocketAddr,
    write: Option<OwnedWriteHalf>,
    heard: Arc<Heard>,
}

impl Member {
    async fn join(node: SocketAddr) -> Self {
        let member = Self::try_join(node).await;
        member.expect("the node listens")
    }

    async fn try_join(node: SocketAddr) -> io::Result<Self> {
        let (read, write) = TcpStream::connect(node).await?.into_split();
        let heard = Arc::<Heard>::default();
        tokio::spawn(Arc::clone(&heard).collect(read));
        let write = Some(write);
        let mut member = Self { node, write, heard };
        member.send("/join hall\n").await;
        let joined = |heap: &Heap| {
            let mut told = heap.told.iter().filter_map(|line| match line.as_str() {
                END => Some(false),
                line if line.starts_with("* you are") => Some(true),
                line if line.starts_with("* not joined") => panic!("{line}"),
                _ => None,
            });
            told.next()
        };
        if !member.heard.until("joined", joined).await {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(member)
    }

    async fn send(&mut self, line: &str) {
        let write = self.write.as_mut().expect("it has not left");
        let _sent_or_gone = soon("a write", write.write_all(line.as_bytes())).await;
    }

    /// Waits until the node closes the connection, and closes it, too.
    async fn end(&mut self) {
        self.heard.line(END).await;
        self.write = None;
    }

    fn has_heard(&self, line: usize) -> bool {
        self.heard.heap().said.contains_key(&line)
    }

    /// Returns how many of these lines were not heard. Panics if any line was heard twice.
    fn missing(&self, lines: &[usize]) -> usize {
        let heap = self.heard.heap();
        assert!(
            heap.said.values().all(|&count| count == 1),
            "a line came twice"
        );
        let missing = lines.iter().filter(|line| !heap.said.contains_key(line));
        missing.count()
    }

    /// Waits until a line is heard.
    async fn hears(&self, line: usize) {
        let heard = |heap: &Heap| heap.said.contains_key(&line).then_some(());
        self.heard.until("a line", heard).await;
    }
}

/// Makes the members say numbered lines in turn. At most `AHEAD` lines are said and not yet heard
/// by their speaker.
async fn say(members: &mut [Member], lines: std::ops::Range<usize>) -> Vec<usize> {
    let all: Vec<_> = lines.collect();
    let many = members.len();
    for (at, line) in all.iter().enumerate() {
        members[at % many].send(&numbered(*line)).await;
        if let Some(before) = at.checked_sub(AHEAD) {
            members[before % many].hears(all[before]).await;
        }
    }
    for (at, line) in all.iter().enumerate().rev().take(AHEAD) {
        members[at % many].hears(*line).await;
    }
    all
}

/// Says one more line, and waits until all members have heard it. By then, they have been sent
/// everything before it.
async fn settle(members: &mut [Member], mark: usize) {
    members[0].send(&numbered(mark)).await;
    for member in members {
        member.hears(mark).await;
    }
}

/// The number of lines that should have been heard, and the number that were not.
#[derive(Clone, Copy, Default)]
struct Lost {
    of: usize,
    lost: usize,
}

impl Lost {
    fn of(lines: &[usize], members: &[Member]) -> Self {
        Self {
            of: lines.len() * members.len(),
            lost: members.iter().map(|it| it.missing(lines)).sum(),
        }
    }

    fn add(&mut self, more: Self) {
        self.of += more.of;
        self.lost += more.lost;
    }

    fn report(self, what: &str) -> usize {
        println!("{what:<50} {:>7} of {:>7} lost", self.lost, self.of);
        self.lost
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_lost_is_what_the_page_says() {
    let Some((nats, url)) = start_nats().await else {
        return;
    };
    let size = std::env::var("CLUSTER_SIZE").unwrap_or_else(|_unset| "30,1000".into());
    let (members, lines) = size.split_once(',').expect("MEMBERS,LINES");
    let members: usize = members.parse().expect("a number");
    let lines: usize = lines.parse().expect("a number");
    let each = members / 3;
    let mut next = 0;
    let mut numbers = |count: usize| {
        next += count;
        next - count..next
    };

    let mut nodes = Vec::new();
    for name in ["one", "two", "three"] {
        nodes.push(Node::of(&url, name, "127.0.0.1:0").await);
    }
    let mut all = Vec::new();
    for node in &nodes {
        for _ in 0..each {
            all.push(Member::join(node.addr).await);
        }
    }

    // A member that does not read delays nobody.
    let socket = TcpSocket::new_v4().expect("a socket can be had");
    socket.set_recv_buffer_size(4096).expect("it is small");
    let mut slow = socket.connect(nodes[0].addr).await.expect("it listens");
    slow.write_all(b"/join hall\n").await.expect("it reads");
    let begun = Instant::now();
    let said = say(&mut all, numbers(lines)).await;
    settle(&mut all, numbers(1).start).await;
    let lost = Lost::of(&said, &all).report("one member does not read");
    println!("  in {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(lost, 0);

    // A node is killed while the others talk.
    let mut gone = all.split_off(2 * each);
    let mut three = nodes.pop().expect("there are three");
    let addr = three.addr.to_string();
    let range = numbers(lines);
    let (before, after) = (
        range.start..range.start + lines / 2,
        range.start + lines / 2..range.end,
    );
    let mut said = say(&mut all, before).await;
    let last = gone.last_mut().expect("it has members");
    let unheard = numbers(20);
    for line in unheard.clone() {
        last.send(&numbered(line)).await;
    }
    signal(&three.child, Signal::KILL);
    let killed = Instant::now();
    soon("its end", three.child.wait())
        .await
        .expect("it is ours");
    said.extend(say(&mut all, after).await);
    settle(&mut all, numbers(1).start).await;
    let lost = Lost::of(&said, &all).report("a node is killed; of the lines of the others");
    assert_eq!(lost, 0);
    for member in &gone {
        member.heard.line(END).await;
    }
    println!(
        "  its members had noticed, and all was said, after {:?}",
        killed.elapsed()
    );
    let unheard: Vec<_> = unheard.collect();
    Lost::of(&unheard, &all).report("  of the lines that it had not said yet");
    let first = all[0].missing(&unheard);
    assert!(
        all.iter().all(|it| it.missing(&unheard) == first),
        "all hear the same"
    );
    let own = gone.last().expect("it has members");
    for line in unheard.into_iter().filter(|line| own.has_heard(*line)) {
        let heard = all.iter().all(|it| it.has_heard(line));
        assert!(heard, "what came back to its member was heard by all");
    }
    nodes.push(Node::of(&url, "three", &addr).await);
    for _ in 0..each {
        all.push(Member::join(nodes[2].addr).await);
    }

    // NATS hangs.
    signal(&nats, Signal::STOP);
    let stopped = Instant::now();
    let limbo: Vec<_> = numbers(30).collect();
    let many = all.len();
    for (at, line) in limbo.iter().enumerate() {
        all[at * 7 % many].send(&numbered(*line)).await;
    }
    for member in &all {
        member
            .heard
            .line("* the other nodes are out of reach")
            .await;
    }
    println!(
        "NATS stands still; all are told after {:?}",
        stopped.elapsed()
    );
    let refused: Vec<_> = numbers(30).collect();
    for (at, line) in refused.iter().enumerate() {
        all[at % many].send(&numbered(*line)).await;
    }
    for member in all.iter().take(30) {
        member.heard.line("* not said: the other nodes").await;
    }
    signal(&nats, Signal::CONT);
    let resumed = Instant::now();
    for member in &all {
        member.heard.line("* the other nodes are in reach").await;
    }
    println!("NATS goes on; all are told after {:?}", resumed.elapsed());
    let said = say(&mut all, numbers(lines / 10)).await;
    settle(&mut all, numbers(1).start).await;
    let lost = Lost::of(&said, &all).report("  once all are told");
    assert_eq!(lost, 0);
    Lost::of(&limbo, &all).report("  before all were told");
    for (at, line) in limbo.iter().enumerate() {
        let sender = &all[at * 7 % many];
        if !sender.has_heard(*line) {
            sender.heard.line("* not said, or late").await;
        }
    }
    let heard = all
        .iter()
        .map(|it| refused.len() - it.missing(&refused))
        .sum::<usize>();
    assert_eq!(heard, 0, "what is refused is not said");

    // The member that does not read is closed, and has missed most lines.
    sleep_until(begun + Duration::from_secs(6)).await;
    settle(&mut all, numbers(1).start).await;
    let mut rest = Vec::new();
    let _reset = soon("its end", slow.read_to_end(&mut rest)).await;
    let heard = rest.split(|&byte| byte == b'\n').count();
    println!("the member that does not read is closed, with {heard} lines in buffers");
    assert!(heard < lines);

    // Each node is replaced while a member of another node talks. The first half of the node's
    // members joins another node when told to, and the second half comes back once the new node
    // listens.
    let [mut stayed, mut moved, mut back] = [Lost::default(); 3];
    for at in 0..3 {
        let node = nodes.remove(at);
        let (mut leaving, rest): (Vec<_>, _) = all.into_iter().partition(|it| it.node == node.addr);
        all = rest;
        let half = leaving.len() / 2;
        let mut returning = leaving.split_off(half);
        let other = nodes[at % 2].addr;
        let listen = node.addr.to_string();
        let name = ["one", "two", "three"][at];
        let replaced = AtomicBool::new(false);
        let begun = Instant::now();
        let talk = async {
            let mut said = Vec::new();
            while said.len() < lines / 10 || !replaced.load(Ordering::Relaxed) {
                said.extend(say(&mut all[..1], numbers(1)).await);
                sleep(Duration::from_millis(1)).await;
            }
            said
        };
        let replace = async {
            signal(&node.child, Signal::TERM);
            let leave = leaving.into_iter().map(async |mut member| {
                member.heard.line("* this node leaves").await;
                let after = Member::join(other).await;
                member.heard.line("* bye: this node has left").await;
                member.end().await;
                (after, member)
            });
            let stay = returning.iter_mut().map(async |member| {
                member.heard.line("* bye: this node has left").await;
                member.end().await;
            });
            let (mut joined, _) = tokio::join!(join_all(leave), join_all(stay));
            let drained = node.ended().await;
            let node = Node::of(&url, name, &listen).await;
            for member in returning {
                joined.push((Member::join(node.addr).await, member));
            }
            replaced.store(true, Ordering::Relaxed);
            (drained, node, joined)
        };
        let (said, (drained, node, joined)) = tokio::join!(talk, replace);
        println!("node {name}: {drained}");
        nodes.insert(at, node);
        let last = numbers(1).start;
        settle(&mut all, last).await;
        println!("  {} lines were said in {:?}", said.len(), begun.elapsed());
        stayed.add(Lost::of(&said, &all));
        for (index, (after, before)) in joined.into_iter().enumerate() {
            after.hears(last).await;
            let heard = |line: &&usize| before.has_heard(**line) || after.has_heard(**line);
            let of = said.len();
            let lost = of - said.iter().filter(heard).count();
            let which = if index < half { &mut moved } else { &mut back };
            which.add(Lost { of, lost });
            all.push(after);
        }
    }
    let lost = stayed.report("each node is replaced; those who stay")
        + moved.report("  those who join another node when told");
    back.report("  those who come back to the new node");
    assert_eq!(lost, 0);
    for node in nodes {
        signal(&node.child, Signal::TERM);
        node.ended().await;
    }
}

#[tokio::test]
async fn without_nats_a_node_runs_alone_and_says_how_to_get_it() {
    let node = Node::start(
        &["--listen", "127.0.0.1:0", "--leave", "0"],
        Some("/nonexistent"),
    )
    .await;
    let (mut ann, bob) = (Member::join(node.addr).await, Member::join(node.addr).await);
    ann.send("/help\n/join a.*\n#1 \n").await;
    bob.hears(1).await;
    ann.heard.line("* /join ROOM").await;
    ann.heard.line("* a room is named by").await;
    ann.send("/quit\n").await;
    ann.heard.line("* bye").await;
    ann.heard.line(END).await;
    signal(&node.child, Signal::TERM);
    node.ended().await;
}

/// The names of the nodes in `haproxy.cfg`.
const NAMES: [&str; 3] = ["one", "two", "three"];
/// The ports in `haproxy.cfg`: HAProxy's own, those of the nodes, and those of their agent checks.
const PORTS: [u16; 7] = [7006, 7011, 7012, 7013, 7021, 7022, 7023];

/// Starts HAProxy with the example's configuration, at these ports. Returns `None` if it is not
/// installed.
fn start_haproxy(dir: &Path, ports: &[u16]) -> Option<Child> {
    let mut config = include_str!("../haproxy.cfg").to_owned();
    for (before, port) in PORTS.iter().zip(ports) {
        config = config.replace(&before.to_string(), &port.to_string());
    }
    let file = dir.join("haproxy.cfg");
    std::fs::write(&file, config).expect("there is room for a file");
    let mut command = Command::new("haproxy");
    command.args(["-db", "-f"]).arg(file);
    match command.kill_on_drop(true).spawn() {
        Ok(haproxy) => Some(haproxy),
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            assert!(
                std::env::var_os("CI").is_none(),
                "haproxy is not installed, and CI must not skip what needs it"
            );
            eprintln!("skipped: haproxy is not installed");
            None
        }
        Err(err) => panic!("haproxy does not start: {err}"),
    }
}

impl Member {
    /// Returns the name of the member's node.
    fn node_name(&self) -> String {
        let heap = self.heard.heap();
        let mut named = heap.told.iter().filter_map(|line| {
            let (name, _rest) = line.strip_prefix("* you are ")?.split_once('-')?;
            Some(name.to_owned())
        });
        named.next().expect("it has joined")
    }
}

/// Joins through HAProxy until a member gets to the node with this name, and returns that member.
async fn comes_to(front: SocketAddr, name: &str) -> Member {
    let comes = async {
        loop {
            // HAProxy may not listen yet, or may not have found a node yet.
            if let Ok(member) = Member::try_join(front).await
                && member.node_name() == name
            {
                return member;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    soon("a member at the node", comes).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_haproxy_nodes_are_replaced_in_turn_and_every_new_member_is_served() {
    let Some((_nats, url)) = start_nats().await else {
        return;
    };
    let free = || std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let free = PORTS.map(|_| free());
    let ports = free.map(|free| free.local_addr().expect("it has an address").port());
    let dir = tempfile::tempdir().expect("there is room for files");
    let Some(_haproxy) = start_haproxy(dir.path(), &ports) else {
        return;
    };
    let front = SocketAddr::from(([127, 0, 0, 1], ports[0]));
    let start = async |at: usize| {
        let listen = format!("127.0.0.1:{}", ports[1 + at]);
        let agent = format!("127.0.0.1:{}", ports[4 + at]);
        let args = ["--nats", &url, "--name", NAMES[at], "--listen", &listen];
        let door = ["--agent", &agent, "--proxy-from", "127.0.0.0/8"];
        Node::start(&[&args[..], &door, &["--leave", "5"]].concat(), None).await
    };
    let mut nodes = Vec::new();
    for at in 0..NAMES.len() {
        nodes.push(start(at).await);
    }
    let mut members = Vec::new();
    for name in NAMES {
        members.push(comes_to(front, name).await);
    }
    // A node refuses clients that bypass HAProxy.
    assert!(Member::try_join(nodes[0].addr).await.is_err());

    let over = Arc::new(AtomicBool::new(false));
    let coming = tokio::spawn({
        let over = Arc::clone(&over);
        async move {
            let mut came = 0;
            while !over.load(Ordering::Relaxed) {
                let joined = Member::try_join(front).await;
                joined.expect("a new member is served, whatever node is being replaced");
                came += 1;
            }
            came
        }
    });
    for (at, name) in NAMES.into_iter().enumerate() {
        signal(&nodes[at].child, Signal::TERM);
        members[at].heard.line("* this node leaves").await;
        // HAProxy notices while the node still serves.
        let mut elsewhere = 0;
        while elsewhere < 20 {
            let member = Member::join(front).await;
            elsewhere = if member.node_name() == name {
                0
            } else {
                elsewhere + 1
            };
        }
        let has_ended = members[at].heard.heap().told.iter().any(|line| line == END);
        assert!(!has_ended, "{name} has ended before HAProxy noticed");
        members[at].end().await;
        let report = nodes.remove(at).ended().await;
        println!("{name} has ended: {report}");
        nodes.insert(at, start(at).await);
        members[at] = comes_to(front, name).await;
    }
    over.store(true, Ordering::Relaxed);
    let came = soon("the last new member", coming).await;
    println!("{} new members were served", came.expect("all were served"));
    // The rooms span the new nodes.
    let said = say(&mut members, 1..31).await;
    settle(&mut members, 31).await;
    assert_eq!(Lost::of(&said, &members).lost, 0);
}
