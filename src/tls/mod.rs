//! TLS as a pre-connect hook. The hook takes a plain connection and returns an encrypted one.
//!
//! [`Tls`] is a service that takes a [`Connection<Io>`] and returns a
//! [`Connection<TlsStream<Io>>`](TlsStream). The hook uses [rustls]. It adds a [`TlsInfo`], which
//! contains the parameters of the session, to the facts of the connection. All layers and services
//! behind the hook can read the `TlsInfo`.
//!
//! [`Tls::builder`] allows TLS 1.2 and 1.3 only. *ring* provides the cryptography, unless
//! [`TlsBuilder::crypto_provider`] sets another provider. 0-RTT is off, because early data can be
//! replayed. Clients can resume sessions. By default, the server keeps sessions in a cache in
//! memory. The cache has room for 256 sessions (rustls's default), so clients cannot exhaust
//! memory. The cache is lost when the process ends.
//!
//! A handshake has no deadline of its own. Run the hook in a
//! [`PreConnectLayer`](crate::preconnect::PreConnectLayer), which limits the time and the number of
//! handshakes in progress. If a proxy sends PROXY headers, chain `ProxyProtocol` (feature
//! `proxy-protocol`) in front of this hook, because the header arrives before the handshake.
//!
//! If the handshake fails, the connection ends with [`EndReason::TlsHandshakeFailed`], and the
//! [cause](crate::ConnectionEnded) contains the error. The peer gets a TLS alert, unless it has
//! sent one itself, or the stream has ended, has failed or takes no more output.
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
//! # Names
//!
//! One server can have several certificates. The name that the client requests (SNI) selects the
//! certificate: the one for exactly this name, else the one for a matching wildcard, else the
//! default certificate. A `*` matches exactly one label, so `*.example.org` matches neither
//! `example.org` nor `a.b.example.org`.
//!
//! A client that requests no name, or an unknown name, gets the default certificate.
//! [`pem_files`](TlsBuilder::pem_files), [`certificate`](TlsBuilder::certificate) and
//! [`identity`](TlsBuilder::identity) set the default certificate. Without a default certificate,
//! such a client is refused. The alert is `unrecognized_name` (RFC 6066) for an unknown name, and
//! `missing_extension` (RFC 8446) if the client requests no name. In both cases the
//! [cause](crate::ConnectionEnded) contains an [`UnknownServerName`].
//!
//! ```
//! use tower_tcp::tls::{Identity, Tls};
//!
//! # let pem = |name: &str| {
//! #     let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
//! #     Identity::pem(made.cert.pem(), made.signing_key.serialize_pem())
//! # };
//! # let (default, shop, others) = (pem("example.org"), pem("shop.test"), pem("*.example.org"));
//! let tls = Tls::builder()
//!     .identity(default) // without it, other names are refused
//!     .identity_for("shop.test", shop)
//!     .identity_for("*.example.org", others)
//!     .build()?;
//! # Ok::<_, tower_tcp::tls::TlsError>(())
//! ```
//!
//! # Reload
//!
//! [`Tls::reload`] reads all files of a builder again while the server runs: the certificates, keys
//! and OCSP responses, the roots and revocation lists for clients, and the ticket keys. If a file
//! is unusable, `reload` returns an error that names the file, and the old configuration stays in
//! use. Otherwise all clones of the hook use the new configuration from then on, for every
//! handshake whose `ClientHello` has not yet arrived completely. Established connections are not
//! affected.
//!
//! Each configuration has its own session cache, and session tickets are bound to the [rules for
//! client certificates](#tickets). So a session cannot be resumed under rules other than those
//! under which it was created. For example, after a reload with a list that revokes a client's
//! certificate, this client cannot connect with its old session.
//!
//! ```
//! use tower_tcp::tls::Tls;
//!
//! # let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
//! # let dir = tempfile::tempdir()?;
//! # let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
//! # std::fs::write(&cert, made.cert.pem())?;
//! # std::fs::write(&key, made.signing_key.serialize_pem())?;
//! let builder = Tls::builder().pem_files(&cert, &key);
//! let tls = builder.build()?; // a clone goes into the stack
//!
//! # std::fs::write(&cert, "broken")?;
//! // For example at SIGHUP. In async code, use `spawn_blocking`.
//! if let Err(err) = tls.reload(&builder) {
//!     eprintln!("the old certificates stay: {err}");
//! }
//! # assert_eq!(
//! #     tls.reload(&builder).unwrap_err().to_string(),
//! #     format!("no certificate in {}", cert.display())
//! # );
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! # Revocation
//!
//! [`TlsBuilder::revocation_lists_file`] adds certificate revocation lists (CRLs) to the
//! verification of clients. If there is at least one list, the revocation status of every
//! certificate in a client's chain, except the root, must be known:
//!
//! | a certificate in the client's chain | the client is |
//! | --- | --- |
//! | is on a list | refused with `certificate_revoked` |
//! | has an issuer without a list | refused with `unknown_ca` |
//! | has an issuer whose list is past its `nextUpdate` | refused with `unknown_ca` |
//!
//! OpenSSL and nginx also refuse the client in the last two cases. Replace a list before it
//! expires, and reload.
//!
//! When a session is resumed, the client's certificate is not verified again. So a session can be
//! resumed even after the certificate or a list has expired. After a reload, sessions in the cache
//! can no longer be resumed. Session tickets are no longer accepted if the rules for client
//! certificates have changed.
//!
//! ```no_run
//! use tower_tcp::tls::{ClientCertificates, Tls};
//!
//! let tls = Tls::builder()
//!     .pem_files("cert.pem", "key.pem")
//!     .client_certificates_file("clients.pem", ClientCertificates::Required)
//!     .revocation_lists_file("clients.crl")
//!     .build()?;
//! # Ok::<_, tower_tcp::tls::TlsError>(())
//! ```
//!
//! # Tickets
//!
//! A session ticket is an encrypted copy of a session, which the client keeps and sends to resume
//! the session. By default, a session is kept only in the cache of the process that created it, so
//! only that process can resume the session. With ticket keys from files, several processes can
//! resume each other's sessions, and a restarted process can resume earlier sessions.
//! [`TlsBuilder::ticket_key_files`] sets the files. Each contains one key, in the format of nginx's
//! `ssl_session_ticket_key`. `openssl rand 80 >ticket.key` creates such a file.
//!
//! The first key encrypts new tickets, and all keys decrypt tickets. To rotate keys, put a new key
//! in front of the old one and [reload](Tls::reload), in every process:
//!
//! ```
//! use tower_tcp::tls::Tls;
//!
//! # let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
//! # let dir = tempfile::tempdir()?;
//! # let path = |name: &str| dir.path().join(name);
//! # std::fs::write(path("cert.pem"), made.cert.pem())?;
//! # std::fs::write(path("key.pem"), made.signing_key.serialize_pem())?;
//! # std::fs::write(path("new.key"), [2; 80])?;
//! # std::fs::write(path("old.key"), [1; 80])?;
//! let tls = Tls::builder()
//!     .pem_files(path("cert.pem"), path("key.pem"))
//!     .ticket_key_files([path("new.key"), path("old.key")])
//!     .build()?;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! A ticket is accepted for 12 hours, as long as its key is configured and the rules for client
//! certificates are the same. If the roots, the revocation lists or the [`ClientCertificates`]
//! policy have changed, or are different in another process, the ticket is not accepted, and the
//! client is verified again.
//!
//! # Your own configuration
//!
//! For features that the builder lacks, configure rustls directly. To change such a configuration
//! at run time, use [`Tls::replace`] instead of [`Tls::reload`].
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

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tower_service::Service;
use tracing::Instrument;

use crate::connection::{Connection, not_a_layer};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::BoxError;
use crate::observe::Handshake;

pub use tokio_rustls::rustls;

mod clients;
mod config;
mod current;
mod error;
mod handshake;
mod identity;
mod info;
mod names;
mod pem;
mod records;
mod stream;
#[cfg(test)]
mod tests;
mod tickets;

pub use clients::ClientCertificates;
pub use config::{TlsBuilder, TlsVersion};
use current::{Configuration, Current};
pub use error::{TlsError, UnknownServerName};
pub use identity::Identity;
pub use info::TlsInfo;
pub use stream::TlsStream;

/// A pre-connect hook that performs the TLS handshake. Clones share the configuration and the
/// session cache.
///
/// As a service it is always ready, because the handshake runs in the future of a call. See the
/// [module docs](self).
///
/// The service fails with a boxed [`ConnectionEnded`], whose cause is an [`io::Error`]. There are
/// three cases:
///
/// - The `io::Error` contains a [`rustls::Error`] if rustls failed, for example because it
///   rejected a message of the peer, or received an alert.
/// - The `io::Error` contains an [`UnknownServerName`] if there is no default certificate, and the
///   peer requested no name or a name without a certificate.
/// - Otherwise the `io::Error` is the error of the stream, such as
///   [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if the peer closed the stream.
#[derive(Clone)]
pub struct Tls {
    current: Current,
}

impl Tls {
    /// Creates a builder for a configuration with certificates in PEM.
    pub fn builder() -> TlsBuilder {
        TlsBuilder::default()
    }

    /// Reads the files of a builder again, and replaces the configuration of this hook and of all
    /// its clones.
    ///
    /// Reading blocks the thread. In async code, call this method in
    /// [`spawn_blocking`](tokio::task::spawn_blocking). See the section on [reload](self#reload).
    ///
    /// # Errors
    ///
    /// Returns the error of [`TlsBuilder::build`]. The old configuration stays in use.
    pub fn reload(&self, builder: &TlsBuilder) -> Result<(), TlsError> {
        self.current.set(builder.configuration()?);
        Ok(())
    }

    /// Replaces the configuration of this hook and of all its clones with that of `new`.
    ///
    /// Use this method for a configuration that [`TlsBuilder`] cannot create. A handshake uses the
    /// new configuration if its `ClientHello` is not yet complete at the time of this call. Earlier
    /// sessions can be resumed only if the new configuration has the session cache or the ticket
    /// keys of the old one.
    pub fn replace(&self, new: impl Into<Self>) {
        self.current.set(new.into().current.get());
    }
}

impl From<Arc<ServerConfig>> for Tls {
    fn from(config: Arc<ServerConfig>) -> Self {
        Self {
            current: Current::new(Configuration {
                server: config,
                names: None,
            }),
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
        // rustls gets the stream without the counter, so that the connection counts only decrypted
        // bytes.
        let (io, conn) = conn.into_parts();
        let handshake = Handshake::begin();
        let current = self.current.clone();
        Box::pin(async move {
            let accept = handshake::accept(&current, io).instrument(handshake.span().clone());
            match accept.await {
                Ok((stream, info)) => {
                    handshake.done(info.version(), info.is_resumed());
                    let mut conn = conn.map_io(|()| stream);
                    conn.insert(info);
                    Ok(conn)
                }
                Err((err, io)) => {
                    handshake.failed(&err);
                    // `InvalidData` means that the peer's input was rejected with an alert, or
                    // was itself an alert. Any other error comes from the stream.
                    let alerted = err.kind() == io::ErrorKind::InvalidData;
                    // The end reason is set before the wait below, because a deadline may drop this
                    // future while it waits.
                    let ended =
                        conn.ended(ConnectionEnded::new(EndReason::TlsHandshakeFailed, err));
                    if alerted {
                        handshake::deliver_alert(io).await;
                    }
                    Err(ended.into())
                }
            }
        })
    }
}

not_a_layer!(Tls);
