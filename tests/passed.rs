//! Sockets that a supervisor passes are served as they are, and a missing one is an error that says
//! what to do. The example `restart` runs as the supervised process.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

use std::convert::Infallible;
use std::env;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bytes::Bytes;
use command_fds::{CommandFdExt, FdMapping};
use process::{Client, installed, path, soon};
use rustix::process::{Pid, Signal, kill_process};
use tally::Tally;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Child;
use tower::service_fn;
use tower_tcp::bind::PassedError;
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::{Pipeline, Server, signal};

#[path = "support/process.rs"]
mod process;
#[path = "support/tally.rs"]
mod tally;

/// Returns the command that starts the example, or for `--exact` this test program, with these
/// descriptors, from 3 on.
fn with(passed: &[&dyn AsFd], names: &str, args: &[&str]) -> Command {
    let program = match args.first() {
        Some(&"--exact") => env::current_exe().unwrap(),
        _ => path("restart"),
    };
    let mut command = Command::new(program);
    command
        .args(args)
        .env("LISTEN_FDS", passed.len().to_string())
        .env("LISTEN_FDNAMES", names)
        .env("RUST_LOG", "warn")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let owned = passed
        .iter()
        .map(|fd| fd.as_fd().try_clone_to_owned().unwrap());
    let mappings = (3..).zip(owned).map(|(child_fd, parent_fd)| FdMapping {
        parent_fd,
        child_fd,
    });
    command.fd_mappings(mappings.collect()).unwrap();
    command
}

fn tcp() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

/// Starts a command, and returns the `count` addresses that it listens on.
async fn listening(command: Command, count: usize) -> (Child, Vec<String>) {
    let mut command = tokio::process::Command::from(command);
    let mut child = command.kill_on_drop(true).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said = Vec::new();
    while said.len() < count {
        let line = soon("a line", stdout.next_line()).await.unwrap();
        let Some(line) = line else {
            let mut error = String::new();
            let stderr = child.stderr.as_mut().unwrap();
            stderr.read_to_string(&mut error).await.unwrap();
            panic!("it ended: {error}");
        };
        said.extend(line.strip_prefix("listening on ").map(str::to_owned));
    }
    // The child writes a report at its end, so its stdout stays open.
    child.stdout = Some(stdout.into_inner().into_inner());
    (child, said)
}

async fn stop(mut child: Child) {
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert!(soon("its end", child.wait()).await.unwrap().success());
}

/// Runs a command that must fail at its bind.
async fn refused(command: Command) -> String {
    let output = tokio::process::Command::from(command).output();
    let Output { status, stderr, .. } = soon("its end", output).await.unwrap();
    assert_eq!(status.code(), Some(1));
    String::from_utf8(stderr).unwrap()
}

#[tokio::test]
async fn sockets_are_taken_by_name_by_number_and_the_rest_together() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("socket");
    let unix = UnixListener::bind(&at).unwrap();
    let [(a, a_addr), (b, b_addr), (c, c_addr), (d, d_addr)] = [tcp(), tcp(), tcp(), tcp()];
    let passed: [&dyn AsFd; 5] = [&a, &b, &unix, &c, &d];
    let endpoints = [
        "--listen",
        "systemd:web",
        "--listen",
        "fd:6",
        "--listen",
        "systemd:*",
    ];

    let (child, said) = listening(with(&passed, "x:web::y:web", &endpoints), 5).await;

    let unix_addr = format!("unix:{}", at.display());
    let tcp = [b_addr, d_addr, c_addr, a_addr].map(|addr| addr.to_string());
    assert_eq!(said[..4], tcp);
    assert_eq!(said[4], unix_addr);
    drop((a, b, c, d, unix));
    for addr in [a_addr, b_addr, c_addr, d_addr] {
        assert_eq!(Client::connect(addr).await.ask("hi").await, "hi");
    }
    stop(child).await;
    // The path belongs to the supervisor, so the server does not remove it.
    assert!(at.exists());
}

#[tokio::test]
async fn clients_in_the_backlog_are_left_to_the_next_process() {
    let (listener, addr) = tcp();
    // A suspended server cannot close a socket that the supervisor keeps.
    for state in ["paused", "suspended"] {
        let mut first = with(
            &[&listener],
            "web",
            &["--exact", "in_a_state", "--ignored", "--nocapture"],
        );
        first.env("STATE", state);
        let (first, _) = listening(first, 1).await;
        let mut waiting = Client::connect(addr).await;
        waiting.send("waiting\n").await;

        stop(first).await;
        let args = ["--listen", "systemd:*"];
        let (second, _) = listening(with(&[&listener], "web", &args), 1).await;

        assert_eq!(waiting.line().await, "waiting", "{state}");
        assert_eq!(waiting.ask("served on").await, "served on");
        drop(waiting);
        stop(second).await;
    }
}

#[tokio::test]
async fn a_suspended_server_accepts_from_a_socket_that_it_cannot_close_once_it_resumes() {
    let (listener, addr) = tcp();
    let mut suspended = with(
        &[&listener],
        "web",
        &["--exact", "in_a_state", "--ignored", "--nocapture"],
    );
    suspended.env("STATE", "suspended");
    let (child, _) = listening(suspended, 1).await;
    let mut client = Client::connect(addr).await;
    client.send("hi\n").await;
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap());

    kill_process(pid.unwrap(), Signal::HUP).unwrap();

    assert_eq!(client.line().await, "hi");
    drop(client);
    stop(child).await;
}

#[tokio::test]
async fn a_lame_duck_serves_the_clients_of_a_socket_that_it_cannot_close() {
    let (listener, addr) = tcp();
    let mut lame_duck = with(
        &[&listener],
        "web",
        &["--exact", "in_a_state", "--ignored", "--nocapture"],
    );
    lame_duck.env("STATE", "lame duck");
    let (child, _) = listening(lame_duck, 1).await;

    let mut client = Client::connect(addr).await;
    assert_eq!(client.ask("hi").await, "hi");

    drop(client);
    stop(child).await;
}

/// Stops the server and starts it again, on a socket that stays, while 32 clients send requests.
async fn restarted_under_load(requests: usize, each: usize, times: usize, limit: &str) {
    let (listener, addr) = tcp();
    let args = ["--listen", "systemd:*", "--max-connections", limit];
    let start = || listening(with(&[&listener], "web", &args), 1);
    let (mut server, _) = start().await;
    let (tally, clients) = Tally::start(addr, requests, each);
    for time in 1..=times {
        tally.reached(time * requests / (times + 1)).await;
        stop(server).await;
        (server, _) = start().await;
    }
    clients.join_all().await;
    stop(server).await;
    println!("kept, {each} a connection, limit {limit}, {times} restarts: {tally:?}");
    tally.none_lost();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_while_a_supervisor_keeps_the_socket() {
    restarted_under_load(1000, 1, 2, "8").await;
    restarted_under_load(1000, 10, 2, "10000").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "some minutes"]
async fn no_request_of_thirty_thousand_is_lost_on_a_kept_socket() {
    for limit in ["8", "10000"] {
        for each in [1, 10] {
            restarted_under_load(30_000, each, 20, limit).await;
        }
    }
}

fn hangups() -> std::io::Result<tokio::signal::unix::Signal> {
    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())
}

/// Serves a passed socket, paused, suspended or as a lame duck. Resumes at a SIGHUP.
#[tokio::test]
#[ignore = "no test, but a process of another"]
async fn in_a_state() {
    let Ok(state) = env::var("STATE") else {
        return;
    };
    let builder = Server::builder()
        .listen("systemd:web")
        .lame_duck_closes_listener();
    let server = builder.bind().await.unwrap();
    match &*state {
        "paused" => server.handle().pause(),
        "suspended" => server.handle().suspend(),
        _ => server.handle().lame_duck(),
    }
    signal::install(&server.handle()).unwrap();
    let (handle, mut hangups) = (server.handle(), hangups().unwrap());
    tokio::spawn(async move {
        hangups.recv().await;
        handle.resume();
    });
    println!("\nlistening on {}", server.handle().local_addrs()[0]);
    let stack = Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
        Ok::<_, Infallible>(line)
    }));
    server.serve(stack).await.unwrap();
}

#[tokio::test]
async fn sockets_that_no_endpoint_takes_are_not_inherited() {
    let [(a, _), (b, _)] = [tcp(), tcp()];
    let args = ["--exact", "starts_another", "--ignored", "--nocapture"];
    let mut command = with(&[&a, &b], "a:b", &args);
    command.env("STARTS", "1");
    let output = tokio::process::Command::from(command).output();

    let Output { status, stdout, .. } = soon("its end", output).await.unwrap();

    assert!(status.success());
    let said = String::from_utf8(stdout).unwrap();
    assert!(said.contains("started"), "{said}");
    assert!(!said.contains("socket:"), "{said}");
}

/// Takes one of two sockets, and starts a process that lists what it has inherited.
#[tokio::test]
#[ignore = "no test, but a process of another"]
async fn starts_another() {
    if env::var_os("STARTS").is_none() {
        return;
    }
    let _server = Server::bind("systemd:a").await.unwrap();
    let script = "echo started; ls -l /proc/self/fd/";
    let mut started = Command::new("sh").args(["-c", script]).spawn().unwrap();
    assert!(started.wait().unwrap().success());
}

#[tokio::test]
async fn what_was_not_passed_is_an_error_of_the_bind() {
    let (tcp, addr) = tcp();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let connected: OwnedFd = std::net::TcpStream::connect(addr).unwrap().into();
    for (endpoints, error) in [
        (
            &["--listen", "fd:9"][..],
            "NoSuchDescriptor { first: 3, last: 5 }",
        ),
        (
            &["--listen", "systemd:none"],
            "NoSuchName { name: \"none\", passed: \"a:b:c\" }",
        ),
        (&["--listen", "systemd:b"], "NotListening { descriptor: 4 }"),
        (&["--listen", "fd:5"], "NotListening { descriptor: 5 }"),
        (&["--listen", "systemd:*"], "NotListening { descriptor: 4 }"),
        (&["--listen", "fd:3", "--listen", "systemd:a"], "Taken"),
    ] {
        let said = refused(with(&[&tcp, &udp, &connected], "a:b:c", endpoints)).await;

        assert!(said.contains(error), "{endpoints:?}: {said}");
        assert!(said.contains(endpoints[endpoints.len() - 1]), "{said}");
    }
    let mut command = with(&[&tcp], "a", &["--listen", "fd:3"]);
    command.env("LISTEN_PID", "1");
    assert!(
        refused(command)
            .await
            .contains("OtherProcess { pid: \"1\" }")
    );
}

#[tokio::test]
async fn the_error_says_what_to_do() {
    let err = Server::bind("systemd:web").await.unwrap_err();

    let cause = find_cause::<PassedError>(&err).unwrap();
    assert_eq!(*cause, PassedError::NonePassed);
    assert!(cause.to_string().contains("systemd-socket-activate"));
}

#[tokio::test]
async fn systemd_passes_its_sockets() {
    if !installed("systemd-socket-activate") {
        return;
    }
    let (_, addr) = tcp();
    let mut command = tokio::process::Command::new("systemd-socket-activate");
    command.arg(format!("--listen={addr}")).arg("--fdname=web");
    command
        .arg(path("restart"))
        .args(["--listen", "systemd:web"]);
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let child = command.spawn().unwrap();
    // `systemd-socket-activate` replaces itself with the program at the first connection.
    let connected = async {
        while std::net::TcpStream::connect(addr).is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("a connection", connected).await;

    assert_eq!(Client::connect(addr).await.ask("hi").await, "hi");
    stop(child).await;
}
