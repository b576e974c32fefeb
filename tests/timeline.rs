//! A change of readiness, a replacement of the process and a drain with a farewell keep their
//! order, and no request is lost meanwhile. `--nocapture` prints their times as a table of
//! milliseconds.
//!
//! The old process is this one, and the new one runs this very program.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

use std::env;
use std::fmt;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use process::{Client, Killed, gone, soon};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tower::service_fn;
use tower_tcp::frame::Lines;
use tower_tcp::health::{AgentCheck, HealthChecks};
use tower_tcp::http::Http;
use tower_tcp::replace::Replace;
use tower_tcp::{BoxError, Handle, Pipeline, Report, Serve, Server, ServerPhase, signal};

#[path = "support/process.rs"]
mod process;

/// The interval of the checks.
const INTERVAL: Duration = Duration::from_millis(5);

/// Names the path of the socket that holds a new process until the test lets it go on.
const HELD_BY: &str = "TIMELINE_HELD_BY";

/// The servers of a process: one of lines, and two for the checks.
struct Program {
    lines: Handle,
    ready: Handle,
    agent: Handle,
    /// Has a permit for each `hold` that may be answered.
    gate: Arc<Semaphore>,
    serving: [Serve; 3],
}

impl Program {
    async fn bind() -> Self {
        let lines = Server::builder()
            .listen("127.0.0.1:0")
            // Longer than the test. A `drain` ends it early.
            .lame_duck(Duration::from_secs(60));
        let lines = lines.bind().await.unwrap();
        let [ready, agent] = [
            Server::bind("127.0.0.1:0").await.unwrap(),
            Server::bind("127.0.0.1:0").await.unwrap(),
        ];
        let handle = lines.handle();
        let gate = Arc::new(Semaphore::new(0));
        let service = {
            let (handle, gate) = (handle.clone(), Arc::clone(&gate));
            service_fn(move |line: Bytes| {
                let (handle, gate) = (handle.clone(), Arc::clone(&gate));
                async move {
                    match &line[..] {
                        b"who" => return Ok(std::process::id().to_string().into()),
                        b"hold" => gate.acquire().await?.forget(),
                        b"drain" => {
                            handle.drain();
                            gate.add_permits(1);
                        }
                        _ => {}
                    }
                    Ok::<_, BoxError>(line)
                }
            })
        };
        let pipeline = Pipeline::new(Lines::default)
            .service(service)
            .farewell(|_, reason| Bytes::from(format!("bye: {reason}")));
        let ended = || {
            let handle = handle.clone();
            async move { _ = handle.closed().await }
        };
        Self {
            ready: ready.handle(),
            agent: agent.handle(),
            gate,
            serving: [
                lines.serve(pipeline),
                ready
                    .serve(Http::new(HealthChecks::new(handle.clone())))
                    .with_graceful_shutdown(ended()),
                agent
                    .serve(AgentCheck::new(handle.clone()))
                    .with_graceful_shutdown(ended()),
            ],
            lines: handle,
        }
    }
}

#[tokio::test]
#[ignore = "no test, but the new process of the other"]
async fn successor() {
    let Some(path) = env::var_os(HELD_BY) else {
        return;
    };
    let program = Program::bind().await;
    signal::install(&program.lines).unwrap();
    // The test closes the stream.
    let mut held = UnixStream::connect(path).await.unwrap();
    held.read_to_end(&mut Vec::new()).await.unwrap();
    for ended in futures_util::future::join_all(program.serving).await {
        ended.unwrap();
    }
}

/// The events so far, in their order.
#[derive(Clone)]
struct Timeline {
    begun: Instant,
    events: Arc<watch::Sender<Vec<(Duration, String)>>>,
}

impl Timeline {
    fn begin() -> Self {
        Self {
            begun: Instant::now(),
            events: Arc::default(),
        }
    }

    fn mark(&self, event: impl Into<String>) {
        let event = event.into();
        self.events
            .send_modify(|events| events.push((self.begun.elapsed(), event)));
    }

    /// Waits until each of these events has happened at least `times` times.
    async fn seen(&self, times: usize, events: &[&str]) {
        for event in events {
            let mut seen = self.events.subscribe();
            let seen = seen.wait_for(|events| {
                let same = events.iter().filter(|(_, name)| name == event);
                same.count() >= times
            });
            soon(event, seen).await.unwrap();
        }
    }

    /// Marks each change of the answer to a check, until the check's port is closed.
    fn check(
        &self,
        name: &'static str,
        (server, request): (SocketAddr, &'static str),
        short: impl Fn(&str) -> String + Send + 'static,
    ) -> JoinHandle<()> {
        let timeline = self.clone();
        tokio::spawn(async move {
            let mut last = String::new();
            while last != REFUSED {
                // A drain may end a check without an answer.
                if let Some(answer) = exchange(server, request).await {
                    let answer = short(&answer);
                    if answer != last {
                        timeline.mark(format!("{name} {answer}"));
                        last = answer;
                    }
                }
                sleep(INTERVAL).await;
            }
        })
    }

    /// Asserts that these events happened, and in this order.
    fn in_order(&self, events: &[&str]) {
        let all = self.events.borrow();
        let mut rest = all.iter();
        for event in events {
            let found = rest.any(|(_, name)| name == event);
            assert!(found, "{event:?} is not in its place:\n{self}");
        }
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>8}  event", "ms")?;
        for (at, event) in &*self.events.borrow() {
            writeln!(f, "{:>8.1}  {event}", at.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}

/// The answer of a port that is closed.
const REFUSED: &str = "refused";

/// Sends a request, and returns all that comes, if anything comes.
async fn exchange(server: SocketAddr, request: &str) -> Option<String> {
    let exchanged = async {
        let mut stream = TcpStream::connect(server).await?;
        stream.write_all(request.as_bytes()).await?;
        stream.shutdown().await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    match soon("an answer", exchanged).await {
        Ok(answer) => Some(answer).filter(|it| !it.is_empty() && it.trim_end() != FAREWELL),
        Err(err) if err.kind() == ErrorKind::ConnectionRefused => Some(REFUSED.to_owned()),
        Err(_reset) => None,
    }
}

/// The last line to a client whose connection is drained. A request that crossed it was not read,
/// so the client sends it again.
const FAREWELL: &str = "bye: drained";

/// The number of clients.
const CLIENTS: usize = 32;
/// The number of requests that a client sends on one connection.
const EACH: usize = 10;

/// Clients that send requests without a pause.
struct Load {
    clients: JoinSet<()>,
    answered: Arc<watch::Sender<usize>>,
}

impl Load {
    fn start(server: SocketAddr, timeline: &Timeline) -> Self {
        let answered = Arc::<watch::Sender<usize>>::default();
        let clients = (0..CLIENTS).map(|client| {
            let (answered, timeline) = (Arc::clone(&answered), timeline.clone());
            async move {
                let mut number = 0;
                loop {
                    let Ok(stream) = TcpStream::connect(server).await else {
                        timeline.mark(format!("{LOST} no connection for client {client}"));
                        return;
                    };
                    let mut stream = BufReader::new(stream);
                    for _ in 0..EACH {
                        let request = format!("{client} {number}");
                        let line = format!("{request}\n");
                        // The farewell can be read even if a write fails.
                        let _failed = stream.write_all(line.as_bytes()).await;
                        let mut reply = String::new();
                        let read = stream.read_line(&mut reply).await;
                        match reply.trim_end() {
                            FAREWELL => break,
                            reply if reply == request => {
                                number += 1;
                                answered.send_modify(|count| *count += 1);
                            }
                            _ => {
                                timeline.mark(format!("{LOST} {request}: {reply:?}, {read:?}"));
                                return;
                            }
                        }
                    }
                }
            }
        });
        Self {
            clients: clients.collect(),
            answered,
        }
    }

    /// Waits until each client has had `EACH` more answers, on average.
    async fn goes_on(&self) {
        let mut answered = self.answered.subscribe();
        let more = *answered.borrow() + CLIENTS * EACH;
        soon("more answers", answered.wait_for(|now| *now >= more))
            .await
            .unwrap();
    }
}

/// The mark of a request that was not answered.
const LOST: &str = "LOST";

/// Shortens an answer of HTTP to its status and the first word of its body.
fn status(answer: &str) -> String {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return answer.to_owned();
    };
    let status = head.split(' ').nth(1).unwrap();
    let word = body.split(':').next().unwrap();
    format!("{status} {word}")
}

/// Reads the answer to `hold`, the farewell and the end, and marks each.
async fn last_words(timeline: &Timeline, of: &str, mut client: Client) {
    for (what, expected) in [("reply", "hold"), ("farewell", FAREWELL), ("end", "")] {
        assert_eq!(client.line().await, expected, "{what}:\n{timeline}");
        timeline.mark(format!("last {what} of {of}"));
    }
}

fn port(handle: &Handle) -> SocketAddr {
    handle.local_addrs()[0].tcp().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flip_of_readiness_a_replacement_and_a_drain_keep_their_order_and_lose_nothing() {
    let timeline = Timeline::begin();
    let Program {
        lines: old,
        ready,
        agent,
        gate,
        serving,
    } = Program::bind().await;
    let server = port(&old);
    let serving = serving.map(tokio::spawn);
    let drains = old.reached(ServerPhase::Draining);
    let drains = tokio::spawn({
        let timeline = timeline.clone();
        async move {
            drains.await;
            timeline.mark("old drains");
        }
    });
    let old_pid = std::process::id().to_string();
    let whose = {
        let old_pid = old_pid.clone();
        move |answer: &str| match answer.lines().next() {
            Some(REFUSED) => REFUSED.to_owned(),
            Some(pid) if pid == old_pid => "old".to_owned(),
            _ => "new".to_owned(),
        }
    };
    let http = "GET /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let checks = [
        timeline.check("/ready", (port(&ready), http), status),
        timeline.check("agent", (port(&agent), ""), |it| it.trim_end().to_owned()),
        timeline.check("connecting:", (server, "who\n"), whose),
    ];
    let mut load = Load::start(server, &timeline);
    timeline
        .seen(
            1,
            &["/ready 200 ready", "agent up ready", "connecting: old"],
        )
        .await;
    let mut held = Client::connect(server).await;
    assert_eq!(held.ask("who").await, old_pid);
    held.send("hold\n").await;

    old.lame_duck();
    timeline.mark("old is told to be a lame duck");
    timeline
        .seen(1, &["/ready 503 lame_duck", "agent up drain"])
        .await;

    let dir = tempfile::tempdir().unwrap();
    let holds = UnixListener::bind(dir.path().join("held")).unwrap();
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "successor", "--ignored"])
        .env(HELD_BY, dir.path().join("held"))
        .stdout(Stdio::null());
    let replace = Replace::new(&old).and(&ready).and(&agent).command(command);
    let replacing = tokio::spawn(replace.run());
    let (new, _) = soon("the new process", holds.accept()).await.unwrap();
    timeline.mark("new has bound, and is not ready");
    // It would be a gap in the service if the old process drained before the new one was ready.
    load.goes_on().await;
    assert_eq!(Client::connect(server).await.ask("who").await, old_pid);
    assert_eq!(old.phase(), ServerPhase::LameDuck, "{timeline}");
    drop(new);
    timeline.mark("new may be ready");
    let pid = soon("the replacement", replacing).await.unwrap().unwrap();
    let new = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    let _killed = Killed(new);
    let new_pid = pid.to_string();
    drains.await.unwrap();
    assert_eq!(Client::connect(server).await.ask("who").await, new_pid);
    timeline.seen(1, &["connecting: new"]).await;
    timeline
        .seen(2, &["/ready 200 ready", "agent up ready"])
        .await;

    gate.add_permits(1);
    last_words(&timeline, "old", held).await;
    for ended in serving {
        let report: Report = soon("the end of old", ended).await.unwrap().unwrap();
        assert_eq!((report.timed_out, report.aborted), (0, 0), "{timeline}");
    }
    timeline.mark("old has ended");

    let mut held = Client::connect(server).await;
    assert_eq!(held.ask("who").await, new_pid);
    held.send("hold\n").await;
    kill_process(new, Signal::TERM).unwrap();
    timeline.mark("new gets SIGTERM");
    timeline
        .seen(2, &["/ready 503 lame_duck", "agent up drain"])
        .await;
    // A balancer goes on sending until it has noticed.
    load.goes_on().await;
    load.clients.shutdown().await;
    timeline.mark("new is told to drain");
    assert_eq!(Client::connect(server).await.ask("drain").await, "drain");
    last_words(&timeline, "new", held).await;
    for check in checks {
        soon("the end of the last check", check).await.unwrap();
    }
    soon("the end of new", gone(new)).await;
    timeline.mark("new has ended");

    let answered = *load.answered.borrow();
    println!(
        "{timeline}\n{answered} requests of {CLIENTS} clients were answered, and none was lost"
    );
    let lost = |events: &Vec<(_, String)>| events.iter().any(|(_, event)| event.starts_with(LOST));
    assert!(!lost(&timeline.events.borrow()), "{timeline}");
    timeline.in_order(&[
        "old is told to be a lame duck",
        "/ready 503 lame_duck",
        "new has bound, and is not ready",
        "new may be ready",
        "connecting: new",
        "last reply of old",
        "last farewell of old",
        "last end of old",
        "old has ended",
        "new gets SIGTERM",
        "/ready 503 lame_duck",
        "connecting: refused",
        "new has ended",
    ]);
    timeline.in_order(&["new may be ready", "old drains", "last reply of old"]);
    timeline.in_order(&[
        "agent up drain",
        "new has bound, and is not ready",
        "agent up ready",
    ]);
    timeline.in_order(&["new gets SIGTERM", "agent up drain", "connecting: refused"]);
}
