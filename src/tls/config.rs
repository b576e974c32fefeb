//! Builds a TLS configuration. `build` reads the builder's files, and each reload reads them again.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::version::{TLS12, TLS13};

use super::Tls;
use super::clients::{self, ClientCertificates, Policy};
use super::current::{Configuration, Current};
use super::error::TlsError;
use super::identity::Identity;
use super::info::registered_name;
use super::names::Names;
use super::pem::Pem;
use super::tickets::Tickets;

/// A version of TLS, for [`TlsBuilder::min_version`]. Versions before TLS 1.2 are not supported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TlsVersion {
    /// TLS 1.2.
    #[default]
    V1_2,
    /// TLS 1.3.
    V1_3,
}

/// Builds a [`Tls`]. Created by [`Tls::builder`].
///
/// Keep the builder to pass it to [`Tls::reload`].
#[derive(Clone, Default)]
#[must_use = "a builder does nothing until `build`"]
pub struct TlsBuilder {
    default: Option<Identity>,
    /// The certificates for names. If the name is `None`, the certificate is used for all DNS names
    /// in it.
    named: Vec<(Option<String>, Identity)>,
    clients: Option<(Pem, ClientCertificates)>,
    revocation_lists: Vec<Pem>,
    alpn: Vec<Vec<u8>>,
    ticket_keys: Vec<PathBuf>,
    provider: Option<Arc<CryptoProvider>>,
    min_version: TlsVersion,
    cipher_suites: Option<Vec<String>>,
}

impl TlsBuilder {
    /// Sets the default certificate, from a PEM file with the certificate chain (the server's own
    /// certificate first) and a PEM file with the private key.
    ///
    /// Both may be the same file. [`build`](Self::build) reads the files. This is a short form of
    /// [`identity`](Self::identity).
    pub fn pem_files(self, chain: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.identity(Identity::pem_files(chain, key))
    }

    /// Sets the default certificate, from a PEM text with the certificate chain (the server's own
    /// certificate first) and a PEM text with the private key.
    ///
    /// This is a short form of [`identity`](Self::identity).
    pub fn certificate(self, chain: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.identity(Identity::pem(chain, key))
    }

    /// Sets the default certificate. It is used for clients that request no name, or a name that
    /// matches no other certificate. Default: none, and such clients are refused.
    ///
    /// See the section on [names](super#names).
    pub fn identity(mut self, default: Identity) -> Self {
        self.default = Some(default);
        self
    }

    /// Adds the certificate for a name, or for a wildcard such as `*.example.org`.
    ///
    /// Write an internationalized name as in DNS (`xn--...`). The case of letters does not matter.
    /// [`build`](Self::build) fails if the name is not valid, already has a certificate, or is not
    /// covered by this certificate. A wildcard is not checked against the certificate.
    pub fn identity_for(mut self, name: impl Into<String>, identity: Identity) -> Self {
        self.named.push((Some(name.into()), identity));
        self
    }

    /// Adds a certificate for all DNS names in it (its *subject alternative names*), including
    /// wildcards.
    ///
    /// [`build`](Self::build) fails if the certificate contains no DNS name, or if one of its DNS
    /// names already has a certificate.
    pub fn identity_by_san(mut self, identity: Identity) -> Self {
        self.named.push((None, identity));
        self
    }

    /// Sets the protocols for ALPN, most preferred first. Default: none.
    ///
    /// If any are set, a client that offers only other protocols is refused (RFC 7301, section
    /// 3.2). A client that does not use ALPN is not refused. [`build`](Self::build) fails if a name
    /// is empty or longer than 255 bytes.
    pub fn alpn(mut self, protocols: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Self {
        self.alpn = protocols
            .into_iter()
            .map(|name| name.as_ref().to_vec())
            .collect();
        self
    }

    /// Requests a client certificate that chains to one of these root certificates, which are
    /// passed as PEM text. `requirement` says whether a client without a certificate is refused.
    /// Default: no certificate is requested.
    ///
    /// The client's certificates are in
    /// [`TlsInfo::peer_certificates`](super::TlsInfo::peer_certificates).
    pub fn client_certificates(
        mut self,
        roots: impl Into<Vec<u8>>,
        requirement: ClientCertificates,
    ) -> Self {
        self.clients = Some((
            Pem::Memory("the passed client roots", roots.into()),
            requirement,
        ));
        self
    }

    /// Requests a certificate from clients, as [`client_certificates`](Self::client_certificates)
    /// does, with the roots from a PEM file.
    pub fn client_certificates_file(
        mut self,
        roots: impl Into<PathBuf>,
        requirement: ClientCertificates,
    ) -> Self {
        self.clients = Some((Pem::File(roots.into()), requirement));
        self
    }

    /// Adds certificate revocation lists, passed as PEM text. Default: none, and no certificate is
    /// considered revoked.
    ///
    /// If there is at least one list, all certificates in a client's chain are checked, except the
    /// root. The client is refused if one of them is revoked, or is not covered by an unexpired
    /// list. See the section on [revocation](super#revocation). [`build`](Self::build) fails if
    /// there are lists but no client certificates are requested.
    pub fn revocation_lists(mut self, pem: impl Into<Vec<u8>>) -> Self {
        let pem = Pem::Memory("the passed revocation lists", pem.into());
        self.revocation_lists.push(pem);
        self
    }

    /// Adds certificate revocation lists, as [`revocation_lists`](Self::revocation_lists) does,
    /// from a PEM file with one or more lists.
    pub fn revocation_lists_file(mut self, pem: impl Into<PathBuf>) -> Self {
        self.revocation_lists.push(Pem::File(pem.into()));
        self
    }

    /// Sets the files with the keys of session tickets. Several processes with the same keys can
    /// resume each other's sessions. The first key encrypts tickets, and all keys decrypt them.
    /// Default: none, so only the process that created a session can resume it.
    ///
    /// A file contains one key: 48 or 80 random bytes, like the files of nginx's
    /// `ssl_session_ticket_key`. nginx uses another cipher, so its tickets are not accepted here.
    /// An attacker with a stolen key can decrypt recorded TLS 1.2 sessions whose tickets were
    /// encrypted with that key, and can impersonate the clients of all sessions with such tickets.
    /// Protect the file like a private key, and rotate the key daily. See the section on
    /// [tickets](super#tickets).
    pub fn ticket_key_files(mut self, files: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        self.ticket_keys = files.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the cryptographic provider that rustls uses.
    ///
    /// Default: *ring*. Why: it needs no build tools besides a C compiler. For aws-lc-rs, depend on
    /// rustls 0.23 with its feature `aws_lc_rs`, and pass
    /// `rustls::crypto::aws_lc_rs::default_provider()`. With any provider, *ring* encrypts the
    /// session tickets if their keys come from [files](Self::ticket_key_files).
    ///
    /// ```
    /// use tower_tcp::tls::{Tls, rustls::crypto::ring};
    ///
    /// let builder = Tls::builder().crypto_provider(ring::default_provider());
    /// # _ = builder;
    /// ```
    pub fn crypto_provider(mut self, provider: impl Into<Arc<CryptoProvider>>) -> Self {
        self.provider = Some(provider.into());
        self
    }

    /// Sets the lowest TLS version that a client may use.
    ///
    /// Default: [`TlsVersion::V1_2`]. Why: it is the lowest version that rustls supports. A client
    /// that supports only lower versions gets the alert `protocol_version`.
    pub fn min_version(mut self, version: TlsVersion) -> Self {
        self.min_version = version;
        self
    }

    /// Restricts the cipher suites to those with these names, as registered by IANA.
    ///
    /// Default: all suites of the provider. Why: none of them is known to be weak. Each TLS version
    /// has its own suites: the names for TLS 1.3 contain no `WITH`. The server uses the first suite
    /// in the client's order of preference that has one of these names and fits the TLS version and
    /// the certificate. [`build`](Self::build) fails unless the provider has a suite for each of
    /// these names.
    ///
    /// ```
    /// use tower_tcp::tls::Tls;
    ///
    /// let builder = Tls::builder()
    ///     .cipher_suites(["TLS_AES_256_GCM_SHA384", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"]);
    /// # _ = builder;
    /// ```
    pub fn cipher_suites(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.cipher_suites = Some(names.into_iter().map(Into::into).collect());
        self
    }

    /// Reads the files and creates the [`Tls`] hook.
    ///
    /// Reading blocks the thread, so call this method before serving.
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
    pub fn build(&self) -> Result<Tls, TlsError> {
        let current = Current::new(self.configuration()?);
        Ok(Tls { current })
    }

    /// Reads the files and creates a configuration with a new session cache, so no cached session
    /// outlives the configuration under which it was created.
    pub(super) fn configuration(&self) -> Result<Configuration, TlsError> {
        let provider = self.provider()?;
        let names = Arc::new(self.names(&provider)?);
        let versions: &[_] = match self.min_version {
            TlsVersion::V1_2 => &[&TLS13, &TLS12],
            TlsVersion::V1_3 => &[&TLS13],
        };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(TlsError::Config)?;
        let (builder, policy) = match &self.clients {
            Some((roots, requirement)) => {
                let lists = &self.revocation_lists;
                let (verifier, policy) = clients::verifier(roots, *requirement, lists, &provider)?;
                (builder.with_client_cert_verifier(verifier), policy)
            }
            None if self.revocation_lists.is_empty() => {
                (builder.with_no_client_auth(), Policy::default())
            }
            None => return Err(TlsError::RevocationWithoutClients),
        };
        let mut server = builder.with_cert_resolver(names.clone());
        if let Some(bad) = self
            .alpn
            .iter()
            .find(|name| !(1..=255).contains(&name.len()))
        {
            let protocol = bad.clone();
            return Err(TlsError::BadProtocol { protocol });
        }
        server.alpn_protocols.clone_from(&self.alpn);
        if !self.ticket_keys.is_empty() {
            server.ticketer = Arc::new(Tickets::read(&self.ticket_keys, policy)?);
        }
        Ok(Configuration {
            server: Arc::new(server),
            names: Some(names),
        })
    }

    fn provider(&self) -> Result<Arc<CryptoProvider>, TlsError> {
        let provider = match &self.provider {
            Some(provider) => Arc::clone(provider),
            None => Arc::new(ring::default_provider()),
        };
        let Some(names) = &self.cipher_suites else {
            return Ok(provider);
        };
        let suites = names.iter().map(|name| {
            let mut all = provider.cipher_suites.iter().copied();
            all.find(|suite| registered_name(suite.suite()) == Some(name))
                .ok_or_else(|| TlsError::UnknownCipherSuite { name: name.clone() })
        });
        Ok(Arc::new(CryptoProvider {
            cipher_suites: suites.collect::<Result<_, _>>()?,
            ..provider.as_ref().clone()
        }))
    }

    fn names(&self, provider: &CryptoProvider) -> Result<Names, TlsError> {
        let mut names = Names::default();
        if let Some(default) = &self.default {
            names.set_default(default, provider)?;
        }
        for (name, identity) in &self.named {
            match name {
                Some(name) => names.add(name, identity, provider)?,
                None => names.add_by_san(identity, provider)?,
            }
        }
        if names.is_empty() {
            return Err(TlsError::NoIdentity);
        }
        Ok(names)
    }
}

impl fmt::Debug for TlsBuilder {
    /// Formats no fields, because some of them contain keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsBuilder").finish_non_exhaustive()
    }
}
