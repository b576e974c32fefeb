//! TLS as clients of other projects see it: the versions, how a connection ends, and the limits on
//! a hostile peer.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use openssl::Openssl;
use process::{Client, Example, having, installed, soon};
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

#[path = "support/openssl.rs"]
mod openssl;
#[path = "support/process.rs"]
mod process;

/// A TLS client that trusts the certificate which `tls_echo` made for itself.
struct Tls {
    connector: TlsConnector,
    server: SocketAddr,
}

impl Tls {
    fn of(tls_echo: &Example) -> Self {
        let said = tls_echo.said.iter();
        let mut paths = said.filter_map(|line| line.strip_prefix("the certificate is in "));
        let path = paths.next().expect("it says where its certificate is");
        let mut roots = RootCertStore::empty();
        let cert = CertificateDer::from_pem_file(path).expect("a certificate in PEM");
        roots.add(cert).expect("a certificate that can be a root");
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring speaks them")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self {
            connector: TlsConnector::from(Arc::new(config)),
            server: tls_echo.addr(),
        }
    }

    async fn connect(&self) -> (BufReader<TlsStream<TcpStream>>, SocketAddr) {
        let stream = TcpStream::connect(self.server)
            .await
            .expect("the server listens");
        let addr = stream
            .local_addr()
            .expect("a connected socket has an address");
        let name = ServerName::try_from("localhost").expect("a name");
        let shaken = soon("the handshake", self.connector.connect(name, stream)).await;
        (BufReader::new(shaken.expect("a good handshake")), addr)
    }
}

async fn ask(stream: &mut BufReader<TlsStream<TcpStream>>, line: &str) -> String {
    stream
        .write_all(format!("{line}\n").as_bytes())
        .await
        .expect("the server reads");
    let mut answer = String::new();
    soon("an answer", stream.read_line(&mut answer))
        .await
        .expect("an answer");
    answer.trim_end().to_owned()
}

/// Sends a request with `openssl s_client`, and shuts the server down after the answer. Returns
/// openssl's output and the log.
async fn openssl(args: &[&str]) -> (String, Vec<String>) {
    let tls_echo = Example::start("tls_echo", &[]).await;
    let mut client = Openssl::connect(tls_echo.addr(), &[&["-quiet"], args].concat());

    client
        .stdin
        .write_all(b"hello\n")
        .await
        .expect("openssl reads its stdin");
    let mut said = String::new();
    soon("an answer, or the end", client.stdout.read_line(&mut said))
        .await
        .expect("text");
    let ended = tls_echo.stop();
    let rest = async {
        // openssl exits when the server closes; its stdin is still open.
        client.stdout.read_to_string(&mut said).await.expect("text");
        client.stderr.read_to_string(&mut said).await.expect("text");
    };
    let ((), ended) = soon("the end", async { tokio::join!(rest, ended) }).await;
    (said, ended.log)
}

#[tokio::test]
async fn openssl_is_served_over_tls_1_3_and_1_2() {
    if !installed("openssl") {
        return;
    }
    for version in ["-tls1_3", "-tls1_2"] {
        let (said, log) = openssl(&[version]).await;

        assert!(said.starts_with("hello\n"), "{said}");
        assert_eq!(
            having(&log, &["connection.closed", "\"drained\""]).len(),
            1,
            "{log:?}"
        );
    }
}

#[tokio::test]
async fn openssl_changes_the_keys_of_both_sides() {
    if !installed("openssl") {
        return;
    }
    let tls_echo = Example::start("tls_echo", &[]).await;
    let Openssl {
        mut stdin,
        stdout,
        stderr,
        process: _process,
    } = Openssl::connect(tls_echo.addr(), &["-tls1_3"]);
    let (mut answers, mut said) = (stdout.lines(), BufReader::new(stderr).lines());
    for round in ["first", "second", "third"] {
        // This is a command to openssl: it changes its own key, and asks the server to do so, too.
        stdin.write_all(b"K\n").await.expect("openssl reads");
        let changed = async {
            while said.next_line().await.expect("text").expect("it runs") != "KEYUPDATE" {}
        };
        soon("a change of keys", changed).await;

        let line = format!("{round}\n");
        stdin
            .write_all(line.as_bytes())
            .await
            .expect("openssl reads");

        let answered =
            async { while answers.next_line().await.expect("text").expect("it runs") != round {} };
        soon("an answer under new keys", answered).await;
    }
    tls_echo.stop().await;
}

#[tokio::test]
async fn b25_openssl_sees_the_closing_word_before_the_end() {
    if !installed("openssl") {
        return;
    }

    let (said, _log) = openssl(&[]).await;

    assert!(said.starts_with("hello\n"), "{said}");
    assert!(!said.contains("eof"), "{said}");
}

#[tokio::test]
async fn b19_openssl_is_refused_with_tls_1_1() {
    if !installed("openssl") {
        return;
    }

    // At its default security level openssl would not try.
    let (said, log) = openssl(&["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"]).await;

    assert!(!said.contains("hello"), "{said}");
    assert!(said.contains("SSL alert number"), "{said}");
    assert_eq!(
        having(&log, &["\"tls_handshake_failed\""]).len(),
        1,
        "{log:?}"
    );
}

#[tokio::test]
async fn b19_sslscan_finds_tls_1_2_and_1_3_and_nothing_older() {
    if !installed("sslscan") {
        return;
    }
    let tls_echo = Example::start("tls_echo", &[]).await;

    let mut scan = Command::new("sslscan");
    scan.args([
        "--no-colour",
        "--no-compression",
        "--no-fallback",
        "--no-groups",
    ])
    .args([
        "--no-heartbleed",
        "--no-renegotiation",
        "--no-check-certificate",
    ])
    .arg(tls_echo.addr().to_string());
    let scan = soon("the scan", scan.output()).await.unwrap();

    let said = String::from_utf8_lossy(&scan.stdout);
    let enabled: Vec<_> = said
        .lines()
        .filter(|line| line.ends_with(" enabled"))
        .collect();
    assert_eq!(
        enabled,
        ["TLSv1.2   enabled", "TLSv1.3   enabled"],
        "{said}"
    );
    let ciphers: Vec<_> = said
        .lines()
        .filter(|line| line.contains(" bits "))
        .collect();
    assert!(
        ciphers.iter().any(|cipher| cipher.contains("TLSv1.3")),
        "{said}"
    );
    for cipher in ciphers {
        assert!(
            cipher.contains("TLSv1.3") || cipher.contains("TLSv1.2"),
            "{cipher}"
        );
    }
}

#[tokio::test]
async fn b16_plain_text_to_the_tls_port_is_one_debug_event() {
    let tls_echo = Example::start("tls_echo", &[]).await;
    let tls = Tls::of(&tls_echo);
    let (mut bystander, beside) = tls.connect().await;
    let zeros = vec![0; 1 << 20];
    let texts: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nhost: here\r\n\r\n",
        // Behind a warning alert, which rustls would log as a warning.
        b"\x15\x03\x03\0\x02\x01\x70GET / HTTP/1.1\r\nhost: here\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        &zeros,
    ];
    let mut clients = Vec::new();

    // Each has an address of its own, because the system may give one the port of another.
    for (text, from) in texts
        .into_iter()
        .zip(["127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"])
    {
        let mut client = Client::connect_from(from, tls_echo.addr()).await;
        client.try_send(text).await;
        client.gone().await;
        clients.push(client.addr);
        assert_eq!(ask(&mut bystander, "still here").await, "still here");
    }

    drop(bystander);
    let ended = tls_echo.stop().await;
    for client in clients {
        let end = ended.end_of(client);
        assert!(
            end.contains("\"tls_handshake_failed\"") && end.contains(" DEBUG "),
            "{end}"
        );
    }
    ended.end_of(beside);
    let of_connections = having(&ended.log, &["connection.closed"]).len();
    assert_eq!(
        (of_connections, ended.log.len()),
        (5, 5 + 1),
        "besides the signal: {:#?}",
        ended.log
    );
}

#[tokio::test]
async fn b17_tls_to_a_plain_port_ends_that_connection_at_once() {
    if !installed("openssl") {
        return;
    }
    let plain = Example::start("multiplexed", &[]).await;

    let mut client = Command::new("openssl");
    client
        .args(["s_client", "-connect", &plain.addr().to_string()])
        .stdin(Stdio::null());
    let client = soon("the end", client.output()).await.unwrap();

    assert!(!client.status.success());
    let log = plain.stop().await.log;
    let ends = having(&log, &["connection.closed"]);
    assert_eq!(ends.len(), 1, "{log:#?}");
    // Read as a length, the first bytes of a handshake exceed any frame limit.
    assert!(
        ends[0].contains("\"frame_too_large\"") && ends[0].contains(" DEBUG "),
        "{ends:?}"
    );
}

/// Opens connections that stall. Every other one has sent half of a `ClientHello`.
async fn stalled(server: SocketAddr, count: usize) -> Vec<TcpStream> {
    let mut all = Vec::new();
    for n in 0..count {
        let mut stream = TcpStream::connect(server)
            .await
            .expect("the server listens");
        if n % 2 == 1 {
            let half = stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]);
            half.await.expect("the server reads");
        }
        all.push(stream);
    }
    all
}

#[tokio::test]
async fn b20_stalled_handshakes_delay_nobody_and_are_gone_at_the_deadline() {
    let deadline = Duration::from_secs(6);
    let tls_echo = Example::start("tls_echo", &["--handshake-deadline", "6"]).await;
    let tls = Tls::of(&tls_echo);
    let begun = Instant::now();
    let stalled = stalled(tls_echo.addr(), 500).await;

    let (mut good, _) = tls.connect().await;
    assert_eq!(ask(&mut good, "hi").await, "hi");

    assert!(
        begun.elapsed() < deadline,
        "the others were there meanwhile"
    );
    let mut none = [0];
    for mut stream in stalled {
        let read = soon("the deadline", stream.read(&mut none)).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    assert!(begun.elapsed() >= deadline, "no sooner");
    assert_eq!(
        tls_echo
            .logged(500, &["\"pre_connect_timeout\""])
            .await
            .len(),
        500
    );
    assert_eq!(ask(&mut good, "still here").await, "still here");
}

#[tokio::test]
async fn b20_the_oldest_stalled_handshake_makes_room_for_a_new_one() {
    let tls_echo = Example::start("tls_echo", &["--handshakes", "8"]).await;
    let tls = Tls::of(&tls_echo);
    let mut stalled = stalled(tls_echo.addr(), 8).await;

    let (mut good, _) = tls.connect().await;

    assert_eq!(ask(&mut good, "hi").await, "hi");
    let read = soon("the end of the oldest", stalled[0].read(&mut [0])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    assert_eq!(
        tls_echo.logged(1, &["\"pre_connect_evicted\""]).await.len(),
        1
    );
}

#[tokio::test]
async fn b25_a_frame_cut_off_without_the_closing_word_is_truncated_and_not_served() {
    let tls_echo = Example::start("tls_echo", &[]).await;
    let (mut client, addr) = Tls::of(&tls_echo).connect().await;
    assert_eq!(ask(&mut client, "whole").await, "whole");

    client.write_all(b"hal").await.unwrap();
    client.flush().await.unwrap();
    client.get_mut().get_mut().0.shutdown().await.unwrap(); // TCP's end only

    let mut rest = Vec::new();
    soon("the end", client.read_to_end(&mut rest))
        .await
        .unwrap();
    assert_eq!(rest, b"");
    drop(client);
    let ended = tls_echo.stop().await;
    let end = ended.end_of(addr);
    assert!(
        end.contains("\"truncated\"") && end.contains("requests=1"),
        "{end}"
    );
}

#[tokio::test]
async fn b25_every_end_that_is_in_order_says_the_closing_word() {
    let tls_echo = Example::start("tls_echo", &[]).await;
    let tls = Tls::of(&tls_echo);
    let (mut finished, _) = tls.connect().await;
    let (mut too_long, _) = tls.connect().await;
    let (mut drained, _) = tls.connect().await;
    assert_eq!(ask(&mut drained, "hi").await, "hi");

    finished.write_all(b"hi\n").await.unwrap();
    finished.shutdown().await.unwrap();
    too_long.write_all(&[b'.'; 70_000]).await.unwrap();
    let mut rests = Vec::new();
    for client in [&mut finished, &mut too_long] {
        let mut rest = Vec::new();
        // rustls reports an end without `close_notify` as an error.
        soon("the end", client.read_to_end(&mut rest))
            .await
            .unwrap();
        rests.push(rest);
    }
    drop((finished, too_long));
    tls_echo.signal(Signal::TERM);
    let mut rest = Vec::new();
    soon("the end", drained.read_to_end(&mut rest))
        .await
        .unwrap();

    assert_eq!(rests, [b"hi\n".as_slice(), b""]);
    assert_eq!(rest, b"");
}
