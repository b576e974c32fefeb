//! A signal to the `stack` example, as a process manager sends it: requests in progress are
//! answered, no new connection is accepted, and the process exits in time.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use process::{Client, Ended, Example, having, soon};
use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

#[path = "support/process.rs"]
mod process;

const CLIENTS: usize = 64;

/// Far more requests a second than any test sends.
const BUSY: [&str; 2] = ["--requests", "1000000"];

async fn greeted(server: SocketAddr) -> Client {
    let mut client = Client::connect(server).await;
    assert_eq!(client.line().await, "220 ready");
    client
}

/// Connects clients whose first request has been answered, so the server has accepted them.
async fn clients(server: SocketAddr) -> Vec<Client> {
    join_all((0..CLIENTS).map(|_| greeted(server))).await
}

/// Waits until new connections are refused.
async fn refused(server: SocketAddr) {
    let refused = async {
        loop {
            match TcpStream::connect(server).await {
                // It was accepted from the backlog, and is closed at once.
                Ok(mut stream) => drop(stream.read_to_end(&mut Vec::new()).await),
                Err(err) if err.kind() == ErrorKind::ConnectionRefused => return,
                Err(_reset_in_the_backlog) => {}
            }
        }
    };
    soon("a refusal", refused).await;
}

/// Returns the sum of a field over the end events of all connections.
fn sum(ended: &Ended, field: &str) -> usize {
    let numbers = having(&ended.log, &["connection.closed"]);
    let numbers = numbers.iter().map(|line| {
        let (_, rest) = line.split_once(field).expect("the event has the field");
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
        digits
            .and_then(|digits| digits.parse::<usize>().ok())
            .expect("a number")
    });
    numbers.sum()
}

#[tokio::test]
async fn h1_requests_in_hand_at_the_signal_are_answered() {
    let stack = Example::start("stack", &[]).await;
    let mut clients = clients(stack.addr()).await;
    // Bytes that have arrived at the server's socket count, read or not.
    for client in &mut clients {
        client.send("sleep 500\necho behind\n").await;
    }

    stack.signal(Signal::TERM);
    let ended = tokio::spawn(stack.ended());

    let rests = join_all(clients.iter_mut().map(Client::rest)).await;
    for rest in rests {
        assert_eq!(String::from_utf8_lossy(&rest), "250 slept\nbehind\n");
    }
    drop(clients);
    let ended = ended.await.unwrap();
    assert!(ended.status.success());
    assert_eq!(
        ended.said.last().unwrap(),
        "connections: 64 drained, 0 timed out, 0 aborted"
    );
}

#[tokio::test]
async fn h1_no_reply_that_was_begun_is_lost_under_load() {
    let stack = Example::start("stack", &BUSY).await;
    let server = stack.addr();
    let clients = clients(server).await;
    let (warm, mut warmed) = mpsc::channel(CLIENTS);
    let load = clients.into_iter().map(|mut client| {
        let warm = warm.clone();
        tokio::spawn(async move {
            let mut answers = 0;
            loop {
                client.try_send(b"sleep 3\n").await;
                match client.line().await.as_str() {
                    "250 slept" => answers += 1,
                    "" => return answers,
                    other => panic!("answered {other:?}"),
                }
                if answers == 20 {
                    warm.send(()).await.expect("the test waits for all");
                }
            }
        })
    });
    let load: Vec<_> = load.collect();
    for _ in 0..CLIENTS {
        soon("twenty answers", warmed.recv()).await;
    }

    let ended = stack.stop().await;

    let answers: Vec<usize> = join_all(load)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert_eq!(sum(&ended, "requests="), answers.iter().sum::<usize>());
    assert_eq!(
        having(&ended.log, &["connection.closed", "\"drained\""]).len(),
        CLIENTS
    );
    assert_eq!(
        ended.said.last().unwrap(),
        "connections: 64 drained, 0 timed out, 0 aborted"
    );
}

#[tokio::test]
async fn new_connects_are_refused_while_those_who_are_in_finish() {
    let stack = Example::start("stack", &[]).await;
    let server = stack.addr();
    let mut client = greeted(server).await;
    client.send("push 1\nsleep 3000\n").await;
    assert_eq!(client.line().await, "push 1");
    assert_eq!(client.line().await, "250 pushed");

    stack.signal(Signal::TERM);
    tokio::select! {
        () = refused(server) => {}
        line = client.line() => panic!("{line:?} came before a refusal"),
    }

    assert_eq!(client.line().await, "250 slept");
    drop(client);
    assert!(stack.ended().await.status.success());
}

#[tokio::test]
async fn an_idle_connection_does_not_hold_the_process() {
    let stack = Example::start("stack", &[]).await;
    let mut client = greeted(stack.addr()).await;
    assert_eq!(client.ask("echo hi").await, "hi");
    let signalled = Instant::now();

    let ended = tokio::spawn(stack.stop());
    assert_eq!(client.rest().await, b"");
    drop(client);

    assert_eq!(
        ended.await.unwrap().said.last().unwrap(),
        "connections: 1 drained, 0 timed out, 0 aborted"
    );
    // A drain may take 30 s.
    assert!(signalled.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn the_deadline_cuts_off_who_is_not_done() {
    let stack = Example::start("stack", &["--shutdown-deadline", "1"]).await;
    let mut slow = greeted(stack.addr()).await;
    let mut quick = greeted(stack.addr()).await;
    slow.send("push 1\nsleep 4000\n").await;
    assert_eq!(slow.line().await, "push 1");
    assert_eq!(quick.ask("echo hi").await, "hi");
    let signalled = Instant::now();

    let ended = tokio::spawn(stack.stop());
    assert_eq!(quick.rest().await, b"");
    drop(quick);
    let ended = ended.await.unwrap();

    let took = signalled.elapsed();
    assert!(
        took >= Duration::from_secs(1) && took < Duration::from_millis(2500),
        "{took:?}"
    );
    assert_eq!(
        ended.said.last().unwrap(),
        "connections: 1 drained, 0 timed out, 1 aborted"
    );
    assert!(ended.end_of(slow.addr).contains("\"drain_deadline\""));
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    for second in [Signal::TERM, Signal::INT] {
        let stack = Example::start("stack", &[]).await;
        let mut client = greeted(stack.addr()).await;
        client.send("push 1\nsleep 4500\n").await;
        assert_eq!(client.line().await, "push 1");
        stack.signal(Signal::TERM);
        stack.logged(1, &["signal.received"]).await;
        let signalled = Instant::now();

        stack.signal(second);
        let ended = stack.ended().await;

        // Earlier than the request would wake up.
        assert!(signalled.elapsed() < Duration::from_secs(4));
        assert!(ended.status.success());
        assert_eq!(
            ended.said.last().unwrap(),
            "connections: 0 drained, 0 timed out, 1 aborted"
        );
        assert!(ended.end_of(client.addr).contains("\"killed\""));
    }
}

#[tokio::test]
async fn h11_a_storm_of_signals_ends_it_once_in_good_order() {
    let stack = Example::start("stack", &[]).await;
    let mut client = greeted(stack.addr()).await;
    client.send("push 1\nsleep 60000\n").await;
    assert_eq!(client.line().await, "push 1");

    for _ in 0..5_000 {
        stack.signal(Signal::TERM);
        stack.signal(Signal::INT);
    }
    let ended = stack.ended().await;

    assert!(ended.status.success());
    let last = "connections: 0 drained, 0 timed out, 1 aborted";
    assert_eq!(ended.said.iter().filter(|line| *line == last).count(), 1);
    assert_eq!(having(&ended.log, &["connection.closed"]).len(), 1);
}
