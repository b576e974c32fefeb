//! Client certificates: revocation, and the resumption of TLS sessions.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::CertificateError;

use super::*;

/// A certificate authority for clients.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        Self {
            pem: params.self_signed(&key).unwrap().pem(),
            issuer: Issuer::new(params, key),
        }
    }

    fn client(&self, serial: u64) -> Made {
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from(serial));
        let signing_key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&signing_key, &self.issuer).unwrap();
        CertifiedKey { cert, signing_key }
    }

    fn list(&self, revoked: &[u64], until: i32) -> String {
        let revoked = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

fn refused_for(err: CertificateError) -> Result<bool, rustls::Error> {
    Err(rustls::Error::InvalidCertificate(err))
}

#[tokio::test]
async fn a_revoked_client_does_not_get_in_after_a_reload_with_or_without_a_session() {
    let (me, authority) = (made("localhost"), Authority::new("clients"));
    let (good, bad) = (authority.client(1), authority.client(2));
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("ticket.key");
    std::fs::write(&key, [7; 80]).unwrap();
    let by_cache = server(&me).client_certificates(&*authority.pem, ClientCertificates::Required);
    let by_ticket = by_cache.clone().ticket_key_files([&key]);

    for before in [by_cache, by_ticket] {
        for version in [&TLS13, &TLS12] {
            let tls = before.build().unwrap();
            let clients = [&good, &bad].map(|own| client(&me, &[version], Some(own)));
            for client in &clients {
                assert_eq!(resumes(&tls, client).await, Ok(false));
                assert_eq!(resumes(&tls, client).await, Ok(true));
            }

            let after = before.clone().revocation_lists(authority.list(&[2], 3000));
            tls.reload(&after).unwrap();

            let revoked = refused_for(CertificateError::Revoked);
            assert_eq!(resumes(&tls, &clients[1]).await, revoked, "with a session");
            let fresh = client(&me, &[version], Some(&bad));
            assert_eq!(resumes(&tls, &fresh).await, revoked, "without");
            assert_eq!(resumes(&tls, &clients[0]).await, Ok(false), "verified anew");
            assert_eq!(resumes(&tls, &clients[0]).await, Ok(true));
        }
    }
}

#[tokio::test]
async fn a_revoked_client_gets_the_alert_certificate_revoked() {
    let (me, authority) = (made("localhost"), Authority::new("clients"));
    let tls = server(&me)
        .client_certificates(&*authority.pem, ClientCertificates::Required)
        .revocation_lists(authority.list(&[2], 3000))
        .build()
        .unwrap();
    let bad = client(&me, &[&TLS13], Some(&authority.client(2)));

    let (_, caller) = shake(&tls, bad).await;

    let err = caller.unwrap().read_u8().await.unwrap_err();
    let alert = rustls::AlertDescription::CertificateRevoked;
    assert_eq!(find_cause(&err), Some(&rustls::Error::AlertReceived(alert)));
}

#[tokio::test]
async fn a_client_whose_status_is_not_known_is_refused() {
    let (me, authority, other) = (
        made("localhost"),
        Authority::new("clients"),
        Authority::new("other clients"),
    );
    let config = client(&me, &[&TLS13], Some(&authority.client(1)));
    let with = |list: String| {
        server(&me)
            .client_certificates(&*authority.pem, ClientCertificates::Optional)
            .revocation_lists(list)
    };

    let of_another = with(other.list(&[], 3000));
    let expired = with(authority.list(&[], 2025));
    let both = of_another
        .clone()
        .revocation_lists(authority.list(&[], 3000));

    assert_eq!(
        resumes(&of_another.build().unwrap(), &config).await,
        refused_for(CertificateError::UnknownRevocationStatus)
    );
    let err = resumes(&expired.build().unwrap(), &config).await;
    assert!(
        matches!(
            err,
            Err(rustls::Error::InvalidCertificate(
                CertificateError::ExpiredRevocationListContext { .. }
            ))
        ),
        "{err:?}"
    );
    assert_eq!(resumes(&both.build().unwrap(), &config).await, Ok(false));
}

#[tokio::test]
async fn a_session_without_a_certificate_is_not_resumed_once_one_is_required() {
    let (me, authority) = (made("localhost"), Authority::new("clients"));
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("ticket.key");
    std::fs::write(&key, [7; 80]).unwrap();
    let with = |requirement| {
        server(&me)
            .client_certificates(&*authority.pem, requirement)
            .ticket_key_files([&key])
    };
    for before in [
        server(&me).ticket_key_files([&key]),
        with(ClientCertificates::Optional),
    ] {
        for version in [&TLS13, &TLS12] {
            let tls = before.build().unwrap();
            let config = client(&me, &[version], None);
            assert_eq!(resumes(&tls, &config).await, Ok(false));
            assert_eq!(resumes(&tls, &config).await, Ok(true));

            tls.reload(&with(ClientCertificates::Required)).unwrap();

            let refused = Err(rustls::Error::NoCertificatesPresented);
            assert_eq!(resumes(&tls, &config).await, refused);
        }
    }
}

#[test]
fn an_error_names_the_revocation_list_at_fault() {
    let (me, authority) = (made("localhost"), Authority::new("clients"));
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let roots = server(&me).client_certificates(&*authority.pem, ClientCertificates::Required);
    std::fs::write(path("good"), authority.list(&[], 3000)).unwrap();
    std::fs::write(path("empty"), &authority.pem).unwrap();
    let junk = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    std::fs::write(path("junk"), junk).unwrap();

    for (name, what) in [
        ("nowhere", "cannot read"),
        ("empty", "no certificate revocation list in"),
        ("junk", "unusable certificate revocation list in"),
    ] {
        let lists = roots.clone().revocation_lists_file(path("good"));
        let err = lists.revocation_lists_file(path(name)).build().unwrap_err();

        assert_eq!(err.to_string(), format!("{what} {}", path(name).display()));
    }
    let err = server(&me).revocation_lists_file(path("good")).build();
    assert!(matches!(err, Err(TlsError::RevocationWithoutClients)));
}
