//! A certificate of the server: its chain, its private key, and optionally an OCSP response.

use std::fmt;
use std::path::PathBuf;

use tokio_rustls::rustls;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::sign::CertifiedKey;

use super::error::TlsError;
use super::pem::{self, Pem};

/// A certificate of the server: its chain, its private key, and optionally an OCSP response.
///
/// ```
/// use tower_tcp::tls::{Identity, Tls};
///
/// let builder = Tls::builder()
///     .identity(Identity::pem_files("cert.pem", "key.pem").ocsp_file("cert.ocsp"))
///     .identity_for("*.example.org", Identity::pem_files("wildcard.pem", "wildcard.key"));
/// # _ = builder;
/// ```
#[derive(Clone)]
#[must_use = "an identity does nothing until it is added to a builder"]
pub struct Identity {
    pub(super) chain: Pem,
    key: Pem,
    ocsp: Option<PathBuf>,
}

impl Identity {
    fn new(chain: Pem, key: Pem) -> Self {
        let ocsp = None;
        Self { chain, key, ocsp }
    }

    /// Creates an identity from a PEM file with the certificate chain (the server's own certificate
    /// first) and a PEM file with the private key.
    ///
    /// Both may be the same file. Each [`build`](super::TlsBuilder::build) and each
    /// [`reload`](super::Tls::reload) reads the files.
    pub fn pem_files(chain: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self::new(Pem::File(chain.into()), Pem::File(key.into()))
    }

    /// Creates an identity from a PEM text with the certificate chain (the server's own certificate
    /// first) and a PEM text with the private key.
    pub fn pem(chain: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        Self::new(
            Pem::Memory("the passed certificate chain", chain.into()),
            Pem::Memory("the passed private key", key.into()),
        )
    }

    /// Sets the file with the OCSP response, in DER, that is stapled to the certificate. Default:
    /// none.
    ///
    /// A response expires, usually within days. Fetch a new one with a program such as `openssl
    /// ocsp -respout`, replace the file, and call [`reload`](super::Tls::reload). The library
    /// checks only that the file is a single DER sequence with the status `successful`. The rest is
    /// for the client to check: the signature, the validity period, the certificate that the
    /// response is for, and the revocation status.
    pub fn ocsp_file(mut self, response: impl Into<PathBuf>) -> Self {
        self.ocsp = Some(response.into());
        self
    }

    /// Reads the chain, the key and the OCSP response. Checks that the key belongs to the
    /// certificate, and that the response has the status "successful".
    pub(super) fn read(&self, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
        let (chain, key) = (self.chain.certificates()?, self.key.private_key()?);
        let mut certified =
            CertifiedKey::from_der(chain, key, provider).map_err(|err| match err {
                rustls::Error::InconsistentKeys(_) => TlsError::KeyMismatch {
                    certificate: self.chain.name(),
                    key: self.key.name(),
                },
                rustls::Error::InvalidCertificate(_) => TlsError::BadCertificate {
                    pem: self.chain.name(),
                    source: err,
                },
                _ => TlsError::BadKey {
                    pem: self.key.name(),
                    source: err,
                },
            })?;
        if let Some(file) = &self.ocsp {
            let response = pem::read(file)?;
            if !is_successful(&response) {
                let file = file.display().to_string();
                return Err(TlsError::BadOcspResponse { file });
            }
            certified.ocsp = Some(response);
        }
        Ok(certified)
    }
}

impl fmt::Debug for Identity {
    /// Formats the identity without its key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("chain", &self.chain.name())
            .finish_non_exhaustive()
    }
}

/// Returns whether `response` is a single DER sequence that begins with the status "successful"
/// (RFC 6960, section 4.2.1).
///
/// Some clients abort the handshake if a response with another status, such as "try later", is
/// stapled.
fn is_successful(response: &[u8]) -> bool {
    let (len, body) = match response {
        [0x30, len @ 0..=0x7f, body @ ..] => (usize::from(*len), body),
        [0x30, 0x81, len, body @ ..] => (usize::from(*len), body),
        [0x30, 0x82, high, low, body @ ..] => {
            (usize::from(u16::from_be_bytes([*high, *low])), body)
        }
        _ => return false,
    };
    body.len() == len && body.starts_with(&[0x0a, 1, 0])
}
