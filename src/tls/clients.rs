//! The rules for verifying clients: whether a certificate is required, the root certificates, and
//! the revocation lists.

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

/// A digest of the rules for client certificates. With ticket keys from files, each key is derived
/// from the content of its file and from this digest. So a ticket is accepted only under the rules
/// under which it was issued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Policy(pub(super) [u8; 32]);

/// Builds the verifier of client certificates from the rules: the roots, the requirement and the
/// revocation lists. Also returns the digest of these rules.
pub(super) fn verifier(
    roots_pem: &Pem,
    requirement: ClientCertificates,
    lists: &[Pem],
    provider: &Arc<CryptoProvider>,
) -> Result<(Arc<dyn ClientCertVerifier>, Policy), TlsError> {
    let mut policy = Context::new(&SHA256);
    policy.update(&[match requirement {
        ClientCertificates::Required => 1,
        ClientCertificates::Optional => 0,
    }]);
    // The kind and the length of each part are hashed, too, so that different rules never give the
    // hash the same input.
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
    // The roots are checked alone first, then with each list, so that an error names the file or
    // text at fault.
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
    let all = match requirement {
        ClientCertificates::Required => all,
        ClientCertificates::Optional => all.allow_unauthenticated(),
    };
    let verifier = all.build().map_err(|err| bad_roots(err.into()))?;

    let mut digest = [0; 32];
    digest.copy_from_slice(policy.finish().as_ref());
    Ok((verifier, Policy(digest)))
}
