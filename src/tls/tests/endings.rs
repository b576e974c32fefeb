//! Peers that close during a handshake or right after it, and orderly ends of a stream.

use super::*;

/// Acts as a client that closes after sending `limit` bytes, or when its handshake is complete.
/// Returns whether it closed before its handshake was complete.
async fn close_after(limit: usize, config: Arc<ClientConfig>, mut far: DuplexStream) -> bool {
    let mut session = ClientConnection::new(config, localhost()).unwrap();
    let mut left = limit;
    loop {
        let mut flight = Vec::new();
        while session.wants_write() {
            session.write_tls(&mut flight).unwrap();
        }
        let send = flight.len().min(left);
        far.write_all(&flight[..send]).await.unwrap();
        left -= send;
        if send < flight.len() {
            return true;
        }
        if !session.is_handshaking() {
            return false;
        }
        if left == 0 {
            return true;
        }
        let mut received = [0; 4096];
        let n = far.read(&mut received).await.unwrap();
        session.read_tls(&mut &received[..n]).unwrap();
        session.process_new_packets().unwrap();
    }
}

#[tokio::test]
async fn b18_a_client_that_leaves_anywhere_in_the_handshake_is_one_failure() {
    let me = made("localhost");
    let tls = server(&me).build().unwrap();
    for version in [&TLS13, &TLS12] {
        let config = Arc::new(client(&me, &[version], None));
        for limit in 0.. {
            let (near, far) = duplex(64 * 1024);
            let (served, unfinished) = tokio::join!(
                accept(&tls, near),
                close_after(limit, Arc::clone(&config), far)
            );
            if !unfinished {
                assert!(limit > 200, "the whole handshake was {limit} bytes");
                break;
            }
            let kind = match served {
                // In TLS 1.2 the server sends the last message of the handshake. So if the client
                // closes after the client's last message, the server's handshake succeeds, and the
                // first read fails.
                Ok(mut conn) if info(&conn).version() == "1.2" => {
                    conn.read_u8().await.unwrap_err().kind()
                }
                served => failure(served).kind(),
            };
            // The pipe breaks if the server still has data to write.
            assert!(
                [io::ErrorKind::UnexpectedEof, io::ErrorKind::BrokenPipe].contains(&kind),
                "after {limit} bytes: {kind}"
            );
        }
    }
}

/// Acts as a client that sends its last bytes of the handshake, a request and `close_notify` in one
/// write, and then closes.
async fn request_and_close<Io>(config: ClientConfig, mut far: Io)
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut session = ClientConnection::new(Arc::new(config), localhost()).unwrap();
    loop {
        let done = !session.is_handshaking();
        if done {
            io::Write::write_all(&mut session.writer(), b"request").unwrap();
            session.send_close_notify();
        }
        let mut flight = Vec::new();
        while session.wants_write() {
            session.write_tls(&mut flight).unwrap();
        }
        far.write_all(&flight).await.unwrap();
        if done {
            return;
        }
        let mut received = [0; 4096];
        let n = far.read(&mut received).await.unwrap();
        session.read_tls(&mut &received[..n]).unwrap();
        session.process_new_packets().unwrap();
    }
}

/// Checks that the server reads the request of the client `request_and_close`, and then an orderly
/// end of the stream.
async fn expect_request<Io>(tls: &Tls, config: ClientConfig, (near, far): (Io, Io))
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (served, ()) = tokio::join!(accept(tls, near), request_and_close(config, far));

    let mut request = String::new();
    served.unwrap().read_to_string(&mut request).await.unwrap();
    assert_eq!(request, "request");
}

#[tokio::test]
async fn a_request_in_the_last_write_of_the_handshake_before_closing_is_read() {
    let me = made("localhost");
    let tls = server(&me).build().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    // TLS 1.3 only: in TLS 1.2 the server sends the last message of a handshake, so the client
    // cannot send a request together with its own last message.
    let config = || client(&me, &[&TLS13], None);

    expect_request(&tls, config(), duplex(64 * 1024)).await;
    expect_request(&tls, config(), UnixStream::pair().unwrap()).await;
    let far = TcpStream::connect(address).await.unwrap();
    let (near, _) = listener.accept().await.unwrap();
    expect_request(&tls, config(), (near, far)).await;
}

#[tokio::test]
async fn b23_a_closing_word_in_place_of_a_hello_is_a_failure() {
    let tls = server(&made("localhost")).build().unwrap();
    let (near, mut far) = duplex(64 * 1024);
    far.write_all(&[0x15, 3, 3, 0, 2, 1, 0]).await.unwrap();
    drop(far);

    failure(accept(&tls, near).await);
}

#[tokio::test]
async fn b25_shutting_down_sends_close_notify() {
    let me = made("localhost");
    let tls = server(&me).build().unwrap();
    for version in [&TLS13, &TLS12] {
        let (served, caller) = shake(&tls, client(&me, &[version], None)).await;
        let (mut conn, mut caller) = (served.unwrap(), caller.unwrap());

        conn.write_all(b"bye").await.unwrap();
        conn.shutdown().await.unwrap();
        drop(conn);

        let mut text = [0; 4];
        assert_eq!(caller.read(&mut text).await.unwrap(), 3);
        // Without `close_notify`, this would be `UnexpectedEof`.
        assert_eq!(caller.read(&mut text).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn b25_an_end_without_the_closing_word_is_told_from_one_with_it() {
    let me = made("localhost");
    let tls = server(&me).build().unwrap();

    let (served, caller) = shake(&tls, client(&me, &[&TLS13], None)).await;
    drop(caller);
    let cut = served.unwrap().read(&mut [0; 1]).await;
    let (served, caller) = shake(&tls, client(&me, &[&TLS13], None)).await;
    caller.unwrap().shutdown().await.unwrap();
    let closed = served.unwrap().read(&mut [0; 1]).await;

    assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(closed.unwrap(), 0);
}
