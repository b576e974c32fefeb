//! The verification of clients: their roots, and the certificates that were revoked.

use std::sync::Arc;

use ring::digest::{Context, SHA256};
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;

use super::error::TlsError;
use super::pem::Pem;
use crate::error::BoxError;

/// The policy for clients without a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientCertificates {
    /// Refuses clients without a valid certificate.
    Required,
    /// Accepts clients without a certificate. A certificate that a client does send must be valid.
    Optional,
}

/// A digest of all that decides whether a client gets in. Session tickets depend on it, so that
/// none is accepted under other rules than it was issued under.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Policy(pub(super) [u8; 32]);

/// Reads the roots and the revocation lists.
pub(super) fn verifier(
    roots_pem: &Pem,
    whether: ClientCertificates,
    lists: &[Pem],
    provider: &Arc<CryptoProvider>,
) -> Result<(Arc<dyn ClientCertVerifier>, Policy), TlsError> {
    let mut policy = Context::new(&SHA256);
    policy.update(&[match whether {
        ClientCertificates::Required => 1,
        ClientCertificates::Optional => 0,
    }]);
    // Each part says its kind and its length, so that different parts never look the same.
    let mut part = |kind: u8, der: &[u8]| {
        policy.update(&[kind]);
        policy.update(&(der.len() as u64).to_be_bytes());
        policy.update(der);
    };

    let bad_roots = |source: BoxError| TlsError::BadRoots {
        pem: roots_pem.name(),
        source,
    };
    let mut roots = RootCertStore::empty();
    for root in roots_pem.certificates()? {
        part(b'r', &root);
        roots.add(root).map_err(|err| bad_roots(err.into()))?;
    }
    let builder =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
    // The roots alone first, then each list alone, so that an error names the text at fault.
    builder
        .clone()
        .build()
        .map_err(|err| bad_roots(err.into()))?;
    let mut all = builder.clone().enforce_revocation_expiration();
    for pem in lists {
        let found = pem.revocation_lists()?;
        found.iter().for_each(|list| part(b'c', list));
        let alone = builder.clone().with_crls(found.iter().cloned()).build();
        alone.map_err(|err| TlsError::BadRevocationList {
            pem: pem.name(),
            source: err.into(),
        })?;
        all = all.with_crls(found);
    }
    let all = match whether {
        ClientCertificates::Required => all,
        ClientCertificates::Optional => all.allow_unauthenticated(),
    };
    let verifier = all.build().map_err(|err| bad_roots(err.into()))?;

    let mut digest = [0; 32];
    digest.copy_from_slice(policy.finish().as_ref());
    Ok((verifier, Policy(digest)))
}
