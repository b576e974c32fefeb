//! An axum app behind TLS: JSON, a WebSocket, server-sent events; limited, traced, drained.
//!
//! ```sh
//! cd examples/axum
//! cargo run
//! curl -k https://127.0.0.1:7443/
//! curl -k --http1.1 --json '{"a": 2, "b": 3}' https://127.0.0.1:7443/sum
//! curl -kN https://127.0.0.1:7443/ticks
//! ```
//!
//! Without `--cert` and `--key` it makes a certificate of its own and says where it is; with `--plain` there is none. Both HTTP/2 and
//! HTTP/1.1 are spoken, as the client asks, on each address. With ctrl-c what is in hand is answered, streams of events end, and
//! WebSockets are closed with a word.

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
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, ConnectionInfo, Server, signal};
use tracing_subscriber::EnvFilter;

/// An axum app behind TLS.
#[derive(Parser)]
struct Args {
    /// Where to listen: `host:port` or `unix:/path`; may be given several times.
    #[arg(long, default_value = "127.0.0.1:7443")]
    listen: Vec<String>,

    /// The certificate and those it depends on, in PEM.
    #[arg(long, requires = "key")]
    cert: Option<PathBuf>,

    /// The certificate's private key, in PEM.
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,

    /// Speak HTTP in the clear.
    #[arg(long, conflicts_with = "cert")]
    plain: bool,

    /// How many may be connected at the same time.
    #[arg(long, default_value_t = 10_000)]
    connections: usize,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();

    let server = Server::builder()
        .name("axum")
        .limit(ConnectionLimit::new(args.connections))
        .listen_all(args.listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;

    let app = app::app();
    let http = Http::make_service(service_fn(move |info: ConnectionInfo| {
        // What axum's own `into_make_service_with_connect_info` does for a listener of axum.
        let peer = info
            .peer_addr()
            .tcp()
            .map(|addr| Extension(ConnectInfo(addr)));
        let app = option_layer(peer).layer(app.clone());
        ready(Ok::<_, Infallible>(app))
    }));
    let own = tempfile::tempdir()?; // removed at the end
    let stack = if args.plain {
        Either::Left(http)
    } else {
        let (cert, key) = match args.cert.zip(args.key) {
            Some(given) => given,
            None => self_signed(&own)?,
        };
        println!("the certificate is in {}", cert.display());
        let tls = Tls::builder()
            .pem_files(cert, key)
            .alpn(["h2", "http/1.1"])
            .build()?;
        Either::Right(
            ServiceBuilder::new()
                .layer(PreConnectLayer::new(tls))
                .service(http),
        )
    };
    let scheme = if args.plain { "http" } else { "https" };
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        println!("try: curl -k {scheme}://{address}/");
    }
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(stack);
    let report = server.serve(stack).await?;
    println!(
        "{} connections drained, {} cut off",
        report.drained, report.aborted
    );
    Ok(())
}

/// Makes a certificate for `localhost` that nobody has a reason to trust.
fn self_signed(dir: &TempDir) -> Result<(PathBuf, PathBuf), BoxError> {
    let made =
        rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    Ok((cert, key))
}
