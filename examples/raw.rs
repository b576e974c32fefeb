//! Sends bytes back, without frames: the connection service is a plain function.
//!
//! ```sh
//! cargo run --example raw
//! printf 'no line ending' | nc -N 127.0.0.1 7002
//! ```
//!
//! The bytes come back, then the connection ends. On ctrl-c, each connection closes as soon as all
//! bytes that its client has sent are sent back.

use std::time::Duration;

use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::bind::Socket;
use tower_tcp::close::Linger;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::{BoxError, Connection, Server, signal};
use tracing_subscriber::EnvFilter;

/// Sends bytes back.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7002")]
    listen: Vec<String>,

    /// Seconds until an inactive peer is dropped.
    #[arg(long, default_value_t = 60)]
    idle: u64,
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

    let idle = Duration::from_secs(args.idle);
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(service_fn(move |conn| echo(conn, idle)));

    let server = Server::builder()
        .name("raw")
        .listen_all(args.listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        if let Some(addr) = address.tcp() {
            println!("try: printf hi | nc -N {} {}", addr.ip(), addr.port());
        }
    }
    println!("{}", server.serve(stack).await?);
    Ok(())
}

/// Serves one connection. There is no pipeline, so this function has to apply the deadlines, obey
/// the drain and close the connection.
async fn echo(mut conn: Connection<Socket>, idle: Duration) -> Result<(), BoxError> {
    let draining = conn.draining();
    tokio::pin!(draining);
    let mut block = vec![0; 8 * 1024];
    loop {
        let n = tokio::select! {
            biased; // bytes that arrived before the drain are sent back
            read = timeout(idle, conn.read(&mut block)) => read??,
            () = &mut draining => 0,
        };
        if n == 0 {
            break;
        }
        // The write is outside the `select!`, so that the drain does not interrupt it.
        timeout(idle, conn.write_all(&block[..n])).await??;
    }
    conn.close(Linger::default()).await?;
    Ok(())
}
