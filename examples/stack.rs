//! A production server: both stacks, each plain Tower, to compose your own from.
//!
//! ```sh
//! cargo run --example stack
//! printf 'echo hi\nbig 8\npush 2\nquit\n' | nc -N 127.0.0.1 7001
//! ```
//!
//! `sleep 9000` is too slow, `fail` and `panic` end their own connection; `RUST_LOG=tower_tcp=debug` shows how each one ended, and
//! `--deny 127.0.0.1` turns you away.

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

/// A line protocol behind a whole stack: echo X, big N, push N, sleep MS, fail, panic, quit.
#[derive(Parser)]
struct Args {
    /// Where to listen: `host:port` or `unix:/path`; may be given several times.
    #[arg(long, default_value = "127.0.0.1:7001")]
    listen: Vec<String>,

    /// How many connections may be open at the same time.
    #[arg(long, default_value_t = 10_000)]
    max_connections: usize,

    /// How many connections are accepted in a second.
    #[arg(long, default_value_t = 1_000)]
    accepts: u64,

    /// Close what is over these two limits, instead of letting it wait in the backlog.
    #[arg(long)]
    shed: bool,

    /// An address to turn away before its first byte; may be given several times.
    #[arg(long)]
    deny: Vec<IpAddr>,

    /// An address that gets no session: its make-service fails.
    #[arg(long)]
    fail_make_from: Option<IpAddr>,

    /// How many requests a connection may make in a second.
    #[arg(long, default_value_t = 100)]
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
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();

    // Before the first frame: a check of your own. TLS would be `.chain(..)`ed to it.
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

    // The request stack. This runs once for each connection, so every layer in it is that connection's own, except what is cloned in.
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
                    // All connections together: at the limit requests wait their turn. No `load_shed` outside of this one: what it
                    // sheds keeps its place in the queue, and the next permit goes to a connection that may have gone idle.
                    .layer(in_hand)
                    // Over its own rate, a connection is told so at once.
                    .load_shed()
                    .rate_limit(args.requests, second)
                    .timeout(Duration::from_millis(args.timeout))
                    // Only errors from in here end the connection: the policy below is off.
                    .layer(ShutdownOnErrorLayer::new())
                    .service(session),
            )
        }
    });
    let pipeline = Pipeline::new(Lines::default)
        .make_service(make)
        .shutdown_on_error(false);

    // The connection stack. The outer four decide in the accept loop, before a connection is taken; the rest runs in its own task.
    let limit = ConnectionLimit::new(args.max_connections); // a clone of it changes it at run time
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new()) // outside of all that it should see
        .option_layer(args.shed.then(LoadShedLayer::new))
        .rate_limit(args.accepts, second)
        .layer(limit.layer())
        .layer(PreConnectLayer::new(check).deadline(Duration::from_secs(5)))
        .service(pipeline);

    let server = Server::builder()
        .name("stack")
        .limit(ConnectionLimit::unlimited()) // the one in the stack is enough
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
    let report = server.serve(stack).await?;
    println!(
        "{} connections drained, {} cut off",
        report.drained, report.aborted
    );
    Ok(())
}

/// The service: one command in, any number of frames out.
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

/// Makes replies of what the layers fail with.
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
