//! PROXY headers as real proxies send them: the client's address is right, over TCP, with TLS in
//! front of the proxy and behind it, and over Unix sockets.

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/process.rs"]
mod process;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use certificates::certified;
use process::{Client, Example, installed, soon};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::process::{Child, Command};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tower::{ServiceBuilder, service_fn};
use tower_tcp::bind::Socket;
use tower_tcp::http::Http;
use tower_tcp::http::hyper::{Request, Response};
use tower_tcp::networks::Networks;
use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
use tower_tcp::proxy::{Command as ProxyCommand, Family, ProxyHeader, ProxyProtocol};
use tower_tcp::testkit::{Served, serve_with};
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Connection, ConnectionInfo, Server};

/// The address of the proxies. It is not 127.0.0.1, so they take no port that another test is about
/// to use.
const FRONT: &str = "127.9.0.1";

/// The client as the server sees it.
fn client_of(info: &ConnectionInfo) -> String {
    format!("{} by {}", info.client_addr(), info.peer_addr())
}

/// The facts in the header.
fn facts_of(info: &ConnectionInfo) -> String {
    let Some(header) = info.get::<ProxyHeader>() else {
        return "none".to_owned();
    };
    let tlvs = header.tlvs();
    let kind = match (header.command(), header.family()) {
        (ProxyCommand::Local, _) => "local".to_owned(),
        (_, Family::Tcp4) => format!("tcp4 to {}", header.destination().expect("an address")),
        (_, family) => format!("{family:?}"),
    };
    let mut facts = vec![kind];
    facts.extend(
        tlvs.alpn()
            .map(|alpn| format!("alpn={}", alpn.escape_ascii())),
    );
    facts.extend(tlvs.authority().map(|name| format!("authority={name}")));
    facts.extend(
        tlvs.unique_id()
            .map(|id| format!("id={}", id.escape_ascii())),
    );
    if let Some(ssl) = tlvs.ssl() {
        facts.push(format!("version={}", ssl.version().expect("a version")));
        facts.push(format!("verify={}", ssl.verify_result()));
        facts.push(format!("verified={}", ssl.is_certificate_verified()));
        facts.extend(ssl.common_name().map(|name| format!("cn={name}")));
        facts.extend(ssl.cipher().map(|name| format!("cipher={name}")));
        facts.extend(ssl.key_algorithm().map(|name| format!("key={name}")));
        facts.extend(ssl.signature_algorithm().map(|name| format!("sig={name}")));
    }
    facts.push(format!("checksum={}", header.has_checksum()));
    facts.join(" ")
}

/// Answers a line with the client and the facts in the header, until the peer closes.
async fn tell<Io: AsyncRead + AsyncWrite + Unpin>(conn: Connection<Io>) -> Result<(), BoxError> {
    let info = conn.info().clone();
    let answer = format!("{}; {}\n", client_of(&info), facts_of(&info));
    let mut conn = BufReader::new(conn);
    let mut line = String::new();
    while conn.read_line(&mut line).await? > 0 {
        conn.write_all(answer.as_bytes()).await?;
        line.clear();
    }
    Ok(())
}

fn trusting() -> ProxyProtocol {
    ProxyProtocol::trusting(Networks::parse(["127.0.0.0/8", "unix"]).expect("networks"))
}

/// A server behind the hook, on a port and on a Unix socket.
struct Backend {
    served: Served<()>,
    port: SocketAddr,
    unix: String,
    dir: TempDir,
}

impl Backend {
    async fn start() -> Self {
        let stack = ServiceBuilder::new()
            .layer(PreConnectLayer::new(trusting()))
            .service(service_fn(tell));
        Self::serve(stack).await
    }

    async fn serve<S>(stack: S) -> Self
    where
        S: tower::Service<Connection<Socket>, Error = BoxError, Future: Send> + Send + 'static,
        S::Response: 'static,
    {
        let dir = tempfile::tempdir().expect("there is room for files");
        let unix = dir.path().join("sock").display().to_string();
        let endpoints = ["127.0.0.1:0".to_owned(), format!("unix:{unix}")];
        let server = Server::builder().listen_all(endpoints).bind();
        let served = serve_with(server.await.expect("it listens"), (), stack);
        let local = served.handle().local_addrs();
        let port = local.iter().find_map(|address| address.tcp());
        let port = port.expect("it listens on a port");
        Self {
            served,
            port,
            unix,
            dir,
        }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).expect("there is room for a file");
        path
    }
}

/// Returns an address for a proxy to listen on.
fn front() -> SocketAddr {
    let socket = std::net::TcpListener::bind((FRONT, 0)).expect("all of 127/8 is here");
    socket.local_addr().expect("it is bound")
}

/// A running proxy. Dropping it kills the process.
struct Proxy(Child);

impl Proxy {
    /// Starts a proxy, and waits until it accepts connections at all of these addresses.
    async fn start(command: &mut Command, fronts: &[SocketAddr]) -> Self {
        command.stdin(Stdio::null()).kill_on_drop(true);
        let mut proxy = Self(command.spawn().expect("it is installed"));
        for front in fronts {
            let listens = async {
                while TcpStream::connect(front).await.is_err() {
                    let ended = proxy.0.try_wait().expect("it is ours");
                    assert!(ended.is_none(), "{command:?} ended: {ended:?}");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            soon("a listening proxy", listens).await;
        }
        proxy
    }

    async fn haproxy(backend: &Backend, sections: &str, fronts: &[SocketAddr]) -> Self {
        let config = format!(
            "global\n  maxconn 100\n  stats socket {}\n\
            defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  \
            timeout server 30s\n{sections}",
            backend.dir.path().join("stats").display()
        );
        let config = backend.file("haproxy.cfg", config);
        Self::start(
            Command::new("haproxy")
                .arg("-db")
                .arg("-q")
                .arg("-f")
                .arg(config),
            fronts,
        )
        .await
    }
}

/// Connects from an address, sends a line, and returns the answer with the client's address.
async fn ask(from: &str, front: SocketAddr) -> (String, SocketAddr) {
    let mut client = Client::connect_from(from, front).await;
    (client.ask("hello").await, client.addr)
}

/// A certificate authority.
struct Authority {
    issuer: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().expect("a key");
        let issuer = rcgen::CertifiedIssuer::self_signed(params, key).expect("it is signed");
        Self { issuer }
    }

    fn sign(&self, name: &str) -> (rcgen::Certificate, rcgen::KeyPair) {
        let mut params = rcgen::CertificateParams::new([name.to_owned()]).expect("a name");
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("it is signed");
        (cert, key)
    }

    /// Returns a client that trusts the authority. With `name`, it also has a certificate.
    fn client(&self, name: Option<&str>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).expect("a root");
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring speaks them")
            .with_root_certificates(roots);
        let mut config = match name.map(|name| self.sign(name)) {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain: Vec<CertificateDer<'static>> = vec![cert.der().clone()];
                let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
                builder
                    .with_client_auth_cert(chain, key)
                    .expect("the key is the certificate's")
            }
        };
        config.alpn_protocols = vec![b"lines".to_vec()];
        TlsConnector::from(Arc::new(config))
    }
}

/// Does the same as [`ask`] over TLS, with `name` as the name of the server.
async fn ask_over_tls(
    connector: &TlsConnector,
    name: &'static str,
    from: &str,
    front: SocketAddr,
) -> (String, SocketAddr) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket
        .bind(SocketAddr::new(from.parse().expect("an address"), 0))
        .expect("it is here");
    let stream = soon("a connection", socket.connect(front))
        .await
        .expect("it listens");
    let addr = stream.local_addr().expect("it is connected");
    let name = ServerName::try_from(name).expect("a name");
    let stream = soon("a handshake", connector.connect(name, stream)).await;
    let mut stream = BufReader::new(stream.expect("a good handshake"));
    stream.write_all(b"hello\n").await.expect("it reads");
    let mut line = String::new();
    soon("an answer", stream.read_line(&mut line))
        .await
        .expect("text");
    (line.trim_end().to_owned(), addr)
}

#[tokio::test]
async fn haproxy_tells_the_client_in_both_versions_over_tcp_and_unix() {
    if !installed("haproxy") {
        return;
    }
    let backend = Backend::start().await;
    let (port, unix) = (backend.port, &backend.unix);
    let fronts = [front(), front(), front(), front()];
    let [v1, v2, v1_unix, v2_unix] = fronts;
    let sections = format!(
        "listen v1\n  bind {v1}\n  server s {port} send-proxy\n\
        listen v2\n  bind {v2}\n  unique-id-format id-%cp\n  \
        server s {port} send-proxy-v2 proxy-v2-options unique-id,crc32c\n\
        listen v1_unix\n  bind {v1_unix}\n  server s unix@{unix} send-proxy\n\
        listen v2_unix\n  bind {v2_unix}\n  server s unix@{unix} send-proxy-v2\n"
    );
    let _haproxy = Proxy::haproxy(&backend, &sections, &fronts).await;

    for front in fronts {
        let (said, client) = ask("127.0.0.5", front).await;
        let peer = if front == v1 || front == v2 {
            "127.0.0.1:"
        } else {
            "unix:"
        };
        assert!(said.starts_with(&format!("{client} by {peer}")), "{said}");
        let facts = match front {
            _ if front == v2 => {
                format!("tcp4 to {front} id=id-{} checksum=true", client.port())
            }
            _ => format!("tcp4 to {front} checksum=false"),
        };
        assert!(said.ends_with(&format!("; {facts}")), "{said}");
    }
}

#[tokio::test]
async fn haproxy_tells_the_table_of_connections() {
    if !installed("haproxy") {
        return;
    }
    let backend = Backend::start().await;
    let front = front();
    let section = format!(
        "listen v2\n  bind {front}\n  server s {} send-proxy-v2\n",
        backend.port
    );
    let _haproxy = Proxy::haproxy(&backend, &section, &[front]).await;

    let mut client = Client::connect_from("127.0.0.6", front).await;
    client.ask("hello").await;

    let handle = backend.served.handle();
    let live = handle
        .connections()
        .find(|live| live.client_addr().tcp() == Some(client.addr));
    let live = live.expect("the client is in the table");
    assert_ne!(live.peer_addr().tcp(), Some(client.addr));
    assert!(live.get::<ProxyHeader>().is_some());
}

#[tokio::test]
async fn haproxy_tells_what_it_knows_of_a_clients_tls_session() {
    if !installed("haproxy") {
        return;
    }
    let backend = Backend::start().await;
    let authority = Authority::new();
    let (cert, key) = authority.sign("a.test");
    let pem = backend.file("a.test.pem", cert.pem() + &key.serialize_pem());
    let ca = backend.file("ca.pem", authority.issuer.pem());
    let front = front();
    let section = format!(
        "listen tls\n  bind {front} ssl crt {} ca-file {} verify optional alpn lines\n  \
        server s {} send-proxy-v2 \
        proxy-v2-options ssl,cert-cn,ssl-cipher,cert-key,cert-sig,authority,crc32c\n",
        pem.display(),
        ca.display(),
        backend.port,
    );
    let _haproxy = Proxy::haproxy(&backend, &section, &[front]).await;

    for name in [Some("alice"), None] {
        let connector = authority.client(name);
        let (said, client) = ask_over_tls(&connector, "a.test", "127.0.0.7", front).await;
        let verified = format!("verify=0 verified={}", name.is_some());
        let name = name.map_or(String::new(), |name| format!("cn={name} "));
        assert!(
            said.starts_with(&format!("{client} by 127.0.0.1:")),
            "{said}"
        );
        let facts = format!("tcp4 to {front} alpn=lines authority=a.test version=TLSv1.3 ");
        assert!(said.contains(&facts), "{said}");
        let facts = format!("{verified} {name}cipher=TLS_AES_");
        assert!(said.contains(&facts), "{said}");
        assert!(said.contains(" key=EC256 sig="), "{said}");
        assert!(said.ends_with(" checksum=true"), "{said}");
    }
}

#[tokio::test]
async fn tls_to_the_server_comes_behind_the_header() {
    if !installed("haproxy") {
        return;
    }
    let (server, trusts_it) = certified();
    let hooks = trusting().chain(Tls::from(server));
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hooks))
        .service(service_fn(tell));
    let backend = Backend::serve(stack).await;
    let (v1, v2) = (front(), front());
    let port = backend.port;
    let sections = format!(
        "listen v1\n  bind {v1}\n  server s {port} send-proxy\n\
        listen v2\n  bind {v2}\n  server s {port} send-proxy-v2\n"
    );
    let _haproxy = Proxy::haproxy(&backend, &sections, &[v1, v2]).await;

    let connector = TlsConnector::from(trusts_it);
    for front in [v1, v2] {
        let (said, client) = ask_over_tls(&connector, "localhost", "127.0.0.8", front).await;
        assert!(
            said.starts_with(&format!("{client} by 127.0.0.1:")),
            "{said}"
        );
    }
}

#[tokio::test]
async fn haproxys_health_checks_are_accepted_as_local() {
    if !installed("haproxy") {
        return;
    }
    let backend = Backend::start().await;
    let front = front();
    let section = format!(
        "listen checked\n  bind {front}\n  option tcp-check\n  \
        tcp-check send hello\\n\n  tcp-check expect rstring ;\\ local\\ checksum=false\n  \
        server s {} send-proxy-v2 check-send-proxy proxy-v2-options crc32c check inter 50ms\n",
        backend.port
    );
    let _haproxy = Proxy::haproxy(&backend, &section, &[front]).await;

    // A check on a busy machine may take longer than its interval, and fail.
    let stats = backend.dir.path().join("stats");
    let passed = async {
        while !shown_stats(&stats).await.contains(",L7OK,") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("a check that passes", passed).await;
}

/// Asks haproxy for the state of its servers. Returns nothing before haproxy takes commands, which
/// may be later than it takes clients.
async fn shown_stats(socket: &Path) -> String {
    let Ok(mut commands) = UnixStream::connect(socket).await else {
        return String::new();
    };
    commands.write_all(b"show stat\n").await.expect("it reads");
    let mut shown = String::new();
    commands.read_to_string(&mut shown).await.expect("text");
    shown
}

#[tokio::test]
async fn nginx_tells_the_client_of_a_stream() {
    let module = ["/usr/lib/nginx/modules", "/usr/share/nginx/modules"]
        .map(|dir| Path::new(dir).join("ngx_stream_module.so"))
        .into_iter()
        .find(|path| path.exists());
    if !installed("nginx") {
        return;
    }
    let backend = Backend::start().await;
    let (tcp, unix) = (front(), front());
    let load = module.map_or(String::new(), |path| {
        format!("load_module {};", path.display())
    });
    let config = format!(
        "{load}\ndaemon off;\nmaster_process off;\npid {dir}/nginx.pid;\n\
        error_log stderr crit;\nevents {{}}\n\
        stream {{\n  proxy_protocol on;\n  \
        server {{ listen {tcp}; proxy_pass {}; }}\n  \
        server {{ listen {unix}; proxy_pass unix:{}; }}\n}}\n",
        backend.port,
        backend.unix,
        dir = backend.dir.path().display(),
    );
    let config = backend.file("nginx.conf", config);
    let mut nginx = Command::new("nginx");
    nginx.arg("-c").arg(config).arg("-e").arg("stderr");
    let _nginx = Proxy::start(&mut nginx, &[tcp, unix]).await;

    for front in [tcp, unix] {
        let (said, client) = ask("127.0.0.5", front).await;
        let peer = if front == tcp { "127.0.0.1:" } else { "unix:" };
        assert!(said.starts_with(&format!("{client} by {peer}")), "{said}");
        assert!(
            said.ends_with(&format!("; tcp4 to {front} checksum=false")),
            "{said}"
        );
    }
}

#[tokio::test]
async fn stunnel_tells_the_client_of_a_tls_session() {
    if !installed("stunnel") {
        return;
    }
    let backend = Backend::start().await;
    let authority = Authority::new();
    let (cert, key) = authority.sign("a.test");
    let pem = backend.file("a.test.pem", cert.pem() + &key.serialize_pem());
    let front = front();
    let config = format!(
        "foreground = yes\nsyslog = no\npid =\ndebug = 3\n[lines]\naccept = {front}\n\
        connect = {}\ncert = {}\nprotocol = proxy\n",
        backend.port,
        pem.display(),
    );
    let config = backend.file("stunnel.conf", config);
    let _stunnel = Proxy::start(Command::new("stunnel").arg(config), &[front]).await;

    let connector = authority.client(None);
    let (said, client) = ask_over_tls(&connector, "a.test", "127.0.0.5", front).await;
    assert!(
        said.starts_with(&format!("{client} by 127.0.0.1:")),
        "{said}"
    );
    assert!(
        said.ends_with(&format!("; tcp4 to {front} checksum=false")),
        "{said}"
    );
}

#[tokio::test]
async fn curl_tells_a_client_over_http_and_tls() {
    if !installed("curl") {
        return;
    }
    let (server, _) = certified();
    let tls = Tls::from(server);
    let http = Http::new(service_fn(|request: Request<_>| async move {
        let info = request.extensions().get::<ConnectionInfo>();
        let info = info.ok_or("every request has it")?;
        Ok::<_, BoxError>(Response::new(client_of(info)))
    }));
    let plain = ServiceBuilder::new()
        .layer(PreConnectLayer::new(trusting()))
        .service(http.clone());
    let over_tls = ServiceBuilder::new()
        .layer(PreConnectLayer::new(trusting().chain(tls)))
        .service(http);
    let plain = Backend::serve(plain).await;
    let over_tls = Backend::serve(over_tls).await;

    let help = Command::new("curl").args(["--help", "all"]).output().await;
    let help = String::from_utf8(help.expect("curl is installed").stdout).expect("text");
    for (scheme, backend) in [("http", &plain), ("https", &over_tls)] {
        let url = format!("{scheme}://{}/", backend.port);
        let curl = async |args: &[&str]| {
            let mut curl = Command::new("curl");
            curl.args(["-sSk", "--noproxy", "*", &url]).args(args);
            let output = soon("curl", curl.output()).await.expect("it runs");
            String::from_utf8(output.stdout).expect("text")
        };
        // curl sends the address of the connection itself.
        let said = curl(&["--haproxy-protocol", "--interface", "127.0.0.5"]).await;
        let (client, peer) = said.split_once(" by ").unwrap_or_else(|| panic!("{said}"));
        assert!(client.starts_with("127.0.0.5:"), "{said}");
        assert_eq!(client, peer);
        if help.contains("--haproxy-clientip") {
            let said = curl(&["--haproxy-clientip", "192.0.2.1"]).await;
            assert!(said.starts_with("192.0.2.1:"), "{said}");
        }
        // Without a header nothing is answered.
        assert_eq!(curl(&[]).await, "");
    }
}

#[tokio::test]
async fn the_examples_take_the_client_from_their_proxies() {
    if !installed("haproxy") {
        return;
    }
    let from = ["--proxy-from", "127.0.0.1"];
    let echo = Example::start("echo", &from).await;
    let redis = Example::start("redis", &from).await;
    let dir = tempfile::tempdir().expect("there is room for files");
    let maildir = dir.path().join("mails");
    let maildir = ["--maildir", maildir.to_str().expect("it is text")];
    let smtp = Example::start("smtp", &[from, maildir].concat()).await;
    let fronts = [front(), front(), front()];
    let [to_echo, to_redis, to_smtp] = fronts;
    let sections = format!(
        "listen echo\n  bind {to_echo}\n  server s {} send-proxy-v2\n\
        listen redis\n  bind {to_redis}\n  server s {} send-proxy\n\
        listen smtp\n  bind {to_smtp}\n  server s {} send-proxy-v2\n",
        echo.addr(),
        redis.addr(),
        smtp.addr()
    );
    let backend = Backend::start().await;
    let _haproxy = Proxy::haproxy(&backend, &sections, &fronts).await;

    let (said, client) = ask("127.0.0.5", to_echo).await;
    assert_eq!(said, "hello");
    let closed = format!(
        "client.address=\"127.0.0.5\" client.port={} ",
        client.port()
    );
    echo.logged(
        1,
        &[
            "connection.closed",
            "network.peer.address=\"127.0.0.1\"",
            &closed,
        ],
    )
    .await;

    let mut client = Client::connect_from("127.0.0.5", to_redis).await;
    assert_eq!(client.ask("ping").await, "+PONG");
    drop(client);
    redis
        .logged(1, &["connection.closed", "client.address=\"127.0.0.5\""])
        .await;

    let mut client = Client::connect_from("127.0.0.5", to_smtp).await;
    assert!(client.line().await.starts_with("220 "));
    for (line, code) in [
        ("HELO me", "250"),
        ("MAIL FROM:<me@example.com>", "250"),
        ("RCPT TO:<you@example.com>", "250"),
        ("DATA", "354"),
        ("hello\r\n.", "250"),
    ] {
        let answer = client.ask(&format!("{line}\r")).await;
        assert!(answer.starts_with(code), "{line}: {answer}");
    }
    let mails = dir.path().join("mails/new");
    let mail = std::fs::read_dir(mails)
        .expect("it is there")
        .next()
        .expect("a mail");
    let mail = std::fs::read_to_string(mail.expect("a mail").path()).expect("text");
    assert!(mail.contains("[127.0.0.5]"), "{mail}");

    // A peer that is no proxy is refused.
    let mut other = Client::connect_from("127.0.0.5", echo.addr()).await;
    other
        .try_send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nhello\n")
        .await;
    other.gone().await;
    echo.logged(
        1,
        &[
            "connection.closed",
            "close.reason=\"rejected\"",
            "not trusted",
        ],
    )
    .await;
}
