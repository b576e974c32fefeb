//! TLS, terminated by this crate, by nginx and by haproxy. All of them forward to the same backend.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::ring::{self, cipher_suite};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{
    ClientConfig, HandshakeKind, RootCertStore, SupportedCipherSuite, SupportedProtocolVersion,
    version,
};

use crate::bench::Bench;
use crate::load::{connect, micros};
use crate::server::{Running, Server, free_port};
use crate::table::{self, Figure, Table};

/// The number of bytes that a turn of the bulk tables transfers.
const BULK: usize = 256 * 1024 * 1024;

const BLOCK: usize = 64 * 1024;

/// The path of nginx's stream module in Debian (`libnginx-mod-stream`).
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// The first byte of a connection tells the backend what to do.
const ECHO: u8 = b'e';
const SEND: u8 = b's';
const TAKE: u8 = b't';

const HANDSHAKES: [Figure; 2] = [
    Figure::new("handshakes/s").compared(),
    Figure::new("CPU µs/handshake").digits(1).compared(),
];

const BYTES: [Figure; 2] = [
    Figure::new("MB/s").compared(),
    Figure::new("CPU µs/MB").digits(1).compared(),
];

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let backend = listener.local_addr()?.port();
    let served = tokio::spawn(serve(listener));
    let (servers, missing) = servers(&dir, &made, backend)?;
    table::head(
        bench,
        "TLS, terminated and forwarded",
        &format!(
            "ECDSA P-256; the client allows one suite. The backend shares the processor of the \
             load, so compare the CPU time of the servers.{missing}"
        ),
    )?;

    let suites = [
        (
            "1.3",
            &version::TLS13,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
        ),
        (
            "1.2",
            &version::TLS12,
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        ),
    ];
    let mut handshakes = Table::new("handshake", HANDSHAKES);
    let mut bytes = Table::new("way", BYTES);
    for (name, version, suite) in suites {
        // A new client for each turn, so that it has no tickets of servers that are gone.
        let client = |resumed| Client::new(made.cert.der(), version, suite, resumed);
        for resumed in [false, true] {
            let samples = bench
                .rounds(&servers, async |server| {
                    client(resumed)?.handshakes(server, bench.period()).await
                })
                .await?;
            let kind = if resumed { "resumed" } else { "full" };
            handshakes.rows(&format!("{name}, {kind}"), &servers, &samples);
        }
        for (way, from_client) in [("to the client", false), ("from the client", true)] {
            let samples = bench
                .rounds(&servers, async |server| {
                    client(false)?.bulk(server, from_client).await
                })
                .await?;
            bytes.rows(&format!("{name}, {way}"), &servers, &samples);
        }
    }
    handshakes.print();
    bytes.print();
    served.abort();
    Ok(())
}

/// Returns the installed servers, and a note about those that are not.
fn servers(
    dir: &TempDir,
    made: &rcgen::CertifiedKey<rcgen::KeyPair>,
    backend: u16,
) -> Result<(Vec<Server>, String)> {
    let (chain, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let write = |name: &str, text: &str| -> io::Result<_> {
        let path = dir.path().join(name);
        fs::write(&path, text)?;
        Ok(path)
    };
    let cert = write("cert.pem", &chain)?;
    let both = write("both.pem", &format!("{chain}{key}"))?;
    let key = write("key.pem", &key)?;
    let ports = [free_port()?, free_port()?];
    let nginx = write(
        "nginx.conf",
        &nginx(dir.path(), ports[0], &cert, &key, backend),
    )?;
    let haproxy = write("haproxy.cfg", &haproxy(ports[1], &both, backend))?;

    let mut servers = vec![
        Server::own("tls")?
            .arg(&cert)
            .arg(&key)
            .arg(format!("127.0.0.1:{backend}"))
            .named("**tower-tcp**"),
    ];
    let mut missing = String::new();
    for (name, port, args) in [
        ("nginx", ports[0], ["-c".into(), nginx]),
        ("haproxy", ports[1], ["-f".into(), haproxy]),
    ] {
        let whole = name != "nginx" || Path::new(NGINX_STREAM).exists();
        match Server::installed(name, port)?.filter(|_| whole) {
            Some(server) => servers.push(args.into_iter().fold(server, Server::arg)),
            None => missing += &format!(" {name} is not installed, or not all of it."),
        }
    }
    Ok((servers, missing))
}

fn nginx(dir: &Path, port: u16, cert: &Path, key: &Path, backend: u16) -> String {
    let [dir, cert, key] = [dir, cert, key].map(Path::display);
    format!(
        "load_module {NGINX_STREAM};
         daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/nginx.log;
         events {{ worker_connections 1024; }}
         stream {{ server {{
             listen 127.0.0.1:{port} ssl backlog=1024;
             ssl_certificate {cert}; ssl_certificate_key {key};
             ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache shared:all:10m;
             proxy_pass 127.0.0.1:{backend};
         }} }}"
    )
}

fn haproxy(port: u16, both: &Path, backend: u16) -> String {
    format!(
        "global
           nbthread 1
         defaults
           mode tcp
           timeout connect 5s
           timeout client 1m
           timeout server 1m
         listen tls
           bind 127.0.0.1:{port} ssl crt {} ssl-min-ver TLSv1.2
           server backend 127.0.0.1:{backend}\n",
        both.display()
    )
}

/// Serves each connection as its first byte asks.
async fn serve(listener: TcpListener) -> io::Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let mut block = vec![0; BLOCK];
            match stream.read_u8().await? {
                ECHO => stream.write_u8(ECHO).await,
                SEND => loop {
                    stream.write_all(&block).await?;
                },
                TAKE => {
                    let mut left = BULK;
                    while left > 0 {
                        left = left.saturating_sub(stream.read(&mut block).await?.max(1));
                    }
                    stream.write_u8(TAKE).await
                }
                _ => Ok(()),
            }
        });
    }
}

/// A TLS client of one version and suite.
pub(super) struct Client {
    connector: TlsConnector,
    resumed: bool,
    name: ServerName<'static>,
}

impl Client {
    pub(super) fn new(
        root: &CertificateDer<'static>,
        version: &'static SupportedProtocolVersion,
        suite: SupportedCipherSuite,
        resumed: bool,
    ) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone())?;
        let mut provider = ring::default_provider();
        provider.cipher_suites = vec![suite];
        let mut config = ClientConfig::builder_with_provider(provider.into())
            .with_protocol_versions(&[version])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        if !resumed {
            config.resumption = Resumption::disabled();
        }
        Ok(Self {
            connector: Arc::new(config).into(),
            resumed,
            name: ServerName::try_from("localhost")?,
        })
    }

    pub(super) async fn connect(
        &self,
        server: &Running,
        number: u32,
    ) -> io::Result<TlsStream<TcpStream>> {
        let stream = connect(server, number).await?;
        stream.set_nodelay(true)?;
        self.connector.connect(self.name.clone(), stream).await
    }

    /// Connects over and over, one connection at a time. Each asks for one byte.
    async fn handshakes(&self, server: &Running, period: Duration) -> Result<[f64; 2]> {
        let mut count = 0;
        // The first connection gets the ticket that later ones resume.
        self.ask(server, count).await?;
        let (begin, cpu) = (Instant::now(), server.cpu()?);
        while begin.elapsed() < period {
            count += 1;
            let resumed = self.ask(server, count).await? == Some(HandshakeKind::Resumed);
            ensure!(resumed == self.resumed, "a handshake of the other kind");
        }
        Ok([
            f64::from(count) / begin.elapsed().as_secs_f64(),
            micros(server.cpu()? - cpu) / f64::from(count),
        ])
    }

    async fn ask(&self, server: &Running, number: u32) -> Result<Option<HandshakeKind>> {
        let mut stream = self.connect(server, number).await?;
        stream.write_u8(ECHO).await?;
        ensure!(
            stream.read_u8().await? == ECHO,
            "the backend does not answer"
        );
        stream.shutdown().await.context("cannot close")?;
        Ok(stream.get_ref().1.handshake_kind())
    }

    /// Sends or receives many bytes.
    async fn bulk(&self, server: &Running, from_client: bool) -> Result<[f64; 2]> {
        let mut stream = self.connect(server, 0).await?;
        let mut block = vec![0; BLOCK];
        let (begin, cpu) = (Instant::now(), server.cpu()?);
        if from_client {
            stream.write_u8(TAKE).await?;
            for _ in 0..BULK / BLOCK {
                stream.write_all(&block).await?;
            }
            stream.flush().await?;
            stream.read_u8().await?;
        } else {
            stream.write_u8(SEND).await?;
            stream.flush().await?;
            let mut left = BULK;
            while left > 0 {
                left = left.saturating_sub(stream.read(&mut block).await?.max(1));
            }
        }
        let megabytes = BULK as f64 / 1e6;
        let figures = [
            megabytes / begin.elapsed().as_secs_f64(),
            micros(server.cpu()? - cpu) / megabytes,
        ];
        drop(stream);
        // Let the server finish with this turn, so that the next one does not pay for it.
        sleep(Duration::from_millis(100)).await;
        Ok(figures)
    }
}
