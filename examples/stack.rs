//! A production server to copy from: a connection stack and a request stack, both plain Tower.
//!
//! ```sh
//! cargo run --example stack
//! printf 'echo hi\nbig 8\npush 2\nquit\n' | nc -N 127.0.0.1 7001
//! ```
//!
//! The request `sleep 9000` exceeds the timeout. `fail` and `panic` each end their own connection.
//! `RUST_LOG=tower_tcp=debug` logs how each connection ended, and `--deny 127.0.0.1` refuses your
//! own connections.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::load_shed::{LoadShedLayer, error::Overloaded};
use tower::timeout::error::Elapsed;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::Socket;
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::pipeline::ShutdownOnErrorLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::{BoxError, Connection, Peer, Pipeline, Reply, Server, signal};
use tracing_subscriber::EnvFilter;

/// A line protocol behind a complete stack: echo X, big N, push N, sleep MS, fail, panic, quit.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7001")]
    listen: Vec<String>,

    /// Maximum number of open connections.
    #[arg(long, default_value_t = 10_000)]
    max_connections: usize,

    /// Maximum number of connections accepted per second.
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u64).range(1..))]
    accepts: u64,

    /// Close connections over `--max-connections` or `--accepts` instead of leaving them in the
    /// backlog.
    #[arg(long)]
    shed: bool,

    /// Address whose connections are refused before their first byte is read; can be repeated.
    #[arg(long)]
    deny: Vec<IpAddr>,

    /// Address for which the make-service fails.
    #[arg(long)]
    fail_make_from: Option<IpAddr>,

    /// Maximum number of requests of a connection per second.
    #[arg(long, default_value = "100", value_parser = clap::value_parser!(u64).range(1..))]
    requests: u64,

    /// Milliseconds that a request may take.
    #[arg(long, default_value_t = 5_000)]
    timeout: u64,

    /// Seconds that a shutdown waits for connections to finish.
    #[arg(long, default_value_t = 30)]
    shutdown_deadline: u64,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    tracing_subscriber::fmt()
        .log_internal_errors(false) // printing them panics if stderr fails
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();

    // Your own check, before the first frame. TLS would be added to it with `.chain(..)`.
    let deny: Arc<[IpAddr]> = args.deny.into();
    let check = service_fn(move |conn: Connection<Socket>| {
        let denied = conn
            .info()
            .peer_addr()
            .tcp()
            .is_some_and(|addr| deny.contains(&addr.ip()));
        std::future::ready(if denied {
            Err("not from there")
        } else {
            Ok(conn)
        })
    });

    // The request stack. It is built once for each connection, so its layers belong to that
    // connection, except for `in_hand`, which all connections share.
    let second = Duration::from_secs(1);
    let in_hand = GlobalConcurrencyLimitLayer::new(256);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let in_hand = in_hand.clone();
        async move {
            if peer.info().peer_addr().tcp().map(|addr| addr.ip()) == args.fail_make_from {
                return Err("no session for this one".into());
            }
            peer.send("220 ready".into()).await?;
            let session = service_fn(move |line| command(peer.clone(), line));
            Ok::<_, BoxError>(
                ServiceBuilder::new()
                    .map_result(apologise)
                    // Shared by all connections: at the limit, requests wait their turn. Put no
                    // `load_shed` outside this layer. A shed request would keep its place in the
                    // queue, and the next permit would go to a connection that may be idle.
                    .layer(in_hand)
                    // A request that exceeds the connection's rate fails at once, and gets a reply
                    // from `apologise`.
                    .load_shed()
                    .rate_limit(args.requests, second)
                    .timeout(Duration::from_millis(args.timeout))
                    // Only errors from inside this layer end the connection, because
                    // `shutdown_on_error` is off below.
                    .layer(ShutdownOnErrorLayer::new())
                    .service(session),
            )
        }
    });
    let pipeline = Pipeline::new(Lines::default)
        .make_service(make)
        .shutdown_on_error(false);

    // The connection stack. The outer four layers decide in the accept loop, before a connection is
    // accepted; the rest runs in the connection's own task.
    let limit = ConnectionLimit::new(args.max_connections); // a clone can set it at run time
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new()) // outside all layers that it should observe
        .option_layer(args.shed.then(LoadShedLayer::new))
        .rate_limit(args.accepts, second)
        .layer(limit.layer())
        .layer(PreConnectLayer::new(check).deadline(Duration::from_secs(5)))
        .service(pipeline);

    let server = Server::builder()
        .name("stack")
        .limit(ConnectionLimit::unlimited()) // the limit in the stack is enough
        .shutdown_deadline(Duration::from_secs(args.shutdown_deadline))
        .listen_all(args.listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        if let Some(addr) = address.tcp() {
            println!(
                "try: printf 'echo hi\\nbig 8\\nquit\\n' | nc -N {} {}",
                addr.ip(),
                addr.port()
            );
        }
    }
    println!("{}", server.serve(stack).await?);
    Ok(())
}

/// The service. It takes one command, and sends any number of frames.
async fn command(peer: Peer<Bytes>, line: Bytes) -> Result<Reply<Bytes>, BoxError> {
    let line = String::from_utf8_lossy(&line);
    let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
    let reply: Bytes = match verb {
        "echo" => rest.to_owned().into(),
        "big" => vec![b'x'; rest.parse::<usize>()?.min(16 << 20)].into(),
        "push" => {
            for n in 1..=rest.parse::<u16>()? {
                peer.send(format!("push {n}").into()).await?;
            }
            "250 pushed".into()
        }
        "sleep" => {
            tokio::time::sleep(Duration::from_millis(rest.parse()?)).await;
            "250 slept".into()
        }
        "quit" => return Ok(Reply::from(Bytes::from("221 bye")).close()),
        "fail" => return Err("failed as told".into()),
        "panic" => panic!("panicked as told"),
        _ => "500 what?".into(),
    };
    Ok(reply.into())
}

/// Turns errors of the load-shed and timeout layers into replies.
fn apologise(result: Result<Reply<Bytes>, BoxError>) -> Result<Reply<Bytes>, BoxError> {
    result.or_else(|err| {
        if find_cause::<Overloaded>(&*err).is_some() {
            Ok(Bytes::from("450 too many requests").into())
        } else if find_cause::<Elapsed>(&*err).is_some() {
            Ok(Bytes::from("451 too slow").into())
        } else {
            Err(err)
        }
    })
}
