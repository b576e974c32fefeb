//! systemd gets the state of a server, each message in its order, and watchdog messages exactly as
//! long as the accept loop runs.
//!
//! A test speaks systemd's side of the protocol. The server runs in a process of its own, because
//! the protocol is set up by environment variables. It is this file's own program, with
//! `TOWER_TCP_CHILD` set.

#[path = "support/process.rs"]
mod process;

use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::task::{Context, Poll};
use std::time::Duration;

use process::soon;
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::{TcpStream, UnixDatagram};
use tokio::process::{Child, ChildStdout, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep, timeout};
use tower::layer::layer_fn;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::admit::{AddressFilter, Verdict};
use tower_tcp::bind::Socket;
use tower_tcp::signal::{self as signals, systemd};
use tower_tcp::{Address, BoxError, Connection, Server};

/// The interval in which the child prints a line, whatever its accept loop does.
const TICK: Duration = Duration::from_millis(20);

/// Blocks the thread that calls it, for longer than any test.
#[expect(clippy::disallowed_methods, reason = "it is to block the thread")]
fn block_if(blocks: bool) {
    if blocks {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Runs a server that tells systemd its state. `way` names where its accept loop gets stuck with
/// the first connection: `filter`, `ready` or `call`. With `quick`, the server ends at once at a
/// signal. Any other value does neither.
async fn serve(way: &str) -> Result<(), BoxError> {
    let (filter, ready, call) = (way == "filter", way == "ready", way == "call");
    let quick = way == "quick";
    let lame_duck = if quick { 0 } else { 300 };
    let builder = Server::builder()
        .listen("127.0.0.1:0")
        .lame_duck(Duration::from_millis(lame_duck))
        .address_filter(AddressFilter::new(move |_: &Address| {
            block_if(filter);
            Verdict::Allow
        }));
    let server = builder.bind().await?;
    let handle = server.handle();
    if !quick {
        signals::install(&handle)?;
    }
    systemd::install(&handle);
    println!("listening on {}", handle.local_addrs()[0]);

    let mut hangups = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            systemd::reload(sleep(Duration::from_millis(50))).await;
        }
    });
    tokio::spawn(async {
        loop {
            println!("tick");
            sleep(TICK).await;
        }
    });
    let stack = ServiceBuilder::new()
        .layer(layer_fn(move |inner| BlocksReady(inner, ready)))
        .map_request(move |conn: Connection<Socket>| {
            block_if(call);
            conn
        })
        .service(service_fn(|conn: Connection<Socket>| async move {
            conn.draining().await;
            // Long enough for messages during the drain.
            sleep(Duration::from_millis(300)).await;
            Ok::<_, BoxError>(())
        }));
    let serving = server.serve(stack);
    if quick {
        // The whole shutdown takes one poll of the future.
        let mut terminate = signal(SignalKind::terminate())?;
        let terminated = async move { _ = terminate.recv().await };
        serving.with_graceful_shutdown(terminated).await?;
        return Ok(());
    }
    // As a local task, the accept loop stays on this thread, and the runtime's workers still run
    // the timers while it is stuck.
    let serving = async { tokio::task::spawn_local(serving).await };
    LocalSet::new().run_until(serving).await??;
    Ok(())
}

/// A connection service that blocks in `poll_ready`, if the flag is `true`.
struct BlocksReady<S>(S, bool);

impl<S: Service<R>, R> Service<R> for BlocksReady<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        block_if(self.1);
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> S::Future {
        self.0.call(request)
    }
}

/// Does nothing, unless it is run by the other tests.
#[test]
fn the_child_of_the_others() {
    if let Ok(way) = std::env::var("TOWER_TCP_CHILD") {
        let runtime = if way == "quick" {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
        } else {
            let mut runtime = tokio::runtime::Builder::new_multi_thread();
            runtime.worker_threads(2).enable_all().build()
        };
        let served = runtime.expect("a runtime").block_on(serve(&way));
        served.expect("it ends in good order");
    }
}

/// A server in a process of its own, and the socket on which systemd would hear of it.
struct Unit {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    socket: UnixDatagram,
    addr: SocketAddr,
    _dir: TempDir,
}

impl Unit {
    async fn start(way: &str, watchdog: Option<Duration>) -> Self {
        let dir = tempfile::tempdir().expect("there is room for files");
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("the path is free");
        let program = std::env::current_exe().expect("a test knows its own path");
        let mut command = Command::new(program);
        command
            .args(["--exact", "the_child_of_the_others", "--nocapture"])
            .env("TOWER_TCP_CHILD", way)
            .env("NOTIFY_SOCKET", &path)
            .env_remove("WATCHDOG_PID")
            .env_remove("WATCHDOG_USEC")
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        if let Some(watchdog) = watchdog {
            command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        }
        let mut child = command.spawn().expect("it is this program");
        let mut stdout = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let listens = async {
            loop {
                let line = stdout.next_line().await.expect("text").expect("it runs");
                if let Some((_, addr)) = line.split_once("listening on ") {
                    return addr.parse().expect("an address");
                }
            }
        };
        let addr = soon("a listening server", listens).await;
        Self {
            child,
            stdout,
            socket,
            addr,
            _dir: dir,
        }
    }

    /// Returns the next message.
    async fn hears(&self) -> String {
        let mut block = [0; 4096];
        let received = soon("a message", self.socket.recv(&mut block)).await;
        let received = received.expect("the socket is open");
        String::from_utf8(block[..received].to_vec()).expect("text")
    }

    /// Returns the next message that is not for the watchdog.
    async fn hears_of_state(&self) -> String {
        loop {
            let message = self.hears().await;
            if message != "WATCHDOG=1\n" {
                return message;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.id().expect("it was not waited for");
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a number of a process"), signal).expect("it is ours");
    }

    /// Waits for the end of the process.
    async fn ends(&mut self) -> ExitStatus {
        let ended = async {
            while self.stdout.next_line().await.expect("text").is_some() {}
            self.child.wait().await.expect("it was not waited for")
        };
        soon("the end", ended).await
    }

    /// Waits until the child has printed this many lines, as its timers run.
    async fn ticks(&mut self, lines: usize) {
        for _ in 0..lines {
            let line = soon("a tick", self.stdout.next_line()).await;
            assert_eq!(line.expect("text").as_deref(), Some("tick"));
        }
    }
}

fn now() -> u128 {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, nanoseconds) = (now.tv_sec as u128, now.tv_nsec as u128);
    seconds * 1_000_000 + nanoseconds / 1_000
}

#[tokio::test]
async fn each_message_comes_in_its_order() {
    let watchdog = Duration::from_millis(200);
    let mut unit = Unit::start("serves", Some(watchdog)).await;
    let begun = Instant::now();
    assert_eq!(
        unit.hears().await,
        "READY=1\nSTATUS=ready: phase serving, 0 connections, limit 10000 with 0 in use\n"
    );

    // The figures change many times, and are told at most every 5 s.
    for _ in 0..50 {
        drop(TcpStream::connect(unit.addr).await.expect("it listens"));
    }
    let mut beats = 0;
    loop {
        let message = unit.hears().await;
        if message == "WATCHDOG=1\n" {
            beats += 1;
        } else {
            assert!(
                message.starts_with("STATUS=ready: phase serving, 50 connections"),
                "{message}"
            );
            break;
        }
    }
    assert!(
        begun.elapsed() >= Duration::from_millis(4900),
        "{:?}",
        begun.elapsed()
    );
    // About 50, on a machine that has time.
    assert!((10..=55).contains(&beats), "{beats}");

    let before = now();
    unit.signal(Signal::HUP);
    let reloading = unit.hears_of_state().await;
    let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=");
    let time = time.unwrap_or_else(|| panic!("{reloading}"));
    let time = time.trim_end().parse().expect("a number");
    assert!((before..=now()).contains(&time), "{time}");
    assert_eq!(unit.hears_of_state().await, "READY=1\n");

    unit.signal(Signal::TERM);
    let stopping = unit.hears_of_state().await;
    let begins = "STOPPING=1\nSTATUS=lame_duck: phase lame_duck, 50 connections";
    assert!(stopping.starts_with(begins), "{stopping}");
    assert_eq!(unit.hears().await, "WATCHDOG=1\n");
    let draining = unit.hears_of_state().await;
    assert!(
        draining.starts_with("STATUS=draining: phase draining, "),
        "{draining}"
    );
    assert_eq!(unit.hears().await, "WATCHDOG=1\n");

    assert!(unit.ends().await.success());
}

#[tokio::test]
async fn the_watchdog_is_silent_while_the_accept_loop_is_stuck() {
    for way in ["filter", "ready", "call"] {
        let mut unit = Unit::start(way, Some(Duration::from_millis(40))).await;
        assert!(unit.hears().await.starts_with("READY=1\n"), "{way}");
        for _ in 0..3 {
            assert_eq!(unit.hears().await, "WATCHDOG=1\n", "{way}");
        }

        let _client = TcpStream::connect(unit.addr).await.expect("it listens");

        // Timers run on, and beats from before may still come.
        let silence = async {
            loop {
                unit.ticks(20).await;
                let mut block = [0; 4096];
                let mut heard = false;
                while unit.socket.try_recv(&mut block).is_ok() {
                    heard = true;
                }
                if !heard {
                    return;
                }
            }
        };
        let silence = timeout(Duration::from_secs(15), silence).await;
        assert!(silence.is_ok(), "{way}: the watchdog is fed");
    }
}

#[tokio::test]
async fn without_a_watchdog_there_is_no_message_for_it() {
    for watchdog in [None, Some(Duration::ZERO)] {
        let mut unit = Unit::start("serves", watchdog).await;
        assert!(unit.hears().await.starts_with("READY=1\n"));
        unit.ticks(20).await;
        unit.signal(Signal::TERM);
        let next = unit.hears().await;
        assert!(next.starts_with("STOPPING=1\n"), "{next}");
    }
}

#[tokio::test]
async fn a_server_that_ends_at_once_has_told_that_it_stops() {
    let mut unit = Unit::start("quick", None).await;
    assert!(unit.hears().await.starts_with("READY=1\n"));
    unit.signal(Signal::TERM);
    assert!(unit.ends().await.success());
    // It was sent before the end, or never.
    let mut block = [0; 4096];
    let received = unit.socket.try_recv(&mut block).expect("a message");
    let last = String::from_utf8_lossy(&block[..received]);
    assert!(last.starts_with("STOPPING=1\n"), "{last}");
}

#[tokio::test]
async fn a_systemd_that_hangs_does_not_hold_the_server_up() {
    let mut unit = Unit::start("quick", Some(Duration::from_millis(4))).await;
    let room = std::fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen");
    let room: usize = room.map_or(10, |room| room.trim().parse().expect("a number"));

    // Long enough to fill the queue of the socket, which nobody reads.
    soon("a full queue", unit.ticks(room / 2)).await;

    unit.signal(Signal::TERM);
    assert!(unit.ends().await.success());
}
