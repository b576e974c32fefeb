//! Reads PEM from files and from memory, with errors that name the file or text at fault.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use rustls_pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
};

use super::error::TlsError;

/// A PEM file, or a PEM text in memory with the name that errors use for the text.
#[derive(Clone)]
pub(super) enum Pem {
    File(PathBuf),
    Memory(&'static str, Vec<u8>),
}

impl Pem {
    pub(super) fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Memory(name, _) => (*name).to_owned(),
        }
    }

    fn text(&self) -> Result<Cow<'_, [u8]>, TlsError> {
        match self {
            Self::File(path) => read(path).map(Cow::Owned),
            Self::Memory(_, text) => Ok(Cow::Borrowed(text)),
        }
    }

    fn all<T: PemObject>(&self) -> Result<Vec<T>, TlsError> {
        T::pem_slice_iter(&self.text()?)
            .collect::<Result<_, _>>()
            .map_err(|source| TlsError::Malformed {
                pem: self.name(),
                source,
            })
    }

    /// Reads the certificates. Fails if there are none.
    pub(super) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let found: Vec<_> = self.all()?;
        if found.is_empty() {
            return Err(TlsError::NoCertificate { pem: self.name() });
        }
        Ok(found)
    }

    /// Reads the revocation lists. Fails if there are none.
    pub(super) fn revocation_lists(
        &self,
    ) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        let found: Vec<_> = self.all()?;
        if found.is_empty() {
            return Err(TlsError::NoRevocationList { pem: self.name() });
        }
        Ok(found)
    }

    pub(super) fn private_key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(&self.text()?).map_err(|err| match err {
            pem::Error::NoItemsFound => TlsError::NoKey { pem: self.name() },
            source => TlsError::Malformed {
                pem: self.name(),
                source,
            },
        })
    }
}

/// Reads a file. An error names the file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Unreadable {
        pem: path.display().to_string(),
        source,
    })
}
