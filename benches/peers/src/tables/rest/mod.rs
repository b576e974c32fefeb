//! The memory of each connection at rest.

mod servers;

use std::any::Any;
use std::time::Duration;

use anyhow::{Context, Result};
use rcgen::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::sleep;
use tokio_rustls::rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use tokio_rustls::rustls::version::TLS13;

use super::tls::Client;
use crate::bench::Bench;
use crate::load::{allow_connections, ask, connect};
use crate::server::Running;
use crate::table::{self, Figure, Table};

use servers::Servers;

/// The number of connections that are counted.
const CONNECTIONS: u32 = 6_000;
/// The number of connections before those. They make the server allocate what all connections
/// share.
const FIRST: u32 = 100;

/// The time that the last connection takes to become idle.
const SETTLE: Duration = Duration::from_secs(1);

const FIGURES: [Figure; 1] = [Figure::new("bytes/connection").compared()];

/// Requests, and the bytes that the answer of each ends with.
type Exchanges = &'static [(&'static [u8], &'static [u8])];

const LINE: Exchanges = &[(b"line\n", b"line\n")];

const HTTP1: Exchanges = &[(
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: peers\r\nAccept: */*\r\n\r\n",
    b"Hello, world!",
)];

/// First the preface, empty settings, and GET / on stream 1 with its head in HPACK. Then the
/// acknowledgement of the server's settings, and a ping. The answer to the ping shows that the
/// acknowledgement has arrived.
const HTTP2: Exchanges = &[
    (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
          \0\0\0\x04\0\0\0\0\0\
          \0\0\x0e\x01\x05\0\0\0\x01\x82\x86\x84\x41\x09localhost",
        b"Hello, world!",
    ),
    (
        b"\0\0\0\x04\x01\0\0\0\0\
          \0\0\x08\x06\0\0\0\0\0at rest!",
        b"at rest!",
    ),
];

/// The head and the first event of a stream that stays open.
const EVENTS: Exchanges = &[(
    b"GET /events HTTP/1.1\r\nHost: localhost\r\nUser-Agent: peers\r\nAccept: */*\r\n\r\n",
    b"data: line\n\n\r\n",
)];

/// The upgrade, then a text message, whose mask changes nothing.
const WEBSOCKET: Exchanges = &[
    (
        b"GET /echo HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
          Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"\r\n\r\n",
    ),
    (b"\x81\x84\0\0\0\0line", b"\x81\x04line"),
];

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    allow_connections(CONNECTIONS + FIRST)?;
    let dir = tempfile::tempdir()?;
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let all = Servers::new(dir.path(), &made)?;
    table::head(
        bench,
        "Connections at rest",
        &format!(
            "Growth of the server's resident memory by {CONNECTIONS} connections that have been \
             answered once. What nginx allocates for all possible connections when it starts is \
             not counted. TLS is 1.3.{}",
            all.missing()
        ),
    )?;
    let mut table = Table::new("protocol", FIGURES);
    for (protocol, exchanges, tls, servers) in [
        ("lines", LINE, false, all.lines()?),
        ("lines, TLS", LINE, true, all.tls_lines()?),
        ("HTTP/1.1", HTTP1, false, all.http1()?),
        ("HTTP/1.1, TLS", HTTP1, true, all.https1()?),
        ("HTTP/2", HTTP2, false, all.http2()?),
        ("WebSocket", WEBSOCKET, false, all.axum(&[])?),
        ("server-sent events", EVENTS, false, all.axum(&[])?),
    ] {
        let samples = bench
            .rounds(&servers, async |server| {
                let client = tls.then(|| client(&made)).transpose()?;
                measure(server, exchanges, client.as_ref()).await
            })
            .await
            .context(protocol)?;
        table.rows(protocol, &servers, &samples);
    }
    table.print();
    Ok(())
}

fn client(made: &CertifiedKey<rcgen::KeyPair>) -> Result<Client> {
    Client::new(made.cert.der(), &TLS13, TLS13_AES_128_GCM_SHA256, false)
}

async fn measure(
    server: &Running,
    exchanges: Exchanges,
    client: Option<&Client>,
) -> Result<[f64; 1]> {
    let mut open = Vec::new();
    let mut before = 0;
    for n in 0..FIRST + CONNECTIONS {
        if n == FIRST {
            before = server.resident()?;
        }
        let connection = connection(server, n, exchanges, client);
        open.push(
            connection
                .await
                .with_context(|| format!("connection {n}"))?,
        );
    }
    sleep(SETTLE).await;
    let grown = server.resident()?.saturating_sub(before);
    Ok([grown as f64 / f64::from(CONNECTIONS)])
}

/// Returns a connection that is open until it is dropped.
async fn connection(
    server: &Running,
    number: u32,
    exchanges: Exchanges,
    client: Option<&Client>,
) -> Result<Box<dyn Any>> {
    match client {
        None => answered(connect(server, number).await?, exchanges).await,
        Some(client) => answered(client.connect(server, number).await?, exchanges).await,
    }
}

async fn answered<Io>(mut stream: Io, exchanges: Exchanges) -> Result<Box<dyn Any>>
where
    Io: AsyncRead + AsyncWrite + Unpin + 'static,
{
    for (request, answer) in exchanges {
        ask(&mut stream, request, answer).await?;
    }
    Ok(Box::new(stream))
}
