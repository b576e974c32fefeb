#!/usr/bin/env bash
# TLS 1.3 over a Unix socket: a client may send the end of its handshake, its only request and
# close_notify together, and then close. Over TCP, tokio-rustls's `accept` succeeds and the request
# is read. Over a Unix socket the same client makes `accept` fail with a broken pipe, and its request
# is never seen. A server writes its session tickets before `accept` returns, and a Unix socket
# refuses a write as soon as the other end is closed, while TCP still accepts it.
# With `send_tls13_tickets = 0` there is nothing to write, and the request is read.
#
# Seen with tokio-rustls 0.26.6, rustls 0.23.46, tokio 1.54.1, Linux.
set -euo pipefail

project=$(mktemp -d)
trap 'rm -rf "$project"' EXIT
cd "$project"
cargo init --quiet --name finding --vcs none

cat >Cargo.toml <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2024"

[dependencies]
rcgen = { version = "=0.14.10", default-features = false, features = ["crypto", "pem", "ring"] }
rustls = { version = "=0.23.46", default-features = false, features = ["ring", "std"] }
tokio = { version = "=1.54.1", features = ["full"] }
tokio-rustls = { version = "=0.26.6", default-features = false, features = ["ring"] }
TOML

cat >src/main.rs <<'RUST'
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio_rustls::TlsAcceptor;

/// Serves one connection, and returns the request or the error of the handshake.
async fn serve(
    io: impl AsyncRead + AsyncWrite + Unpin,
    config: Arc<ServerConfig>,
) -> io::Result<String> {
    let mut tls = TlsAcceptor::from(config).accept(io).await?;
    let mut request = String::new();
    tls.read_to_string(&mut request).await?;
    Ok(request)
}

/// Sends the end of the handshake, a request and close_notify in one write, and closes.
async fn send(mut io: impl Read + Write, config: Arc<ClientConfig>) {
    let name = ServerName::try_from("localhost").expect("a name");
    let mut tls = ClientConnection::new(config, name).expect("a client");
    tls.write_tls(&mut io).expect("the hello is sent");
    while tls.is_handshaking() {
        // The server runs on this thread, and only here.
        tokio::task::yield_now().await;
        match tls.read_tls(&mut io) {
            Ok(_) => {
                tls.process_new_packets().expect("the server's part is right");
            }
            Err(err) => assert_eq!(err.kind(), io::ErrorKind::WouldBlock),
        }
    }
    tls.writer().write_all(b"hello").expect("it is buffered");
    tls.send_close_notify();
    let mut all = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut all).expect("it is in memory");
    }
    io.write_all(&all).expect("the server has room");
}

async fn over_tcp(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>) -> io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    let far = tokio::net::TcpStream::from_std(far)?;
    let served = tokio::spawn(serve(far, Arc::clone(server)));
    send(near, Arc::clone(client)).await;
    served.await?
}

async fn over_unix(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>) -> io::Result<String> {
    let (near, far) = UnixStream::pair()?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    let far = tokio::net::UnixStream::from_std(far)?;
    let served = tokio::spawn(serve(far, Arc::clone(server)));
    send(near, Arc::clone(client)).await;
    served.await?
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let chain = vec![made.cert.der().clone()];
    let mut roots = RootCertStore::empty();
    roots.add(chain[0].clone()).expect("a root");
    let client = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = Arc::new(client);
    let mut server = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a configuration");
    let by_default = Arc::new(server.clone());
    server.send_tls13_tickets = 0;
    let without_tickets = Arc::new(server);

    let tcp = over_tcp(&by_default, &client).await;
    println!("TCP: {tcp:?}");
    assert_eq!(tcp.expect("it is read"), "hello");

    let unix = over_unix(&by_default, &client).await;
    println!("Unix: {unix:?}");
    assert_eq!(unix.expect_err("it is read now").kind(), io::ErrorKind::BrokenPipe);

    let unix = over_unix(&without_tickets, &client).await;
    println!("Unix, no tickets: {unix:?}");
    assert_eq!(unix.expect("it is read"), "hello");
}
RUST

cargo run --quiet
