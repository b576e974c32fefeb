//! The example `one_port`, driven by common clients: each is served in its own protocol, under
//! every fault of its connection.

use std::collections::HashSet;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use certificates::certified;
use futures_util::TryStreamExt;
use one_port::stack;
use openssl::Openssl;
use process::{Client, Example, soon};
use socket2::SockRef;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConnection;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::io::{ReaderStream, StreamReader};
use tower_tcp::testkit::faults;
use tower_tcp::tls::Tls;

#[path = "support/certificates.rs"]
mod certificates;
#[path = "../examples/one_port.rs"]
#[expect(dead_code, reason = "its `main` runs in a process of its own")]
mod one_port;
#[path = "support/openssl.rs"]
mod openssl;
#[path = "support/process.rs"]
mod process;

/// Runs a client program with `input`. Returns its output.
async fn run(program: &str, args: &[&str], input: &str) -> String {
    let mut client = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|err| panic!("{program} is installed (see .ci/run): {err}"));
    let mut stdin = client.stdin.take().expect("a pipe");
    stdin.write_all(input.as_bytes()).await.expect("it reads");
    drop(stdin);
    let output = soon(program, client.wait_with_output()).await;
    let output = output.expect("it ends");
    let said = String::from_utf8(output.stdout).expect("text");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {said}{complaint}");
    said
}

async fn curl(args: &[&str]) -> String {
    run(
        "curl",
        &[&["--silent", "--show-error", "--insecure"], args].concat(),
        "",
    )
    .await
}

#[tokio::test]
async fn curl_is_answered_in_the_http_it_speaks() {
    let example = Example::start("one_port", &[]).await;
    let (plain, tls) = (
        format!("http://{}/", example.addr()),
        format!("https://{}/", example.addr()),
    );

    assert_eq!(curl(&[&plain]).await, "HTTP/1.1 in the clear\n");
    let http2 = curl(&["--http2-prior-knowledge", &plain]).await;
    assert_eq!(http2, "HTTP/2.0 in the clear\n");
    assert_eq!(curl(&[&tls]).await, "HTTP/2.0 over TLS 1.3\n");
    let http1 = curl(&["--http1.1", &tls]).await;
    assert_eq!(http1, "HTTP/1.1 over TLS 1.3\n");
}

#[tokio::test]
async fn http_inside_of_tls_that_was_not_agreed_is_found() {
    let example = Example::start("one_port", &[]).await;
    let tls = format!("https://{}/", example.addr());

    let answer = curl(&["--no-alpn", "--tls-max", "1.2", &tls]).await;

    assert_eq!(answer, "HTTP/1.1 over TLS 1.2\n");
}

#[tokio::test]
async fn nc_is_answered_in_lines() {
    let example = Example::start("one_port", &[]).await;
    let (host, port) = (example.addr().ip().to_string(), example.addr().port());

    let said = run("nc", &["-N", &host, &port.to_string()], "hi\n").await;

    assert_eq!(said, "220 ready\nhi\n");
}

#[tokio::test]
async fn nc_is_answered_in_http_if_that_is_what_it_sends() {
    let example = Example::start("one_port", &[]).await;
    let (host, port) = (example.addr().ip().to_string(), example.addr().port());
    let request = "GET / HTTP/1.0\r\n\r\n";

    let said = run("nc", &["-N", &host, &port.to_string()], request).await;

    assert!(said.starts_with("HTTP/1.0 200 OK\r\n"), "{said}");
    assert!(said.ends_with("\r\n\r\nHTTP/1.0 in the clear\n"), "{said}");
}

#[tokio::test]
async fn openssl_is_answered_in_lines_inside_of_tls() {
    let example = Example::start("one_port", &[]).await;
    let mut client = Openssl::connect(example.addr(), &["-quiet"]);

    client.stdin.write_all(b"hi\n").await.unwrap();

    for expected in ["220 ready\n", "hi\n"] {
        let mut line = String::new();
        let reading = client.stdout.read_line(&mut line);
        soon("a line", reading).await.unwrap();
        assert_eq!(line, expected);
    }
}

#[tokio::test]
async fn one_who_says_nothing_is_greeted() {
    let example = Example::start("one_port", &["--silence", "50"]).await;
    let mut client = Client::connect(example.addr()).await;

    assert_eq!(client.line().await, "220 ready");

    assert_eq!(client.ask("hi").await, "hi");
}

/// Returns the first bytes of a TLS client.
fn client_hello() -> Vec<u8> {
    let name = ServerName::try_from("localhost").expect("a name");
    let mut client = ClientConnection::new(certified().1, name).expect("a client");
    let mut hello = Vec::new();
    client.write_tls(&mut hello).expect("into memory");
    hello
}

#[tokio::test]
async fn clients_that_leave_behind_any_byte_end_once_each_and_leave_nothing() {
    let example = Example::start("one_port", &[]).await;
    let hello = client_hello();
    let beginnings: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        &hello,
        b"hello\nhello\n",
    ];

    let mut left = 0;
    for bytes in beginnings {
        for cut in 0..=bytes.len() {
            for resets in [false, true] {
                let mut client = TcpStream::connect(example.addr()).await.unwrap();
                client.write_all(&bytes[..cut]).await.unwrap();
                if resets {
                    SockRef::from(&client)
                        .set_linger(Some(Duration::ZERO))
                        .unwrap();
                }
                left += 1;
            }
        }
    }

    let ends = example.logged(left, &["connection.closed"]).await;
    let numbers = ends.iter().map(|end| {
        let id = end.split(" connection.id=").nth(1);
        id.and_then(|rest| rest.split(' ').next())
            .expect("it has one")
    });
    assert_eq!(numbers.collect::<HashSet<_>>().len(), left);
    let ended = example.stop().await;
    assert!(ended.log.iter().all(|line| !line.contains("panicked")));
    // The last connection may still be closing.
    let last = ended.said.last().unwrap();
    assert!(last.ends_with(", 0 aborted"), "{last}");
}

#[tokio::test]
async fn all_of_them_leave_at_a_signal() {
    let example = Example::start("one_port", &[]).await;
    let mut web = Client::connect(example.addr()).await;
    let mut lines = Client::connect(example.addr()).await;
    web.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(web.line().await, "HTTP/1.1 200 OK");
    lines.send("hi\n").await;
    assert_eq!(lines.line().await, "220 ready");
    assert_eq!(lines.line().await, "hi");

    let ended = tokio::spawn(example.stop());

    assert_eq!(lines.rest().await, b"");
    web.rest().await;
    drop((web, lines));
    let ended = ended.await.unwrap();
    assert!(ended.status.success());
    let last = ended.said.last().unwrap();
    assert_eq!(last, "connections: 2 drained, 0 timed out, 0 aborted");
}

const SILENCE: Duration = Duration::from_secs(1);

/// Replaces the value of each `date` header, which differs from run to run, by as many `x`.
fn undated<Io>(io: Io) -> impl AsyncRead + AsyncWrite + Unpin
where
    Io: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (reader, writer) = tokio::io::split(io);
    let mut line = Vec::new();
    let undated = ReaderStream::new(reader).map_ok(move |bytes| {
        let bytes = bytes.into_iter().map(|byte| {
            let date = line.starts_with(b"date: ") && !byte.is_ascii_control();
            line.push(byte);
            if byte == b'\n' {
                line.clear();
            }
            if date { b'x' } else { byte }
        });
        bytes.collect::<Bytes>()
    });
    tokio::io::join(StreamReader::new(undated), writer)
}

#[tokio::test(start_paused = true)]
async fn every_fault_at_every_byte_leaves_whole_lines() {
    let tls = Tls::from(certified().0);

    let check = faults::check(
        move || stack(tls.clone(), SILENCE),
        "PRIVATE\n\nGET / HTTP/1.1\n", // HTTP/2 begins with `PRI`
        "220 ready\nPRIVATE\n\nGET / HTTP/1.1\n",
    );

    check.await.unwrap();
}

/// Stands for the `close_notify` at the end of a TLS stream.
const CLOSED: &str = "(close_notify)";

/// Appends [`CLOSED`] to what is read, unless the stream ends with an error.
fn said_closed<Io: AsyncRead + AsyncWrite>(io: Io) -> impl AsyncRead + AsyncWrite + Unpin {
    let (reader, writer) = tokio::io::split(io);
    tokio::io::join(reader.chain(CLOSED.as_bytes()), writer)
}

const TWICE: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n";

fn hello(over: &str) -> String {
    let (date, line) = ("x".repeat(29), format!("HTTP/1.1 {over}\n"));
    let length = line.len();
    format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\ndate: {date}\r\n\r\n{line}")
}

#[tokio::test(start_paused = true)]
async fn every_fault_leaves_whole_responses() {
    let tls = Tls::from(certified().0);

    let check = faults::check(
        move || stack(tls.clone(), SILENCE),
        TWICE,
        hello("in the clear").repeat(2),
    );

    // A client that is silent or leaves before its protocol is known is greeted in lines.
    let check = check.client(|io| async { Ok(undated(io)) });
    let check = check.farewell("220 ready\n").places(TWICE.len() + 1);
    check.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn every_fault_leaves_whole_responses_inside_of_tls() {
    let (server, mut client) = certified();
    // Each handshake has as many bytes as the first.
    Arc::make_mut(&mut client).resumption = Resumption::disabled();
    let (tls, connector) = (Tls::from(server), TlsConnector::from(client));

    let check = faults::check(
        move || stack(tls.clone(), SILENCE),
        TWICE,
        hello("over TLS 1.3").repeat(2) + CLOSED,
    );

    let check = check.client(move |io| {
        let connected = connector.connect("localhost".try_into().expect("a host name"), io);
        async { Ok(said_closed(undated(connected.await?))) }
    });
    let check = check.farewell("220 ready\n").farewell(CLOSED);
    let check = check.farewell(format!("220 ready\n{CLOSED}"));
    check.places(8).seeds(0..4).await.unwrap();
}
