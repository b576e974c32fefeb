//! Chooses a certificate by the server name that a client requests.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::{DnsName, ServerName};
use tokio_rustls::rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{CertificateError, Error};
use webpki::EndEntityCert;

use super::error::{TlsError, UnknownServerName};
use super::identity::Identity;

type Certificates = HashMap<Box<str>, Arc<CertifiedKey>>;

/// The certificates for exact names and for wildcards, and the default certificate.
///
/// rustls's own `ResolvesServerCertUsingSni` supports neither wildcards nor a default.
#[derive(Debug, Default)]
pub(super) struct Names {
    exact: Certificates,
    /// The certificates for wildcards. The map's key is the wildcard without its `*.`.
    wildcards: Certificates,
    default: Option<Arc<CertifiedKey>>,
}

impl Names {
    pub(super) fn set_default(
        &mut self,
        identity: &Identity,
        provider: &CryptoProvider,
    ) -> Result<(), TlsError> {
        self.default = Some(Arc::new(identity.read(provider)?));
        Ok(())
    }

    /// Adds a certificate for a name or a wildcard. Fails if the certificate is not valid for the
    /// name. For a wildcard, this is not checked.
    pub(super) fn add(
        &mut self,
        name: &str,
        identity: &Identity,
        provider: &CryptoProvider,
    ) -> Result<(), TlsError> {
        let certified = Arc::new(identity.read(provider)?);
        if !name.starts_with("*.") {
            let valid = || {
                let cert = ParsedCertificate::try_from(certified.end_entity_cert()?)?;
                verify_server_name(&cert, &ServerName::DnsName(dns_name(name)?.to_owned()))
            };
            checked(name)?;
            valid().map_err(|source| TlsError::WrongName {
                name: name.to_owned(),
                pem: identity.chain.name(),
                source,
            })?;
        }
        self.insert(name, certified)
    }

    /// Adds a certificate under each DNS name that it contains.
    pub(super) fn add_by_san(
        &mut self,
        identity: &Identity,
        provider: &CryptoProvider,
    ) -> Result<(), TlsError> {
        let certified = Arc::new(identity.read(provider)?);
        let pem = || identity.chain.name();
        let bad = |source| TlsError::BadCertificate { pem: pem(), source };
        let cert = certified.end_entity_cert().map_err(bad)?;
        let cert = EndEntityCert::try_from(cert)
            .map_err(|_unparsable| bad(CertificateError::BadEncoding.into()))?;
        let mut nameless = true;
        for name in cert.valid_dns_names() {
            self.insert(name, Arc::clone(&certified))?;
            nameless = false;
        }
        if nameless {
            return Err(TlsError::Nameless { pem: pem() });
        }
        Ok(())
    }

    fn insert(&mut self, name: &str, certified: Arc<CertifiedKey>) -> Result<(), TlsError> {
        let (all, key) = match name.strip_prefix("*.") {
            Some(parent) => (&mut self.wildcards, parent),
            None => (&mut self.exact, name),
        };
        let key = checked(key).map_err(|_of_the_part| TlsError::BadName {
            name: name.to_owned(),
        })?;
        match all.entry(key) {
            // The certificate contains the name twice, perhaps in different spellings.
            Entry::Occupied(has) if Arc::ptr_eq(has.get(), &certified) => Ok(()),
            Entry::Occupied(_) => Err(TlsError::DuplicateName {
                name: name.to_owned(),
            }),
            Entry::Vacant(free) => {
                free.insert(certified);
                Ok(())
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.default.is_none() && self.exact.is_empty() && self.wildcards.is_empty()
    }

    /// Finds the certificate for a name, or the default certificate. rustls has converted the name
    /// to lower case.
    fn find(&self, name: Option<&str>) -> Option<&Arc<CertifiedKey>> {
        let named = name.and_then(|name| {
            let name = name.strip_suffix('.').unwrap_or(name);
            self.exact.get(name).or_else(|| {
                let (_label, parent) = name.split_once('.')?;
                self.wildcards.get(parent)
            })
        });
        named.or(self.default.as_ref())
    }

    /// Returns an error if no certificate matches the hello and there is no default certificate.
    pub(super) fn check(&self, hello: &ClientHello<'_>) -> Result<(), UnknownServerName> {
        let name = hello.server_name();
        match self.find(name) {
            Some(_) => Ok(()),
            None => Err(name.map_or(UnknownServerName::Absent, |name| {
                UnknownServerName::Unknown(name.into())
            })),
        }
    }
}

impl ResolvesServerCert for Names {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.find(hello.server_name()).cloned()
    }
}

/// Checks a DNS name. Returns it in lower case, without a final dot.
fn checked(name: &str) -> Result<Box<str>, TlsError> {
    let checked = dns_name(name).map_err(|_invalid| TlsError::BadName {
        name: name.to_owned(),
    })?;
    let lower = checked.as_ref().to_ascii_lowercase();
    Ok(lower.strip_suffix('.').unwrap_or(&lower).into())
}

fn dns_name(name: &str) -> Result<DnsName<'_>, Error> {
    DnsName::try_from(name).map_err(|err| Error::General(err.to_string()))
}

#[cfg(test)]
mod tests {
    use rcgen::generate_simple_self_signed;
    use tokio_rustls::rustls::crypto::ring;

    use super::*;

    fn identity(names: &[&str]) -> Identity {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let made = generate_simple_self_signed(names).unwrap();
        Identity::pem(made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn an_exact_name_goes_before_a_wildcard_and_a_wildcard_before_the_default() {
        let provider = ring::default_provider();
        let mut names = Names::default();
        let exact = [
            "a.test", "b.test", "c.test", "d.test", "e.test", "f.test", "g.test",
        ];
        for name in exact {
            names.add(name, &identity(&[name]), &provider).unwrap();
        }
        let both = identity(&["h.test", "I.example.org", "*.I.example.org"]);
        names.add_by_san(&both, &provider).unwrap();
        let wildcard = identity(&["*.example.org"]);
        names.add("*.Example.org.", &wildcard, &provider).unwrap();
        let default = identity(&["default"]);
        let of = |identity: &Identity| identity.chain.certificates().unwrap()[0].clone();
        let found = |names: &Names, name| names.find(name).map(|found| found.cert[0].clone());

        for name in exact {
            let cert = found(&names, Some(name)).unwrap();
            let cert = ParsedCertificate::try_from(&cert).unwrap();
            verify_server_name(&cert, &ServerName::try_from(name).unwrap()).unwrap();
        }
        for name in [
            "h.test",
            "i.example.org",
            "x.i.example.org",
            "i.example.org.",
        ] {
            assert_eq!(found(&names, Some(name)), Some(of(&both)), "{name}");
        }
        for name in ["a.example.org", "xn--e-0ia.example.org", "a.example.org."] {
            assert_eq!(found(&names, Some(name)), Some(of(&wildcard)), "{name}");
        }
        let others = [
            Some("example.org"),
            Some("a.b.example.org"),
            Some("x.x.i.example.org"),
            Some("z.test"),
            Some("test"),
            Some("example.org.a.test"),
            None,
        ];
        for name in others {
            assert_eq!(found(&names, name), None, "{name:?}");
        }
        names.set_default(&default, &provider).unwrap();
        for name in others {
            assert_eq!(found(&names, name), Some(of(&default)), "{name:?}");
        }
    }

    #[test]
    fn a_name_that_could_never_be_requested_is_an_error() {
        let provider = ring::default_provider();
        let some = identity(&["a.test"]);
        let long = format!("{}.test", "a".repeat(64));
        for name in [
            "",
            ".",
            "*",
            "*.",
            "*.*.test",
            "a.*.test",
            "*a.test",
            "a..test",
            "ä.test",
            "a b.test",
            "127.0.0.1",
            "[::1]",
            "-a.test",
            &long,
        ] {
            let err = Names::default().add(name, &some, &provider).unwrap_err();
            assert_eq!(
                err.to_string(),
                format!("{name:?} is neither a DNS name nor a wildcard such as *.example.org")
            );
        }
    }

    #[test]
    fn two_certificates_for_a_name_are_an_error_however_it_is_written() {
        let provider = ring::default_provider();
        let some = identity(&["a.test", "*.a.test"]);
        for (one, other) in [("a.test", "A.test."), ("*.a.test", "*.A.TEST")] {
            let mut names = Names::default();
            names.add(one, &some, &provider).unwrap();

            let err = names.add(other, &some, &provider).unwrap_err();

            assert_eq!(
                err.to_string(),
                format!("two certificates for the name {other}")
            );
            let err = names.add_by_san(&some, &provider).unwrap_err();
            assert!(matches!(err, TlsError::DuplicateName { .. }), "{err}");
        }
    }

    #[test]
    fn a_certificate_may_contain_a_name_twice() {
        let provider = ring::default_provider();
        let some = identity(&["a.test", "A.test", "*.a.test", "*.A.test", "b.test"]);
        let mut names = Names::default();

        names.add_by_san(&some, &provider).unwrap();

        assert_eq!((names.exact.len(), names.wildcards.len()), (2, 1));
    }

    #[test]
    fn a_certificate_for_other_names_is_an_error() {
        let provider = ring::default_provider();
        let (some, none) = (identity(&["a.test"]), identity(&[]));

        let wrong = Names::default().add("b.test", &some, &provider);
        let nameless = Names::default().add_by_san(&none, &provider);

        assert_eq!(
            wrong.unwrap_err().to_string(),
            "the certificate in the passed certificate chain is not valid for the name b.test"
        );
        assert_eq!(
            nameless.unwrap_err().to_string(),
            "no DNS name in the certificate in the passed certificate chain"
        );
    }
}
