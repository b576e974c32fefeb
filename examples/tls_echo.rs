//! Sends lines back, through TLS.
//!
//! ```sh
//! cargo run --example tls_echo
//! (echo hi; sleep 1) | openssl s_client -quiet -no_ign_eof -connect 127.0.0.1:7443
//! ```
//!
//! Without `--cert` and `--key` the server makes its own certificate and prints the path. With
//! several certificates, the first is the default, and each of the others serves the host names in
//! it. SIGHUP reloads all files. If one of them is broken, the server reports that and keeps the
//! old ones.
//!
//! A handshake may take ten seconds, and 512 handshakes may be in progress. One more evicts the
//! oldest. To see the deadline, start the server with `RUST_LOG=tower_tcp=debug`, run `nc 127.0.0.1
//! 7443` and type nothing.

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
use tower_tcp::tls::{ClientCertificates, Identity, Tls, TlsBuilder};
use tower_tcp::{BoxError, Pipeline, Server, signal};
use tracing_subscriber::EnvFilter;

use reload::reload_on_hangup;

mod reload;

/// Sends lines back, through TLS.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7443")]
    listen: Vec<String>,

    /// Certificate chain, in PEM; can be repeated.
    #[arg(long)]
    cert: Vec<PathBuf>,

    /// Private key, in PEM. Give one for each `--cert`, in the same order.
    #[arg(long)]
    key: Vec<PathBuf>,

    /// Refuse clients that request no host name or an unknown one.
    #[arg(long)]
    strict_sni: bool,

    /// Root certificates of client certificates, in PEM. Without this option, the server requests
    /// no client certificates.
    #[arg(long)]
    client_roots: Option<PathBuf>,

    /// Certificate revocation list for clients, in PEM; can be repeated.
    #[arg(long)]
    crl: Vec<PathBuf>,

    /// File with 80 random bytes: a key for session tickets, which several servers can share; can
    /// be repeated.
    #[arg(long)]
    ticket_key: Vec<PathBuf>,

    /// Seconds that a handshake may take.
    #[arg(long, default_value_t = 10)]
    handshake_deadline: u64,

    /// Maximum number of handshakes in progress.
    #[arg(long, default_value_t = 512)]
    handshakes: usize,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    tracing_subscriber::fmt()
        .log_internal_errors(false) // printing them panics if stderr fails
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();

    let own = tempfile::tempdir()?; // removed at the end
    if args.cert.is_empty() {
        let (cert, key) = self_signed(&own)?;
        println!("the certificate is in {}", cert.display());
        (args.cert, args.key) = (vec![cert], vec![key]);
    }
    let files = files(&args)?;
    let tls = files.build()?;
    reload_on_hangup(tls.clone(), files)?;
    let handshake = PreConnectLayer::new(tls)
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
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        println!(
            "try: (echo hi; sleep 1) | openssl s_client -quiet -no_ign_eof -connect {address}"
        );
    }
    println!("{}", server.serve(stack).await?);
    Ok(())
}

fn files(args: &Args) -> Result<TlsBuilder, BoxError> {
    if args.cert.len() != args.key.len() {
        return Err("give one --key for each --cert".into());
    }
    let mut tls = Tls::builder().ticket_key_files(&args.ticket_key);
    for (n, (cert, key)) in args.cert.iter().zip(&args.key).enumerate() {
        let identity = Identity::pem_files(cert, key);
        tls = match n {
            0 if !args.strict_sni => tls.identity(identity),
            _ => tls.identity_by_san(identity),
        };
    }
    if let Some(roots) = &args.client_roots {
        tls = tls.client_certificates_file(roots, ClientCertificates::Required);
    }
    for list in &args.crl {
        tls = tls.revocation_lists_file(list);
    }
    Ok(tls)
}

/// Makes a self-signed certificate for `localhost`. No client trusts it.
fn self_signed(dir: &TempDir) -> Result<(PathBuf, PathBuf), BoxError> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    Ok((cert, key))
}
