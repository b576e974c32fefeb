//! Builds a configuration from PEM, with errors that name the file at fault.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls_pki_types::pem::{self, PemObject};
use thiserror::Error;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

use super::Tls;
use crate::error::BoxError;

/// The policy for clients without a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientCertificates {
    /// Refuses clients without a valid certificate.
    Required,
    /// Accepts clients without a certificate. A certificate that a client does send must be valid.
    Optional,
}

/// The error of [`TlsBuilder::build`].
///
/// The field `pem` is the path of the file at fault, or a name for the text that was passed in
/// memory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// Neither [`pem_files`](TlsBuilder::pem_files) nor
    /// [`certificate`](TlsBuilder::certificate) was called.
    #[error("no certificate was given")]
    NoneGiven,

    /// A file could not be read.
    #[error("cannot read {pem}")]
    Unreadable {
        /// The path of the file.
        pem: String,
        /// The error of the system.
        #[source]
        source: io::Error,
    },

    /// A file or text is not PEM.
    #[error("malformed PEM in {pem}")]
    Malformed {
        /// The path of the file, or the name of the text.
        pem: String,
        /// The error of the parser.
        #[source]
        source: pem::Error,
    },

    /// A file or text contains no certificate.
    #[error("no certificate in {pem}")]
    NoCertificate {
        /// The path of the file, or the name of the text.
        pem: String,
    },

    /// A file or text contains no private key, or only an encrypted one.
    #[error("no unencrypted private key in {pem}")]
    NoKey {
        /// The path of the file, or the name of the text.
        pem: String,
    },

    /// The server's own certificate is unusable.
    #[error("unusable certificate in {pem}")]
    BadCertificate {
        /// The path of the file, or the name of the text.
        pem: String,
        /// The reason.
        #[source]
        source: rustls::Error,
    },

    /// The private key is unusable. RSA, ECDSA and Ed25519 keys are supported.
    #[error("unusable private key in {pem}")]
    BadKey {
        /// The path of the file, or the name of the text.
        pem: String,
        /// The reason.
        #[source]
        source: rustls::Error,
    },

    /// The private key does not belong to the certificate.
    #[error("the private key in {key} does not match the certificate in {certificate}")]
    KeyMismatch {
        /// The path or name of the certificate's file or text.
        certificate: String,
        /// The path or name of the key's file or text.
        key: String,
    },

    /// The root certificates for clients are unusable.
    #[error("unusable roots for client certificates in {pem}")]
    BadRoots {
        /// The path of the file, or the name of the text.
        pem: String,
        /// The reason.
        #[source]
        source: BoxError,
    },

    /// rustls rejected the configuration as a whole.
    #[error("rustls refused the configuration")]
    Config(#[source] rustls::Error),
}

/// Builds a [`Tls`]. Created by [`Tls::builder`].
#[derive(Default)]
#[must_use = "a builder does nothing until `build`"]
pub struct TlsBuilder {
    identity: Option<(Pem, Pem)>,
    clients: Option<(Pem, ClientCertificates)>,
    alpn: Vec<Vec<u8>>,
}

impl TlsBuilder {
    /// Sets the files of the certificate chain, the server's own certificate first, and of its
    /// private key.
    ///
    /// Both may be the same file. [`build`](Self::build) reads them, once.
    pub fn pem_files(mut self, chain: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.identity = Some((Pem::File(chain.into()), Pem::File(key.into())));
        self
    }

    /// Sets the certificate chain, the server's own certificate first, and its private key as PEM
    /// text.
    pub fn certificate(mut self, chain: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.identity = Some((
            Pem::Memory("the certificate chain given", chain.into()),
            Pem::Memory("the private key given", key.into()),
        ));
        self
    }

    /// Sets the protocols to offer by ALPN, most preferred first. Default: none.
    ///
    /// If any are set, a client that offers only others is refused (RFC 7301, section 3.2). A
    /// client without ALPN is always served.
    pub fn alpn(mut self, protocols: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Self {
        self.alpn = protocols
            .into_iter()
            .map(|name| name.as_ref().to_vec())
            .collect();
        self
    }

    /// Asks clients for a certificate that chains to one of these roots, passed as PEM text.
    /// Default: no certificate is requested.
    ///
    /// The client's certificates are in
    /// [`TlsInfo::peer_certificates`](super::TlsInfo::peer_certificates).
    pub fn client_certificates(
        mut self,
        roots: impl Into<Vec<u8>>,
        whether: ClientCertificates,
    ) -> Self {
        self.clients = Some((Pem::Memory("the client roots given", roots.into()), whether));
        self
    }

    /// Asks clients for a certificate, as [`client_certificates`](Self::client_certificates) does,
    /// with the roots in a PEM file.
    pub fn client_certificates_file(
        mut self,
        roots: impl Into<PathBuf>,
        whether: ClientCertificates,
    ) -> Self {
        self.clients = Some((Pem::File(roots.into()), whether));
        self
    }

    /// Reads the files and creates the hook.
    ///
    /// Reading blocks the thread, so call it before serving.
    ///
    /// # Errors
    ///
    /// Returns a [`TlsError`], which names the file or text at fault if there is one.
    ///
    /// ```
    /// use tower_tcp::tls::Tls;
    ///
    /// let err = Tls::builder().pem_files("/nowhere/cert.pem", "/nowhere/key.pem").build();
    ///
    /// assert_eq!(err.unwrap_err().to_string(), "cannot read /nowhere/cert.pem");
    /// ```
    pub fn build(self) -> Result<Tls, TlsError> {
        let (chain_pem, key_pem) = self.identity.ok_or(TlsError::NoneGiven)?;
        let chain = chain_pem.certificates()?;
        let key = key_pem.private_key()?;
        let provider = Arc::new(ring::default_provider());

        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13, &TLS12])
            .map_err(TlsError::Config)?;
        let builder = match &self.clients {
            None => builder.with_no_client_auth(),
            Some((roots, whether)) => {
                builder.with_client_cert_verifier(roots.verifier(*whether, provider)?)
            }
        };
        let mut config = builder
            .with_single_cert(chain, key)
            .map_err(|err| match err {
                rustls::Error::InconsistentKeys(_) => TlsError::KeyMismatch {
                    certificate: chain_pem.name(),
                    key: key_pem.name(),
                },
                rustls::Error::InvalidCertificate(_) => TlsError::BadCertificate {
                    pem: chain_pem.name(),
                    source: err,
                },
                _ => TlsError::BadKey {
                    pem: key_pem.name(),
                    source: err,
                },
            })?;
        config.alpn_protocols = self.alpn;
        Ok(Tls::from(Arc::new(config)))
    }
}

impl fmt::Debug for TlsBuilder {
    /// Omits the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsBuilder").finish_non_exhaustive()
    }
}

/// The source of a PEM text, and the name that errors use for it.
enum Pem {
    File(PathBuf),
    Memory(&'static str, Vec<u8>),
}

impl Pem {
    fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Memory(name, _) => (*name).to_owned(),
        }
    }

    fn text(&self) -> Result<Cow<'_, [u8]>, TlsError> {
        match self {
            Self::File(path) => {
                std::fs::read(path)
                    .map(Cow::Owned)
                    .map_err(|source| TlsError::Unreadable {
                        pem: self.name(),
                        source,
                    })
            }
            Self::Memory(_, text) => Ok(Cow::Borrowed(text)),
        }
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let found: Vec<_> = CertificateDer::pem_slice_iter(&self.text()?)
            .collect::<Result<_, _>>()
            .map_err(|source| TlsError::Malformed {
                pem: self.name(),
                source,
            })?;
        if found.is_empty() {
            return Err(TlsError::NoCertificate { pem: self.name() });
        }
        Ok(found)
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(&self.text()?).map_err(|err| match err {
            pem::Error::NoItemsFound => TlsError::NoKey { pem: self.name() },
            source => TlsError::Malformed {
                pem: self.name(),
                source,
            },
        })
    }

    fn verifier(
        &self,
        whether: ClientCertificates,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let bad = |source: BoxError| TlsError::BadRoots {
            pem: self.name(),
            source,
        };
        let mut roots = RootCertStore::empty();
        for root in self.certificates()? {
            roots.add(root).map_err(|err| bad(err.into()))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        match whether {
            ClientCertificates::Required => verifier,
            ClientCertificates::Optional => verifier.allow_unauthenticated(),
        }
        .build()
        .map_err(|err| bad(err.into()))
    }
}
