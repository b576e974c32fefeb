//! The version, the protocol and the session that are negotiated in a handshake.

use super::*;

#[tokio::test]
async fn tls_1_3_is_negotiated_and_its_parameters_are_reported() {
    let me = made("localhost");

    let (served, _) = shake(
        &server(&me).build().unwrap(),
        client(&me, &[&TLS13, &TLS12], None),
    )
    .await;

    let conn = served.unwrap();
    let info = info(&conn);
    assert_eq!(info.version(), "1.3");
    assert!(
        ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"].contains(&info.cipher_suite()),
        "{}",
        info.cipher_suite()
    );
    assert_eq!(info.server_name(), Some("localhost"));
    assert_eq!(info.alpn(), None);
    assert!(info.peer_certificates().is_empty());
    assert!(!info.is_resumed());
}

#[tokio::test]
async fn tls_1_2_is_negotiated() {
    let me = made("localhost");

    let (served, _) = shake(&server(&me).build().unwrap(), client(&me, &[&TLS12], None)).await;

    let conn = served.unwrap();
    assert_eq!(info(&conn).version(), "1.2");
    assert!(info(&conn).cipher_suite().starts_with("TLS_ECDHE_"));
}

#[tokio::test]
async fn only_decrypted_bytes_are_counted() {
    let me = made("localhost");
    let (served, caller) = shake(&server(&me).build().unwrap(), client(&me, &[&TLS13], None)).await;
    let (mut conn, mut caller) = (served.unwrap(), caller.unwrap());

    caller.write_all(b"hello").await.unwrap();
    caller.flush().await.unwrap();
    conn.read_exact(&mut [0; 5]).await.unwrap();
    conn.write_all(b"hi").await.unwrap();

    let (sender, receiver) = std::sync::mpsc::channel();
    conn.on_end(move |end| {
        sender
            .send((end.bytes_read(), end.bytes_written()))
            .unwrap();
    });
    conn.life().finish(|| EndReason::PeerClosed.into());
    assert_eq!(receiver.recv().unwrap(), (5, 2));
}

#[tokio::test]
async fn a_second_connection_resumes_the_first_session() {
    let me = made("localhost");
    let tls = server(&me).build().unwrap();
    let config = client(&me, &[&TLS13], None);

    assert_eq!(resumes(&tls, &config).await, Ok(false));
    assert_eq!(resumes(&tls, &config).await, Ok(true));
}

#[tokio::test]
async fn the_servers_favourite_of_the_common_protocols_is_chosen() {
    let me = made("localhost");
    let tls = server(&me).alpn(["h2", "http/1.1"]).build().unwrap();
    let mut config = client(&me, &[&TLS13], None);
    config.alpn_protocols = vec![b"http/1.1".to_vec(), b"h2".to_vec()];

    let (served, caller) = shake(&tls, config).await;

    let h2 = Some(b"h2".as_slice());
    assert_eq!(info(&served.unwrap()).alpn(), h2);
    assert_eq!(caller.unwrap().get_ref().1.alpn_protocol(), h2);
}

#[tokio::test]
async fn b19_a_client_with_no_protocol_in_common_is_refused_with_an_alert() {
    let me = made("localhost");
    let tls = server(&me).alpn(["h2"]).build().unwrap();
    let mut config = client(&me, &[&TLS13, &TLS12], None);
    config.alpn_protocols = vec![b"smtp".to_vec()];

    let (served, caller) = shake(&tls, config).await;

    assert_eq!(rustls_error(served), rustls::Error::NoApplicationProtocol);
    let alert = rustls::AlertDescription::NoApplicationProtocol;
    assert_eq!(
        find_cause(&caller.unwrap_err()),
        Some(&rustls::Error::AlertReceived(alert))
    );
}

#[tokio::test]
async fn b19_a_client_that_knows_only_tls_1_0_is_refused_with_an_alert() {
    let tls = server(&made("localhost")).build().unwrap();
    // A record with a ClientHello: version 3.1 (TLS 1.0), 32 random bytes, no session ID, one
    // cipher suite, and no compression.
    let mut hello = vec![0x16, 3, 1, 0, 45, 1, 0, 0, 41, 3, 1];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x13, 1, 0]);
    let (near, mut far) = duplex(64 * 1024);
    far.write_all(&hello).await.unwrap();

    let (served, answer) = tokio::join!(accept(&tls, near), async move {
        let mut answer = Vec::new();
        far.read_to_end(&mut answer).await.unwrap();
        answer
    });

    assert!(matches!(
        rustls_error(served),
        rustls::Error::PeerIncompatible(_)
    ));
    // The answer is one record, with a fatal alert.
    assert_eq!((answer.len(), answer[0], answer[5]), (7, 0x15, 2));
}
