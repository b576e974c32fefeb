//! Server names that are refused, TLS versions, cipher suites, a stapled OCSP response, early data,
//! and the session cache.

use std::sync::Mutex;

use rustls::AlertDescription;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

use super::*;

fn alert(caller: io::Result<client::TlsStream<DuplexStream>>) -> rustls::Error {
    let err = caller.unwrap_err();
    find_cause::<rustls::Error>(&err).unwrap().clone()
}

fn unknown<Io>(served: Served<Io>) -> UnknownServerName {
    let ended = served.err().unwrap().downcast::<ConnectionEnded>().unwrap();
    assert_eq!(ended.reason(), EndReason::TlsHandshakeFailed);
    let cause = ended.cause.as_deref().unwrap();
    find_cause::<UnknownServerName>(cause).unwrap().clone()
}

#[tokio::test]
async fn without_a_default_certificate_other_names_are_refused() {
    let me = made("a.test");
    let identity = Identity::pem(me.cert.pem(), me.signing_key.serialize_pem());
    let tls = Tls::builder().identity_for("a.test", identity);
    let tls = tls.build().unwrap();
    for version in [&TLS13, &TLS12] {
        let config = client(&me, &[version], None);
        let mut silent = config.clone();
        silent.enable_sni = false;

        let (known, _) = shake_as(&tls, config.clone(), "A.test").await;
        let (other, other_caller) = shake_as(&tls, config, "b.test").await;
        let (none, none_caller) = shake_as(&tls, silent, "a.test").await;

        assert_eq!(info(&known.unwrap()).server_name(), Some("a.test"));
        let refused = unknown(other);
        assert_eq!(refused, UnknownServerName::Unknown("b.test".into()));
        assert_eq!(
            refused.to_string(),
            "no certificate for the server name b.test"
        );
        assert_eq!(
            alert(other_caller),
            rustls::Error::AlertReceived(AlertDescription::UnrecognisedName)
        );
        assert_eq!(unknown(none), UnknownServerName::Absent);
        assert_eq!(
            alert(none_caller),
            rustls::Error::AlertReceived(AlertDescription::MissingExtension)
        );
    }
}

#[tokio::test]
async fn a_client_with_an_older_version_than_the_lowest_is_refused() {
    let me = made("localhost");
    let tls = server(&me).min_version(TlsVersion::V1_3).build().unwrap();

    let (new, _) = shake(&tls, client(&me, &[&TLS13, &TLS12], None)).await;
    let (old, caller) = shake(&tls, client(&me, &[&TLS12], None)).await;

    assert_eq!(info(&new.unwrap()).version(), "1.3");
    assert!(matches!(
        rustls_error(old),
        rustls::Error::PeerIncompatible(_)
    ));
    assert_eq!(
        alert(caller),
        rustls::Error::AlertReceived(AlertDescription::ProtocolVersion)
    );
}

#[tokio::test]
async fn only_the_cipher_suites_that_are_named_are_used() {
    let me = made("localhost");
    let suites = [
        "TLS_CHACHA20_POLY1305_SHA256",
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    ];
    let tls = server(&me)
        .crypto_provider(ring::default_provider())
        .cipher_suites(suites)
        .build()
        .unwrap();

    for (version, suite) in [&TLS13, &TLS12].into_iter().zip(suites) {
        let (served, _) = shake(&tls, client(&me, &[version], None)).await;
        assert_eq!(info(&served.unwrap()).cipher_suite(), suite);
    }

    // The first is rustls's own name of a suite, not the registered name. The second suite is not
    // supported.
    for unknown in ["TLS13_AES_128_GCM_SHA256", "TLS_RSA_WITH_RC4_128_MD5"] {
        let err = server(&me).cipher_suites([unknown]).build().unwrap_err();
        assert_eq!(
            err.to_string(),
            format!("the provider has no cipher suite \"{unknown}\"")
        );
    }
    let none = server(&me).cipher_suites([""; 0]).build();
    assert!(matches!(none, Err(TlsError::Config(_))));
}

/// Verifies the server's certificate, and records the stapled OCSP response.
#[derive(Debug)]
struct RecordingVerifier {
    verifier: Arc<WebPkiServerVerifier>,
    stapled: Mutex<Vec<u8>>,
}

impl ServerCertVerifier for RecordingVerifier {
    fn verify_server_cert(
        &self,
        cert: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.stapled.lock().unwrap() = response.to_vec();
        self.verifier
            .verify_server_cert(cert, chain, name, &[], now)
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, signed)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, signed)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

#[tokio::test]
async fn the_response_in_the_ocsp_file_is_stapled() {
    let me = made("localhost");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ocsp");
    let response = [&[0x30, 0x82, 1, 0, 0x0a, 1, 0], [7; 253].as_slice()].concat();
    let identity = Identity::pem(me.cert.pem(), me.signing_key.serialize_pem());
    let builder = Tls::builder().identity(identity.ocsp_file(&file));
    std::fs::write(&file, &response).unwrap();
    let tls = builder.build().unwrap();

    for version in [&TLS13, &TLS12] {
        let mut config = client(&me, &[version], None);
        let mut roots = RootCertStore::empty();
        roots.add(me.cert.der().clone()).unwrap();
        let provider = Arc::new(ring::default_provider());
        let recording = Arc::new(RecordingVerifier {
            verifier: WebPkiServerVerifier::builder_with_provider(roots.into(), provider)
                .build()
                .unwrap(),
            stapled: Mutex::default(),
        });
        config
            .dangerous()
            .set_certificate_verifier(recording.clone());
        shake(&tls, config).await.1.unwrap();
        assert_eq!(*recording.stapled.lock().unwrap(), response);
    }

    let cut = &response[..259];
    let longer = [&*response, b"\n"].concat();
    // In this order: cut off, too long, "try later", PEM, empty, and a length field of four bytes.
    for bad in [
        cut,
        &longer,
        &[0x30, 3, 0x0a, 1, 3],
        b"-----BEGIN",
        b"",
        &[0x30, 0x84],
    ] {
        std::fs::write(&file, bad).unwrap();
        let err = tls.reload(&builder).unwrap_err();
        let wanted = format!("no successful OCSP response in {}", file.display());
        assert_eq!(err.to_string(), wanted);
    }
    for good in [
        [0x30, 3, 0x0a, 1, 0].to_vec(),
        [&[0x30, 0x81, 200, 0x0a, 1, 0], [7; 197].as_slice()].concat(),
    ] {
        std::fs::write(&file, good).unwrap();
        tls.reload(&builder).unwrap();
    }
}

#[test]
fn b27_early_data_is_off_and_the_session_cache_is_on() {
    let tls = server(&made("localhost")).build().unwrap();

    let config = tls.current.get().server;

    assert_eq!(config.max_early_data_size, 0);
    assert!(config.session_storage.can_cache());
}
