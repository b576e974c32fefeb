//! TLS as a pre-connect hook. It takes a plain connection and returns an encrypted one.
//!
//! [`Tls`] is a service that takes a [`Connection<Io>`] and returns a
//! [`Connection<TlsStream<Io>>`](TlsStream), by [rustls]. The parameters of the session are in
//! [`ConnectionInfo::get::<TlsInfo>`](crate::ConnectionInfo::get) for all layers and services
//! behind it.
//!
//! [`Tls::builder`] allows TLS 1.2 and 1.3 only, with the *ring* provider. 0-RTT is off, because
//! early data can be replayed. Sessions can be resumed from a cache of rustls' default size, 256
//! sessions. It is bounded, so that clients cannot fill memory, and it is lost with the process.
//!
//! A handshake has no deadline of its own. Run the hook in a
//! [`PreConnectLayer`](crate::preconnect::PreConnectLayer), which bounds the time and the number of
//! handshakes in progress. If a proxy sends a PROXY header, it comes before the handshake, so chain
//! `ProxyProtocol` of the feature `proxy-protocol` in front of this hook.
//!
//! A connection whose handshake fails ends with [`EndReason::TlsHandshakeFailed`]. A TLS alert
//! tells the peer why.
//!
//! # Examples
//!
//! ```
//! use tower_tcp::tls::Tls;
//!
//! # let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
//! # let (chain, key) = (made.cert.pem(), made.signing_key.serialize_pem());
//! # let dir = tempfile::tempdir()?;
//! # let (cert_pem, key_pem) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
//! # std::fs::write(&cert_pem, chain)?;
//! # std::fs::write(&key_pem, key)?;
//! let tls = Tls::builder().pem_files(cert_pem, key_pem).alpn(["h2", "http/1.1"]).build()?;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! For features that the builder lacks, such as a certificate per name or new certificates at run
//! time, configure rustls directly:
//!
//! ```
//! use std::sync::Arc;
//! use tower_tcp::tls::{Tls, rustls};
//! use rustls::server::{ResolvesServerCert, ServerConfig};
//!
//! fn by_name(certificates: Arc<dyn ResolvesServerCert>) -> Result<Tls, rustls::Error> {
//!     let ring = Arc::new(rustls::crypto::ring::default_provider());
//!     let config = ServerConfig::builder_with_provider(ring)
//!         .with_safe_default_protocol_versions()?
//!         .with_no_client_auth()
//!         .with_cert_resolver(certificates);
//!     Ok(Tls::from(Arc::new(config)))
//! }
//! # by_name(Arc::new(rustls::server::ResolvesServerCertUsingSni::new()))?;
//! # Ok::<_, rustls::Error>(())
//! ```

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;
use tower_layer::Layer;
use tower_service::Service;
use tracing::Instrument;

use crate::connection::Connection;
use crate::end::{ConnectionEnded, EndReason};
use crate::error::BoxError;
use crate::observe::Handshake;

pub use tokio_rustls::rustls;
pub use tokio_rustls::server::TlsStream;

mod config;
mod info;
mod reads_on;
#[cfg(test)]
mod tests;

pub use config::{ClientCertificates, TlsBuilder, TlsError};
pub use info::TlsInfo;
use reads_on::ReadsOn;

/// The time to read from a peer after its handshake failed, so that it receives the alert.
const ALERT_LINGER: Duration = Duration::from_millis(200);
/// The maximum number of bytes to read from such a peer.
const ALERT_LINGER_BYTES: u64 = 16 * 1024;

/// A pre-connect hook that performs the TLS handshake. Clones share the configuration and the
/// session cache.
///
/// It is always ready, because the handshake runs in the returned future. See the [module
/// docs](self).
///
/// The service fails with a boxed [`ConnectionEnded`], whose cause is an [`io::Error`]. It contains
/// a [`rustls::Error`] if the peer's messages were at fault. Otherwise it is the error of the
/// stream, such as [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if the peer left.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
}

impl Tls {
    /// Creates a builder, which reads certificates in PEM.
    pub fn builder() -> TlsBuilder {
        TlsBuilder::default()
    }
}

impl From<Arc<ServerConfig>> for Tls {
    fn from(config: Arc<ServerConfig>) -> Self {
        Self {
            acceptor: TlsAcceptor::from(config),
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl<Io> Service<Connection<Io>> for Tls
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Response = Connection<TlsStream<Io>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, conn: Connection<Io>) -> Self::Future {
        // rustls gets the bare stream, so that the connection counts plain bytes only.
        let (io, conn) = conn.into_parts();
        let handshake = Handshake::begin();
        let accept = accept(self.acceptor.clone(), io).instrument(handshake.span().clone());
        Box::pin(async move {
            match accept.await {
                Ok(stream) => {
                    let info = TlsInfo::new(stream.get_ref().1);
                    handshake.done(info.version(), info.is_resumed());
                    let mut conn = conn.map_io(|()| stream);
                    conn.insert(info);
                    Ok(conn)
                }
                Err((err, io)) => {
                    handshake.failed(&err);
                    // `InvalidData` is rustls' verdict on the input, with an alert. Any other error
                    // is the stream's own.
                    let alerted = err.kind() == io::ErrorKind::InvalidData;
                    // The end is proposed before the wait below, during which a deadline may drop
                    // this future.
                    let ended =
                        conn.ended(ConnectionEnded::new(EndReason::TlsHandshakeFailed, err));
                    if alerted {
                        deliver_alert(io).await;
                    }
                    Err(ended.into())
                }
            }
        })
    }
}

/// Makes `.layer(tls)` a compiler error that names `PreConnectLayer`. Nothing implements the bound.
#[doc(hidden)]
impl<S: sealed::BehindPreConnectLayer> Layer<S> for Tls {
    type Service = S;

    fn layer(&self, inner: S) -> S {
        inner
    }
}

#[expect(unnameable_types, reason = "sealed: a bound that nothing meets")]
mod sealed {
    #[diagnostic::on_unimplemented(
        message = "a hook is not a layer: put it into `PreConnectLayer::new(tls)`",
        label = "`Tls` in place of a layer",
        note = "`.layer(PreConnectLayer::new(tls))` puts TLS in front of the service behind it"
    )]
    pub trait BehindPreConnectLayer {}
}

/// Performs the handshake.
async fn accept<Io>(acceptor: TlsAcceptor, io: Io) -> Result<TlsStream<Io>, (io::Error, Io)>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let shaken = acceptor.accept(ReadsOn::new(io)).into_fallible().await;
    let (io, session) = shaken
        .map_err(|(err, stream)| (stream.failed_write.unwrap_or(err), stream.io))?
        .into_inner();
    // The session continues over the bare stream. This does not wait, because the session is
    // established and has nothing to write.
    let established = acceptor.accept_with(io.io, |new| *new = session);
    established.into_fallible().await
}

/// Closes a stream to which an alert was just written.
///
/// Closing a TCP socket with unread input resets it, and a reset can overtake the alert. A peer
/// that does not speak TLS has often sent more than was read. So this shuts down writing first and
/// then reads a little.
async fn deliver_alert<Io: AsyncRead + AsyncWrite + Unpin>(mut io: Io) {
    let ending = async {
        io.shutdown().await?;
        tokio::io::copy(&mut io.take(ALERT_LINGER_BYTES), &mut tokio::io::sink()).await
    };
    // However this ends, the stream is dropped next, and the handshake's own error is reported.
    _ = tokio::time::timeout(ALERT_LINGER, ending).await;
}
