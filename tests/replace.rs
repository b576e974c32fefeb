//! A process is replaced without losing a request, and if the new one fails, the old one serves on.
//! The example `restart` and its successors run as processes.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

use std::convert::Infallible;
use std::env;
use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use command_fds::{CommandFdExt, FdMapping};
use futures_util::future::join_all;
use futures_util::poll;
use process::{Client, Ended, Example, gone, having, path, soon};
use rustix::process::{Pid, Signal, kill_process};
use tally::Tally;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::{JoinHandle, JoinSet, yield_now};
use tokio::time::sleep;
use tower::service_fn;
use tower_tcp::bind::SocketOptions;
use tower_tcp::frame::Lines;
use tower_tcp::replace::{Replace, ReplaceError, close_unused};
use tower_tcp::{Error, Handle, Pipeline, Report, Serve, Server, signal};

#[path = "support/process.rs"]
mod process;
#[path = "support/tally.rs"]
mod tally;

/// A process and its successors, which share its output.
struct Restarted {
    first: Example,
    latest: Latest,
    replaced: usize,
    /// Contains a link to the program. A test can replace the link with a script.
    dir: TempDir,
}

/// The process that serves. Dropping it kills the process.
struct Latest(Option<Pid>);

impl Latest {
    fn signal(&self, signal: Signal) {
        kill_process(self.0.unwrap(), signal).expect("it runs");
    }
}

impl Drop for Latest {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ended = kill_process(pid, Signal::KILL);
        }
    }
}

impl Restarted {
    async fn start(listen: &[&str], args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("restart");
        symlink(path("restart"), &program).unwrap();
        let first = Example::start_on(program.to_str().unwrap(), listen, args).await;
        Self {
            latest: Latest(Some(first.pid())),
            first,
            replaced: 0,
            dir,
        }
    }

    fn addr(&self) -> SocketAddr {
        self.first.addr()
    }

    /// Replaces the latest process, and waits until it drains.
    async fn replace(&mut self) {
        self.latest.signal(Signal::HUP);
        self.replaced += 1;
        let words = ["process.replaced"];
        let events = self.first.logged(self.replaced, &words).await;
        let (_, pid) = events[self.replaced - 1].split_once("pid=").unwrap();
        self.latest.0 = Pid::from_raw(pid.trim().parse().unwrap());
    }

    /// Puts a script in the place of the program.
    fn install(&self, script: &str) {
        let new = self.dir.path().join("new");
        fs::write(&new, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&new, Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, self.dir.path().join("restart")).unwrap();
    }

    /// Tries to replace the process with the installed program, which must fail. Returns the event
    /// with the reason.
    async fn refused(&self) -> String {
        let words = ["process.not_replaced"];
        let before = self.first.so_far(&words).len();
        self.latest.signal(Signal::HUP);
        self.first.logged(before + 1, &words).await.remove(before)
    }

    /// Stops the latest process, and waits until all have ended.
    async fn stop(mut self) -> Ended {
        self.latest.signal(Signal::TERM);
        self.latest.0 = None;
        let ended = self.first.ended().await;
        assert!(ended.status.success(), "{ended:?}", ended = ended.log);
        ended
    }
}

/// Replaces a server again and again while 32 clients send requests.
async fn replaced_under_load(requests: usize, each: usize, times: usize, limit: &str) {
    let args = ["--max-connections", limit];
    let mut server = Restarted::start(&["127.0.0.1:0"], &args).await;
    let (tally, clients) = Tally::start(server.addr(), requests, each);
    for time in 1..=times {
        tally.reached(time * requests / (times + 1)).await;
        server.replace().await;
    }
    clients.join_all().await;
    server.stop().await;
    println!("{each} a connection, limit {limit}, {times} restarts: {tally:?}");
    tally.none_lost();
    assert_eq!(tally.answered.load(SeqCst), requests, "{tally:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_at_a_limit_below_the_number_of_clients() {
    replaced_under_load(2000, 1, 4, "8").await;
    replaced_under_load(2000, 10, 4, "8").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_at_a_limit_above_the_number_of_clients() {
    replaced_under_load(2000, 1, 4, "10000").await;
    replaced_under_load(2000, 10, 4, "10000").await;
}

/// Run by hand, with `--ignored --nocapture`, and the example as a release build if possible.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "some minutes"]
async fn no_request_of_thirty_thousand_is_lost_in_twenty_restarts() {
    for limit in ["8", "10000"] {
        for each in [1, 10] {
            replaced_under_load(30_000, each, 20, limit).await;
        }
    }
}

/// The same with a socket for each process, to compare. It asserts nothing about what is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn requests_are_lost_with_a_socket_for_each_process() {
    for (limit, each) in [("8", 1), ("8", 10), ("10000", 1), ("10000", 10)] {
        let (requests, times) = (30_000, 20);
        let args = ["--max-connections", limit, "--reuse-port"];
        let mut server = Example::start("restart", &args).await;
        let addr = server.addr();
        let (tally, clients) = Tally::start(addr, requests, each);
        let mut ended = Vec::new();
        for time in 1..=times {
            tally.reached(time * requests / (times + 1)).await;
            let new = Example::start_on("restart", &[&addr.to_string()], &args).await;
            ended.push(tokio::spawn(std::mem::replace(&mut server, new).stop()));
        }
        clients.join_all().await;
        server.stop().await;
        println!("SO_REUSEPORT, {each} a connection, limit {limit}: {tally:?}");
    }
}

/// Installs the script of each pair in place of the new version, while clients send requests. Each
/// attempt to replace the process must end with one event that contains the second text of the
/// pair.
async fn fails(args: &[&str], failures: &[(&str, &str)]) {
    let server = Restarted::start(&["127.0.0.1:0"], args).await;
    let mut client = Client::connect(server.addr()).await;
    assert_eq!(client.ask("before").await, "before");
    let (tally, mut clients) = Tally::start(server.addr(), usize::MAX, 10);
    let real = path("restart").display().to_string();
    for (script, why) in failures {
        let port = server.addr().port().to_string();
        server.install(&script.replace("REAL", &real).replace("PORT", &port));

        let event = server.refused().await;

        assert!(event.contains(why), "{script}: {event}");
        assert_eq!(client.ask("after").await, "after", "{script}");
        tally.reached(tally.sent.load(SeqCst) + 100).await;
    }
    clients.shutdown().await;
    tally.none_lost();
    let log = server.stop().await.log;
    let events = having(&log, &["process.not_replaced"]);
    assert_eq!(events.len(), failures.len(), "{events:#?}");
    assert_eq!(having(&log, &["process.replaced"]).len(), 0);
}

#[tokio::test]
async fn a_new_process_that_ends_leaves_the_old_one_serving_with_one_event() {
    let failures = [
        ("exit 7", "ended before it was ready: exit status: 7"),
        ("kill -9 $$", "ended before it was ready: signal: 9"),
        // The address on which the old process listens, written differently.
        (
            "exec REAL --listen localhost:PORT",
            "ended before it was ready: exit status: 1",
        ),
    ];
    fails(&[], &failures).await;
}

#[tokio::test]
async fn a_new_process_that_hangs_leaves_the_old_one_serving_with_one_event() {
    let hangs = "was not ready within 500ms: it does not accept connections yet";
    // The second script has closed the stream to the old process.
    let failures = [
        ("exec sleep 1000", hangs),
        ("exec 3>&- 4>&- sleep 1000", hangs),
    ];
    fails(&["--ready-within", "0.5"], &failures).await;
}

#[tokio::test]
async fn a_unix_path_stays_until_the_last_process_ends() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let unix = format!("unix:{}", socket.display());
    let args = ["--listen", &unix];
    let mut server = Restarted::start(&["127.0.0.1:0"], &args).await;
    let before = socket.metadata().unwrap();
    for _ in 0..2 {
        let old = server.latest.0.unwrap();
        server.replace().await;
        gone(old).await;
        assert_eq!(ask(&socket, "x").await, "x");
    }
    // A new process that fails leaves the path, too: it has taken the socket over, and then cannot
    // bind another address.
    let real = path("restart").display().to_string();
    let taken = format!("localhost:{}", server.addr().port());
    server.install(&format!("exec {real} --listen {unix} --listen {taken}"));
    assert!(server.refused().await.contains("exit status: 1"));
    assert_eq!(ask(&socket, "y").await, "y");
    let after = socket.metadata().unwrap();
    assert_eq!((before.ino(), before.dev()), (after.ino(), after.dev()));

    let said = server.stop().await.said;

    assert!(!socket.exists());
    // The port stays the same, although it was not given.
    let listening = having(&said, &["listening on 127.0.0.1:"]);
    assert_eq!(listening.len(), 3, "{said:?}");
    assert!(
        listening.iter().all(|line| *line == listening[0]),
        "{said:?}"
    );
}

#[tokio::test]
async fn i4_a_process_that_is_killed_as_it_drains_is_not_missed() {
    let args = ["--next-line", "60000"];
    let mut server = Restarted::start(&["127.0.0.1:0"], &args).await;
    let old = Latest(Some(server.first.pid()));
    let mut kept = Client::connect(server.addr()).await;
    assert_eq!(kept.ask("before").await, "before");
    server.replace().await;
    let (tally, mut clients) = Tally::start(server.addr(), usize::MAX, 10);
    tally.reached(500).await;
    // The drain waits for the next line of this client.
    assert_eq!(kept.ask("drained").await, "drained");

    old.signal(Signal::KILL);
    kept.gone().await;
    tally.reached(tally.sent.load(SeqCst) + 2000).await;

    clients.shutdown().await;
    tally.none_lost();
    // The new process can be replaced, too, and is stopped in good order.
    let new = server.latest.0.unwrap();
    server.replace().await;
    gone(new).await;
    let mut client = Client::connect(server.addr()).await;
    assert_eq!(client.ask("after").await, "after");
    drop(client);
    let latest = server.latest.0.unwrap();
    server.latest.signal(Signal::TERM);
    gone(latest).await;
    assert_eq!(server.first.so_far(&["process.replaced"]).len(), 2);
}

#[tokio::test]
async fn a_process_that_is_killed_before_the_new_one_has_bound_is_not_missed() {
    let mut server = Restarted::start(&["127.0.0.1:0"], &[]).await;
    let old = Latest(Some(server.first.pid()));
    let [pid, on] = ["pid", "on"].map(|name| server.dir.path().join(name));
    let script = format!(
        "echo $$ >{}; until [ -e {} ]; do sleep 0.01; done; exec {} \"$@\"",
        pid.display(),
        on.display(),
        path("restart").display()
    );
    server.install(&script);
    old.signal(Signal::HUP);
    server.latest.0 = Some(soon("the new process", written_pid(pid)).await);

    old.signal(Signal::KILL);
    gone(old.0.unwrap()).await;
    fs::write(on, "").unwrap();

    let mut client = Client::connect(server.addr()).await;
    assert_eq!(client.ask("after").await, "after");
}

// Within this process, with a new process of this very program

/// Sends a line to a Unix socket, and returns the reply.
async fn ask(path: &Path, line: &str) -> String {
    let stream = soon("a connection", UnixStream::connect(path)).await;
    ask_over(stream.unwrap(), line).await
}

async fn ask_over(mut stream: UnixStream, line: &str) -> String {
    stream
        .write_all(format!("{line}\n").as_bytes())
        .await
        .unwrap();
    let mut reply = String::new();
    let read = BufReader::new(stream).read_line(&mut reply).await;
    assert!(read.is_ok(), "{read:?}");
    reply.trim_end().to_owned()
}

/// Waits until no other test replaces this process. A process can have only one replacement in
/// progress, and all these tests run in one process.
async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

/// Returns the kernel's numbers of the sockets that a server listens on.
fn numbers(handle: &Handle) -> String {
    let numbers = handle.listening_sockets().map(|socket| {
        let link = format!("/proc/self/fd/{}", socket.as_fd().as_raw_fd());
        fs::read_link(link).unwrap().display().to_string()
    });
    numbers.collect::<Vec<_>>().join(" ")
}

/// Binds a server that replies with its process ID and the numbers of its sockets. In `endpoints`,
/// `\0` stands for a NUL, which an environment variable cannot contain.
async fn server(endpoints: &str) -> (Handle, Serve) {
    let server = Server::builder()
        .socket_options(SocketOptions::default().reuse_port(true))
        .listen_all(endpoints.split(' ').map(|text| text.replace("\\0", "\0")))
        .bind()
        .await
        .unwrap();
    let handle = server.handle();
    let reply = Bytes::from(format!("{} {}", std::process::id(), numbers(&handle)));
    let service = service_fn(move |_: Bytes| {
        let reply = reply.clone();
        async move { Ok::<_, Infallible>(reply) }
    });
    let serving = server.serve(Pipeline::new(Lines::default).service(service));
    (handle, serving)
}

async fn running(endpoints: &str) -> (Handle, JoinHandle<Result<Report, Error>>) {
    let (handle, serving) = server(endpoints).await;
    (handle, tokio::spawn(serving))
}

/// A server of this process, at sockets in a folder of its own. No other test replaces this process
/// meanwhile.
struct Old {
    handle: Handle,
    served: JoinHandle<Result<Report, Error>>,
    dir: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Old {
    /// Listens at sockets with these names, and at `others`.
    async fn listen(names: &[&str], others: &[&str]) -> Self {
        let alone = alone().await;
        let dir = tempfile::tempdir().unwrap();
        let named = names.iter().map(|name| unix(&dir.path().join(name)));
        let others = others.iter().map(|&other| other.to_owned());
        let endpoints: Vec<_> = named.chain(others).collect();
        let (handle, served) = running(&endpoints.join(" ")).await;
        Self {
            handle,
            served,
            dir,
            _alone: alone,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn unix(&self, name: &str) -> String {
        unix(&self.path(name))
    }

    /// A replacement by a new process with these servers.
    fn replace(&self, servers: &str) -> Replace {
        Replace::new(&self.handle).command(successor_with(servers))
    }

    /// Waits for the end of the server, which must be in good order.
    async fn ended(&mut self) {
        ended(&mut self.served).await;
    }

    /// Stops the server, which was not replaced.
    async fn stop(&mut self) {
        self.handle.shutdown();
        self.ended().await;
    }
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

async fn ended(served: &mut JoinHandle<Result<Report, Error>>) {
    let report = soon("the end of a server", served).await;
    report.unwrap().unwrap();
}

/// Returns the process ID of the new process, which is killed at the end of the test.
fn new_process(replaced: Result<u32, ReplaceError>) -> (u32, Latest) {
    let pid = replaced.unwrap();
    (pid, Latest(Pid::from_raw(pid.try_into().unwrap())))
}

async fn is_served_by(path: &Path, process: u32) {
    let reply = ask(path, "").await;
    assert!(reply.starts_with(&process.to_string()), "{reply}");
}

/// Returns the command of a new process with these servers, separated by `;`. A word can follow
/// them: `hang` starts no further server, `close_unused` closes the sockets that no server took,
/// `lame_duck` begins this phase, `stop` drains the servers, `replace` tries to replace the new
/// process once, and `replace_when_ready` tries again until the new process is ready.
fn successor_with(servers: &str) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "successor", "--ignored"])
        .env("SUCCESSOR", servers)
        .stdout(Stdio::null());
    command
}

#[tokio::test]
#[ignore = "no test, but the new process of others"]
async fn successor() {
    let Ok(servers) = env::var("SUCCESSOR") else {
        return;
    };
    let (mut serving, mut handles) = (Vec::new(), Vec::new());
    for endpoints in servers.split(';') {
        match endpoints {
            "lame_duck" => handles.iter().for_each(Handle::lame_duck),
            "stop" => handles.iter().for_each(Handle::drain),
            "replace" => match Replace::new(&handles[0]).run().await {
                Err(ReplaceError::NotAccepting) => std::process::exit(7),
                other => panic!("{other:?}"),
            },
            "replace_when_ready" => {
                tokio::spawn(replace_when_ready(handles[0].clone()));
            }
            "hang" => sleep(Duration::from_secs(1000)).await,
            "close_unused" => close_unused(),
            endpoints => {
                let (handle, served) = server(endpoints).await;
                signal::install(&handle).unwrap();
                handles.push(handle);
                serving.push(served);
                if servers.ends_with("hang") {
                    tokio::spawn(serving.remove(0));
                }
            }
        }
    }
    join_all(serving).await;
}

/// Says when a replacement of this process begins to wait, and exits when that has failed.
async fn replace_when_ready(handle: Handle) {
    loop {
        let mut replacing = pin!(Replace::new(&handle).command(Command::new("false")).run());
        match poll!(&mut replacing) {
            Poll::Ready(Err(ReplaceError::NotAccepting)) => yield_now().await,
            Poll::Ready(refused) => panic!("{refused:?}"),
            Poll::Pending => {
                println!("it waits");
                match replacing.await {
                    Err(ReplaceError::Ended(_)) => std::process::exit(8),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn all_sockets_of_all_servers_are_handed_on_in_their_order() {
    let _alone = alone().await;
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| dir.path().join(name));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    // Both servers listen on one port, each with a socket of its own, and on `localhost`.
    let endpoints = paths
        .clone()
        .map(|path| format!("127.0.0.1:{port} unix:{} localhost:0", path.display()));
    let (first, mut first_served) = running(&endpoints[0]).await;
    let (second, mut second_served) = running(&endpoints[1]).await;
    let before = [numbers(&first), numbers(&second)];
    assert_ne!(before[0], before[1]);

    let replace = Replace::new(&first).and(&second);
    let command = successor_with(&endpoints.join(";"));
    let replaced = replace.command(command).run().await;

    let (pid, _latest) = new_process(replaced);
    ended(&mut first_served).await;
    ended(&mut second_served).await;
    assert_eq!(first.listening_sockets().count(), 0);
    for (path, numbers) in paths.iter().zip(before) {
        assert_eq!(ask(path, "").await, format!("{pid} {numbers}"));
    }
}

#[tokio::test]
async fn a_server_that_is_added_twice_is_handed_on_once() {
    let mut old = Old::listen(&["a"], &["127.0.0.1:0"]).await;
    let before = numbers(&old.handle);
    let servers = [&old.unix("a"), "127.0.0.1:0"].join(" ");

    let replaced = old.replace(&servers).and(&old.handle).run().await;

    let (pid, _latest) = new_process(replaced);
    old.ended().await;
    assert_eq!(ask(&old.path("a"), "").await, format!("{pid} {before}"));
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_abstract_name_with_a_nul_is_handed_on() {
    let name = format!("unix:@tower-tcp-{}\\0", std::process::id());
    let mut old = Old::listen(&["a"], &[&name]).await;
    let before = numbers(&old.handle);

    let servers = [&old.unix("a"), &name].map(String::as_str).join(" ");
    let replaced = old.replace(&servers).run().await;

    let (pid, _latest) = new_process(replaced);
    old.ended().await;
    assert_eq!(ask(&old.path("a"), "").await, format!("{pid} {before}"));
}

#[tokio::test]
async fn clients_in_the_backlog_are_served_by_the_new_process() {
    let mut old = Old::listen(&["a"], &[]).await;
    old.handle.pause();
    let mut waiting = JoinSet::new();
    for _ in 0..5 {
        let stream = UnixStream::connect(old.path("a")).await.unwrap();
        waiting.spawn(async move { ask_over(stream, "").await });
    }

    let replaced = old.replace(&old.unix("a")).run().await;

    let (pid, _latest) = new_process(replaced);
    old.ended().await;
    for reply in soon("the replies", waiting.join_all()).await {
        assert!(reply.starts_with(&pid.to_string()), "{reply:?}");
    }
}

#[tokio::test]
async fn a_socket_that_the_new_process_does_not_want_must_be_closed_by_it() {
    let mut old = Old::listen(&["a", "b"], &[]).await;
    let [a, b] = ["a", "b"].map(|name| old.unix(name));

    // On a busy machine a process takes long to start.
    let mut seen = None;
    for seconds in [1, 4, 16] {
        let replace = old.replace(&a).ready_within(Duration::from_secs(seconds));
        let refused = replace.run().await;
        let Err(ReplaceError::NotReady { waits_for, .. }) = refused else {
            panic!("{refused:?}");
        };
        seen = seen.or(waits_for);
        if seen.is_some() {
            break;
        }
    }
    assert_eq!(seen, Some(b));
    for name in ["a", "b"] {
        is_served_by(&old.path(name), std::process::id()).await;
    }

    let replaced = old.replace(&format!("{a};close_unused")).run().await;

    let (pid, _latest) = new_process(replaced);
    old.ended().await;
    is_served_by(&old.path("a"), pid).await;
    // The old process has removed the path that nobody serves.
    assert!(!old.path("b").exists());
}

#[tokio::test]
async fn a_new_process_accepts_nothing_before_it_is_ready() {
    let mut old = Old::listen(&["a", "b"], &[]).await;

    let replace = old.replace(&format!("{};hang", old.unix("a")));
    let replacing = tokio::spawn(replace.ready_within(Duration::from_secs(2)).run());

    let mut asked = 0;
    while !replacing.is_finished() {
        is_served_by(&old.path("a"), std::process::id()).await;
        asked += 1;
    }
    assert_ne!(asked, 0);
    let refused = replacing.await.unwrap();
    assert!(
        matches!(refused, Err(ReplaceError::NotReady { .. })),
        "{refused:?}"
    );
    old.stop().await;
}

#[tokio::test]
async fn sixty_four_servers_are_replaced() {
    let _alone = alone().await;
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<_> = (0..64).map(|at| dir.path().join(at.to_string())).collect();
    let endpoints: Vec<_> = paths.iter().map(|path| unix(path)).collect();
    let mut servers = Vec::new();
    for endpoint in &endpoints {
        servers.push(running(endpoint).await);
    }
    let (first, others) = servers.split_first().unwrap();
    let replace = others
        .iter()
        .fold(Replace::new(&first.0), |replace, (handle, _)| {
            replace.and(handle)
        });

    let command = successor_with(&endpoints.join(";"));
    let replaced = replace.command(command).run().await;

    let (pid, _latest) = new_process(replaced);
    for (_, served) in &mut servers {
        ended(served).await;
    }
    for path in &paths {
        is_served_by(path, pid).await;
    }
}

#[tokio::test]
async fn a_new_process_that_stops_before_it_is_ready_accepts_nothing() {
    let mut old = Old::listen(&["a"], &["127.0.0.1:0"]).await;
    old.handle.pause();
    let waiting = UnixStream::connect(old.path("a")).await.unwrap();
    let waiting = tokio::spawn(ask_over(waiting, ""));

    let replace = old.replace(&format!("{};stop", old.unix("a")));
    let refused = replace.ready_within(Duration::from_secs(2)).run().await;

    assert!(
        matches!(refused, Err(ReplaceError::Ended(_))),
        "{refused:?}"
    );
    old.handle.resume();
    let reply = soon("the reply", waiting).await.unwrap();
    assert!(
        reply.starts_with(&std::process::id().to_string()),
        "{reply}"
    );
    old.stop().await;
    assert!(!old.path("a").exists());
}

#[tokio::test]
async fn a_new_process_whose_lame_duck_phase_has_begun_serves_as_before() {
    let mut old = Old::listen(&["a"], &[]).await;

    let replace = old.replace(&format!("{};lame_duck", old.unix("a")));
    let (pid, _latest) = new_process(replace.run().await);

    old.ended().await;
    is_served_by(&old.path("a"), pid).await;
}

/// The old process logs that it is replaced as soon as it has sent its reply, so the new process
/// may get the next signal before that reply. Here the test is the old process.
#[tokio::test]
async fn a_ready_process_is_replaced_once_the_reply_of_the_old_one_has_arrived() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (stream, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let passed = [(listener.into(), 3), (theirs.into(), 4)];
    let mut command = successor_with("127.0.0.1:0;replace_when_ready");
    command
        .arg("--nocapture")
        .env("TOWER_TCP_REPLACES", std::process::id().to_string())
        .env("TOWER_TCP_SOCKET_0", "0 0 127.0.0.1:0")
        .env("LISTEN_FDS", "2")
        .fd_mappings(
            passed
                .map(|(parent_fd, child_fd)| FdMapping {
                    parent_fd,
                    child_fd,
                })
                .into(),
        )
        .unwrap();
    let mut new = tokio::process::Command::from(command);
    let mut new = new
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut stream = BufReader::new(UnixStream::from_std(stream).unwrap());
    let mut from_new = String::new();
    while !from_new.contains("ready 0\n") {
        let read = soon("the new process is ready", stream.read_line(&mut from_new)).await;
        assert_ne!(read.unwrap(), 0, "{from_new}");
    }

    let mut output = BufReader::new(new.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("it waits") {
        let read = soon("the replacement waits", output.read_line(&mut said)).await;
        assert_ne!(read.unwrap(), 0, "{said}");
    }
    stream.write_all(b"go\n").await.unwrap();

    let status = soon("the new process ends", new.wait()).await.unwrap();
    assert_eq!(status.code(), Some(8));
}

#[tokio::test]
async fn a_new_process_is_not_replaced_before_it_is_ready() {
    let mut old = Old::listen(&["a"], &[]).await;

    let replace = old.replace(&format!("{};replace", old.unix("a")));
    let refused = replace.run().await;

    let Err(ReplaceError::Ended(status)) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(status.code(), Some(7));
    old.stop().await;
}

#[expect(
    clippy::disallowed_methods,
    reason = "the runtime must read nothing meanwhile"
)]
#[tokio::test]
async fn a_new_process_that_closes_the_stream_when_it_is_ready_is_killed() {
    let mut old = Old::listen(&["a"], &[]).await;
    let [path, pid, on, closed] = ["a", "pid", "on", "closed"].map(|name| old.path(name));
    let mut command = Command::new("sh");
    let script = "echo $$ >pid; until [ -e on ]; do sleep 0.01; done
        echo ready 0 >&4; exec 4>&-; : >closed; exec sleep 1000";
    command.args(["-c", script]).current_dir(old.dir.path());
    let replacing = tokio::spawn(Replace::new(&old.handle).command(command).run());
    let pid = soon("the new process", written_pid(pid)).await;

    // This task reads nothing before the stream is closed.
    fs::write(on, "").unwrap();
    while !closed.exists() {
        std::thread::sleep(Duration::from_millis(1));
    }

    let refused = soon("the end of the replacement", replacing).await.unwrap();
    assert!(
        matches!(refused, Err(ReplaceError::Ended(_))),
        "{refused:?}"
    );
    gone(pid).await;
    old.stop().await;
    assert!(!path.exists());
}

/// Returns the command of a process that never becomes ready, and a future of its process ID.
fn hanging(dir: &Path) -> (Command, impl Future<Output = Pid> + use<>) {
    let file = dir.join("pid");
    let mut command = Command::new("sh");
    let script = format!("echo $$ >{}; exec sleep 1000", file.display());
    command.args(["-c", &script]);
    (command, written_pid(file))
}

/// Waits until a process has written its process ID to a file.
async fn written_pid(file: PathBuf) -> Pid {
    loop {
        let written = fs::read_to_string(&file).unwrap_or_default();
        if let Some(Ok(pid)) = written.strip_suffix('\n').map(str::parse) {
            return Pid::from_raw(pid).unwrap();
        }
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_shutdown_ends_a_replacement() {
    let mut old = Old::listen(&[], &["127.0.0.1:0"]).await;
    let (command, pid) = hanging(old.dir.path());
    let replacing = tokio::spawn(Replace::new(&old.handle).command(command).run());
    let pid = soon("the new process", pid).await;
    let (command, _) = hanging(old.dir.path());
    let second = Replace::new(&old.handle).command(command).run().await;
    assert!(
        matches!(second, Err(ReplaceError::InProgress)),
        "{second:?}"
    );

    old.handle.shutdown();

    let refused = soon("the end of the replacement", replacing).await.unwrap();
    assert!(
        matches!(refused, Err(ReplaceError::ShuttingDown)),
        "{refused:?}"
    );
    gone(pid).await;
    old.ended().await;
    let late = Replace::new(&old.handle).run().await;
    assert!(matches!(late, Err(ReplaceError::ShuttingDown)), "{late:?}");
}

#[tokio::test]
async fn a_dropped_replacement_leaves_no_process_behind() {
    let mut old = Old::listen(&[], &["127.0.0.1:0"]).await;
    let (command, pid) = hanging(old.dir.path());
    let replacing = tokio::spawn(Replace::new(&old.handle).command(command).run());
    let pid = soon("the new process", pid).await;

    replacing.abort();

    gone(pid).await;
    let missing = Replace::new(&old.handle).command(Command::new("/missing"));
    let missing = missing.run().await;
    assert!(
        matches!(missing, Err(ReplaceError::Start(_))),
        "{missing:?}"
    );
    old.stop().await;
}
