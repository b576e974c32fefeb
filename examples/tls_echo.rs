//! Sends lines back, through TLS.
//!
//! ```sh
//! cargo run --example tls_echo
//! printf 'hi\n' | openssl s_client -quiet -connect 127.0.0.1:7443
//! ```
//!
//! Without `--cert` and `--key` the server makes its own certificate and prints the path. A
//! handshake may take ten seconds, and 512 connections may be in theirs; one more evicts the
//! oldest. Try it: run `nc 127.0.0.1 7443` and type nothing, with `RUST_LOG=tower_tcp=debug` set
//! for the server.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use tempfile::TempDir;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Pipeline, Server, signal};
use tracing_subscriber::EnvFilter;

/// Sends lines back, through TLS.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7443")]
    listen: Vec<String>,

    /// Certificate chain, in PEM.
    #[arg(long, requires = "key")]
    cert: Option<PathBuf>,

    /// Private key of the certificate, in PEM.
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,

    /// Seconds that a handshake may take.
    #[arg(long, default_value_t = 10)]
    handshake_deadline: u64,

    /// Maximum number of connections in their handshake.
    #[arg(long, default_value_t = 512)]
    handshakes: usize,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();

    let own = tempfile::tempdir()?; // removed at the end
    let (cert, key) = match args.cert.zip(args.key) {
        Some(given) => given,
        None => self_signed(&own)?,
    };
    let handshake = PreConnectLayer::new(Tls::builder().pem_files(&cert, &key).build()?)
        .deadline(Duration::from_secs(args.handshake_deadline))
        .pending(args.handshakes);
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .layer(handshake)
        .service(Pipeline::new(Lines::default).service(echo));

    let server = Server::builder()
        .name("tls_echo")
        .listen_all(args.listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;
    println!("the certificate is in {}", cert.display());
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        println!("try: printf 'hi\\n' | openssl s_client -quiet -connect {address}");
    }
    println!("{}", server.serve(stack).await?);
    Ok(())
}

/// Makes a self-signed certificate for `localhost`. No client trusts it.
fn self_signed(dir: &TempDir) -> Result<(PathBuf, PathBuf), BoxError> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    Ok((cert, key))
}
