use std::net::Ipv4Addr;

use rcgen::CertifiedKey;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};
use tokio::io::{DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::Instant;
use tokio_rustls::{TlsConnector, client};

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::connection::{Address, Probe};
use crate::error::find_cause;

mod clients;
mod records;
mod reload;
mod settings;
mod stream;

type Made = CertifiedKey<rcgen::KeyPair>;
type Served<Io> = Result<Connection<TlsStream<Io>>, BoxError>;

fn made(name: &str) -> Made {
    rcgen::generate_simple_self_signed([name.to_owned()]).unwrap()
}

fn server(made: &Made) -> TlsBuilder {
    Tls::builder().certificate(made.cert.pem(), made.signing_key.serialize_pem())
}

fn client(
    server: &Made,
    versions: &[&'static SupportedProtocolVersion],
    own: Option<&Made>,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(server.cert.der().clone()).unwrap();
    let ring = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(ring)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    match own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
            builder
                .with_client_auth_cert(vec![own.cert.der().clone()], key)
                .unwrap()
        }
    }
}

fn localhost() -> ServerName<'static> {
    ServerName::try_from("localhost").unwrap()
}

fn connection<Io>(io: Io) -> Connection<Io> {
    Connection::new(io, Address::Memory(1), Address::Memory(2), Probe::default())
}

/// Runs the hook on one end of a connection.
async fn accept<Io>(tls: &Tls, io: Io) -> Served<Io>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tls.clone().call(connection(io)).await
}

async fn shake(
    tls: &Tls,
    config: ClientConfig,
) -> (
    Served<DuplexStream>,
    io::Result<client::TlsStream<DuplexStream>>,
) {
    shake_as(tls, config, "localhost").await
}

/// Performs a handshake with a client that requests this name.
async fn shake_as(
    tls: &Tls,
    config: ClientConfig,
    name: &'static str,
) -> (
    Served<DuplexStream>,
    io::Result<client::TlsStream<DuplexStream>>,
) {
    let (near, far) = duplex(64 * 1024);
    let connector = TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from(name).unwrap();
    tokio::join!(accept(tls, near), connector.connect(name, far))
}

/// Returns whether a client resumes a session, or why it does not get in. The client has the
/// tickets afterwards, and all clones of its configuration use them.
async fn resumes(tls: &Tls, config: &ClientConfig) -> Result<bool, rustls::Error> {
    let (served, caller) = shake(tls, config.clone()).await;
    let mut conn = match served {
        Ok(conn) => conn,
        Err(err) => return Err(rustls_error::<DuplexStream>(Err(err))),
    };
    // The tickets are read along with the first data.
    conn.write_all(b"x").await.unwrap();
    conn.flush().await.unwrap();
    caller.unwrap().read_u8().await.unwrap();
    Ok(info(&conn).is_resumed())
}

fn info(conn: &Connection<TlsStream<DuplexStream>>) -> &TlsInfo {
    conn.info().get().unwrap()
}

/// Returns the cause of a failed handshake, after checking that it is reported as one.
fn failure<Io>(served: Served<Io>) -> io::Error {
    let ended = served.err().unwrap().downcast::<ConnectionEnded>().unwrap();
    assert_eq!(ended.reason(), EndReason::TlsHandshakeFailed);
    let cause = ended.cause.as_deref().unwrap();
    let cause = cause.downcast_ref::<io::Error>().unwrap();
    match find_cause::<rustls::Error>(cause) {
        Some(inner) => io::Error::new(cause.kind(), inner.clone()),
        None => cause.kind().into(),
    }
}

fn rustls_error<Io>(served: Served<Io>) -> rustls::Error {
    let err = failure(served);
    find_cause::<rustls::Error>(&err).unwrap().clone()
}

#[tokio::test]
async fn tls_1_3_is_spoken_and_the_facts_are_there() {
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
async fn tls_1_2_is_spoken() {
    let me = made("localhost");

    let (served, _) = shake(&server(&me).build().unwrap(), client(&me, &[&TLS12], None)).await;

    let conn = served.unwrap();
    assert_eq!(info(&conn).version(), "1.2");
    assert!(info(&conn).cipher_suite().starts_with("TLS_ECDHE_"));
}

#[tokio::test]
async fn what_is_counted_is_plain_bytes() {
    let me = made("localhost");
    let (served, caller) = shake(&server(&me).build().unwrap(), client(&me, &[&TLS13], None)).await;
    let (mut conn, mut caller) = (served.unwrap(), caller.unwrap());

    caller.write_all(b"hello").await.unwrap();
    caller.flush().await.unwrap();
    conn.read_exact(&mut [0; 5]).await.unwrap();
    conn.write_all(b"hi").await.unwrap();

    let (tell, told) = std::sync::mpsc::channel();
    conn.on_end(move |end| {
        tell.send((end.bytes_read(), end.bytes_written())).unwrap();
    });
    conn.life().finish(|| EndReason::PeerClosed.into());
    assert_eq!(told.recv().unwrap(), (5, 2));
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
    // A record of a ClientHello: version 3.1, a random, no session, one suite, no compression.
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
    // One alert record, fatal.
    assert_eq!((answer.len(), answer[0], answer[5]), (7, 0x15, 2));
}

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

    for whether in [ClientCertificates::Required, ClientCertificates::Optional] {
        let tls = server(&me)
            .client_certificates(friend.cert.pem(), whether)
            .build()
            .unwrap();
        let (served, caller) = shake(&tls, client(&me, &[&TLS13], Some(&stranger))).await;

        assert!(matches!(
            rustls_error(served),
            rustls::Error::InvalidCertificate(_)
        ));
        // In TLS 1.3 the client completes before the server has seen its certificate, so the alert
        // arrives with the next read.
        let err = caller.unwrap().read_u8().await.unwrap_err();
        let alert = find_cause(&err);
        assert!(
            matches!(alert, Some(rustls::Error::AlertReceived(_))),
            "{err:?}"
        );
    }
}

#[tokio::test]
async fn a_client_may_come_without_an_optional_certificate() {
    let (me, friend) = (made("localhost"), made("friend"));
    let tls = server(&me)
        .client_certificates(friend.cert.pem(), ClientCertificates::Optional)
        .build()
        .unwrap();

    let (served, _) = shake(&tls, client(&me, &[&TLS13], None)).await;

    assert!(info(&served.unwrap()).peer_certificates().is_empty());
}

/// Over real sockets, because only they turn unread input into a reset.
#[tokio::test]
async fn b16_plain_text_is_answered_by_an_alert_and_the_end() {
    let tls = server(&made("localhost")).build().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let texts = [
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
        // More than rustls takes in one read.
        vec![b'G'; 12 * 1024],
        vec![0; 12 * 1024],
    ];
    for text in texts {
        let mut peer = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (io, _) = listener.accept().await.unwrap();
        peer.write_all(&text).await.unwrap();

        // Nothing is read before the server is done, so a reset would have arrived by now.
        let served = accept(&tls, io).await;
        let mut answer = Vec::new();
        let read = peer.read_to_end(&mut answer).await;

        rustls_error(served);
        assert!(read.is_ok(), "{read:?} after {answer:?}");
        // One alert record, fatal.
        assert_eq!(
            (answer.len(), answer[0], answer[5]),
            (7, 0x15, 2),
            "{answer:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn b16_a_peer_that_stays_after_the_alert_sees_the_end_at_once_and_is_left_after_200_ms() {
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
    // What rustls read, what was read after it, and what the pipe holds.
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
    let (tell, told) = std::sync::mpsc::channel();
    conn.on_end(move |end| tell.send(end.reason()).unwrap());

    let mut shaking = tokio_test::task::spawn(tls.clone().call(conn));
    tokio_test::assert_pending!(shaking.poll());
    drop(shaking);
    life.set_reason(EndReason::PreConnectTimeout, None);
    life.finish(|| EndReason::Killed.into());

    assert_eq!(told.recv().unwrap(), EndReason::TlsHandshakeFailed);
}

/// Acts as a client up to `limit` bytes, then leaves. Returns whether the handshake needed more.
async fn leave_after(limit: usize, config: Arc<ClientConfig>, mut far: DuplexStream) -> bool {
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
        let mut came = [0; 4096];
        let n = far.read(&mut came).await.unwrap();
        session.read_tls(&mut &came[..n]).unwrap();
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
            let (served, left) = tokio::join!(
                accept(&tls, near),
                leave_after(limit, Arc::clone(&config), far)
            );
            if !left {
                assert!(limit > 200, "the whole handshake was {limit} bytes");
                break;
            }
            let kind = match served {
                // In TLS 1.2 the client has sent all of its part when the server has the last word.
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
async fn ask_and_leave<Io>(config: ClientConfig, mut far: Io)
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
        let mut came = [0; 4096];
        let n = far.read(&mut came).await.unwrap();
        session.read_tls(&mut &came[..n]).unwrap();
        session.process_new_packets().unwrap();
    }
}

/// Expects that the request of such a client is read, and then a proper end of its stream.
async fn hears<Io>(tls: &Tls, config: ClientConfig, (near, far): (Io, Io))
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (served, ()) = tokio::join!(accept(tls, near), ask_and_leave(config, far));

    let mut request = String::new();
    served.unwrap().read_to_string(&mut request).await.unwrap();
    assert_eq!(request, "request");
}

#[tokio::test]
async fn a_client_that_asks_with_its_last_write_of_the_handshake_and_closes_is_heard() {
    let me = made("localhost");
    let tls = server(&me).build().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    // In TLS 1.2 the server has the last word of a handshake.
    let config = || client(&me, &[&TLS13], None);

    hears(&tls, config(), duplex(64 * 1024)).await;
    hears(&tls, config(), UnixStream::pair().unwrap()).await;
    let far = TcpStream::connect(address).await.unwrap();
    let (near, _) = listener.accept().await.unwrap();
    hears(&tls, config(), (near, far)).await;
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
async fn b25_shutting_down_says_the_closing_word() {
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
        // Without `close_notify` this is `UnexpectedEof`.
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

#[test]
fn b27_early_data_is_off_and_the_session_cache_is_on() {
    let tls = server(&made("localhost")).build().unwrap();

    let config = tls.current.get().server;

    assert_eq!(config.max_early_data_size, 0);
    assert!(config.session_storage.can_cache());
}

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
fn an_error_says_which_text_in_memory_was_at_fault() {
    let me = made("localhost");

    let err = Tls::builder()
        .certificate(me.cert.pem(), "no key")
        .build()
        .unwrap_err();

    assert_eq!(
        err.to_string(),
        "no unencrypted private key in the private key given"
    );
    assert!(matches!(Tls::builder().build(), Err(TlsError::NoneGiven)));
}
