//! Peers that do not speak TLS, and the alert that they receive.

use super::*;

/// Uses real sockets, because only they send a reset when they are closed with unread input.
#[tokio::test]
async fn b16_plain_text_is_answered_by_an_alert_and_the_end() {
    let tls = server(&made("localhost")).build().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let texts = [
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
        // More than rustls reads at once.
        vec![b'G'; 12 * 1024],
        vec![0; 12 * 1024],
    ];
    for text in texts {
        let mut peer = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (io, _) = listener.accept().await.unwrap();
        peer.write_all(&text).await.unwrap();

        // The client reads only after the server is done, so a reset would have arrived by now.
        let served = accept(&tls, io).await;
        let mut answer = Vec::new();
        let read = peer.read_to_end(&mut answer).await;

        rustls_error(served);
        assert!(read.is_ok(), "{read:?} after {answer:?}");
        // The answer is one record, with a fatal alert.
        assert_eq!(
            (answer.len(), answer[0], answer[5]),
            (7, 0x15, 2),
            "{answer:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn b16_a_peer_that_stays_after_the_alert_sees_the_end_at_once_and_is_dropped_after_200_ms() {
    let tls = server(&made("localhost")).build().unwrap();
    let (near, mut far) = duplex(64 * 1024);
    far.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let start = Instant::now();

    let (served, seen) = tokio::join!(accept(&tls, near), async {
        far.read_to_end(&mut Vec::new()).await.unwrap();
        start.elapsed()
    });

    assert!(matches!(
        rustls_error(served),
        rustls::Error::InvalidMessage(_)
    ));
    assert_eq!(seen, Duration::ZERO);
    assert_eq!(start.elapsed().as_millis(), 200);
}

#[tokio::test(start_paused = true)]
async fn b16_a_peer_that_goes_on_sending_is_read_from_for_16_kib_at_most() {
    let tls = server(&made("localhost")).build().unwrap();
    let (near, mut far) = duplex(4096);
    let start = Instant::now();

    let (served, sent) = tokio::join!(accept(&tls, near), async {
        let mut sent = 0;
        while let Ok(n) = far.write(&[0; 1024]).await {
            sent += n;
        }
        sent
    });

    rustls_error(served);
    // In this order: the bytes that rustls read, the bytes that were read and discarded afterwards,
    // and the bytes that the pipe holds.
    assert!(sent <= 4096 + 16 * 1024 + 4096, "{sent}");
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn a_deadline_during_the_linger_does_not_change_the_reason() {
    let tls = server(&made("localhost")).build().unwrap();
    let (near, mut far) = duplex(64 * 1024);
    far.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let conn = connection(near);
    let life = Arc::clone(conn.life());
    let (sender, receiver) = std::sync::mpsc::channel();
    conn.on_end(move |end| sender.send(end.reason()).unwrap());

    let mut shaking = tokio_test::task::spawn(tls.clone().call(conn));
    tokio_test::assert_pending!(shaking.poll());
    drop(shaking);
    life.set_reason(EndReason::PreConnectTimeout, None);
    life.finish(|| EndReason::Killed.into());

    assert_eq!(receiver.recv().unwrap(), EndReason::TlsHandshakeFailed);
}
