//! Certificates of clients: required, optional, and issued by another root.

use super::*;

#[tokio::test]
async fn a_client_with_the_required_certificate_is_served_and_known_by_it() {
    let (me, friend) = (made("localhost"), made("friend"));
    let tls = server(&me)
        .client_certificates(friend.cert.pem(), ClientCertificates::Required)
        .build()
        .unwrap();

    let (served, _) = shake(&tls, client(&me, &[&TLS13], Some(&friend))).await;

    assert_eq!(
        info(&served.unwrap()).peer_certificates(),
        [friend.cert.der().clone()]
    );
}

#[tokio::test]
async fn b26_a_client_without_the_required_certificate_is_refused() {
    let (me, friend) = (made("localhost"), made("friend"));
    let tls = server(&me)
        .client_certificates(friend.cert.pem(), ClientCertificates::Required)
        .build()
        .unwrap();

    for version in [&TLS13, &TLS12] {
        let (served, _) = shake(&tls, client(&me, &[version], None)).await;

        assert_eq!(rustls_error(served), rustls::Error::NoCertificatesPresented);
    }
}

#[tokio::test]
async fn b26_a_certificate_of_another_root_is_refused_even_where_none_is_required() {
    let (me, friend, stranger) = (made("localhost"), made("friend"), made("stranger"));

    for requirement in [ClientCertificates::Required, ClientCertificates::Optional] {
        let tls = server(&me)
            .client_certificates(friend.cert.pem(), requirement)
            .build()
            .unwrap();
        let (served, caller) = shake(&tls, client(&me, &[&TLS13], Some(&stranger))).await;

        assert!(matches!(
            rustls_error(served),
            rustls::Error::InvalidCertificate(_)
        ));
        // In TLS 1.3 the client completes the handshake before the server has seen the client's
        // certificate, so the alert arrives with the next read.
        let err = caller.unwrap().read_u8().await.unwrap_err();
        let alert = find_cause(&err);
        assert!(
            matches!(alert, Some(rustls::Error::AlertReceived(_))),
            "{err:?}"
        );
    }
}

#[tokio::test]
async fn a_client_may_connect_without_an_optional_certificate() {
    let (me, friend) = (made("localhost"), made("friend"));
    let tls = server(&me)
        .client_certificates(friend.cert.pem(), ClientCertificates::Optional)
        .build()
        .unwrap();

    let (served, _) = shake(&tls, client(&me, &[&TLS13], None)).await;

    assert!(info(&served.unwrap()).peer_certificates().is_empty());
}
