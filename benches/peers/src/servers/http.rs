//! Serves one axum app with this crate, `axum::serve`, axum-server or tonic, in plain text or over
//! TLS.

mod rustls;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::ws::{WebSocket, WebSocketUpgrade};
use axum::response::Response;
use axum::response::sse::{Event, Sse};
use axum::routing::{any, get};
use axum::serve::{Listener, ListenerExt};
use axum_server::accept::NoDelayAcceptor;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use clap::{Parser, ValueEnum};
use futures_util::stream::{self, Stream, StreamExt};
use hyper_util::rt::TokioTimer;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tower::ServiceBuilder;
use tower_tcp::http::Http;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Server};

use rustls::rustls;

/// The size of a WebSocket's read buffer, in bytes. An idle WebSocket keeps its buffer. The default
/// is 128 KiB.
const READ_BUFFER: usize = 4 * 1024;

#[derive(Parser)]
struct Args {
    by: By,
    /// The certificate and its key, in PEM. Without them there is no TLS.
    tls: Vec<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum By {
    TowerTcp,
    AxumServe,
    AxumServer,
    /// With the defaults of this crate: a deadline for request heads, and the peer's address in
    /// each request.
    AxumServerGuarded,
    /// HTTP/2 in plain text only, even with a certificate.
    Tonic,
}

fn app() -> Router {
    Router::new()
        .route("/", get(async || "Hello, world!"))
        .route("/echo", any(echo))
        .route("/events", get(events))
}

/// Sends one event, and keeps the stream open.
async fn events() -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let first = stream::iter([Ok(Event::default().data("line"))]);
    Sse::new(first.chain(stream::pending()))
}

/// Sends the messages of a WebSocket back.
async fn echo(upgrade: WebSocketUpgrade) -> Response {
    let upgrade = upgrade.read_buffer_size(READ_BUFFER);
    upgrade.on_upgrade(|mut socket: WebSocket| async move {
        while let Some(Ok(message)) = socket.recv().await {
            if socket.send(message).await.is_err() {
                return;
            }
        }
    })
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let Args { by, tls } = Args::parse();
    let tls = match &tls[..] {
        [cert, key] => Some((cert.as_path(), key.as_path())),
        _ => None,
    };
    match by {
        By::TowerTcp => tower_tcp(tls).await,
        By::AxumServe => axum_serve(tls.map(rustls).transpose()?).await,
        By::AxumServer => axum_server(tls.map(rustls).transpose()?, false).await,
        By::AxumServerGuarded => axum_server(tls.map(rustls).transpose()?, true).await,
        By::Tonic => tonic().await,
    }
}

async fn tower_tcp(tls: Option<(&Path, &Path)>) -> Result<(), BoxError> {
    let server = Server::bind("127.0.0.1:0").await?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
    }
    let stack = ServiceBuilder::new().layer(ConnectionTraceLayer::new());
    let http = Http::new(app());
    match tls {
        Some((cert, key)) => {
            let tls = Tls::builder().pem_files(cert, key).build()?;
            let tls = PreConnectLayer::new(tls);
            server.serve(stack.layer(tls).service(http)).await?
        }
        None => server.serve(stack.service(http)).await?,
    };
    Ok(())
}

async fn axum_serve(tls: Option<Arc<ServerConfig>>) -> Result<(), BoxError> {
    let tcp = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", tcp.local_addr()?);
    match tls {
        Some(config) => {
            let acceptor = config.into();
            axum::serve(Handshakes { tcp, acceptor }, app()).await?;
        }
        None => {
            let tcp = tcp.tap_io(|stream| drop(stream.set_nodelay(true)));
            axum::serve(tcp, app()).await?;
        }
    }
    Ok(())
}

/// Performs TLS handshakes one after the other. That is enough, because the clients keep their
/// connections open.
struct Handshakes {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for Handshakes {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (stream, peer) = Listener::accept(&mut self.tcp).await;
            let begun = stream.set_nodelay(true);
            if begun.is_ok()
                && let Ok(stream) = self.acceptor.accept(stream).await
            {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

async fn axum_server(tls: Option<Arc<ServerConfig>>, guarded: bool) -> Result<(), BoxError> {
    let tcp = std::net::TcpListener::bind("127.0.0.1:0")?;
    tcp.set_nonblocking(true)?;
    println!("listening on {}", tcp.local_addr()?);
    let mut server = axum_server::from_tcp(tcp).acceptor(NoDelayAcceptor::new());
    if guarded {
        // hyper has a default deadline for request heads, but applies it only with a timer.
        server.http_builder().http1().timer(TokioTimer::new());
    }
    let tls = tls.map(|config| {
        let tls = RustlsAcceptor::new(RustlsConfig::from_config(config));
        tls.acceptor(NoDelayAcceptor::new())
    });
    let bare = app().into_make_service();
    let informed = app().into_make_service_with_connect_info::<SocketAddr>();
    match (tls, guarded) {
        (Some(tls), true) => server.acceptor(tls).serve(informed).await?,
        (Some(tls), false) => server.acceptor(tls).serve(bare).await?,
        (None, true) => server.serve(informed).await?,
        (None, false) => server.serve(bare).await?,
    }
    Ok(())
}

async fn tonic() -> Result<(), BoxError> {
    let tcp = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", tcp.local_addr()?);
    let incoming = TcpIncoming::from(tcp).with_nodelay(Some(true));
    let routes = Routes::from(app());
    let server = tonic::transport::Server::builder().add_routes(routes);
    Ok(server.serve_with_incoming(incoming).await?)
}
