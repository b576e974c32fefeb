//! Every example runs, and does what its module head shows.

use std::net::SocketAddr;
use std::path::Path;

use process::{Client, Example, explains_its_options, path, soon};
use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;
use tokio::process::Command;

#[path = "support/process.rs"]
mod process;

const ALL: [&str; 11] = [
    "chat",
    "echo",
    "multiplexed",
    "one_port",
    "raw",
    "redis",
    "restart",
    "smtp",
    "stack",
    "tail",
    "tls_echo",
];

/// Returns whether this path is one example. A folder without a `main.rs` is a module that examples
/// share, or a package of several examples.
fn is_example(path: &Path) -> bool {
    if path.is_dir() {
        path.join("main.rs").exists() || path.join("src/main.rs").exists()
    } else {
        path.extension().is_some_and(|extension| extension == "rs")
    }
}

#[test]
fn all_examples_are_driven_here() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");

    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        // A package has its own tests.
        .filter(|path| !path.join("Cargo.toml").exists())
        .filter(|path| is_example(path))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();

    assert_eq!(names, ALL);
}

#[test]
fn every_example_is_in_the_list_of_examples() {
    let page = include_str!("../examples/README.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let mut listed: Vec<_> = rows.filter_map(|row| row.split('`').next()).collect();
    listed.sort_unstable();

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut there: Vec<_> = ["examples", "examples/protocols"]
        .into_iter()
        .flat_map(|dir| std::fs::read_dir(root.join(dir)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| is_example(path))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    there.sort();

    assert_eq!(listed, there);
}

#[tokio::test]
async fn every_example_explains_its_options() {
    for name in ALL {
        explains_its_options(name).await;
    }
}

#[tokio::test]
async fn echo_serves_two_addresses_at_once() {
    let echo = Example::start_on("echo", &["127.0.0.1:0", "127.0.0.2:0"], &[]).await;
    let mut first = Client::connect(echo.addresses[0]).await;
    let mut second = Client::connect(echo.addresses[1]).await;

    assert_eq!(first.ask("hi").await, "hi");
    assert_eq!(second.ask("ho").await, "ho");

    drop((first, second));
    let ended = echo.stop().await;
    assert!(ended.status.success());
    assert!(
        ended
            .said
            .last()
            .unwrap()
            .ends_with("drained, 0 timed out, 0 aborted")
    );
}

#[tokio::test]
async fn echo_spreads_its_connections_over_workers() {
    let echo = Example::start("echo", &["--workers", "2"]).await;
    let mut first = Client::connect(echo.addr()).await;
    let mut second = Client::connect(echo.addr()).await;

    assert_eq!(first.ask("hi").await, "hi");
    assert_eq!(second.ask("ho").await, "ho");

    let threads = echo.threads();
    assert!(threads.contains(&"echo-0".to_owned()), "{threads:?}");
    assert!(threads.contains(&"echo-1".to_owned()), "{threads:?}");
    drop((first, second));
    let ended = echo.stop().await;
    assert!(ended.status.success());
    assert!(
        ended
            .said
            .last()
            .unwrap()
            .ends_with("drained, 0 timed out, 0 aborted")
    );
}

/// Returns whether the server closes a connection from `ip` before the client has sent anything.
async fn is_denied(ip: &str, server: SocketAddr) -> bool {
    let socket = TcpSocket::new_v4().expect("a socket can be had");
    let from = SocketAddr::new(ip.parse().expect("an address"), 0);
    socket.bind(from).expect("all of 127/8 is here");
    // It may be reset before the client knows that it is connected.
    let Ok(mut stream) = soon("a connection", socket.connect(server)).await else {
        return true;
    };
    let read = soon("the end", stream.read_u8()).await;
    read.is_err()
}

#[tokio::test]
async fn echo_limits_each_client_and_loads_its_list_of_denied_networks_again() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("denied");
    std::fs::write(&list, "127.0.0.3  # a guest\n").unwrap();
    let args = ["--per-client", "1", "--deny", list.to_str().unwrap()];
    let echo = Example::start("echo", &args).await;

    let mut inside = Client::connect(echo.addr()).await;
    assert_eq!(inside.ask("hi").await, "hi");
    let mut over = Client::connect(echo.addr()).await;
    over.gone().await;
    let mut other = Client::connect_from("127.0.0.2", echo.addr()).await;
    assert_eq!(other.ask("ho").await, "ho");
    assert!(is_denied("127.0.0.3", echo.addr()).await);

    std::fs::write(&list, "127.0.0.2\n").unwrap();
    echo.signal(Signal::HUP);
    echo.logged(1, &["loaded again"]).await;
    assert_eq!(other.ask("still in").await, "still in");
    assert!(is_denied("127.0.0.2", echo.addr()).await);
    let mut guest = Client::connect_from("127.0.0.3", echo.addr()).await;
    assert_eq!(guest.ask("hi").await, "hi");

    std::fs::write(&list, "nonsense\n").unwrap();
    echo.signal(Signal::HUP);
    echo.logged(1, &["`nonsense` is not a network"]).await;
    assert!(is_denied("127.0.0.2", echo.addr()).await);

    let over = over.addr;
    drop((inside, other, guest));
    let ended = echo.stop().await;
    assert!(ended.end_of(over).contains("client_limit_exceeded"));
}

#[tokio::test]
async fn raw_sends_back_what_came_and_then_the_end() {
    let raw = Example::start("raw", &[]).await;
    let mut client = Client::connect(raw.addr()).await;

    client.send("no line ending").await;
    client.half_close().await;

    assert_eq!(client.rest().await, b"no line ending");
    raw.logged(1, &["connection.closed", "\"peer_closed\""])
        .await;
}

#[tokio::test]
async fn raw_closes_in_good_order_at_a_shutdown() {
    let raw = Example::start("raw", &[]).await;
    let mut client = Client::connect(raw.addr()).await;
    assert_eq!(client.ask("hi").await, "hi");

    let ended = tokio::spawn(raw.stop());

    assert_eq!(client.rest().await, b"");
    drop(client);
    let ended = ended.await.unwrap();
    assert_eq!(
        ended.said.last().unwrap(),
        "connections: 1 drained, 0 timed out, 0 aborted"
    );
}

#[tokio::test]
async fn multiplexed_answers_the_fast_before_the_slow() {
    let server = Example::start("multiplexed", &[]).await;

    let mut client = Command::new(path("multiplexed"));
    client.args(["--client", &server.addr().to_string()]);
    let client = soon("the client", client.output()).await.unwrap();

    let said = String::from_utf8(client.stdout).unwrap();
    let order: Vec<_> = said.lines().collect();
    assert_eq!(
        order,
        [
            "asked: 600 slow",
            "asked: 300 medium",
            "asked: 0 fast",
            "answer: fast",
            "answer: medium",
            "answer: slow",
        ]
    );
}

#[tokio::test]
async fn stack_speaks_its_line_protocol() {
    let stack = Example::start("stack", &["--timeout", "100"]).await;
    let mut client = Client::connect(stack.addr()).await;

    assert_eq!(client.line().await, "220 ready");
    assert_eq!(client.ask("echo X y").await, "X y");
    assert_eq!(client.ask("big 3").await, "xxx");
    assert_eq!(client.ask("push 2").await, "push 1");
    assert_eq!(client.line().await, "push 2");
    assert_eq!(client.line().await, "250 pushed");
    assert_eq!(client.ask("sleep 1").await, "250 slept");
    assert_eq!(client.ask("sleep 9000").await, "451 too slow");
    assert_eq!(client.ask("quit").await, "221 bye");
    assert_eq!(client.rest().await, b"");
    let addr = client.addr;
    drop(client);
    let ended = stack.stop().await;
    assert!(ended.end_of(addr).contains("\"service_closed\""));
}

#[tokio::test]
async fn stack_tells_a_connection_over_its_rate_and_goes_on() {
    let stack = Example::start("stack", &["--requests", "1"]).await;
    let mut client = Client::connect(stack.addr()).await;
    assert_eq!(client.line().await, "220 ready");

    client.send("echo 1\necho 2\necho 3\n").await;

    assert_eq!(client.line().await, "1");
    assert_eq!(client.line().await, "450 too many requests");
    assert_eq!(client.line().await, "450 too many requests");
}

#[tokio::test]
async fn a_number_that_no_server_can_use_is_refused_with_a_reason() {
    for (name, option) in [
        ("stack", "--accepts=0"),
        ("stack", "--requests=0"),
        ("restart", "--ready-within=-1"),
        ("restart", "--ready-within=nan"),
    ] {
        let mut example = Command::new(path(name));
        example
            .args(["--listen=127.0.0.1:0", option])
            .kill_on_drop(true);
        let output = soon("the end", example.output())
            .await
            .expect("it is built");

        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{name} {option}");
        assert!(!said.is_empty(), "{name} {option}");
        assert!(!said.contains("panicked"), "{name} {option}: {said}");
    }
}

/// Returns whether the system probes this client of an example while the client is silent.
#[cfg(target_os = "linux")]
fn is_probed(client: &Client, server: SocketAddr) -> bool {
    let hex = |port: u16| format!(":{port:04X}");
    let table = std::fs::read_to_string("/proc/net/tcp").expect("this is Linux");
    table.lines().any(|line| {
        let columns: Vec<_> = line.split_ascii_whitespace().collect();
        let [_, local, remote, _, _, timer, ..] = columns[..] else {
            return false;
        };
        let ours =
            local.ends_with(&hex(server.port())) && remote.ends_with(&hex(client.addr.port()));
        ours && timer.starts_with("02:") // the timer of keepalive probes
    })
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_client_that_may_be_silent_forever_is_probed() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    for (name, args) in [("redis", &[][..]), ("tail", &["--from-start", file])] {
        let example = Example::start(name, args).await;
        let mut client = Client::connect(example.addr()).await;
        if name == "redis" {
            client.send("ping\r\n").await;
        }
        client.line().await;

        assert!(is_probed(&client, example.addr()), "{name}");
    }
}

#[tokio::test]
async fn stack_at_its_limit_lets_clients_wait_in_the_backlog() {
    let stack = Example::start("stack", &["--max-connections", "1"]).await;
    let mut first = Client::connect(stack.addr()).await;
    assert_eq!(first.line().await, "220 ready");
    let mut second = Client::connect(stack.addr()).await;

    assert_eq!(first.ask("quit").await, "221 bye");
    drop(first);

    assert_eq!(second.line().await, "220 ready");
}

#[tokio::test]
async fn stack_that_sheds_closes_what_is_over_its_limit() {
    let stack = Example::start("stack", &["--max-connections", "1", "--shed"]).await;
    let mut first = Client::connect(stack.addr()).await;
    assert_eq!(first.line().await, "220 ready");
    let mut second = Client::connect(stack.addr()).await;

    second.gone().await;

    assert_eq!(first.ask("echo still here").await, "still here");
    drop(first);
    let ended = stack.stop().await;
    assert!(ended.end_of(second.addr).contains("\"limit_exceeded\""));
}
