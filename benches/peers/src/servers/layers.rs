//! Sends lines back with this crate, with one of tower's layers around the service, or with all of
//! them.
//!
//! With `--in-memory` it sends requests to itself over a stream in memory, then exits, so that the
//! instructions of a request can be counted.

mod by_hand;

use std::convert::Infallible;
use std::future::ready;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use clap::{Parser, ValueEnum};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::runtime;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower::util::BoxService;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::Listener;
use tower_tcp::frame::Lines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::pipeline::ShutdownOnErrorLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::{BoxError, Connection, EndReason, Peer, Pipeline, Server, testkit};

/// Never reached, like the limits below.
const LONG: Duration = Duration::from_secs(60);
const MANY: u64 = u64::MAX;

/// The capacity of the stream in memory in each direction. It is larger than any batch, so no write
/// waits for room.
const WIRE: usize = 1024 * 1024;

#[derive(Parser)]
struct Args {
    stack: Stack,

    /// Serve this many batches in memory, then exit.
    #[arg(long)]
    in_memory: Option<usize>,

    /// The number of requests in a batch.
    #[arg(long, default_value_t = 1)]
    ahead: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum Stack {
    /// The loop of `by_hand`, without a pipeline; in memory only.
    ByHand,
    /// No layer. A service for each connection, as in the variants down to `AllByHand`.
    None,
    MapResult,
    Timeout,
    ConcurrencyLimit,
    RateLimit,
    LoadShed,
    ShutdownOnError,
    /// The request stack of the `stack` example.
    All,
    /// The stack of `All` without a pipeline: each line is passed to the stack by hand.
    AllByHand,
    /// One service, cloned for each request.
    Shared,
    /// One rate limit for all connections. It is not `Clone`, so it is behind a buffer.
    SharedRateLimit,
    /// The connection's span, and its end in the log.
    Trace,
    /// Both stacks of the `stack` example.
    Whole,
}

fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let mut runtime = match args.in_memory {
        // Both sides run in turn, the same way in every run.
        Some(_) => runtime::Builder::new_current_thread(),
        None => runtime::Builder::new_multi_thread(),
    };
    runtime.enable_all().build()?.block_on(run(args))
}

async fn run(args: Args) -> Result<(), BoxError> {
    let Some(batches) = args.in_memory else {
        let server = Server::bind("127.0.0.1:0").await?;
        for address in server.handle().local_addrs() {
            println!("listening on {address}");
        }
        return serve(server, args.stack).await;
    };
    let client = match args.stack {
        Stack::ByHand => {
            let (client, stream) = tokio::io::duplex(WIRE);
            tokio::spawn(by_hand::echo(stream));
            client
        }
        stack => {
            let (listener, connector) = testkit::memory_with_buffer(WIRE);
            tokio::spawn(serve(Server::from_listener(listener), stack));
            connector.connect().await?
        }
    };
    exchange(client, batches, args.ahead).await
}

async fn serve<L>(server: Server<L>, stack: Stack) -> Result<(), BoxError>
where
    L: Listener<Io: AsyncRead + AsyncWrite + Unpin>,
{
    // Boxed once for each connection, which costs its requests nothing.
    type Whole<Io> = BoxService<Connection<Io>, EndReason, BoxError>;

    let in_hand = GlobalConcurrencyLimitLayer::new(256);
    let new = ServiceBuilder::new;
    let echo = || service_fn(echo);
    let request_stack = {
        let in_hand = in_hand.clone();
        move || {
            new()
                .map_result(|reply: Result<Bytes, BoxError>| reply)
                .layer(in_hand.clone())
                .load_shed()
                .rate_limit(MANY, LONG)
                .timeout(LONG)
                .layer(ShutdownOnErrorLayer::new())
                .service(echo())
        }
    };
    let whole: Whole<L::Io> = match stack {
        Stack::ByHand => return Err("is in memory only".into()),
        Stack::None => BoxService::new(each(echo)),
        Stack::MapResult => BoxService::new(each(move || {
            new()
                .map_result(|reply: Result<Bytes, Infallible>| reply)
                .service(echo())
        })),
        Stack::Timeout => BoxService::new(each(move || new().timeout(LONG).service(echo()))),
        Stack::ConcurrencyLimit => {
            BoxService::new(each(move || new().layer(in_hand.clone()).service(echo())))
        }
        Stack::RateLimit => {
            BoxService::new(each(move || new().rate_limit(MANY, LONG).service(echo())))
        }
        Stack::LoadShed => BoxService::new(each(move || new().load_shed().service(echo()))),
        Stack::ShutdownOnError => BoxService::new(each(move || {
            new().layer(ShutdownOnErrorLayer::new()).service(echo())
        })),
        Stack::All => BoxService::new(each(request_stack)),
        Stack::AllByHand => BoxService::new(service_fn(move |conn: Connection<L::Io>| {
            call_each(conn, request_stack())
        })),
        Stack::Shared => BoxService::new(Pipeline::new(Lines::default).service(echo())),
        Stack::SharedRateLimit => {
            let limited = new().buffer(64).rate_limit(MANY, LONG).service(echo());
            BoxService::new(Pipeline::new(Lines::default).service(limited))
        }
        Stack::Trace => {
            BoxService::new(new().layer(ConnectionTraceLayer::new()).service(each(echo)))
        }
        Stack::Whole => {
            let check = service_fn(|conn: Connection<L::Io>| ready(Ok::<_, Infallible>(conn)));
            BoxService::new(
                new()
                    .layer(ConnectionTraceLayer::new())
                    .rate_limit(MANY, LONG)
                    .layer(ConnectionLimit::new(10_000).layer())
                    .layer(PreConnectLayer::new(check).deadline(LONG))
                    .service(each(request_stack)),
            )
        }
    };
    server.serve(whole).await?;
    Ok(())
}

/// Builds a pipeline that makes a service for each connection.
fn each<Io, S, F>(
    service: F,
) -> impl Service<Connection<Io>, Response = EndReason, Error = BoxError, Future: Send>
+ Clone
+ Send
+ use<Io, S, F>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn() -> S + Clone + Send + 'static,
    S: Service<Bytes, Response = Bytes, Error: Into<BoxError>, Future: Send> + Send + 'static,
{
    let make = service_fn(move |_: Peer<Bytes>| ready(Ok::<_, Infallible>(service())));
    Pipeline::new(Lines::default).make_service(make)
}

/// The loop of `by_hand`, around a service.
#[expect(
    clippy::manual_async_fn,
    reason = "where it is called, the compiler does not find out that it is `Send`"
)]
fn call_each<Io, S>(
    mut stream: Io,
    mut service: S,
) -> impl Future<Output = Result<EndReason, BoxError>> + Send
where
    Io: AsyncRead + AsyncWrite + Unpin + Send,
    S: Service<Bytes, Response = Bytes, Error: Into<BoxError>, Future: Send> + Send,
{
    async move {
        let mut input = BytesMut::with_capacity(8 * 1024);
        let mut output = Vec::with_capacity(8 * 1024);
        while stream.read_buf(&mut input).await? > 0 {
            while let Some(end) = memchr::memchr(b'\n', &input) {
                let line = input.split_to(end + 1).freeze();
                let ready = service.ready().await.map_err(Into::into)?;
                let reply = ready.call(line).await.map_err(Into::into)?;
                output.extend_from_slice(&reply);
            }
            stream.write_all(&output).await?;
            output.clear();
        }
        Ok(EndReason::PeerClosed)
    }
}

async fn echo(line: Bytes) -> Result<Bytes, Infallible> {
    Ok(line)
}

/// Sends each batch once the previous one has been answered.
async fn exchange(mut stream: DuplexStream, batches: usize, ahead: usize) -> Result<(), BoxError> {
    let batch = b"fifteen letters\n".repeat(ahead);
    let mut replies = vec![0; batch.len()];
    for _ in 0..batches {
        stream.write_all(&batch).await?;
        stream.read_exact(&mut replies).await?;
    }
    Ok(())
}
