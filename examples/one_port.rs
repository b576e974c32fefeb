//! HTTP and a line protocol, with and without TLS, on one port.
//!
//! ```sh
//! cargo run --example one_port
//! curl http://127.0.0.1:7080/
//! curl --http2-prior-knowledge http://127.0.0.1:7080/
//! curl -k https://127.0.0.1:7080/
//! printf 'hi\n' | nc -N 127.0.0.1 7080
//! printf 'GET / HTTP/1.0\r\n\r\n' | nc -N 127.0.0.1 7080
//! (echo hi; sleep 1) | openssl s_client -quiet -no_ign_eof -connect 127.0.0.1:7080
//! ```
//!
//! If a client is silent for a second, the server assumes that the client speaks the line protocol
//! and is waiting for the greeting. Try `nc 127.0.0.1 7080`.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::http::hyper::{Request, Response};
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::pipeline::OnConnectLayer;
use tower_tcp::preconnect::{Either, Peek, PreConnectExt, PreConnectLayer, Protocol, Unknown};
use tower_tcp::tls::{Tls, TlsInfo};
use tower_tcp::{
    BoxError, Connection, ConnectionInfo, ConnectionService, Peer, Pipeline, Server, signal,
};
use tracing_subscriber::EnvFilter;

/// Speaks HTTP and a line protocol, with and without TLS, on one port.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7080")]
    listen: Vec<String>,

    /// Certificate chain, in PEM. Without it, a self-signed certificate is made.
    #[arg(long, requires = "key")]
    cert: Option<PathBuf>,

    /// Private key of the certificate, in PEM.
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,

    /// Milliseconds until a silent client is greeted.
    #[arg(long, default_value_t = 1000)]
    silence: u64,
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

    let own = tempfile::tempdir()?; // removed at the end
    let (cert, key) = match args.cert.zip(args.key) {
        Some(given) => given,
        None => self_signed(&own)?,
    };
    let tls = Tls::builder()
        .pem_files(&cert, key)
        .alpn(["h2", "http/1.1"])
        .build()?;

    let server = Server::builder()
        .name("one_port")
        .listen_all(args.listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;
    println!("the certificate is in {}", cert.display());
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        if let Some(address) = address.tcp() {
            println!("try: curl http://{address}/; curl -k https://{address}/");
        }
    }
    let silence = Duration::from_millis(args.silence);
    println!("{}", server.serve(stack(tls, silence)).await?);
    Ok(())
}

/// Serves both protocols. A client that is silent for as long as `silence` is greeted in the line
/// protocol.
pub(crate) fn stack<Io>(tls: Tls, silence: Duration) -> impl ConnectionService<Io> + Clone
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let peek = Peek::new(Protocol::detect)
        .deadline(silence)
        .unknown(Unknown::Pass);
    // First look for TLS. Then look for the protocol inside it, unless ALPN has agreed on one.
    let hooks = peek
        .clone()
        .chain(tls.when(|info| info.get() == Some(&Protocol::Tls)))
        .chain(peek.when(|info| info.get().is_some_and(|tls: &TlsInfo| tls.alpn().is_none())));

    let http = Http::new(service_fn(hello));
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let greet =
        OnConnectLayer::new(|peer: Peer<Bytes>| async move { peer.send("220 ready".into()).await });
    let lines = Pipeline::new(Lines::default).make_service(
        ServiceBuilder::new()
            .layer(greet)
            .service_fn(move |_peer| async move { Ok::<_, Infallible>(echo) }),
    );
    ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .layer(PreConnectLayer::new(hooks))
        .service_fn(move |conn: Connection<_>| {
            if speaks_http(conn.info()) {
                Either::Left(http.clone().oneshot(conn))
            } else {
                Either::Right(lines.clone().oneshot(conn))
            }
        })
}

/// Returns whether the connection speaks HTTP. ALPN can only agree on a version of HTTP. Without
/// ALPN, the first bytes decide.
fn speaks_http(info: &ConnectionInfo) -> bool {
    match info.get().and_then(TlsInfo::alpn) {
        Some(_h2_or_http_1_1) => true,
        None => matches!(info.get(), Some(Protocol::Http1 | Protocol::Http2)),
    }
}

/// Answers with the protocol of the request.
async fn hello(request: Request<RequestBody>) -> Result<Response<String>, Infallible> {
    let info = request.extensions().get::<ConnectionInfo>();
    let tls = info.and_then(|info| info.get::<TlsInfo>());
    let over = tls.map_or("in the clear".to_owned(), |tls| {
        format!("over TLS {}", tls.version())
    });
    Ok(Response::new(format!("{:?} {over}\n", request.version())))
}

/// Makes a self-signed certificate for `localhost`. No client trusts it.
fn self_signed(dir: &TempDir) -> Result<(PathBuf, PathBuf), BoxError> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    Ok((cert, key))
}
