//! A stack that is served over each kind of socket, and its clients.
#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each test binary uses its own part"
)]

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::Layer;
use tower_tcp::bind::Socket;
use tower_tcp::pipeline::{InFlight, Multiplexed};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve_with};
use tower_tcp::tls::{self, Tls};
use tower_tcp::{ConnectionService, Pipeline, Server, ServerBuilder};

use crate::certificates::certified;

/// A client's stream.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {
    /// Leaves so that the server cannot answer: by a reset, or over a Unix socket by closing.
    fn vanish(self: Box<Self>) -> io::Result<()>;

    /// Returns the client's port, over TCP.
    fn port(&self) -> Option<u16> {
        None
    }
}

impl Io for TcpStream {
    fn vanish(self: Box<Self>) -> io::Result<()> {
        self.set_zero_linger()
    }

    fn port(&self) -> Option<u16> {
        Some(self.local_addr().ok()?.port())
    }
}

impl Io for TlsStream<TcpStream> {
    fn vanish(self: Box<Self>) -> io::Result<()> {
        self.get_ref().0.set_zero_linger()
    }

    fn port(&self) -> Option<u16> {
        self.get_ref().0.port()
    }
}

impl Io for UnixStream {
    fn vanish(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}

/// The kind of socket of a server. TLS is over TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Tls,
    Unix,
}

pub(crate) const TRANSPORTS: [Transport; 3] = [Transport::Tcp, Transport::Tls, Transport::Unix];

/// A stack for sockets as they are and for those behind TLS.
pub(crate) trait Stack:
    ConnectionService<Socket> + ConnectionService<tls::TlsStream<Socket>> + Clone
{
}

impl<S> Stack for S where
    S: ConnectionService<Socket> + ConnectionService<tls::TlsStream<Socket>> + Clone
{
}

/// A server over real sockets.
pub(crate) struct Over {
    pub(crate) served: Served<()>,
    transport: Transport,
    client: TlsConnector,
    dir: TempDir,
}

impl Over {
    /// Serves a stack by a server that is named after its transport and `way`.
    pub(crate) async fn serve<S: Stack>(
        transport: Transport,
        way: &str,
        builder: ServerBuilder,
        stack: S,
    ) -> Self {
        let builder = builder.name(format!("{transport:?}, {way}"));
        Self::behind(transport, builder, stack.clone(), |tls| {
            PreConnectLayer::new(tls).layer(stack)
        })
        .await
    }

    /// Serves `plain`, or over TLS the stack that `secure` makes with the TLS hook.
    pub(crate) async fn behind<P, S>(
        transport: Transport,
        builder: ServerBuilder,
        plain: P,
        secure: impl FnOnce(Tls) -> S,
    ) -> Self
    where
        P: ConnectionService<Socket>,
        S: ConnectionService<Socket>,
    {
        let dir = tempfile::tempdir().expect("a directory");
        let address = match transport {
            Transport::Unix => format!("unix:{}", dir.path().join("socket").display()),
            Transport::Tcp | Transport::Tls => "127.0.0.1:0".to_owned(),
        };
        let server: Server = builder.listen(&*address).bind().await.expect("it is bound");
        let (config, client) = certified();
        let served = match transport {
            Transport::Tls => serve_with(server, (), secure(Tls::from(config))),
            Transport::Tcp | Transport::Unix => serve_with(server, (), plain),
        };
        Self {
            served,
            transport,
            client: TlsConnector::from(client),
            dir,
        }
    }

    /// Serves a pipeline in each of the three ways of dispatch, eight requests at a time where
    /// there may be several.
    pub(crate) async fn each_way<F, K, T>(
        transport: Transport,
        builder: impl Fn() -> ServerBuilder,
        pipeline: Pipeline<F, K, T>,
    ) -> [Self; 3]
    where
        Pipeline<F, K, T>: Stack,
        Pipeline<F, K, T, InFlight>: Stack,
        Pipeline<F, K, T, Multiplexed>: Stack,
    {
        let (one, in_flight) = (pipeline.clone(), pipeline.clone().in_flight(8));
        [
            Self::serve(transport, "one at a time", builder(), one).await,
            Self::serve(transport, "in flight", builder(), in_flight).await,
            Self::serve(transport, "multiplexed", builder(), pipeline.multiplexed(8)).await,
        ]
    }

    pub(crate) fn transport(&self) -> Transport {
        self.transport
    }

    /// Returns the address of a server that does not listen on a Unix socket.
    pub(crate) fn addr(&self) -> SocketAddr {
        let address = self.served.handle().local_addrs()[0].tcp();
        address.expect("it is TCP")
    }

    /// Returns where a server would listen on a Unix socket.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub(crate) async fn connect(&self) -> Box<dyn Io> {
        if let Transport::Unix = self.transport {
            let io = UnixStream::connect(self.path()).await;
            return Box::new(io.expect("it listens"));
        }
        let io = TcpStream::connect(self.addr()).await.expect("it listens");
        if let Transport::Tcp = self.transport {
            return Box::new(io);
        }
        let name = ServerName::try_from("localhost").expect("a name");
        let secured = self.client.connect(name, io).await;
        Box::new(secured.expect("the handshake is made"))
    }

    /// Connects, and sends these bytes.
    pub(crate) async fn send(&self, bytes: &[u8]) -> Box<dyn Io> {
        let mut io = self.connect().await;
        io.write_all(bytes).await.expect("the server reads");
        io.flush().await.expect("the server reads");
        io
    }
}
