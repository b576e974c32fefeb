//! Replacement of the configuration during handshakes, and sessions that several hooks share.

use std::path::Path;

use super::*;

fn write(dir: &Path, made: &Made) {
    std::fs::write(dir.join("cert"), made.cert.pem()).unwrap();
    std::fs::write(dir.join("key"), made.signing_key.serialize_pem()).unwrap();
}

fn files(dir: &Path) -> TlsBuilder {
    Tls::builder().pem_files(dir.join("cert"), dir.join("key"))
}

#[tokio::test]
async fn a_reload_is_seen_by_all_clones_and_by_handshakes_that_have_no_hello_yet() {
    let (old, new) = (made("localhost"), made("localhost"));
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &old);
    let builder = files(dir.path());
    let tls = builder.build().unwrap();
    let clone = tls.clone();
    shake(&clone, client(&old, &[&TLS13], None))
        .await
        .1
        .unwrap();
    let (near, far) = duplex(64 * 1024);
    let mut begun = tokio_test::task::spawn(clone.clone().call(connection(near)));
    tokio_test::assert_pending!(begun.poll());

    write(dir.path(), &new);
    tls.reload(&builder).unwrap();

    // This client trusts the new certificate only.
    let config = client(&new, &[&TLS13], None);
    let connector = TlsConnector::from(Arc::new(config.clone()));
    let (served, caller) = tokio::join!(begun, connector.connect(localhost(), far));
    served.unwrap();
    caller.unwrap();
    for tls in [&tls, &clone] {
        shake(tls, config.clone()).await.1.unwrap();
    }
}

#[tokio::test]
async fn an_error_in_a_reload_changes_nothing() {
    let (old, new) = (made("localhost"), made("localhost"));
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &old);
    let builder = files(dir.path());
    let tls = builder.build().unwrap();
    let config = client(&old, &[&TLS13], None);
    assert_eq!(resumes(&tls, &config).await, Ok(false));

    std::fs::write(dir.path().join("cert"), new.cert.pem()).unwrap();
    let mismatch = tls.reload(&builder).unwrap_err();
    assert!(matches!(mismatch, TlsError::KeyMismatch { .. }));
    write(dir.path(), &new);
    for (broken, what) in [
        (
            builder.clone().ticket_key_files(["/nowhere"]),
            "cannot read /nowhere",
        ),
        (
            builder
                .clone()
                .client_certificates("", ClientCertificates::Required),
            "no certificate in the passed client roots",
        ),
        (
            builder.clone().cipher_suites(["TLS_NULL"]),
            "the provider has no cipher suite \"TLS_NULL\"",
        ),
        (
            builder.clone().identity_for("a..b", Identity::pem("", "")),
            "no certificate in the passed certificate chain",
        ),
    ] {
        assert_eq!(tls.reload(&broken).unwrap_err().to_string(), what);
    }

    // The old certificate and the old session cache are still used.
    let fresh = client(&old, &[&TLS13], None);
    assert_eq!(resumes(&tls, &fresh).await, Ok(false));
    assert_eq!(resumes(&tls, &config).await, Ok(true));
}

#[tokio::test]
async fn a_session_is_not_resumed_after_a_reload() {
    let me = made("localhost");
    let builder = server(&me);
    let tls = builder.build().unwrap();
    for version in [&TLS13, &TLS12] {
        let config = client(&me, &[version], None);
        assert_eq!(resumes(&tls, &config).await, Ok(false));
        assert_eq!(resumes(&tls, &config).await, Ok(true));

        tls.reload(&builder).unwrap();

        assert_eq!(resumes(&tls, &config).await, Ok(false));
    }
}

#[tokio::test]
async fn a_custom_configuration_replaces_one_of_the_builder() {
    let (old, new) = (made("localhost"), made("localhost"));
    let tls = server(&old).build().unwrap();
    let other = server(&new).build().unwrap().current.get().server;

    tls.replace(other);

    shake(&tls, client(&new, &[&TLS13], None)).await.1.unwrap();
}

#[tokio::test]
async fn hooks_with_one_ticket_key_resume_each_others_sessions_until_it_is_rotated_out() {
    let me = made("localhost");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("one"), [1; 80]).unwrap();
    std::fs::write(path("two"), [2; 48]).unwrap();
    std::fs::write(path("three"), [3; 80]).unwrap();
    let with = |names: &[&str]| {
        let files = names.iter().copied().map(path);
        server(&me).ticket_key_files(files)
    };
    for version in [&TLS13, &TLS12] {
        let (here, there) = (
            with(&["one"]).build().unwrap(),
            with(&["one"]).build().unwrap(),
        );
        let config = client(&me, &[version], None);
        assert_eq!(resumes(&here, &config).await, Ok(false));
        assert_eq!(resumes(&there, &config).await, Ok(true), "of the other");

        // `here` knows the new key before `there` encrypts tickets with it.
        here.reload(&with(&["one", "two"])).unwrap();
        there.reload(&with(&["two", "one"])).unwrap();
        assert_eq!(resumes(&there, &config).await, Ok(true), "by the old key");
        assert_eq!(resumes(&here, &config).await, Ok(true), "by the new one");
        let old = client(&me, &[version], None);
        assert_eq!(resumes(&here, &old).await, Ok(false));
        there.reload(&with(&["three", "two"])).unwrap();
        assert_eq!(resumes(&there, &old).await, Ok(false), "rotated out");
    }
}
