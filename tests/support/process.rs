//! Runs the examples as processes.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// The limit of every wait, far longer than any of them takes.
const NET: Duration = Duration::from_secs(20);

/// Waits for what must come soon.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match timeout(NET, future).await {
        Ok(done) => done,
        Err(_elapsed) => panic!("{what}: not within {NET:?}"),
    }
}

/// Returns whether a program can be run. If `CI` is set, it must be.
pub(crate) fn installed(program: &str) -> bool {
    let found = std::process::Command::new(program)
        .arg("--version")
        .output();
    found.is_ok() || missing(program)
}

/// Debian's Python, which has the modules that Debian's packages install. Another Python may come
/// before it in `PATH`.
const PYTHON: &str = "/usr/bin/python3";

/// Returns whether a module of Python is installed. If `CI` is set, it must be.
pub(crate) fn python_has(module: &str) -> bool {
    let mut import = std::process::Command::new(PYTHON);
    import.args(["-c", &format!("import {module}")]);
    let found = import.output();
    found.is_ok_and(|output| output.status.success())
        || missing(&format!("the Python module {module}"))
}

/// Runs a program in Python, which must succeed.
pub(crate) async fn python(program: &str, args: &[&str]) {
    let mut python = Command::new(PYTHON);
    python.args(["-B", "-c", program]).args(args);
    let output = soon("Python", python.kill_on_drop(true).output()).await;
    let output = output.expect("it is installed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// Reports that a test is skipped, and returns `false`.
fn missing(what: &str) -> bool {
    assert!(
        std::env::var_os("CI").is_none(),
        "{what} is not installed, and CI must not skip what needs it: see .ci/run"
    );
    eprintln!("skipped: {what} is not installed");
    false
}

/// Returns the path of an example, as built by a whole `cargo test`. (`cargo test --test x` does
/// not rebuild it.)
pub(crate) fn path(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let profile = test.parent().and_then(|deps| deps.parent());
    let path = profile
        .expect("tests are in target/PROFILE/deps")
        .join("examples")
        .join(name);
    assert!(
        path.exists(),
        "{} is not built: a whole `cargo test` builds it, and so does `cargo build --examples`",
        path.display()
    );
    path
}

/// Checks that an example explains its options.
pub(crate) async fn explains_its_options(name: &str) {
    let help = Command::new(path(name)).arg("--help").output();
    let help = soon("the help", help).await.expect("it starts");

    let text = String::from_utf8(help.stdout).expect("it is text");
    assert!(help.status.success(), "{name}: {:?}", help.status);
    assert!(
        text.contains("Usage:") && text.contains("--listen"),
        "{name}: {text}"
    );
}

/// A running example and its log. Dropping it kills the process.
pub(crate) struct Example {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    log: Arc<Log>,
    reader: JoinHandle<()>,
    pub(crate) addresses: Vec<SocketAddr>,
    /// The lines that the example printed before it listened.
    pub(crate) said: Vec<String>,
}

/// The output and the status of an example that has exited.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) said: Vec<String>,
    pub(crate) log: Vec<String>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    more: Notify,
}

impl Example {
    /// Starts an example on one port.
    pub(crate) async fn start(name: &str, args: &[&str]) -> Self {
        Self::start_on(name, &["127.0.0.1:0"], args).await
    }

    /// Starts an example, and waits until it listens.
    pub(crate) async fn start_on(name: &str, listen: &[&str], args: &[&str]) -> Self {
        Self::start_command(Command::new(path(name)), name, listen, args).await
    }

    /// Starts an example by another program, which takes the command line of the example behind its
    /// own arguments.
    pub(crate) async fn start_by(by: &[&str], name: &str, args: &[&str]) -> Self {
        let mut command = Command::new(by[0]);
        command.args(&by[1..]).arg(path(name));
        Self::start_command(command, name, &["127.0.0.1:0"], args).await
    }

    async fn start_command(
        mut command: Command,
        name: &str,
        listen: &[&str],
        args: &[&str],
    ) -> Self {
        command
            .args(listen.iter().flat_map(|at| ["--listen", at]))
            .args(args)
            .env("RUST_LOG", "warn,tower_tcp=debug")
            .env("NO_COLOR", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().expect("an example that exists starts");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let mut stdout = BufReader::new(stdout).lines();
        let stderr = child.stderr.take().expect("stderr is a pipe");
        let log = Arc::new(Log::default());
        let reader = tokio::spawn(collect(BufReader::new(stderr).lines(), Arc::clone(&log)));

        let (mut addresses, mut said) = (Vec::new(), Vec::new());
        while addresses.len() < listen.len() {
            let line = soon("the address on stdout", stdout.next_line()).await;
            let line = line.expect("stdout is text");
            let line = line.unwrap_or_else(|| panic!("{name} ended: {:?}", lines(&log)));
            if let Some(address) = line.strip_prefix("listening on ") {
                addresses.push(address.parse().expect("it listens on a port"));
            }
            said.push(line);
        }
        Self {
            child,
            stdout,
            log,
            reader,
            addresses,
            said,
        }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addresses[0]
    }

    pub(crate) fn pid(&self) -> Pid {
        let pid = self.child.id().expect("it was not waited for");
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        pid.expect("a number of a process")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it is ours");
    }

    /// Waits until `count` lines of the log contain all of these words.
    pub(crate) async fn logged(&self, count: usize, words: &[&str]) -> Vec<String> {
        let found = async {
            loop {
                let more = self.log.more.notified();
                tokio::pin!(more);
                more.as_mut().enable();
                let found = having(&lines(&self.log), words);
                if found.len() >= count {
                    return found;
                }
                more.await;
            }
        };
        match timeout(NET, found).await {
            Ok(found) => found,
            Err(_elapsed) => panic!("no {words:?} in {:#?}", lines(&self.log)),
        }
    }

    /// Returns the lines logged so far that contain all of these words.
    pub(crate) fn so_far(&self, words: &[&str]) -> Vec<String> {
        having(&lines(&self.log), words)
    }

    /// Returns the resident memory of the process, in KiB.
    pub(crate) fn resident(&self) -> usize {
        let pid = self.child.id().expect("it was not waited for");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        kib.expect("the system says so").parse().expect("a number")
    }

    /// Returns the names of the threads.
    pub(crate) fn threads(&self) -> Vec<String> {
        let pid = self.child.id().expect("it was not waited for");
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
        tasks
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .map(|name| name.trim_end().to_owned())
            .collect()
    }

    /// Waits until the process exits.
    pub(crate) async fn ended(mut self) -> Ended {
        let mut said = self.said;
        let rest = async {
            while let Some(line) = self.stdout.next_line().await.expect("stdout is text") {
                said.push(line);
            }
            self.child.wait().await.expect("a child can be waited for")
        };
        let status = soon("the end of the process", rest).await;
        self.reader.await.expect("reading a log does not panic");
        Ended {
            status,
            said,
            log: lines(&self.log),
        }
    }

    /// Stops the process with SIGTERM, and waits until it exits.
    pub(crate) async fn stop(self) -> Ended {
        self.signal(Signal::TERM);
        self.ended().await
    }
}

impl Ended {
    /// Returns the one log line about the end of a client's connection.
    pub(crate) fn end_of(&self, client: SocketAddr) -> &str {
        let (ip, port) = (client.ip(), client.port());
        let words = [
            "connection.closed",
            &format!("network.peer.address=\"{ip}\" network.peer.port={port} "),
        ];
        let found: Vec<_> = self
            .log
            .iter()
            .filter(|line| words.iter().all(|word| line.contains(word)))
            .collect();
        assert_eq!(found.len(), 1, "one event for {client} in {:#?}", self.log);
        found[0]
    }
}

/// A process that is no child of an [`Example`]. Dropping it kills the process.
pub(crate) struct Killed(pub(crate) Pid);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ended = kill_process(self.0, Signal::KILL);
    }
}

/// Waits until a process has ended, whether or not its parent has noticed.
pub(crate) async fn gone(pid: Pid) {
    let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
    let ended = async {
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    soon("the end of a process", ended).await;
}

async fn collect(mut stderr: Lines<BufReader<tokio::process::ChildStderr>>, log: Arc<Log>) {
    while let Ok(Some(line)) = stderr.next_line().await {
        let mut lines = log.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(line);
        drop(lines);
        log.more.notify_waiters();
    }
}

fn lines(log: &Log) -> Vec<String> {
    let lines = log.lines.lock().unwrap_or_else(PoisonError::into_inner);
    lines.clone()
}

/// Returns the lines that contain all of these words.
pub(crate) fn having(lines: &[String], words: &[&str]) -> Vec<String> {
    let all = |line: &&String| words.iter().all(|word| line.contains(word));
    lines.iter().filter(all).cloned().collect()
}

/// A client that speaks lines.
pub(crate) struct Client {
    stream: BufReader<TcpStream>,
    pub(crate) addr: SocketAddr,
}

impl Client {
    pub(crate) async fn connect(server: SocketAddr) -> Self {
        Self::connect_from("127.0.0.1", server).await
    }

    pub(crate) async fn connect_from(ip: &str, server: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket can be had");
        let ip = ip.parse().expect("an address");
        socket
            .bind(SocketAddr::new(ip, 0))
            .expect("all of 127/8 is here");
        Self::connect_by(socket, server).await
    }

    pub(crate) async fn connect_by(socket: TcpSocket, server: SocketAddr) -> Self {
        let stream = soon("a connection", socket.connect(server)).await;
        let stream = stream.expect("the server listens");
        let addr = stream
            .local_addr()
            .expect("a connected socket has an address");
        let stream = BufReader::new(stream);
        Self { stream, addr }
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let sent = self.stream.write_all(bytes.as_ref());
        soon("a write", sent).await.expect("the server reads");
    }

    /// Sends as much as the server takes. The server may have closed already.
    pub(crate) async fn try_send(&mut self, bytes: &[u8]) {
        let _taken_or_not = soon("a write", self.stream.write_all(bytes)).await;
    }

    pub(crate) async fn half_close(&mut self) {
        self.stream.shutdown().await.expect("it was open");
    }

    /// Reads a line without its ending. Empty at the end of the stream.
    pub(crate) async fn line(&mut self) -> String {
        let mut line = String::new();
        let read = soon("a line", self.stream.read_line(&mut line)).await;
        read.expect("the end comes without a reset");
        assert!(line.is_empty() || line.ends_with('\n'), "cut off: {line:?}");
        line.trim_end().to_owned()
    }

    pub(crate) async fn ask(&mut self, request: &str) -> String {
        self.send(format!("{request}\n")).await;
        self.line().await
    }

    /// Reads to the end, which must not be a reset.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let read = soon("the end", self.stream.read_to_end(&mut rest)).await;
        read.expect("the end comes without a reset");
        rest
    }

    /// Waits until the server has closed the connection, in any way.
    pub(crate) async fn gone(&mut self) {
        let mut rest = Vec::new();
        // A reset counts as an end.
        let _either_way = soon("the end", self.stream.read_to_end(&mut rest)).await;
    }
}
