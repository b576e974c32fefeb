//! Sends lines back, with the usual limits, deadlines and layers.
//!
//! ```sh
//! cargo run --example echo
//! printf 'hi\n' | nc -N 127.0.0.1 7000
//! ```
//!
//! With `--workers 2` connections are spread over two threads, and each stays on its thread.
//! `ps -T -C echo` shows the threads.
//!
//! Ctrl-c drains the server; a second ctrl-c ends it at once. `RUST_LOG=tower_tcp=debug` logs the
//! end of each connection.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::pipeline::Limits;
use tower_tcp::{BoxError, Pipeline, Server, signal};

use door::Door;

mod door;

/// Sends lines back.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7000")]
    listen: Vec<String>,

    /// Maximum number of open connections.
    #[arg(long, default_value_t = 65_536)]
    max_connections: usize,

    /// Maximum length of a line in bytes, including its ending.
    #[arg(long, default_value_t = 65_536)]
    max_line: usize,

    /// Seconds until a silent connection is closed.
    #[arg(long, default_value_t = 60)]
    idle: u64,

    /// Number of worker threads. A connection stays on its thread. With 0, connections run on
    /// tokio's own threads, which share the work.
    #[arg(long, default_value_t = 0)]
    workers: usize,

    #[command(flatten)]
    door: Door,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .log_internal_errors(false) // printing them panics if stderr fails
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_unset| "warn,tower_tcp=warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();

    let max_line = args.max_line;
    let limits = Limits::default().max_frame(max_line);
    let deadlines = Deadlines::default().idle(Duration::from_secs(args.idle));
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let (filter, hooks) = args.door.open()?;
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .option_layer(hooks)
        .service(
            Pipeline::new(move || Lines::default().max_line(max_line))
                .service(echo)
                .limits(limits)
                .deadlines(deadlines)
                .shutdown_on_error(true),
        );

    let server = Server::builder()
        .name("echo")
        .limit(ConnectionLimit::new(args.max_connections))
        .workers(args.workers)
        .address_filter(filter)
        .listen_all(args.listen)
        .bind()
        .await?;

    signal::install(&server.handle())?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        if let Some(addr) = address.tcp() {
            println!("try: printf 'hi\\n' | nc -N {} {}", addr.ip(), addr.port());
        }
    }
    println!("{}", server.serve(stack).await?);
    Ok(())
}
