//! A network that loses packets, is slow or disappears, and a machine without free ports.
//!
//! Each test starts itself again in a network of its own, which needs root. Without root, the test
//! is skipped.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

use std::env;
use std::io;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use process::{installed, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tower::service_fn;
use tower_tcp::bind::SocketOptions;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::Limits;
use tower_tcp::testkit::{Served, serve_with};
use tower_tcp::{BoxError, EndReason, Peer, Pipeline, Server};

#[path = "support/process.rs"]
mod process;

const SECOND: Duration = Duration::from_secs(1);

/// Returns whether this process is in a network of its own. If not, runs the test there.
fn in_own_network(test: &str) -> bool {
    const VARIABLE: &str = "TOWER_TCP_OWN_NETWORK";
    if env::var_os(VARIABLE).is_some() {
        return true;
    }
    if !installed("nft") {
        return false;
    }
    let unshare = || {
        let mut unshare = Command::new("unshare");
        unshare.arg("--net");
        unshare
    };
    let may = unshare().arg("true").stderr(Stdio::null()).status();
    if !may.is_ok_and(|status| status.success()) {
        eprintln!("skipped: only root can have a network of its own");
        return false;
    }
    let ran = unshare()
        .args(["sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""])
        .arg(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(VARIABLE, "1")
        .status();
    assert!(ran.unwrap().success());
    false
}

/// Runs a program that changes the network of this process.
fn run(command: &str) {
    let ran = Command::new("sh").args(["-c", command]).status();
    assert!(ran.unwrap().success(), "{command}");
}

/// Has the system drop the packets that match a condition of nft, or all if `when` is empty.
fn drop_packets(when: &str) {
    run(&format!(
        "nft 'add table inet t; add chain inet t out {{ type filter hook output priority 0; }}; \
         add rule inet t out {when} counter drop'"
    ));
}

/// Returns the number of packets that the system has dropped.
fn dropped_packets() -> usize {
    let chain = ["list", "chain", "inet", "t", "out"];
    let listed = Command::new("nft").args(chain).output().unwrap();
    assert!(listed.status.success());
    let listed = String::from_utf8(listed.stdout).unwrap();
    let counter = listed.split_once("counter packets ").unwrap().1;
    counter.split(' ').next().unwrap().parse().unwrap()
}

async fn bound(options: SocketOptions) -> (Server, SocketAddr) {
    let server = Server::builder()
        .socket_options(options)
        .listen("127.0.0.1:0");
    let server = server.bind().await.unwrap();
    let addr = server.handle().local_addrs()[0].tcp().unwrap();
    (server, addr)
}

async fn serve(options: SocketOptions, deadlines: Deadlines) -> (Served<()>, SocketAddr) {
    let reply = service_fn(|line: Bytes| async move {
        Ok::<_, BoxError>(match line.as_ref() {
            b"large" => Bytes::from(vec![b'x'; 8 * 1024 * 1024]),
            _ => line,
        })
    });
    let (server, addr) = bound(options).await;
    let stack = Pipeline::new(Lines::default)
        .service(reply)
        .deadlines(deadlines);
    (serve_with(server, (), stack), addr)
}

/// Connects, and gets one reply.
async fn connect(addr: SocketAddr) -> TcpStream {
    let mut client = soon("a connection", TcpStream::connect(addr))
        .await
        .unwrap();
    echoes(&mut client).await;
    client
}

async fn echoes(client: &mut TcpStream) {
    client.write_all(b"hi\n").await.unwrap();
    soon("a reply", client.read_exact(&mut [0; 3]))
        .await
        .unwrap();
}

#[tokio::test]
async fn d8_connections_to_a_machine_that_is_gone_end_by_a_deadline_or_by_keepalive() {
    if !in_own_network("d8_connections_to_a_machine_that_is_gone_end_by_a_deadline_or_by_keepalive")
    {
        return;
    }
    run("echo 1 >/proc/sys/net/ipv4/tcp_keepalive_intvl");
    run("echo 2 >/proc/sys/net/ipv4/tcp_keepalive_probes");
    let short = Deadlines::default().idle(SECOND).write(SECOND);
    let never = Deadlines::default().idle(None);
    let options = SocketOptions::default();
    let (deadlines, addr) = serve(options.clone(), short).await;
    let (kept_alive, kept_addr) = serve(options.keepalive(SECOND), never).await;
    let _resting = connect(addr).await;
    let _kept = connect(kept_addr).await;
    let mut reading = connect(addr).await;
    reading.write_all(b"large\n").await.unwrap();
    soon("a part", reading.read_exact(&mut [0; 100]))
        .await
        .unwrap();

    drop_packets("");
    let gone = Instant::now();

    let mut reasons = [EndReason::PeerClosed; 2];
    for reason in &mut reasons {
        let end = soon("an end by a deadline", deadlines.ended()).await;
        *reason = end.unwrap().reason();
    }
    println!("{reasons:?} after {:?}", gone.elapsed());
    assert!(reasons.contains(&EndReason::IdleTimeout), "{reasons:?}");
    assert!(reasons.contains(&EndReason::WriteTimeout), "{reasons:?}");
    let end = soon("an end by keepalive", kept_alive.ended())
        .await
        .unwrap();
    println!("{} after {:?}", end.reason(), gone.elapsed());
    assert_eq!(end.reason(), EndReason::PeerReset, "{end:?}");
    assert_eq!(kept_alive.handle().live(), 0);
}

#[tokio::test]
async fn d10_every_byte_arrives_although_a_fifth_of_all_packets_is_lost() {
    if !in_own_network("d10_every_byte_arrives_although_a_fifth_of_all_packets_is_lost") {
        return;
    }
    // Otherwise the device passes up to 64 KiB as one packet, and few packets are lost, or none.
    run("ip link set lo mtu 1500 gso_max_segs 1");
    // A small buffer, so that the server has to wait for the packets that are lost.
    let options = SocketOptions::default().send_buffer(8 * 1024);
    let (served, addr) = serve(options, Deadlines::default()).await;
    // Every fifth one. A random choice can drop the same bytes again and again, up to a deadline.
    drop_packets("numgen inc mod 5 == 4");
    let begun = Instant::now();
    let mut lines = String::new();
    for n in 0..2_000 {
        lines += &format!("{n:039}\n");
    }

    let mut client = soon("a connection", TcpStream::connect(addr))
        .await
        .unwrap();
    let (mut reader, mut writer) = client.split();
    let mut replies = String::new();
    let send = async {
        writer.write_all(lines.as_bytes()).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let both = async { tokio::join!(send, reader.read_to_string(&mut replies)) };
    let (_, read) = tokio::time::timeout(60 * SECOND, both).await.unwrap();

    read.unwrap();
    assert_eq!(replies, lines);
    let (dropped, time) = (dropped_packets(), begun.elapsed());
    println!(
        "{} bytes each way in {time:?}, {dropped} packets dropped",
        lines.len()
    );
    // At least a fifth of the packets that carry the bytes.
    assert!(dropped >= 2 * lines.len() / 1500 / 5, "{dropped}");
    let end = soon("the end", served.ended()).await.unwrap();
    assert_eq!(end.reason(), EndReason::PeerClosed);
}

#[tokio::test]
async fn d11_on_a_slow_link_marks_hold_and_a_drain_ends_at_its_deadline() {
    if !in_own_network("d11_on_a_slow_link_marks_hold_and_a_drain_ends_at_its_deadline") {
        return;
    }
    const FRAME: usize = 4096;
    let sent = Arc::new(AtomicUsize::new(0));
    let pushed = Arc::clone(&sent);
    // Pushes a megabyte to whoever connects.
    let make = service_fn(move |peer: Peer<Bytes>| {
        let pushed = Arc::clone(&pushed);
        tokio::spawn(async move {
            while pushed.load(Ordering::Relaxed) < 256 * FRAME {
                peer.send(Bytes::from(vec![b'x'; FRAME - 1])).await?;
                pushed.fetch_add(FRAME, Ordering::Relaxed);
            }
            Ok::<_, BoxError>(())
        });
        let echo = service_fn(|line: Bytes| async move { Ok::<_, BoxError>(line) });
        std::future::ready(Ok::<_, BoxError>(echo))
    });
    let options = SocketOptions::default().send_buffer(16 * 1024);
    let (server, addr) = bound(options).await;
    let stack = Pipeline::new(Lines::default)
        .make_service(make)
        .limits(Limits::default().high_mark(64 * 1024));
    let mut served = serve_with(server, (), stack);
    run("ip link set lo mtu 1500");
    run("tc qdisc add dev lo root tbf rate 1mbit burst 16kb latency 10s");
    let mut client = TcpStream::connect(addr).await.unwrap();
    let mut part = vec![0; 125_000];
    let begun = Instant::now();

    // At this rate the bytes take a second, less because of the burst.
    soon("a part", client.read_exact(&mut part)).await.unwrap();
    let slow = begun.elapsed();
    let ahead = sent.load(Ordering::Relaxed).saturating_sub(part.len());
    println!("{} bytes in {slow:?}, {ahead} bytes ahead", part.len());
    assert!(slow > SECOND / 2, "{slow:?}");
    // The mark, and the buffers of both sockets and of the link.
    assert!(ahead < 400 * 1024, "{ahead}");

    let deadline = SECOND / 2;
    served.handle().shutdown_within(deadline);
    let report = soon("the end of the drain", served.closed()).await.unwrap();
    println!("{report} after {:?}", report.duration);
    assert_eq!(report.aborted, 1, "{report:?}");
    assert!(report.duration >= deadline, "{report:?}");
    assert!(report.duration < 2 * deadline, "{report:?}");
}

#[tokio::test]
async fn a20_a_server_does_not_notice_that_its_clients_have_no_port_left() {
    if !in_own_network("a20_a_server_does_not_notice_that_its_clients_have_no_port_left") {
        return;
    }
    let (mut served, addr) = serve(SocketOptions::default(), Deadlines::default()).await;
    run("echo 40000 40009 >/proc/sys/net/ipv4/ip_local_port_range");
    for _ in 0..3 {
        let mut clients = Vec::new();
        let failed = loop {
            match soon("a connection", TcpStream::connect(addr)).await {
                Ok(client) => clients.push(client),
                Err(err) => break err,
            }
            assert!(clients.len() <= 10);
        };
        assert_eq!(failed.kind(), io::ErrorKind::AddrNotAvailable);
        assert!(clients.len() > 5, "{}", clients.len());
        for client in &mut clients {
            echoes(client).await;
        }
        for client in clients {
            // A port is free again at once.
            client.set_zero_linger().unwrap();
            drop(client);
            let end = soon("an end", served.ended()).await.unwrap();
            assert_eq!(end.reason(), EndReason::PeerReset);
        }
    }
    assert_eq!(served.handle().live(), 0);
    served.shutdown().await.unwrap();
}
