//! The `stack` example, from outside: answers arrive, and each fault ends one connection, with one
//! event and one reason.

use std::net::SocketAddr;

use process::{Client, Example};
use tokio::net::TcpSocket;

#[path = "support/process.rs"]
mod process;

/// Connects a client, and reads its greeting.
async fn greeted(server: SocketAddr) -> Client {
    let mut client = Client::connect(server).await;
    assert_eq!(client.line().await, "220 ready");
    client
}

#[tokio::test]
async fn d2_eight_megabytes_reach_a_client_that_half_closed_first() {
    let stack = Example::start("stack", &[]).await;
    let mut client = greeted(stack.addr()).await;

    client.send("big 8000000\n").await;
    client.half_close().await;

    let reply = client.rest().await;
    assert_eq!(reply.len(), 8_000_001);
    assert!(reply.ends_with(b"x\n"));
    let ended = stack.stop().await;
    assert!(ended.end_of(client.addr).contains("\"peer_closed\""));
}

#[tokio::test]
async fn d7_a_farewell_is_not_lost_by_what_the_client_sends_behind_its_quit() {
    let stack = Example::start("stack", &[]).await;
    let rest = vec![b'.'; 2_000_000];
    for _ in 0..20 {
        let mut client = greeted(stack.addr()).await;

        client.send("quit\n").await;
        client.try_send(&rest).await;

        assert_eq!(client.rest().await, b"221 bye\n");
    }
}

#[tokio::test]
async fn d7_a_large_reply_is_not_lost_by_what_lies_unread_behind_the_quit() {
    let stack = Example::start("stack", &[]).await;
    let socket = TcpSocket::new_v4().unwrap();
    // A small buffer, so that the server still holds most of the reply when it closes.
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    let mut client = Client::connect_by(socket, stack.addr()).await;
    let mut bytes = b"big 1000000\nquit\n".to_vec();
    bytes.resize(bytes.len() + 100_000, b'.');

    client.send(bytes).await;

    let expected = ["220 ready\n", &"x".repeat(1_000_000), "\n221 bye\n"].concat();
    let reply = client.rest().await;
    assert_eq!(reply.len(), expected.len());
    assert!(reply == expected.as_bytes());
}

#[tokio::test]
async fn c9_answers_arrive_before_the_end_that_a_bad_frame_behind_them_causes() {
    let stack = Example::start("stack", &[]).await;
    let mut client = greeted(stack.addr()).await;
    let mut bytes = b"sleep 20\necho b\nsleep 20\n".to_vec();
    bytes.resize(bytes.len() + 70_000, b'.');

    client.send(bytes).await;

    assert_eq!(client.rest().await, b"250 slept\nb\n250 slept\n");
    let ended = stack.stop().await;
    assert!(ended.end_of(client.addr).contains("\"frame_too_large\""));
}

/// Lets one client fail beside another that is served all the time. Returns the log line of the
/// failed client's end.
async fn ends_alone(args: &[&str], from: &str, bytes: &[u8]) -> String {
    let args = [args, &["--requests", "1000000"]].concat();
    let stack = Example::start("stack", &args).await;
    let mut bystander = greeted(stack.addr()).await;

    let mut client = Client::connect_from(from, stack.addr()).await;
    client.send(bytes).await;
    let mut served = 0;
    {
        let gone = client.gone();
        tokio::pin!(gone);
        while futures_util::poll!(&mut gone).is_pending() {
            served += 1;
            let request = format!("echo {served}");
            assert_eq!(bystander.ask(&request).await, served.to_string());
        }
    }

    assert_eq!(bystander.ask("echo still").await, "still");
    assert_eq!(bystander.ask("quit").await, "221 bye");
    let (wrong, beside) = (client.addr, bystander.addr);
    drop((client, bystander));
    let ended = stack.stop().await;
    assert!(ended.end_of(beside).contains("\"service_closed\""));
    ended.end_of(wrong).to_owned()
}

#[tokio::test]
async fn a_frame_over_the_limit_ends_its_connection_alone() {
    let end = ends_alone(&[], "127.0.0.1", &[b'.'; 70_000]).await;

    assert!(end.contains("\"frame_too_large\""), "{end}");
    assert!(end.contains(" DEBUG "), "{end}");
}

#[tokio::test]
async fn e1_a_panic_in_the_service_ends_its_connection_alone() {
    let end = ends_alone(&[], "127.0.0.1", b"panic\n").await;

    assert!(end.contains("\"panic\""), "{end}");
    assert!(end.contains("panicked as told"), "{end}");
    assert!(end.contains(" ERROR "), "{end}");
}

#[tokio::test]
async fn an_error_of_the_service_ends_its_connection_alone() {
    let end = ends_alone(&[], "127.0.0.1", b"fail\n").await;

    assert!(end.contains("\"service_error\""), "{end}");
    assert!(end.contains("failed as told"), "{end}");
}

#[tokio::test]
async fn a_failing_make_service_ends_its_connection_alone() {
    let args = ["--fail-make-from", "127.0.0.8"];

    let end = ends_alone(&args, "127.0.0.8", b"echo hi\n").await;

    assert!(end.contains("\"make_service_error\""), "{end}");
    assert!(end.contains("no session for this one"), "{end}");
    assert!(end.contains("requests=0"), "{end}");
}

#[tokio::test]
async fn a_rejected_pre_connect_ends_its_connection_alone() {
    let args = ["--deny", "127.0.0.9"];

    let end = ends_alone(&args, "127.0.0.9", b"echo hi\n").await;

    assert!(end.contains("\"rejected\""), "{end}");
    assert!(end.contains("not from there"), "{end}");
    assert!(end.contains("requests=0"), "{end}");
}
