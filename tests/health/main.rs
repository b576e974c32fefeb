//! Health: probes and load balancers get a true answer in each state of a server, until it has
//! ended.

mod haproxy;

#[path = "../support/process.rs"]
mod process;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Semaphore;
use tower::service_fn;
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::Socket;
use tower_tcp::frame::Lines;
use tower_tcp::health::{AgentCheck, Health, HealthChecks, Readiness, is_live};
use tower_tcp::http::Http;
use tower_tcp::testkit::{Served, memory, serve, serve_with};
use tower_tcp::{BoxError, Connection, Handle, Pipeline, Server, ServerBuilder, ServerPhase};

use support::{Clients, Ends, until};

/// Answers a line once the gate has a permit.
fn gated(gate: &Arc<Semaphore>) -> impl support::Pipelined {
    let gate = Arc::clone(gate);
    Pipeline::new(Lines::default).service(service_fn(move |line: Bytes| {
        let gate = Arc::clone(&gate);
        async move {
            gate.acquire().await?.forget();
            Ok::<_, BoxError>(line)
        }
    }))
}

/// Starts a server with a limit of 4 connections. Its answers wait for the returned gate.
fn server(build: impl FnOnce(ServerBuilder) -> ServerBuilder) -> (Served, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let (listener, connector) = memory();
    let builder = Server::builder().limit(ConnectionLimit::new(4));
    let server = build(builder).build(listener);
    (serve_with(server, connector, gated(&gate)), gate)
}

/// Sends a request of HTTP/1, and returns the head and the body of the answer.
async fn fetch(client: &mut DuplexStream, method: &str, path: &str) -> (String, String) {
    let request = format!("{method} {path} HTTP/1.1\r\nhost: admin\r\n\r\n");
    client
        .write_all(request.as_bytes())
        .await
        .expect("it is open");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.expect("a whole head comes"));
    }
    let head = String::from_utf8(head).expect("text");
    // The dates of two answers can differ.
    let head: String = head
        .split_inclusive('\n')
        .filter(|line| !line.starts_with("date: "))
        .collect();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let length = length.expect("it has a length").parse().expect("a number");
    let mut body = vec![0; if method == "HEAD" { 0 } else { length }];
    client
        .read_exact(&mut body)
        .await
        .expect("a whole body comes");
    (head, String::from_utf8(body).expect("text"))
}

/// Returns the status and the body of the answer to a `GET`.
async fn get(client: &mut DuplexStream, path: &str) -> (u16, String) {
    let (head, body) = fetch(client, "GET", path).await;
    let status = head.split(' ').nth(1).expect("a status");
    (status.parse().expect("a number"), body)
}

/// Returns the answer of the agent.
async fn agent(served: &Served) -> String {
    support::read_to_end(served.stream().await).await
}

fn readiness(handle: &Handle) -> Readiness {
    Health::of(handle).readiness()
}

#[tokio::test(start_paused = true)]
async fn every_state_has_its_answers_until_the_server_has_ended() {
    let (mut main, gate) = server(|server| server.lame_duck(Duration::from_secs(5)));
    let handle = main.handle().clone();
    let http = serve(Http::new(HealthChecks::new(handle.clone())));
    // One connection for all requests.
    let mut http_client = http.stream().await;
    let check = AgentCheck::new(handle.clone());
    let (plain, weighted) = (serve(check.clone()), serve(check.weight_by_load()));
    let mut expect = async |state: Readiness, live: u16, words: [&str; 2], line: &str| {
        assert_eq!(readiness(&handle), state);
        let ready = if state == Readiness::Ready { 200 } else { 503 };
        let body = format!("{line}\n");
        assert_eq!(get(&mut http_client, "/ready").await, (ready, body.clone()));
        assert_eq!(get(&mut http_client, "/live").await, (live, body));
        let said = [agent(&plain).await, agent(&weighted).await];
        assert_eq!(said, words.map(|words| format!("{words}\n")));
        assert_eq!(Health::of(&handle).to_string(), line);
    };

    let line = "ready: phase serving, 0 connections, limit 4 with 0 in use";
    expect(Readiness::Ready, 200, ["up ready", "up ready 100%"], line).await;

    let mut client = main.client().await;
    client.send("a\n").await;
    until(|| handle.live() == 1).await;
    let line = "ready: phase serving, 1 connections, limit 4 with 1 in use";
    expect(Readiness::Ready, 200, ["up ready", "up ready 75%"], line).await;

    handle.limit().set(1);
    let line = "at_limit: phase serving, 1 connections, limit 1 with 1 in use";
    expect(Readiness::AtLimit, 200, ["up drain"; 2], line).await;

    handle.pause();
    let line = "paused: phase serving, 1 connections, limit 1 with 1 in use";
    expect(Readiness::Paused, 200, ["up maint"; 2], line).await;

    handle.suspend();
    let line = "suspended: phase serving, 1 connections, limit 1 with 1 in use";
    expect(Readiness::Suspended, 200, ["up maint"; 2], line).await;

    handle.resume();
    handle.limit().set_unlimited();
    let line = "ready: phase serving, 1 connections, no limit";
    expect(Readiness::Ready, 200, ["up ready", "up ready 100%"], line).await;

    handle.shutdown();
    let line = "lame_duck: phase lame_duck, 1 connections, no limit";
    expect(Readiness::LameDuck, 200, ["up drain"; 2], line).await;

    handle.reached(ServerPhase::Draining).await;
    let line = "draining: phase draining, 1 connections, no limit";
    expect(Readiness::Draining, 200, ["stopped # draining"; 2], line).await;

    gate.add_permits(1);
    assert_eq!(client.line().await, "a");
    drop(client);
    main.report().await;
    let line = "ended: phase ended, 0 connections, no limit";
    expect(Readiness::Ended, 503, ["stopped # ended"; 2], line).await;
}

#[tokio::test(start_paused = true)]
async fn the_weight_is_the_free_part_of_the_limit_and_zero_only_at_the_limit() {
    let (main, _gate) = server(|server| server);
    let handle = main.handle();
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(main.stream().await);
    }
    until(|| handle.live() == 3).await;
    for (limit, free) in [
        (0, 0),
        (2, 0),
        (3, 0),
        (4, 25),
        (6, 50),
        (301, 100),
        (3000, 100),
    ] {
        handle.limit().set(limit);
        assert_eq!(Health::of(handle).free_percent(), free, "limit {limit}");
    }
    handle.limit().set(usize::MAX - 1);
    assert_eq!(Health::of(handle).free_percent(), 100);
}

#[tokio::test(start_paused = true)]
async fn a_head_request_has_the_answer_without_its_body() {
    let (main, _gate) = server(|server| server);
    let http = serve(Http::new(HealthChecks::new(main.handle().clone())));
    let mut client = http.stream().await;

    for path in ["/ready", "/live"] {
        let (head, body) = fetch(&mut client, "HEAD", path).await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert_eq!(body, "");
        let (with_body, body) = fetch(&mut client, "GET", path).await;
        assert_eq!(head, with_body);
        assert!(
            head.contains(&format!("content-length: {}\r\n", body.len())),
            "{head}"
        );
        assert!(head.contains("cache-control: no-store\r\n"), "{head}");
    }
}

#[tokio::test(start_paused = true)]
async fn other_paths_and_methods_are_refused() {
    let (main, _gate) = server(|server| server);
    let http = serve(Http::new(HealthChecks::new(main.handle().clone())));
    let mut client = http.stream().await;

    assert_eq!(get(&mut client, "/").await.0, 404);
    assert_eq!(get(&mut client, "/ready/").await.0, 404);
    let (head, _) = fetch(&mut client, "DELETE", "/ready").await;
    assert!(head.starts_with("HTTP/1.1 405 "), "{head}");
    assert!(head.contains("allow: GET, HEAD\r\n"), "{head}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_check_ends_in_good_order_whatever_haproxy_does() {
    let (main, _gate) = server(|server| server);
    let mut agent = serve(AgentCheck::new(main.handle().clone()));
    // One client sends (`agent-send`), one leaves at once, and one neither reads nor leaves.
    let sends = support::exchange(agent.stream().await, "hello\n").await;
    assert_eq!(sends, "up ready\n");
    drop(agent.stream().await);
    let _silent = agent.stream().await;
    agent.handle().shutdown();
    let report = agent.report().await;
    assert_eq!(report.aborted, 0);
    assert!(report.duration < Duration::from_secs(6), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_heartbeat_is_answered_in_every_state_but_not_before_serving_nor_after_the_end() {
    let (listener, connector) = memory();
    let server = Server::builder()
        .limit(ConnectionLimit::new(1))
        .build(listener);
    let handle = server.handle();
    assert!(!is_live(&handle).await, "it is not served yet");
    let early = tokio::spawn(handle.heartbeat());

    let gate = Arc::new(Semaphore::new(0));
    let mut served = serve_with(server, connector, gated(&gate));
    assert!(early.await.expect("no panic"));
    assert!(handle.heartbeat().await);

    let mut client = served.client().await;
    client.send("a\n").await;
    let _waits = served.stream().await;
    until(|| readiness(&handle) == Readiness::AtLimit).await;
    assert!(handle.heartbeat().await, "at the limit");
    handle.pause();
    assert!(handle.heartbeat().await, "paused");
    handle.lame_duck();
    assert!(handle.heartbeat().await, "lame duck");
    handle.shutdown();
    assert_eq!(handle.phase(), ServerPhase::Draining);
    assert!(handle.heartbeat().await, "draining");
    assert!(is_live(&handle).await);

    // Many heartbeats at once, and one whose future is dropped.
    assert!(handle.heartbeat().now_or_never().is_none());
    let many = (0..100).map(|_| tokio::spawn(handle.heartbeat()));
    for beat in many.collect::<Vec<_>>() {
        assert!(beat.await.expect("no panic"));
    }

    gate.add_permits(1);
    drop(client);
    served.report().await;
    assert!(!handle.heartbeat().await);
    assert!(!is_live(&handle).await);
}

#[test]
fn a_server_whose_accept_loop_is_blocked_is_not_live() {
    let (unblock, blocked) = std::sync::mpsc::channel::<()>();
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().expect("a runtime")
    };
    let (handles, served) = std::sync::mpsc::channel();
    // The server blocks its own thread. The checks run on another, as in a multi-threaded runtime.
    let thread = std::thread::spawn(move || {
        runtime().block_on(async {
            let server = Server::bind("127.0.0.1:0").await.expect("it binds");
            handles.send(server.handle()).expect("it is waited for");
            let stack = service_fn(move |conn: Connection<Socket>| {
                // Blocks the accept loop, which calls the stack.
                let _unblocked = blocked.recv();
                async move {
                    drop(conn);
                    Ok::<_, BoxError>(())
                }
            });
            server.serve(stack).await.expect("it ends in good order");
        });
    });
    let handle = served.recv().expect("it starts");
    runtime().block_on(async {
        let http = serve(Http::new(HealthChecks::new(handle.clone())));
        let mut client = http.stream().await;
        assert!(handle.heartbeat().await);
        assert_eq!(get(&mut client, "/live").await.0, 200);

        let addr = handle.local_addrs()[0].tcp().expect("a port");
        let _client = tokio::net::TcpStream::connect(addr)
            .await
            .expect("it listens");
        process::soon("the block", async { while is_live(&handle).await {} }).await;
        assert_eq!(get(&mut client, "/live").await.0, 503);

        unblock.send(()).expect("it waits");
        assert!(process::soon("a heartbeat", handle.heartbeat()).await);
        assert_eq!(get(&mut client, "/live").await.0, 200);
        handle.shutdown();
        handle.closed().await;
    });
    thread.join().expect("no panic");
}

#[tokio::test(start_paused = true)]
async fn a_check_does_not_wait_for_a_server_that_hangs() {
    // Nobody polls this server.
    let (listener, _connector) = memory();
    let server = Server::from_listener(listener);
    let http = serve(Http::new(HealthChecks::new(server.handle())));
    let mut client = http.stream().await;
    let begun = tokio::time::Instant::now();
    assert_eq!(get(&mut client, "/live").await.0, 503);
    assert_eq!(begun.elapsed(), Duration::from_millis(500));
    drop(server);
    assert_eq!(get(&mut client, "/live").await.0, 503);
}
