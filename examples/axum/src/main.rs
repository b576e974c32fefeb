//! An axum app behind TLS: JSON, a WebSocket, server-sent events; with limits, tracing and a
//! graceful shutdown.
//!
//! ```sh
//! cd examples/axum
//! cargo run
//! curl -k https://127.0.0.1:7443/
//! curl -k --http1.1 --json '{"a": 2, "b": 3}' https://127.0.0.1:7443/sum
//! curl -kN https://127.0.0.1:7443/ticks
//! ```
//!
//! Without `--cert` and `--key` the server makes its own certificate and prints the path. With
//! several certificates, the first is the default, and each of the others serves the host names in
//! it. SIGHUP reloads the files. `--plain` turns TLS off.
//!
//! Every address serves both HTTP/2 and HTTP/1.1, and the client chooses. On ctrl-c, pending
//! requests are answered, event streams end, and WebSockets get a close frame.

mod app;

use std::convert::Infallible;
use std::future::ready;
use std::path::PathBuf;

use axum::Extension;
use axum::extract::ConnectInfo;
use clap::Parser;
use tempfile::TempDir;
use tower::util::{Either, option_layer};
use tower::{Layer, ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::http::Http;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::tls::{Identity, Tls, TlsBuilder};
use tower_tcp::{BoxError, ConnectionInfo, Server, signal};
use tracing_subscriber::EnvFilter;

use door::Door;
use reload::reload_on_hangup;

#[path = "../../door/mod.rs"]
mod door;
#[path = "../../reload/mod.rs"]
mod reload;

/// An axum app behind TLS.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7443")]
    listen: Vec<String>,

    /// Certificate chain, in PEM; can be repeated.
    #[arg(long)]
    cert: Vec<PathBuf>,

    /// Private key of the certificate, in PEM, one for each `--cert` and in the same order.
    #[arg(long, requires = "cert")]
    key: Vec<PathBuf>,

    /// Speak HTTP without TLS.
    #[arg(long, conflicts_with = "cert")]
    plain: bool,

    /// Maximum number of open connections.
    #[arg(long, default_value_t = 10_000)]
    connections: usize,

    #[command(flatten)]
    door: Door,
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

    let (filter, hooks) = args.door.open()?;
    let server = Server::builder()
        .name("axum")
        .address_filter(filter)
        .limit(ConnectionLimit::new(args.connections))
        .listen_all(args.listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;

    let app = app::app();
    let http = Http::make_service(service_fn(move |info: ConnectionInfo| {
        // This does the same as axum's `into_make_service_with_connect_info`, which works only with
        // a listener of axum.
        let client = info
            .client_addr()
            .tcp()
            .map(|addr| Extension(ConnectInfo(addr)));
        let app = option_layer(client).layer(app.clone());
        ready(Ok::<_, Infallible>(app))
    }));
    let own = tempfile::tempdir()?; // removed at the end
    let stack = if args.plain {
        Either::Left(http)
    } else {
        if args.cert.is_empty() {
            let (cert, key) = self_signed(&own)?;
            println!("the certificate is in {}", cert.display());
            (args.cert, args.key) = (vec![cert], vec![key]);
        }
        let files = files(&args.cert, &args.key)?;
        let tls = files.build()?;
        reload_on_hangup(tls.clone(), files)?;
        Either::Right(PreConnectLayer::new(tls).layer(http))
    };
    let scheme = if args.plain { "http" } else { "https" };
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        if let Some(address) = address.tcp() {
            println!("try: curl -k {scheme}://{address}/");
        }
    }
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .option_layer(hooks)
        .service(stack);
    println!("{}", server.serve(stack).await?);
    Ok(())
}

fn files(certs: &[PathBuf], keys: &[PathBuf]) -> Result<TlsBuilder, BoxError> {
    if certs.len() != keys.len() {
        return Err("give one --key for each --cert".into());
    }
    let mut identities = certs.iter().zip(keys);
    let mut tls = Tls::builder().alpn(["h2", "http/1.1"]);
    if let Some((cert, key)) = identities.next() {
        tls = tls.pem_files(cert, key);
    }
    for (cert, key) in identities {
        tls = tls.identity_by_san(Identity::pem_files(cert, key));
    }
    Ok(tls)
}

/// Makes a self-signed certificate for `localhost` and `127.0.0.1`. No client trusts it.
fn self_signed(dir: &TempDir) -> Result<(PathBuf, PathBuf), BoxError> {
    let made =
        rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    Ok((cert, key))
}
