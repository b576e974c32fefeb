//! Tests the app with curl, a WebSocket client and a hand-written client.

use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::{Example, soon};

/// Runs curl, and returns what it printed.
async fn curl(args: &[&str]) -> String {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--insecure"]);
    let output = soon("curl", curl.args(args).kill_on_drop(true).output()).await;
    let output = output.expect("curl is installed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).expect("it is text")
}

async fn connect(example: &Example) -> BufReader<TcpStream> {
    let stream = TcpStream::connect(&example.address).await;
    BufReader::new(stream.expect("it listens"))
}

async fn ask(client: &mut BufReader<TcpStream>, path: &str) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    let sent = client.write_all(request.as_bytes()).await;
    sent.expect("it is open");
}

/// Reads lines until one equals `expected`.
async fn until(client: &mut BufReader<TcpStream>, expected: &str) {
    let mut line = String::new();
    while line.trim_end() != expected {
        line.clear();
        let read = soon(expected, client.read_line(&mut line)).await;
        assert_ne!(read.expect("it is text"), 0, "no {expected:?} came");
    }
}

async fn websocket<Io>(scheme: &str, io: Io) -> WebSocketStream<Io>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let connected = soon(
        "an upgrade",
        client_async(format!("{scheme}://localhost/echo"), io),
    )
    .await;
    connected.expect("it is agreed").0
}

async fn is_echoed<Io>(socket: &mut WebSocketStream<Io>)
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    for message in [
        Message::text("hello"),
        Message::binary(vec![7; 10_000]),
        Message::text(""),
    ] {
        socket.send(message.clone()).await.expect("it is open");

        let echo = soon("an echo", socket.next()).await;
        assert_eq!(echo.expect("it is open").expect("a message"), message);
    }
}

#[tokio::test]
async fn it_explains_its_options() {
    let mut help = Command::new(env!("CARGO_BIN_EXE_axum-on-tower-tcp"));
    let help = soon("the help", help.arg("--help").output()).await.unwrap();

    let text = String::from_utf8(help.stdout).unwrap();
    assert!(help.status.success());
    assert!(
        text.contains("Usage:") && text.contains("--listen"),
        "{text}"
    );
}

#[tokio::test]
async fn each_version_of_http_is_spoken_plain_and_encrypted() {
    for (args, url, version, expected) in [
        (&["--plain"][..], "http", "--http1.1", "hello\n200 1.1"),
        (
            &["--plain"],
            "http",
            "--http2-prior-knowledge",
            "hello\n200 2",
        ),
        (&[], "https", "--http1.1", "hello\n200 1.1"),
        (&[], "https", "--http2", "hello\n200 2"),
    ] {
        let example = Example::start(args).await;
        let url = format!("{url}://{}/", example.address);

        let said = curl(&[version, "--write-out", "%{http_code} %{http_version}", &url]).await;

        assert_eq!(said, expected, "{url} {version}");
    }
}

#[tokio::test]
async fn json_is_taken_and_answered() {
    let example = Example::start(&[]).await;
    let url = format!("https://{}/sum", example.address);

    let said = curl(&["--json", r#"{"a": 2, "b": 3}"#, &url]).await;

    assert_eq!(said, r#"{"sum":5}"#);
}

#[tokio::test]
async fn a_handler_knows_its_connection() {
    let example = Example::start(&[]).await;
    let url = format!("https://{}/whoami", example.address);

    let said = curl(&["--http2", &url]).await;

    assert!(said.contains(r#""address":"127.0.0.1:"#), "{said}");
    assert!(said.contains(r#""tls":"1.3","protocol":"h2""#), "{said}");
}

#[tokio::test]
async fn a_handler_knows_the_client_behind_a_proxy() {
    let example = Example::start(&["--plain", "--proxy-from", "127.0.0.1"]).await;
    let mut client = TcpStream::connect(&example.address).await.unwrap();
    let header = "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n";
    let request = "GET /whoami HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    client.write_all(header.as_bytes()).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    let mut said = String::new();
    soon("an answer", client.read_to_string(&mut said))
        .await
        .unwrap();
    assert!(said.contains(r#""address":"192.0.2.1:56324""#), "{said}");

    let example = Example::start(&["--proxy-from", "127.0.0.0/8"]).await;
    let url = format!("https://{}/whoami", example.address);
    let said = curl(&[
        "--haproxy-protocol",
        "--interface",
        "127.0.0.5",
        "--http2",
        &url,
    ])
    .await;
    assert!(said.contains(r#""address":"127.0.0.5:"#), "{said}");
}

#[tokio::test]
async fn a_websocket_echoes() {
    let example = Example::start(&["--plain"]).await;

    let io = TcpStream::connect(&example.address).await.unwrap();
    let mut socket = websocket("ws", io).await;

    is_echoed(&mut socket).await;
}

#[tokio::test]
async fn a_websocket_that_closes_is_answered() {
    let example = Example::start(&["--plain"]).await;
    let mut io = TcpStream::connect(&example.address).await.unwrap();
    websocket("ws", &mut io).await;
    // A close with the code 1000, masked with zeros.
    let close = [0x88, 0x82, 0, 0, 0, 0, 3, 232];

    io.write_all(&close).await.unwrap();

    let mut rest = Vec::new();
    let read = soon("the end", io.read_to_end(&mut rest)).await;
    read.expect("it closes in good order");
    assert_eq!(rest, [0x88, 2, 3, 232]);
}

#[tokio::test]
async fn a_websocket_learns_that_its_message_is_too_large() {
    let example = Example::start(&["--plain"]).await;
    let io = TcpStream::connect(&example.address).await.unwrap();
    let mut socket = websocket("ws", io).await;

    let message = Message::binary(vec![7; 100_000]);
    soon("a message", socket.send(message)).await.unwrap();

    let last = soon("a last word", socket.next()).await;
    let Some(Ok(Message::Close(Some(last)))) = last else {
        panic!("{last:?} is no close");
    };
    assert_eq!(u16::from(last.code), 1009);
}

#[tokio::test]
async fn a_websocket_echoes_behind_tls() {
    let example = Example::start(&[]).await;
    let mut roots = RootCertStore::empty();
    let cert = example.cert.as_ref().expect("it has made one");
    roots
        .add(CertificateDer::from_pem_file(cert).unwrap())
        .unwrap();
    let config = ClientConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let io = TcpStream::connect(&example.address).await.unwrap();
    let connecting = TlsConnector::from(Arc::new(config)).connect(name, io);
    let io = soon("a handshake", connecting).await.unwrap();

    let mut socket = Box::pin(websocket("wss", io)).await;

    is_echoed(&mut socket).await;
}

#[tokio::test]
async fn events_come_one_by_one() {
    let example = Example::start(&["--plain"]).await;
    let mut client = connect(&example).await;

    ask(&mut client, "/ticks").await;

    until(&mut client, "content-type: text/event-stream").await;
    for n in 0..2 {
        until(&mut client, "event: tick").await;
        until(&mut client, &format!("data: {n}")).await;
    }
}

#[tokio::test]
async fn a_drain_answers_what_is_in_hand_and_ends_what_has_no_end() {
    let example = Example::start(&["--plain"]).await;
    let io = TcpStream::connect(&example.address).await.unwrap();
    let mut socket = websocket("ws", io).await;
    let mut events = connect(&example).await;
    ask(&mut events, "/ticks").await;
    until(&mut events, "event: tick").await;
    let mut request = connect(&example).await;

    ask(&mut request, "/slow").await;
    example.terminate();

    let last = soon("a last word", socket.next()).await;
    assert_eq!(last.unwrap().unwrap(), Message::Close(None));
    assert!(soon("the end", socket.next()).await.is_none());
    // The last chunk, which is empty.
    until(&mut events, "0").await;
    until(&mut request, "connection: close").await;
    until(&mut request, "slow").await;
    drop((socket, events, request));
    let (status, last) = example.ended().await;
    assert!(status.success());
    assert_eq!(last, "connections: 3 drained, 0 timed out, 0 aborted");
}

#[tokio::test]
async fn who_comes_beyond_the_limit_waits_for_room() {
    let example = Example::start(&["--plain", "--connections", "1"]).await;
    let mut first = connect(&example).await;
    ask(&mut first, "/").await;
    until(&mut first, "hello").await;
    let mut second = connect(&example).await;

    ask(&mut second, "/").await;
    // This takes a second, enough time for an early answer to the second client.
    ask(&mut first, "/slow").await;
    until(&mut first, "slow").await;

    let early = second.get_mut().try_read(&mut [0; 1]);
    assert_eq!(early.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    drop(first);
    until(&mut second, "hello").await;
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let example = Example::start(&["--plain"]).await;
    let mut client = connect(&example).await;
    let head = format!("GET / HTTP/1.1\r\nx: {}", "y".repeat(1 << 20));

    // The server may close before all of it is sent.
    _ = client.write_all(head.as_bytes()).await;

    until(&mut client, "HTTP/1.1 431 Request Header Fields Too Large").await;
    let mut rest = Vec::new();
    _ = soon("the end", client.read_to_end(&mut rest)).await;
}
