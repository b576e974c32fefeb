//! A server that speaks the Redis protocol. It shows how to write a server with this library, with
//! one file for each idea.
//!
//! | file | content |
//! | --- | --- |
//! | `resp.rs`, `inline.rs` | the codec: requests, replies, and every bound on what a peer may send |
//! | `commands.rs` | the request service of one connection |
//! | `channels.rs` | publish and subscribe: frames that are not replies |
//! | `store.rs` | the keys and values; independent of connections |
//! | `main.rs` | the stack, the limits and their reasons |
//!
//! ```sh
//! cargo run --release --example redis
//! redis-cli -p 6380 set greeting hello
//! printf 'get greeting\r\nquit\r\n' | nc -N 127.0.0.1 6380
//! redis-cli -p 6380 subscribe news &   # then: redis-cli -p 6380 publish news hello
//! redis-benchmark -p 6380 -q -P 32 -t get,set
//! ```
//!
//! This is only an example: nothing is stored on disk, and there is no PSUBSCRIBE.
//! `benches/README.md` compares the cost of requests with that of Redis.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use tokio::runtime;
use tokio::time::Instant;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::SocketOptions;
use tower_tcp::deadline::Deadlines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::pipeline::{Limits, Watermarks};
use tower_tcp::{BoxError, EndReason, Peer, Pipeline, Server, signal};
use tracing_subscriber::EnvFilter;

use channels::Channels;
use commands::{Session, Shared};
use door::Door;
use resp::{Frame, Resp};
use store::Store;

mod channels;
mod commands;
#[path = "../door/mod.rs"]
mod door;
mod inline;
mod resp;
mod store;

/// The time after which the system probes a silent client, as in Redis. Without these probes, the
/// connections of a machine that has vanished would stay open forever, unless `--timeout` is set.
const KEEPALIVE: Duration = Duration::from_secs(300);

/// Speaks the Redis protocol: strings, lists, publish and subscribe, in memory.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:6380")]
    listen: Vec<String>,

    /// Number of threads that serve connections. Redis uses one.
    #[arg(
        long,
        default_value_t = 1,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024)
    )]
    threads: usize,

    /// Maximum number of open connections. Further ones get an error and are closed.
    #[arg(long, default_value_t = 10_000)]
    max_connections: usize,

    /// Maximum size of a request in bytes. It also bounds the input that the server buffers for
    /// each connection. Redis allows 1 GiB. Values larger than the default are better stored in
    /// files.
    #[arg(long, default_value_t = 1024 * 1024)]
    max_request: usize,

    /// Maximum number of bytes of unread messages of a subscriber. A subscriber with more is
    /// closed. Redis has the same default. The limit also applies to unread replies, once a
    /// connection has subscribed.
    #[arg(long, default_value_t = 32 * 1024 * 1024)]
    max_unread: usize,

    /// Seconds until a silent connection is closed. 0, the default of Redis, means never.
    #[arg(long, default_value_t = 0)]
    timeout: u64,

    #[command(flatten)]
    door: Door,
}

fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    tracing_subscriber::fmt()
        .log_internal_errors(false) // printing them panics if stderr fails
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let mut runtime = match args.threads {
        1 => runtime::Builder::new_current_thread(),
        _ => runtime::Builder::new_multi_thread(),
    };
    runtime
        .worker_threads(args.threads)
        .enable_all()
        .build()?
        .block_on(serve(args))
}

async fn serve(args: Args) -> Result<(), BoxError> {
    let (filter, hooks) = args.door.open()?;
    let server = Server::builder()
        .name("redis")
        .address_filter(filter)
        .limit(ConnectionLimit::unlimited()) // the limit in the stack is enough
        .socket_options(SocketOptions::default().keepalive(KEEPALIVE))
        .listen_all(args.listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;

    let shared = Arc::new(Shared {
        store: Store::default(),
        channels: Arc::new(Channels::new(Watermarks::below(args.max_unread))),
        config: vec![
            ("appendonly", "no".into()),
            ("maxclients", args.max_connections.to_string()),
            ("save", String::new()),
            ("timeout", args.timeout.to_string()),
        ],
        handle: server.handle(),
        started: Instant::now(),
    });
    let make = service_fn(move |peer: Peer<Frame>| {
        let session = Session::new(Arc::clone(&shared), peer);
        std::future::ready(Ok::<_, Infallible>(session))
    });

    let silent = (args.timeout > 0).then(|| Duration::from_secs(args.timeout));
    let limits = Limits::default()
        // The codec has the same limit, and answers a larger request with an error.
        .max_frame(args.max_request);
    let deadlines = Deadlines::default().first_byte(silent).idle(silent);
    let pipeline = Pipeline::new(move || Resp::new(args.max_request))
        .make_service(make)
        .limits(limits)
        .deadlines(deadlines)
        .farewell(|_, reason| farewell(reason));
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .layer(
            ConnectionLimit::new(args.max_connections)
                .layer()
                .overflow(pipeline.reject()),
        )
        .option_layer(hooks)
        .service(pipeline);

    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        if let Some(addr) = address.tcp() {
            println!("try: redis-cli -h {} -p {} ping", addr.ip(), addr.port());
        }
    }
    println!("{}", server.serve(stack).await?);
    Ok(())
}

/// Returns the last frame for a client whose connection the server closes. As in Redis, there is
/// none at a shutdown or for a silent client, because some clients fail on an error that follows no
/// command.
fn farewell(reason: EndReason) -> Option<Frame> {
    let error = "ERR max number of clients reached";
    (reason == EndReason::LimitExceeded).then(|| Frame::Error(error.into()))
}
