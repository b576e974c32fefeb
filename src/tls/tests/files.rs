//! Errors of certificates, keys and roots that cannot be loaded.

use super::*;

#[test]
fn an_error_names_the_file_at_fault() {
    let (me, other) = (made("localhost"), made("other"));
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let chain = write("chain", &me.cert.pem());
    let key = write("key", &me.signing_key.serialize_pem());
    let other_key = write("other key", &other.signing_key.serialize_pem());
    let empty = write("empty", "");
    let torn = write("torn", "-----BEGIN CERTIFICATE-----\nAAAA\n");
    let junk = write(
        "junk",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    );
    let junk_key = write(
        "junk key",
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    );
    let nowhere = dir.path().join("nowhere");
    let error = |chain, key| Tls::builder().pem_files(chain, key).build().unwrap_err();
    let roots = |roots| {
        Tls::builder()
            .pem_files(&chain, &key)
            .client_certificates_file(roots, ClientCertificates::Required)
            .build()
    };

    roots(&chain).unwrap();
    let cases = [
        (error(&nowhere, &key), "cannot read", &nowhere),
        (error(&chain, &nowhere), "cannot read", &nowhere),
        (error(&empty, &key), "no certificate in", &empty),
        (error(&key, &chain), "no certificate in", &key),
        (error(&torn, &key), "malformed PEM in", &torn),
        (error(&junk, &key), "unusable certificate in", &junk),
        (
            error(&chain, &chain),
            "no unencrypted private key in",
            &chain,
        ),
        (
            error(&chain, &junk_key),
            "unusable private key in",
            &junk_key,
        ),
        (roots(&nowhere).unwrap_err(), "cannot read", &nowhere),
        (roots(&key).unwrap_err(), "no certificate in", &key),
        (
            roots(&junk).unwrap_err(),
            "unusable roots for client certificates in",
            &junk,
        ),
    ];
    for (err, what, file) in cases {
        assert_eq!(err.to_string(), format!("{what} {}", file.display()));
    }
    assert_eq!(
        error(&chain, &other_key).to_string(),
        format!(
            "the private key in {} does not match the certificate in {}",
            other_key.display(),
            chain.display()
        )
    );
}

#[test]
fn an_error_names_the_text_in_memory_at_fault() {
    let me = made("localhost");

    let err = Tls::builder()
        .certificate(me.cert.pem(), "no key")
        .build()
        .unwrap_err();

    assert_eq!(
        err.to_string(),
        "no unencrypted private key in the passed private key"
    );
    assert!(matches!(Tls::builder().build(), Err(TlsError::NoIdentity)));
}

#[test]
fn a_protocol_that_tls_cannot_express_is_an_error() {
    let me = made("localhost");
    let tls = Tls::builder().certificate(me.cert.pem(), me.signing_key.serialize_pem());

    for name in [Vec::new(), vec![b'h'; 256]] {
        let err = tls.clone().alpn([b"h2", &name[..]]).build();

        assert!(matches!(err, Err(TlsError::BadProtocol { protocol }) if protocol == name));
    }
    assert!(tls.alpn([[b'h'; 255]]).build().is_ok());
}
