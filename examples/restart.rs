//! Sends lines back, and replaces itself with a new process without losing a line.
//!
//! ```sh
//! cargo run --example restart
//! while printf 'hi\n' | nc -N 127.0.0.1 7006; do :; done   # in a second terminal
//! pkill -HUP -x restart                                    # in a third
//! ```
//!
//! Install a new version at the same path before the signal. If the new version does not start, the
//! old process continues to serve, and logs why. With systemd, or `systemd-socket-activate
//! --listen=7006`, use `--listen 'systemd:*'`. Then a stop and a start lose no line either.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tower::service_fn;
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::SocketOptions;
use tower_tcp::deadline::{Deadlines, DrainDeadlines};
use tower_tcp::frame::Lines;
use tower_tcp::replace::Replace;
use tower_tcp::{BoxError, Handle, Pipeline, Server};
use tracing_subscriber::EnvFilter;

/// Sends lines back, and replaces itself on SIGHUP.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port`, `unix:/path`, `fd:3` or `systemd:name`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7006")]
    listen: Vec<String>,

    /// Maximum number of open connections.
    #[arg(long, default_value_t = 10_000)]
    max_connections: usize,

    /// Seconds until a new process must be ready.
    #[arg(long, default_value_t = 30.0)]
    ready_within: f64,

    /// Milliseconds for which a draining connection waits for the next line.
    #[arg(long, default_value_t = 1000)]
    next_line: u64,

    /// Let several processes listen on one address, each with a backlog of its own.
    #[arg(long)]
    reuse_port: bool,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "info".into());
    tracing_subscriber::fmt()
        .log_internal_errors(false) // printing them panics if stderr fails
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();

    let ready_within = Duration::try_from_secs_f64(args.ready_within)?;
    // A client that keeps sending may have a line in transit when its connection drains.
    let drain = DrainDeadlines::default().next_frame(Duration::from_millis(args.next_line));
    let echo = Pipeline::new(Lines::default)
        .service(service_fn(|line: Bytes| async move {
            Ok::<_, Infallible>(line)
        }))
        .deadlines(Deadlines::default().drain(drain));

    let server = Server::builder()
        .name("restart")
        .limit(ConnectionLimit::new(args.max_connections))
        .socket_options(SocketOptions::default().reuse_port(args.reuse_port))
        .listen_all(args.listen)
        .bind()
        .await?;
    tower_tcp::signal::install(&server.handle())?;
    replace_on_hangup(server.handle(), ready_within)?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
    }
    println!("{}", server.serve(echo).await?);
    Ok(())
}

fn replace_on_hangup(handle: Handle, ready_within: Duration) -> io::Result<()> {
    let mut hangups = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            // `run` logs a failure, and this server continues to serve.
            let _failed = Replace::new(&handle).ready_within(ready_within).run().await;
        }
    });
    Ok(())
}
