//! A chat on several machines. Its rooms span all of them by means of [NATS](https://nats.io).
//!
//! | file | content |
//! | --- | --- |
//! | `rooms.rs` | the rooms: the members on this node, and the lines from all nodes |
//! | `member.rs` | the session of one connection |
//! | `service.rs` | the service of one connection: its codec, limits and deadlines |
//! | `main.rs` | the node: its options, NATS, the stack |
//! | `haproxy.cfg` | HAProxy in front of three nodes |
//!
//! ```sh
//! apt-get install nats-server
//! cargo run                # starts NATS, and says how to start other nodes
//! nc 127.0.0.1 7006        # then /join hall, and talk; /quit
//! ```
//!
//! A node subscribes to a room when the first of the node's members joins the room, and
//! unsubscribes when the last of them leaves or disconnects.
//!
//! # What is lost
//!
//! NATS passes a line on to the nodes that it can reach, and stores no lines. So a node gets a line
//! once or not at all, and a line that it has missed is not sent again. `tests/cluster.rs` counted
//! lost lines with 3 nodes, 300 members and 10,000 lines (2026-11-28):
//!
//! | event | lost | reason |
//! | --- | --- | --- |
//! | a member does not read | that member gets only 27 lines; the other members lose 0 of 3,000,000 | the member misses the lines for which its buffers have no room, and is closed after 5 s |
//! | `kill -9` of a node | the lines of its members that it had not read; the members of the other nodes lose 0 of 2,000,000 | a member also gets its own lines once NATS has passed them on, so it knows which of them are lost |
//! | NATS hangs or restarts | of 30 lines sent at that moment, 4 to 30 in seven runs; a sender that does not get its own line is told "not said, or late" after 2 s | the lines were in transit when the connection was given up |
//! | the same, 3 s later | none, because new lines are refused | the nodes have noticed the failure and told all members, and they tell them when NATS is back |
//! | a node is replaced | no line for a member that joins another node when it is told to, and stays on the old node until that node says bye | meanwhile, it is a member on both nodes |
//! | the same | for a member that reconnects to the new node, the lines until then: 14,694 of 213,000 while all three nodes were replaced | no lines are stored for it |
//!
//! If the sender of a line has got the line back, other members miss it only on nodes that NATS
//! could not reach at that moment. Those members are told that they may have missed lines.
//!
//! At most 4,096 lines of a room wait for a node that cannot keep up. The node misses further
//! lines, and its members are told so.
use std::io;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::process::{Child, Command};
use tokio::signal::unix::{self, SignalKind};
use tower::ServiceBuilder;
use tower_tcp::bind::SocketOptions;
use tower_tcp::health::AgentCheck;
use tower_tcp::networks::Networks;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::proxy::{ProxyProtocol, Untrusted};
use tower_tcp::{BoxError, Server, signal};
use tracing_subscriber::EnvFilter;

use rooms::Rooms;

mod member;
mod rooms;
mod service;

/// The size of the kernel's send buffer of each connection, in bytes. By default, the buffer of a
/// member that does not read grows to megabytes.
const SEND_BUFFER: usize = 64 * 1024;

/// A chat whose rooms span several machines.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7006")]
    listen: Vec<String>,

    /// Address of the NATS server of all nodes, such as `nats://10.0.0.1:4222`. Without it, this
    /// node starts `nats-server`, or runs alone if that is not installed.
    #[arg(long)]
    nats: Option<String>,

    /// Name of this node, which is part of its members' names.
    #[arg(long, default_value = "node")]
    name: String,

    /// Seconds from the first SIGTERM or ctrl-c to the drain. Members are told at the signal, so
    /// that they can join another node before they leave this one.
    #[arg(long, default_value_t = 5)]
    leave: u64,

    /// Address of the agent check for HAProxy.
    #[arg(long)]
    agent: Option<String>,

    /// Networks of the proxies that send a PROXY header, such as `10.0.0.0/8,unix`. If set, all
    /// other peers are refused.
    #[arg(long)]
    proxy_from: Option<Networks>,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    tracing_subscriber::fmt()
        .log_internal_errors(false) // printing them panics if stderr fails
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();

    // A NATS server that this node has started is killed when it is dropped at the end.
    let (_started, url) = match args.nats {
        Some(url) => (None, Some(url)),
        None => start_nats()?.unzip(),
    };
    let rooms = Arc::new(Rooms::open(url).await?);
    let proxy = match args.proxy_from {
        Some(networks) => ProxyProtocol::trusting(networks),
        None => ProxyProtocol::trusting(Networks::new()).untrusted(Untrusted::Direct),
    };
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .layer(PreConnectLayer::new(proxy))
        .service(service::chat(Arc::clone(&rooms), args.name.into()));

    let server = Server::builder()
        .name("cluster")
        .socket_options(SocketOptions::default().send_buffer(SEND_BUFFER))
        .lame_duck(Duration::from_secs(args.leave))
        .listen_all(args.listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;
    if let Some(address) = args.agent {
        let agent = Server::bind(address).await?;
        tokio::spawn(agent.serve(AgentCheck::new(server.handle())));
    }
    tokio::spawn(leave(rooms)?);
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
    }
    println!("{}", server.serve(stack).await?);
    Ok(())
}

/// Returns a future that waits for the first signal, and then tells the members that this node will
/// leave.
fn leave(rooms: Arc<Rooms>) -> io::Result<impl Future<Output = ()>> {
    let mut terminate = unix::signal(SignalKind::terminate())?;
    let mut interrupt = unix::signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        rooms.announce("* this node leaves: join another").await;
    })
}

/// Starts a NATS server for this node and others. Returns it with its URL, or `None` if it is not
/// installed.
fn start_nats() -> io::Result<Option<(Child, String)>> {
    let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let started = Command::new("nats-server")
        .args(["--addr", "127.0.0.1", "--port", &free.port().to_string()])
        .stderr(Stdio::null())
        // In a process group of its own, so that ctrl-c does not end it before the node is drained.
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    match started {
        Ok(nats) => {
            println!("other nodes: cargo run -- --nats {free} --listen 127.0.0.1:7007 --name two");
            Ok(Some((nats, free.to_string())))
        }
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            println!("alone, because there is neither --nats nor a nats-server on the path");
            println!("to have one: apt-get install nats-server, or https://nats.io/download");
            Ok(None)
        }
        Err(err) => Err(err),
    }
}
