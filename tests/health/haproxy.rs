//! A real HAProxy follows the agent, and its checks see what `BALANCERS.md` says.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::Semaphore;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::Socket;
use tower_tcp::frame::Lines;
use tower_tcp::health::{AgentCheck, HealthChecks};
use tower_tcp::http::hyper::{Request, Response};
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::networks::Networks;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::proxy::ProxyProtocol;
use tower_tcp::testkit::{Served, serve_with};
use tower_tcp::{
    BoxError, Connection, ConnectionService, Handle, Pipeline, Rewind, Server, ServerBuilder,
};

use super::process::{Client, installed, soon};

/// A running HAProxy with a socket for commands. Dropping it kills the process.
struct Haproxy {
    _process: Child,
    commands: PathBuf,
    _dir: TempDir,
}

impl Haproxy {
    /// Starts HAProxy, and waits until it takes commands.
    async fn start(sections: &str) -> Self {
        let dir = tempfile::tempdir().expect("there is room for files");
        let commands = dir.path().join("commands");
        let config = format!(
            "global\n  maxconn 100\n  stats socket {}\n\
            defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  \
            timeout server 30s\n  timeout check 500ms\n  retries 0\n{sections}",
            commands.display(),
        );
        let file = dir.path().join("haproxy.cfg");
        std::fs::write(&file, config).expect("there is room for a file");
        let mut command = Command::new("haproxy");
        command.arg("-db").arg("-q").arg("-f").arg(file);
        command.stdin(Stdio::null()).kill_on_drop(true);
        let mut process = command.spawn().expect("it is installed");
        let listens = async {
            while UnixStream::connect(&commands).await.is_err() {
                let ended = process.try_wait().expect("it is ours");
                assert!(ended.is_none(), "{command:?} ended: {ended:?}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon("a running haproxy", listens).await;
        Self {
            _process: process,
            commands,
            _dir: dir,
        }
    }

    /// Returns the columns of the server of a backend.
    async fn stat(&self, backend: &str) -> HashMap<String, String> {
        let mut commands = UnixStream::connect(&self.commands)
            .await
            .expect("it listens");
        commands.write_all(b"show stat\n").await.expect("it reads");
        let mut table = String::new();
        let read = commands.read_to_string(&mut table);
        soon("the statistics", read).await.expect("text");
        let mut lines = table.lines();
        let names = lines.next().expect("a head").trim_start_matches("# ");
        let row = lines.find(|line| line.starts_with(&format!("{backend},s,")));
        let row = row.unwrap_or_else(|| panic!("no {backend} in {table}"));
        let row = names.split(',').zip(row.split(','));
        row.map(|(name, cell)| (name.to_owned(), cell.to_owned()))
            .collect()
    }

    /// Returns the status of a server: `up`, `down`, `drain` or `maint`.
    async fn status(&self, backend: &str) -> String {
        let status = &self.stat(backend).await["status"];
        let word = status.split(' ').next().unwrap_or(status);
        // During a change it is `UP 1/2`, for example.
        if status.contains('/') {
            status.clone()
        } else {
            word.to_lowercase()
        }
    }

    async fn becomes(&self, backend: &str, status: &str) {
        let mut last = String::new();
        let becomes = async {
            while last != status {
                tokio::time::sleep(Duration::from_millis(10)).await;
                last = self.status(backend).await;
            }
        };
        let became = tokio::time::timeout(Duration::from_secs(20), becomes).await;
        assert!(became.is_ok(), "{backend} is {last}, and not {status}");
    }
}

fn port(handle: &Handle) -> SocketAddr {
    handle.local_addrs()[0].tcp().expect("it listens on a port")
}

/// Returns an address for a proxy to listen on.
fn front() -> SocketAddr {
    let socket = std::net::TcpListener::bind("127.9.0.1:0").expect("all of 127/8 is here");
    socket.local_addr().expect("it is bound")
}

async fn on(
    builder: ServerBuilder,
    at: SocketAddr,
    stack: impl ConnectionService<Socket>,
) -> Served<()> {
    let server = builder.listen(at).bind().await;
    serve_with(server.expect("the port is free"), (), stack)
}

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// Answers each line with itself; `wait` only once the gate has a permit.
fn lines(gate: &Arc<Semaphore>) -> impl ConnectionService<Socket> + use<> {
    let gate = Arc::clone(gate);
    Pipeline::new(Lines::default).service(service_fn(move |line: Bytes| {
        let gate = Arc::clone(&gate);
        async move {
            if line == "wait" {
                gate.acquire().await?.forget();
            }
            Ok::<_, BoxError>(line)
        }
    }))
}

#[tokio::test]
async fn haproxy_follows_the_agent_through_a_restart() {
    if !installed("haproxy") {
        return;
    }
    let gate = Arc::new(Semaphore::new(0));
    let mut old = on(Server::builder(), ANY, lines(&gate)).await;
    let main = port(old.handle());
    let agent = on(
        Server::builder(),
        ANY,
        AgentCheck::new(old.handle().clone()),
    )
    .await;
    let agent_at = port(agent.handle());
    let front = front();
    let section = format!(
        "listen lines\n  bind {front}\n  server s {main} check inter 50ms \
        agent-check agent-port {} agent-inter 50ms weight 100\n",
        agent_at.port(),
    );
    let haproxy = Haproxy::start(&section).await;
    haproxy.becomes("lines", "up").await;
    let mut client = Client::connect(front).await;
    assert_eq!(client.ask("a").await, "a");

    old.handle().lame_duck();

    haproxy.becomes("lines", "drain").await;
    assert_eq!(client.ask("b").await, "b");
    let mut late = Client::connect(main).await;
    assert_eq!(late.ask("c").await, "c");

    client.send("wait\n").await;
    soon("the request", async {
        while !old.handle().connections().any(|live| live.requests() == 3) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    old.handle().shutdown();

    haproxy.becomes("lines", "down").await;
    gate.add_permits(1);
    assert_eq!(client.line().await, "wait");
    drop((client, late));
    old.closed().await.expect("it ends in good order");
    let ended = agent.handle().clone();
    drop(agent);
    ended.closed().await;

    // The new process, in the place of the old one.
    let new = on(Server::builder(), main, lines(&gate)).await;
    let _agent = on(
        Server::builder(),
        agent_at,
        AgentCheck::new(new.handle().clone()),
    )
    .await;

    haproxy.becomes("lines", "up").await;
    assert_eq!(Client::connect(front).await.ask("d").await, "d");
}

#[tokio::test]
async fn haproxy_returns_from_maintenance_and_weighs_by_load() {
    if !installed("haproxy") {
        return;
    }
    let builder = Server::builder().limit(ConnectionLimit::new(4));
    let served = on(builder, ANY, lines(&Arc::new(Semaphore::new(0)))).await;
    let handle = served.handle();
    let check = AgentCheck::new(handle.clone()).weight_by_load();
    let agent = on(Server::builder(), ANY, check).await;
    // The checks go to the agent's port. On the server's port, their connections would count as
    // load.
    let section = format!(
        "defaults\n  default-server check port {agent} agent-check agent-port {agent} \
        agent-inter 50ms\n\
        backend heavy\n  server s {main} weight 100\n\
        backend light\n  server s {main}\n",
        main = port(handle),
        agent = port(agent.handle()).port(),
    );
    let haproxy = Haproxy::start(&section).await;
    let weighs = async |backend: &str, weight: &str| {
        let weighs = async {
            while haproxy.stat(backend).await["weight"] != weight {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon(&format!("{backend} of weight {weight}"), weighs).await;
    };
    handle.pause();
    haproxy.becomes("heavy", "maint").await;
    handle.resume();
    haproxy.becomes("heavy", "up").await;
    weighs("heavy", "100").await;

    let mut client = Client::connect(port(handle)).await;
    assert_eq!(client.ask("a").await, "a");
    weighs("heavy", "75").await;
    // The default weight is 1, and 75 % of it is rounded down to 0.
    weighs("light", "0").await;
}

/// The states of the table, as its columns are named.
const STATES: [&str; 7] = [
    "serving",
    "paused",
    "suspended",
    "at the limit",
    "lame duck",
    "lame duck, listener closed",
    "draining",
];

/// Returns the first word of each cell of a row.
fn row(check: &str) -> Vec<String> {
    let page = include_str!("../../BALANCERS.md");
    let head = format!("| check | arrives as | {} |", STATES.join(" | "));
    assert!(page.contains(&head), "the page has a table with {head}");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| "));
    let cells = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
    let row = cells
        .into_iter()
        .find(|cells| cells[0] == check && cells.len() == 9);
    let row = row.unwrap_or_else(|| panic!("the page has a row of {check}"));
    let word = |cell: &&str| {
        cell.split(' ')
            .next()
            .unwrap_or(cell)
            .trim_matches(['*', ','])
            .to_owned()
    };
    row[2..].iter().map(word).collect()
}

/// The rows of the table, each with its name here.
const CHECKS: [(&str, &str); 6] = [
    ("connect", "HAProxy `check`"),
    ("v1", "HAProxy `check-send-proxy`, v1"),
    ("v2", "HAProxy `check-send-proxy`, v2"),
    ("http", "HAProxy `option httpchk`, same port"),
    ("ready", "HAProxy `option httpchk GET /ready`, admin port"),
    ("agent", "HAProxy `agent-check`, admin port"),
];

#[tokio::test]
async fn haproxys_checks_see_what_the_page_says() {
    if !installed("haproxy") {
        return;
    }
    let rows = CHECKS.map(|(name, check)| (name, row(check)));
    let plain = row("a plain connect, same port");
    for (column, state) in STATES.iter().enumerate() {
        let seen = |(name, row): &(_, Vec<String>)| (*name, row[column].clone());
        see(state, rows.iter().map(seen).collect(), &plain[column]).await;
    }
}

/// Puts a server into a state, and checks what each check sees of it: `expected`, by name, and
/// `plain` by a connect.
async fn see(state: &str, expected: Vec<(&'static str, String)>, plain: &str) {
    let builder = || match state {
        "lame duck, listener closed" => Server::builder().lame_duck_closes_listener(),
        _ => Server::builder(),
    };
    let hello = Http::new(service_fn(|_: Request<RequestBody>| async {
        Ok::<_, Infallible>(Response::new("hello\n".to_owned()))
    }));
    let main = on(builder(), ANY, hello).await;
    let trusting = ProxyProtocol::trusting(Networks::parse(["127.0.0.0/8"]).expect("networks"));
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(trusting))
        .service(service_fn(|conn: Connection<Rewind<Socket>>| async move {
            drop(conn);
            Ok::<_, BoxError>(())
        }));
    let proxied = on(builder(), ANY, stack).await;
    let admin = on(
        Server::builder(),
        ANY,
        Http::new(HealthChecks::new(main.handle().clone())),
    )
    .await;
    let checks = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&checks);
    let agent = ServiceBuilder::new()
        .map_request(move |conn: Connection<Socket>| {
            count.fetch_add(1, Ordering::Relaxed);
            conn
        })
        .service(AgentCheck::new(main.handle().clone()));
    let agent = on(Server::builder(), ANY, agent).await;

    let (at, proxied_at) = (port(main.handle()), port(proxied.handle()));
    let (admin_port, agent_port) = (port(admin.handle()).port(), port(agent.handle()).port());
    let timing = "inter 50ms fall 2 rise 1";
    let section = format!(
        "backend connect\n  server s {at} check {timing}\n\
        backend v1\n  server s {proxied_at} send-proxy check check-send-proxy {timing}\n\
        backend v2\n  server s {proxied_at} send-proxy-v2 check check-send-proxy {timing}\n\
        backend http\n  mode http\n  option httpchk\n  server s {at} check {timing}\n\
        backend ready\n  option httpchk GET /ready\n  \
        server s {at} check port {admin_port} {timing}\n\
        backend agent\n  \
        server s {at} check {timing} agent-check agent-port {agent_port} agent-inter 50ms\n",
    );
    let haproxy = Haproxy::start(&section).await;
    for (name, _) in CHECKS {
        haproxy.becomes(name, "up").await;
    }

    for handle in [main.handle(), proxied.handle()] {
        match state {
            "serving" => {}
            "paused" => handle.pause(),
            "suspended" => handle.suspend(),
            "at the limit" => handle.limit().set(0),
            "lame duck" | "lame duck, listener closed" => handle.lame_duck(),
            "draining" => handle.drain(),
            _ => unreachable!("another state"),
        }
    }
    // All checks have the same interval.
    let since = checks.load(Ordering::Relaxed);
    soon("twenty rounds of checks", async {
        while checks.load(Ordering::Relaxed) < since + 20 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // On a busy machine a check may time out that should not. The next one comes in time.
    for (name, status) in expected {
        haproxy.becomes(name, &status).await;
    }
    let connects = TcpStream::connect(at).await.is_ok();
    assert_eq!(
        if connects { "up" } else { "down" },
        plain,
        "a plain connect, {state}"
    );
}
