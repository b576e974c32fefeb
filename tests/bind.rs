//! Bind: a server listens exactly at its addresses, takes no path that is in use, and leaves none
//! behind.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

use std::convert::Infallible;
use std::error::Error as _;
use std::fs;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::poll;
use socket2::{Domain, SockAddr, SockRef, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tower::service_fn;
use tower_tcp::accept::classify;
use tower_tcp::bind::{
    Endpoint, Incoming, IntoListener, Listener, ListenerClosed, ListenerExt, Socket, SocketOptions,
    Sockets,
};
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::{
    Address, Connection, Error, Handle, Pipeline, Report, Server, ServerBuilder, testkit,
};

async fn bind<const N: usize>(endpoints: [&str; N]) -> Result<Sockets, Error> {
    bind_with(endpoints, SocketOptions::default()).await
}

async fn bind_with<const N: usize>(
    endpoints: [&str; N],
    options: SocketOptions,
) -> Result<Sockets, Error> {
    Sockets::bind(endpoints.map(Endpoint::from).into(), &options).await
}

/// Waits for a future that should complete at once. Panics after ten seconds.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    let deadline = Duration::from_secs(10);
    let Ok(value) = tokio::time::timeout(deadline, future).await else {
        panic!("nothing within {deadline:?}");
    };
    value
}

async fn readable(sockets: &mut Sockets) -> io::Result<()> {
    soon(poll_fn(|cx| sockets.poll_readable(cx))).await
}

async fn accept(sockets: &mut Sockets) -> io::Result<Incoming<Socket>> {
    soon(poll_fn(|cx| sockets.poll_accept(cx))).await
}

fn tcp(sockets: &Sockets, index: usize) -> SocketAddr {
    sockets.local_addrs()[index].tcp().unwrap()
}

fn v6() -> bool {
    let there = std::net::TcpListener::bind("[::1]:0").is_ok();
    if !there {
        eprintln!("skipped: no IPv6 here");
    }
    there
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await;
    (client.unwrap(), listener.accept().await.unwrap().0)
}

fn assert_bind_error(result: Result<Sockets, Error>, named: &str, kind: io::ErrorKind) {
    let err = result.unwrap_err();
    assert!(err.to_string().contains(named), "{err} names {named}");
    let Error::Bind { source, .. } = &err else {
        panic!("{err:?} is of another kind");
    };
    assert_eq!(source.kind(), kind, "{source}");
    assert!(err.source().is_some());
}

// Addresses as text

#[test]
fn an_endpoint_is_shown_as_it_was_written() {
    for text in [
        "127.0.0.1:0",
        "[::]:7000",
        "localhost:7000",
        "unix:/run/a.sock",
        "unix:relative.sock",
        "unix:@abstract",
        "fd:3",
        "systemd:web",
        "systemd:*",
    ] {
        assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        assert_eq!(Endpoint::from(text).to_string(), text);
    }
    let addr = (IpAddr::from(Ipv4Addr::LOCALHOST), 80);
    assert_eq!(Endpoint::from(addr).to_string(), "127.0.0.1:80");
    assert_eq!(
        Endpoint::unix("/run/a.sock").to_string(),
        "unix:/run/a.sock"
    );
}

#[test]
fn the_text_of_a_path_is_parsed_as_the_same_path() {
    for path in [
        "/run/a.sock",
        "relative.sock",
        "@a.sock",
        "./@a.sock",
        "@",
        "a@b",
    ] {
        let endpoint = Endpoint::unix(path);

        let parsed: Endpoint = endpoint.to_string().parse().unwrap();

        // `Debug` shows both the text and the parsed form.
        assert_eq!(format!("{parsed:?}"), format!("{endpoint:?}"));
    }
    assert_eq!(Endpoint::unix("@a.sock").to_string(), "unix:./@a.sock");
}

#[tokio::test]
async fn a_string_that_says_nothing_is_an_error_that_names_it() {
    for text in [
        "",
        ":",
        ":7000",
        "7000",
        "localhost",
        "localhost:",
        "localhost:65536",
        "localhost:x",
        "::1:7000x",
        "[::1:7000",
        "a b:7000",
        "http://a:80",
        "unix:",
        "unix:@",
        "fd:",
        "fd:x",
        "systemd:",
    ] {
        assert!(text.parse::<Endpoint>().is_err(), "{text:?} parses");
        assert_bind_error(bind([text]).await, text, io::ErrorKind::InvalidInput);
    }
}

// TCP

#[tokio::test]
async fn several_families_are_one_listener_and_port_0_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let endpoints = vec![
        "127.0.0.1:0".into(),
        Endpoint::unix(&path),
        "127.0.0.1:0".into(),
    ];

    let mut sockets = soon(Sockets::bind(endpoints, &SocketOptions::default()))
        .await
        .unwrap();

    assert_ne!(tcp(&sockets, 0).port(), 0);
    assert_ne!(tcp(&sockets, 0), tcp(&sockets, 2));
    assert_eq!(
        sockets.local_addrs()[1],
        Address::Unix(Some(path.as_path().into()))
    );
    let _first = TcpStream::connect(tcp(&sockets, 0)).await.unwrap();
    let _second = UnixStream::connect(&path).await.unwrap();
    let _third = TcpStream::connect(tcp(&sockets, 2)).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let incoming = accept(&mut sockets).await.unwrap();
        assert_eq!(
            incoming.io.as_tcp().is_some(),
            incoming.peer_addr.tcp().is_some()
        );
        assert_ne!(
            incoming.io.as_tcp().is_some(),
            incoming.io.as_unix().is_some()
        );
        seen.push(incoming.local_addr);
    }
    for address in sockets.local_addrs() {
        assert!(seen.contains(&address), "{address} was served");
    }
}

#[tokio::test]
async fn a_name_listens_on_all_of_its_addresses_at_one_port() {
    let mut sockets = soon(bind(["localhost:0"])).await.unwrap();

    for index in 0..sockets.local_addrs().len() {
        let addr = tcp(&sockets, index);
        assert!(addr.ip().is_loopback());
        assert_eq!(addr.port(), tcp(&sockets, 0).port());
        let _client = TcpStream::connect(addr).await.unwrap();
        assert_eq!(accept(&mut sockets).await.unwrap().local_addr, addr.into());
    }
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_an_error_that_names_it() {
    let err = soon(bind(["nowhere.invalid:0"])).await.unwrap_err();

    assert!(err.to_string().contains("nowhere.invalid:0"), "{err}");
}

#[tokio::test]
async fn a_taken_port_is_an_error_that_names_it_and_releases_the_others() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = (taken.local_addr().unwrap().to_string(), taken);
    let inherited = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let other = inherited.local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let endpoints = vec![
        inherited.into(),
        Endpoint::unix(&path),
        taken.0.as_str().into(),
    ];

    let result = soon(Sockets::bind(endpoints, &SocketOptions::default())).await;

    assert_bind_error(result, &taken.0, io::ErrorKind::AddrInUse);
    assert!(!path.exists(), "the path is removed");
    let refused = std::net::TcpStream::connect(other).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn an_address_of_another_machine_is_an_error_that_names_it() {
    let result = soon(bind(["192.0.2.1:7000"])).await;

    assert_bind_error(result, "192.0.2.1:7000", io::ErrorKind::AddrNotAvailable);
}

#[test]
fn binding_can_be_left_to_another_thread() {
    fn is_send<T: Send>(_: T) {}

    is_send(Sockets::bind(Vec::new(), &SocketOptions::default()));
}

#[tokio::test]
async fn no_endpoint_at_all_is_an_error() {
    assert_bind_error(bind([]).await, "no address", io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn an_address_is_shared_only_when_all_ask_for_it() {
    let reuse = || SocketOptions::default().reuse_port(true);
    let sharing = bind_with(["127.0.0.1:0"], reuse()).await.unwrap();
    let addr = tcp(&sharing, 0).to_string();

    assert!(bind_with([&addr], reuse()).await.is_ok());
    assert_bind_error(bind([&addr]).await, &addr, io::ErrorKind::AddrInUse);
}

#[tokio::test]
async fn the_ipv6_wildcard_takes_ipv4_too_and_shows_it_as_ipv4() {
    if !v6() {
        return;
    }
    let mut sockets = bind(["[::]:0"]).await.unwrap();
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, tcp(&sockets, 0).port()));

    let client = TcpStream::connect(addr).await.unwrap();
    let incoming = accept(&mut sockets).await.unwrap();

    assert_eq!(
        incoming.peer_addr,
        Address::Tcp(client.local_addr().unwrap())
    );
    assert_eq!(incoming.local_addr, Address::Tcp(addr));
}

#[tokio::test]
async fn only_v6_leaves_ipv4_to_another_socket() {
    if !v6() {
        return;
    }
    let sockets = bind_with(["[::]:0"], SocketOptions::default().only_v6(true))
        .await
        .unwrap();
    let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, tcp(&sockets, 0).port()));

    bind([&v4.to_string()]).await.unwrap();
}

#[tokio::test]
async fn a_wildcard_tells_which_address_the_peer_connected_to() {
    let mut sockets = bind(["0.0.0.0:0"]).await.unwrap();
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, tcp(&sockets, 0).port()));

    let _client = TcpStream::connect(addr).await.unwrap();

    assert_eq!(accept(&mut sockets).await.unwrap().local_addr, addr.into());
}

#[tokio::test]
async fn options_are_set_on_accepted_sockets() {
    let silence = Duration::from_secs(77);
    let mut plain = bind(["127.0.0.1:0"]).await.unwrap();
    let options = SocketOptions::default()
        .nodelay(false)
        .keepalive(silence)
        .linger(Duration::ZERO)
        .recv_buffer(40_000)
        .send_buffer(50_000);
    let mut other = bind_with(["127.0.0.1:0"], options).await.unwrap();

    let _client = TcpStream::connect(tcp(&plain, 0)).await.unwrap();
    let incoming = accept(&mut plain).await.unwrap();
    let socket = SockRef::from(&incoming.io);
    assert!(socket.tcp_nodelay().unwrap());
    assert!(!socket.keepalive().unwrap());
    assert_eq!(socket.linger().unwrap(), None);

    let _client = TcpStream::connect(tcp(&other, 0)).await.unwrap();
    let incoming = accept(&mut other).await.unwrap();
    let socket = SockRef::from(&incoming.io);
    assert!(!socket.tcp_nodelay().unwrap());
    assert!(socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), silence);
    assert_eq!(socket.linger().unwrap(), Some(Duration::ZERO));
    // Linux doubles the requested size.
    assert!([40_000, 80_000].contains(&socket.recv_buffer_size().unwrap()));
    assert!([50_000, 100_000].contains(&socket.send_buffer_size().unwrap()));
}

#[tokio::test]
async fn an_inherited_socket_that_does_not_listen_is_an_error() {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    let real = TcpListener::bind("127.0.0.1:0").unwrap();
    let (one, other) = UnixStream::pair().unwrap();
    let unbound = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let sockets: [(&str, OwnedFd); 6] = [
        ("socketpair", one.into()),
        ("its other end", other.into()),
        ("datagram", UnixDatagram::unbound().unwrap().into()),
        ("udp", UdpSocket::bind("127.0.0.1:0").unwrap().into()),
        (
            "connected",
            TcpStream::connect(real.local_addr().unwrap())
                .unwrap()
                .into(),
        ),
        ("not bound", unbound.unwrap().into()),
    ];
    for (name, fd) in sockets {
        let as_unix = UnixListener::from(fd.try_clone().unwrap());
        for endpoint in [Endpoint::from(TcpListener::from(fd)), as_unix.into()] {
            let bound = Sockets::bind(vec![endpoint], &SocketOptions::default()).await;
            let err = bound.expect_err(name);
            let Error::Bind { source, .. } = err else {
                panic!("{name}: {err:?} is of another kind");
            };
            assert_eq!(source.kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }
    // The same kind of socket is served if it listens.
    Sockets::bind(vec![real.into()], &SocketOptions::default())
        .await
        .unwrap();
}

#[tokio::test]
async fn an_inherited_socket_is_served_also_if_it_was_blocking() {
    let inherited = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = inherited.local_addr().unwrap();
    let mut sockets = Sockets::bind(vec![inherited.into()], &SocketOptions::default())
        .await
        .unwrap();

    let _client = TcpStream::connect(addr).await.unwrap();

    assert!(accept(&mut sockets).await.is_ok());
    assert!(poll!(poll_fn(|cx| sockets.poll_accept(cx))).is_pending());
}

// Unix

#[tokio::test]
async fn a_stale_socket_file_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());

    let mut sockets = Sockets::bind(vec![Endpoint::unix(&path)], &SocketOptions::default())
        .await
        .unwrap();

    let _client = UnixStream::connect(&path).await.unwrap();
    assert!(accept(&mut sockets).await.is_ok());
}

#[tokio::test]
async fn a_live_servers_path_is_not_stolen_even_if_its_backlog_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let endpoint = format!("unix:{}", path.display());
    let live = bind_with([&endpoint], SocketOptions::default().backlog(0))
        .await
        .unwrap();
    let inode = fs::symlink_metadata(&path).unwrap().ino();
    let filling = fill(&path, 8);

    let result = soon(bind([&endpoint])).await;

    assert_bind_error(result, &endpoint, io::ErrorKind::AddrInUse);
    assert_eq!(fs::symlink_metadata(&path).unwrap().ino(), inode);
    drop((live, filling));
}

#[tokio::test]
async fn one_path_twice_in_one_server_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("unix:{}", dir.path().join("s").display());

    let result = soon(bind([&endpoint, &endpoint])).await;

    assert_bind_error(result, &endpoint, io::ErrorKind::AddrInUse);
}

#[tokio::test]
async fn a_plain_file_and_a_symlink_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    fs::write(&plain, "kept").unwrap();
    // The link points to a stale socket, so a probe through the link would be refused.
    let stale = dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let link = dir.path().join("link");
    symlink(&stale, &link).unwrap();

    for path in [&plain, &link] {
        let endpoint = format!("unix:{}", path.display());
        assert_bind_error(bind([&endpoint]).await, &endpoint, io::ErrorKind::AddrInUse);
    }

    assert_eq!(fs::read_to_string(&plain).unwrap(), "kept");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(
        fs::symlink_metadata(&stale)
            .unwrap()
            .file_type()
            .is_socket()
    );
}

#[tokio::test]
async fn a_path_is_removed_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let sockets = Sockets::bind(vec![Endpoint::unix(&path)], &SocketOptions::default())
        .await
        .unwrap();
    assert!(path.exists());

    drop(sockets);

    assert!(!path.exists());
}

#[tokio::test]
async fn a_path_that_is_another_servers_by_now_is_left_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let ours = Sockets::bind(vec![Endpoint::unix(&path)], &SocketOptions::default())
        .await
        .unwrap();
    fs::remove_file(&path).unwrap();
    let theirs = std::os::unix::net::UnixListener::bind(&path).unwrap();

    drop(ours);

    assert!(path.exists());
    assert!(UnixStream::connect(&path).await.is_ok());
    drop(theirs);
}

#[tokio::test]
async fn an_inherited_unix_socket_has_the_name_of_an_endpoint_at_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("it's \"é\".sock");
    let inherited = std::os::unix::net::UnixListener::bind(&path).unwrap();

    let options = SocketOptions::default();
    let sockets = Sockets::bind(vec![inherited.into()], &options).await;

    let socket = &sockets.unwrap().listening_sockets()[0];
    assert_eq!(socket.endpoint(), Endpoint::unix(path).to_string());
}

#[tokio::test]
async fn an_inherited_unix_sockets_path_is_left_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let inherited = std::os::unix::net::UnixListener::bind(&path).unwrap();

    drop(
        Sockets::bind(vec![inherited.into()], &SocketOptions::default())
            .await
            .unwrap(),
    );

    assert!(path.exists());
}

#[tokio::test]
async fn a_socket_file_has_the_mode_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    for mode in [0o600, 0o666, 0o000] {
        let path = dir.path().join(format!("{mode:o}"));
        let options = SocketOptions::default().unix_mode(mode);

        let _sockets = Sockets::bind(vec![Endpoint::unix(&path)], &options)
            .await
            .unwrap();

        let found = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(found & 0o7777, mode);
    }
}

#[tokio::test]
async fn a_path_that_is_too_long_or_has_a_nul_is_an_error_and_not_cut() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("unix:{}/{}", dir.path().display(), "x".repeat(108));
    let nul = format!("unix:{}/cut\0off", dir.path().display());

    assert_bind_error(bind([&long]).await, &long, io::ErrorKind::InvalidInput);
    assert_bind_error(bind([&nul]).await, &nul, io::ErrorKind::InvalidInput);

    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_an_error_that_names_the_path() {
    let result = bind(["unix:/nonexistent/dir/s"]).await;

    assert_bind_error(result, "/nonexistent/dir/s", io::ErrorKind::NotFound);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_abstract_name_is_served_and_leaves_no_file() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixStream};

    let name = format!("tower-tcp-test-{}", std::process::id());
    let mut sockets = bind([&format!("unix:@{name}")]).await.unwrap();
    assert_eq!(
        sockets.local_addrs()[0].to_string(),
        format!("unix:@{name}")
    );

    let _client =
        UnixStream::connect_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();

    assert_eq!(
        accept(&mut sockets).await.unwrap().peer_addr,
        Address::Unix(None)
    );
    assert!(!Path::new(&format!("@{name}")).exists());
}

/// Connects until the backlog is full, or `most` times. The connections stay open.
fn fill(path: &Path, most: usize) -> Vec<socket2::Socket> {
    let address = SockAddr::unix(path).unwrap();
    let connect = || {
        let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.connect(&address).ok().map(|()| socket)
    };
    std::iter::from_fn(connect).take(most).collect()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_backlog_is_as_long_as_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let options = SocketOptions::default().backlog(3);

    let _sockets = Sockets::bind(vec![Endpoint::unix(&path)], &options)
        .await
        .unwrap();

    // Linux queues one connection more than requested.
    assert_eq!(fill(&path, 100).len(), 4);
}

// Accepting

#[tokio::test]
async fn a11_clients_that_find_the_backlog_full_try_again_and_none_is_reset() {
    let options = SocketOptions::default().backlog(1);
    let echoing = suspendable(["127.0.0.1:0"], |server| server.socket_options(options));
    let (handle, served) = echoing.await;
    let addr = handle.local_addrs()[0].tcp().unwrap();
    handle.pause();
    let (told, mut connected) = mpsc::channel(8);
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let told = told.clone();
            tokio::spawn(async move {
                let begun = Instant::now();
                let client = TcpStream::connect(addr).await.unwrap();
                told.send(()).await.unwrap();
                echoes(client).await;
                begun.elapsed()
            })
        })
        .collect();
    soon(connected.recv()).await.unwrap();

    handle.resume();

    let mut longest = Duration::ZERO;
    for client in clients {
        longest = longest.max(soon(client).await.unwrap());
    }
    // Linux sends the first packet again after a second.
    assert!(longest > Duration::from_millis(900), "{longest:?}");
    handle.shutdown();
    served.await.unwrap().unwrap();
}

#[tokio::test]
async fn readable_is_pending_when_nothing_waits() {
    let mut sockets = bind(["127.0.0.1:0", "127.0.0.1:0"]).await.unwrap();
    assert!(poll!(poll_fn(|cx| sockets.poll_readable(cx))).is_pending());
    assert!(poll!(poll_fn(|cx| sockets.poll_accept(cx))).is_pending());

    let _client = TcpStream::connect(tcp(&sockets, 1)).await.unwrap();

    readable(&mut sockets).await.unwrap();
    assert!(poll!(poll_fn(|cx| sockets.poll_accept(cx))).is_ready());
}

#[tokio::test]
async fn readable_is_pending_after_the_last_connection_and_wakes_for_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let endpoint = format!("unix:{}", path.display());
    let mut sockets = bind(["127.0.0.1:0", &endpoint]).await.unwrap();

    for _ in 0..3 {
        let _client = TcpStream::connect(tcp(&sockets, 0)).await.unwrap();
        readable(&mut sockets).await.unwrap();
        accept(&mut sockets).await.unwrap();
        assert!(poll!(poll_fn(|cx| sockets.poll_readable(cx))).is_pending());

        let _client = UnixStream::connect(&path).await.unwrap();
        readable(&mut sockets).await.unwrap();
        accept(&mut sockets).await.unwrap();
        assert!(poll!(poll_fn(|cx| sockets.poll_readable(cx))).is_pending());
    }
}

#[tokio::test]
async fn a_connection_that_comes_while_readable_waits_wakes_it() {
    let mut sockets = bind(["127.0.0.1:0"]).await.unwrap();
    let addr = tcp(&sockets, 0);
    let _first = TcpStream::connect(addr).await.unwrap();
    accept(&mut sockets).await.unwrap();

    let mut waiting = tokio_test::task::spawn(poll_fn(|cx| sockets.poll_readable(cx)));
    assert!(waiting.poll().is_pending());
    let _second = TcpStream::connect(addr).await.unwrap();

    soon(waiting).await.unwrap();
}

#[tokio::test]
async fn readable_may_be_asked_again_without_losing_a_connection() {
    let mut sockets = bind(["127.0.0.1:0"]).await.unwrap();
    let client = TcpStream::connect(tcp(&sockets, 0)).await.unwrap();

    for _ in 0..3 {
        readable(&mut sockets).await.unwrap();
    }

    let peer = accept(&mut sockets).await.unwrap().peer_addr;
    assert_eq!(peer, Address::Tcp(client.local_addr().unwrap()));
}

#[tokio::test]
async fn another_process_that_is_faster_makes_accept_wait() {
    let theirs = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = theirs.local_addr().unwrap();
    let ours = theirs.try_clone().unwrap();
    let mut sockets = Sockets::bind(vec![ours.into()], &SocketOptions::default())
        .await
        .unwrap();
    let _client = TcpStream::connect(addr).await.unwrap();
    readable(&mut sockets).await.unwrap();

    theirs.accept().unwrap();

    assert!(poll!(poll_fn(|cx| sockets.poll_accept(cx))).is_pending());
    let _client = TcpStream::connect(addr).await.unwrap();
    assert!(accept(&mut sockets).await.is_ok());
}

#[tokio::test]
async fn a_busy_listener_does_not_starve_the_others() {
    let mut sockets = bind(["127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"])
        .await
        .unwrap();
    let mut clients = Vec::new();
    for _ in 0..9 {
        clients.push(TcpStream::connect(tcp(&sockets, 0)).await.unwrap());
    }
    clients.push(TcpStream::connect(tcp(&sockets, 1)).await.unwrap());
    clients.push(TcpStream::connect(tcp(&sockets, 2)).await.unwrap());

    // Each listener has its turn. One whose readiness the runtime has not seen yet has its turn in
    // the next round.
    let mut served = Vec::new();
    for _ in 0..5 {
        tokio::task::yield_now().await;
        readable(&mut sockets).await.unwrap();
        served.push(accept(&mut sockets).await.unwrap().local_addr);
    }

    assert!(served.contains(&sockets.local_addrs()[1]), "{served:?}");
    assert!(served.contains(&sockets.local_addrs()[2]), "{served:?}");
}

#[tokio::test]
async fn a_connection_reset_in_the_queue_is_no_failure() {
    let mut sockets = bind(["0.0.0.0:0"]).await.unwrap();
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, tcp(&sockets, 0).port()));

    for _ in 0..50 {
        let client = TcpStream::connect(addr).await.unwrap();
        SockRef::from(&client)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(client);
        let mut incoming = accept(&mut sockets).await.unwrap();
        assert!(incoming.local_addr.tcp().is_some());
        let err = soon(incoming.io.read_u8()).await.unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::ConnectionReset);
    }

    let _client = TcpStream::connect(addr).await.unwrap();
    assert!(accept(&mut sockets).await.is_ok());
}

#[tokio::test]
async fn a_socket_that_listens_no_more_is_a_closed_listener() {
    let theirs = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = theirs.try_clone().unwrap();
    let mut sockets = Sockets::bind(vec![ours.into()], &SocketOptions::default())
        .await
        .unwrap();
    assert!(poll!(poll_fn(|cx| sockets.poll_readable(cx))).is_pending());

    SockRef::from(&theirs)
        .shutdown(std::net::Shutdown::Both)
        .unwrap();

    let err = accept(&mut sockets).await.unwrap_err();
    assert!(find_cause::<ListenerClosed>(&err).is_some(), "{err:?}");
}

#[tokio::test]
async fn a_socket_carries_bytes_both_ways_over_either_family() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let endpoint = format!("unix:{}", path.display());
    let mut sockets = bind(["127.0.0.1:0", &endpoint]).await.unwrap();

    for family in ["tcp", "unix"] {
        let mut client = if family == "tcp" {
            Socket::from(TcpStream::connect(tcp(&sockets, 0)).await.unwrap())
        } else {
            Socket::from(UnixStream::connect(&path).await.unwrap())
        };
        let mut server = accept(&mut sockets).await.unwrap().io;
        client.write_all(b"ping").await.unwrap();
        let mut buffer = [0; 4];
        soon(server.read_exact(&mut buffer)).await.unwrap();
        assert_eq!(&buffer, b"ping");
        assert!(AsyncWrite::is_write_vectored(&server));
        server.write_all(b"pong").await.unwrap();
        server.shutdown().await.unwrap();
        let mut reply = Vec::new();
        soon(client.read_to_end(&mut reply)).await.unwrap();
        assert_eq!(reply, b"pong");
        let _fd = client.as_fd();
    }
}

#[tokio::test]
async fn several_buffers_arrive_in_order_whatever_their_size() {
    let (client, mut server) = UnixStream::pair().unwrap();
    let mut client = Socket::from(client);
    for (head, body) in [
        (0, 0),
        (0, 7),
        (3, 0),
        (130, 13),
        (511, 1),
        (512, 1),
        (9, 4096),
    ] {
        let (head, body) = (vec![b'h'; head], vec![b'b'; body]);
        let bufs = [&head[..], b"", &body].map(io::IoSlice::new);
        let written = client.write_vectored(&bufs).await.unwrap();
        let sent = [head, body].concat();
        assert_eq!(written, sent.len());
        let mut arrived = vec![0; written];
        soon(server.read_exact(&mut arrived)).await.unwrap();
        assert_eq!(arrived, sent);
    }
}

#[tokio::test]
async fn more_buffers_than_the_system_takes_at_once_are_no_short_write() {
    let (client, mut server) = tcp_pair().await;
    let mut client = Socket::from(client);
    let bufs = [io::IoSlice::new(b"x"); 1500];

    let first = soon(client.write_vectored(&bufs)).await.unwrap();
    let second = soon(client.write_vectored(&bufs)).await.unwrap();

    assert!(first > 512 && second > 512, "{first} and {second}");
    soon(server.read_exact(&mut vec![0; first + second]))
        .await
        .unwrap();
}

#[tokio::test]
async fn small_vectored_writes_to_a_full_socket_lose_nothing() {
    let (client, mut server) = tcp_pair().await;
    SockRef::from(&client).set_send_buffer_size(4096).unwrap();
    SockRef::from(&server).set_recv_buffer_size(4096).unwrap();
    let mut client = Socket::from(client);
    let sent: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
    let writing = async {
        let mut at = 0;
        while at < sent.len() {
            let [head, body] = [at + 100, at + 399].map(|end| end.min(sent.len()));
            let bufs = [&sent[at..head], &sent[head..body]].map(io::IoSlice::new);
            at += client.write_vectored(&bufs).await.unwrap();
        }
        client.shutdown().await.unwrap();
    };
    let mut arrived = Vec::new();
    let reading = server.read_to_end(&mut arrived);

    // The reader is polled for the first time when the socket is full.
    let (_, read) = soon(async { tokio::join!(biased; writing, reading) }).await;

    read.unwrap();

    assert!(arrived == sent);
}

// Listeners of tokio, and small changes to listeners

#[tokio::test]
async fn a_tcp_listener_of_tokio_is_looked_at_before_it_accepts() {
    let mut sockets = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .into_listener();
    assert!(poll!(poll_fn(|cx| sockets.poll_readable(cx))).is_pending());

    let client = TcpStream::connect(tcp(&sockets, 0)).await.unwrap();

    readable(&mut sockets).await.unwrap();
    let incoming = accept(&mut sockets).await.unwrap();
    let stream = incoming.io.as_tcp().unwrap();
    assert_eq!(incoming.peer_addr.tcp(), client.local_addr().ok());
    assert!(stream.nodelay().unwrap(), "as by default");
    assert!(poll!(poll_fn(|cx| sockets.poll_readable(cx))).is_pending());
}

#[tokio::test]
async fn a_unix_listener_of_tokio_is_looked_at_and_leaves_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut sockets = UnixListener::bind(&path).unwrap().into_listener();
    assert!(poll!(poll_fn(|cx| sockets.poll_readable(cx))).is_pending());

    let _client = UnixStream::connect(&path).await.unwrap();

    readable(&mut sockets).await.unwrap();
    assert!(accept(&mut sockets).await.unwrap().io.as_unix().is_some());
    assert_eq!(
        sockets.local_addrs(),
        [Address::Unix(Some(path.as_path().into()))]
    );
    drop(sockets);
    assert!(path.exists());
}

/// Answers `hi` to every connection.
async fn greet(mut conn: Connection<Socket>) -> io::Result<()> {
    conn.write_all(b"hi").await
}

#[tokio::test]
async fn a_server_takes_listeners_of_tokio() {
    let served = testkit::serve_with(
        Server::from_listener(TcpListener::bind("127.0.0.1:0").await.unwrap()),
        (),
        tower::service_fn(greet),
    );
    let address = served.handle().local_addrs()[0].tcp().unwrap();
    let mut heard = String::new();
    let mut client = TcpStream::connect(address).await.unwrap();
    soon(client.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "hi");

    // With options of its own, and together with an address.
    let options = SocketOptions::default().nodelay(false);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().socket_options(options).listen(listener);
    let server = server.listen("127.0.0.1:0").bind().await.unwrap();
    assert_eq!(server.handle().local_addrs().len(), 2);
    let nodelay = tower::service_fn(async |mut conn: Connection<Socket>| {
        let on = conn.get_ref().as_tcp().unwrap().nodelay()?;
        conn.write_all(if on { b"on" } else { b"off" }).await
    });
    let _served = testkit::serve_with(server, (), nodelay);
    let mut heard = String::new();
    let mut client = TcpStream::connect(address).await.unwrap();
    soon(client.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "off");
}

#[tokio::test]
async fn a_tap_and_a_map_keep_addresses_and_look_before_they_accept() {
    let mut tapped = 0;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut listener = listener
        .tap_io(move |io| {
            tapped += 1;
            io.as_tcp().unwrap().set_ttl(40 + tapped).unwrap();
        })
        .map_io(|io| (io, "mapped"));
    assert_eq!(listener.local_addrs(), [address.into()]);
    assert!(poll!(poll_fn(|cx| listener.poll_readable(cx))).is_pending());

    for ttl in [41, 42] {
        let client = TcpStream::connect(address).await.unwrap();
        soon(poll_fn(|cx| listener.poll_readable(cx)))
            .await
            .unwrap();
        let incoming = soon(poll_fn(|cx| listener.poll_accept(cx))).await.unwrap();

        let (io, mapped) = &incoming.io;
        assert_eq!(
            (io.as_tcp().unwrap().ttl().unwrap(), *mapped),
            (ttl, "mapped")
        );
        assert_eq!(incoming.peer_addr.tcp(), client.local_addr().ok());
        assert_eq!(incoming.local_addr.tcp(), Some(address));
    }
}

// Suspended: the sockets are closed, and opened again

/// Starts a server that echoes lines.
async fn suspendable<const N: usize>(
    endpoints: [&str; N],
    build: impl FnOnce(ServerBuilder) -> ServerBuilder,
) -> (Handle, JoinHandle<Result<Report, Error>>) {
    let builder = build(Server::builder().listen_all(endpoints));
    let server = builder.bind().await.unwrap();
    let handle = server.handle();
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let stack = Pipeline::new(Lines::default).service(echo);
    (handle, tokio::spawn(server.serve(stack)))
}

/// Waits until a server has this number of listening sockets.
async fn listens(handle: &Handle, sockets: usize) {
    let listens = async {
        while handle.listening_sockets().count() != sockets {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(listens).await;
}

async fn echoes(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    stream.write_all(b"hi\n").await.unwrap();
    let mut reply = [0; 3];
    soon(stream.read_exact(&mut reply)).await.unwrap();
    assert_eq!(&reply, b"hi\n");
}

#[tokio::test]
async fn a_suspended_server_refuses_clients_until_it_listens_at_the_same_addresses_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let unix = format!("unix:{}", path.display());
    let name = format!("tower-tcp-{}", path.display());
    let endpoints = [
        "127.0.0.1:0",
        "localhost:0",
        &unix,
        &format!("unix:@{name}"),
    ];
    let options = SocketOptions::default().unix_mode(0o600);
    let (handle, served) = suspendable(endpoints, |server| server.socket_options(options)).await;
    let count = handle.listening_sockets().count();
    let ports: Vec<_> = handle
        .local_addrs()
        .iter()
        .filter_map(Address::tcp)
        .collect();
    let open = TcpStream::connect(ports[0]).await.unwrap();
    soon(async {
        while handle.live() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;

    for _ in 0..3 {
        handle.suspend();
        listens(&handle, 0).await;
        assert!(handle.is_suspended());
        for port in &ports {
            let refused = TcpStream::connect(port).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        }
        assert!(!path.exists());
        assert!(UnixStream::connect(format!("\0{name}")).await.is_err());

        handle.resume();
        listens(&handle, count).await;
        assert!(!handle.is_suspended());
        for port in &ports {
            echoes(TcpStream::connect(port).await.unwrap()).await;
        }
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        echoes(UnixStream::connect(&path).await.unwrap()).await;
        echoes(UnixStream::connect(format!("\0{name}")).await.unwrap()).await;
    }

    // The connection from before goes on.
    echoes(open).await;
    handle.shutdown();
    served.await.unwrap().unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn the_clients_in_the_backlog_are_served_before_the_server_is_suspended() {
    let (handle, served) = suspendable(["127.0.0.1:0"], |server| server).await;
    let addr = handle.local_addrs()[0].tcp().unwrap();
    handle.pause();
    let mut waiting = Vec::new();
    for _ in 0..100 {
        waiting.push(TcpStream::connect(addr).await.unwrap());
    }

    handle.suspend();

    listens(&handle, 0).await;
    for client in waiting {
        echoes(client).await;
    }
    handle.shutdown();
    served.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_server_whose_address_is_taken_meanwhile_tries_again_until_it_is_free() {
    let (asked, mut errors) = mpsc::channel(8);
    let policy = move |err: &io::Error| {
        let _enough_were_seen = asked.try_send(err.kind());
        classify(err)
    };
    let (handle, served) =
        suspendable(["127.0.0.1:0"], |server| server.on_accept_error(policy)).await;
    let addr = handle.local_addrs()[0].tcp().unwrap();
    handle.suspend();
    listens(&handle, 0).await;
    let other = TcpListener::bind(addr).await.unwrap();

    handle.resume();

    for _ in 0..3 {
        assert_eq!(soon(errors.recv()).await, Some(io::ErrorKind::AddrInUse));
    }
    drop(other);
    listens(&handle, 1).await;
    echoes(TcpStream::connect(addr).await.unwrap()).await;
    handle.shutdown();
    served.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_server_that_cannot_listen_at_one_address_again_listens_at_none() {
    let (asked, mut errors) = mpsc::channel(8);
    let policy = move |err: &io::Error| {
        let _enough_were_seen = asked.try_send(err.kind());
        classify(err)
    };
    let (handle, served) = suspendable(["127.0.0.1:0", "127.0.0.1:0"], |server| {
        server.on_accept_error(policy)
    })
    .await;
    let addrs: Vec<_> = handle
        .local_addrs()
        .iter()
        .filter_map(Address::tcp)
        .collect();
    handle.suspend();
    listens(&handle, 0).await;
    let other = TcpListener::bind(addrs[1]).await.unwrap();

    handle.resume();

    // By now, the server waits for 160 ms before it tries again.
    for _ in 0..6 {
        assert_eq!(soon(errors.recv()).await, Some(io::ErrorKind::AddrInUse));
    }
    let refused = TcpStream::connect(addrs[0]).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    drop(other);
    listens(&handle, 2).await;
    for addr in addrs {
        echoes(TcpStream::connect(addr).await.unwrap()).await;
    }
    handle.shutdown();
    served.await.unwrap().unwrap();
}

/// Runs `in_a_deep_folder` in a folder whose absolute path is too long for a Unix socket.
#[test]
fn a_suspended_server_listens_again_at_a_relative_path_in_a_deep_folder() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120));
    fs::create_dir(&deep).unwrap();

    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "in_a_deep_folder", "--ignored"])
        .current_dir(deep)
        .output()
        .unwrap();

    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}");
}

#[tokio::test]
#[ignore = "no test, but a process of another one"]
async fn in_a_deep_folder() {
    let (handle, served) = suspendable(["unix:socket"], |server| server).await;
    handle.suspend();
    listens(&handle, 0).await;

    handle.resume();

    listens(&handle, 1).await;
    echoes(UnixStream::connect("socket").await.unwrap()).await;
    handle.shutdown();
    served.await.unwrap().unwrap();
    assert!(!Path::new("socket").exists());
}

#[tokio::test]
async fn a_suspended_server_ends_without_listening_again() {
    let (handle, served) = suspendable(["127.0.0.1:0"], |server| {
        server.lame_duck(Duration::from_millis(20))
    })
    .await;
    let addr = handle.local_addrs()[0].tcp().unwrap();
    let open = TcpStream::connect(addr).await.unwrap();
    handle.suspend();
    listens(&handle, 0).await;
    // Whoever listens there now keeps the address.
    let other = TcpListener::bind(addr).await.unwrap();

    handle.shutdown();

    drop(open);
    let report = soon(served).await.unwrap().unwrap();
    assert_eq!(report.aborted, 0);
    drop(other);
}
