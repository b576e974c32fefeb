//! Each client is limited by itself: lists and bans of addresses, connections and requests.
//! Nothing remembers clients without a bound.

#[path = "support/recorded.rs"]
mod recorded;
mod support;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use metrics::set_default_local_recorder;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tower::{ServiceBuilder, service_fn};
use tower_tcp::admit::{
    AccessList, AccessRules, AddressDenied, AddressFilter, Bans, ClientRate, ConnectionLimit,
    OverClientLimit, PerClient, Verdict,
};
use tower_tcp::bind::{Incoming, Listener, ListenerExt, SocketOptions};
use tower_tcp::error::find_cause;
use tower_tcp::frame::Lines;
use tower_tcp::networks::Networks;
use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
use tower_tcp::testkit::{Served, serve_with};
use tower_tcp::{
    Address, BoxError, Connection, ConnectionService, EndReason, Peer, Pipeline, Reply, Server,
};

use recorded::Recorded;
use support::{Client, Ends, panic_if, settled};

const SECOND: Duration = Duration::from_secs(1);

/// Accepts connections from addresses that the test chooses.
struct FromAnywhere {
    waiting: mpsc::Receiver<Incoming<DuplexStream>>,
    /// Taken from the queue by `poll_readable`, for the next `poll_accept`.
    next: Option<Incoming<DuplexStream>>,
}

impl Listener for FromAnywhere {
    type Io = DuplexStream;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.next.is_none() {
            match ready!(self.waiting.poll_recv(cx)) {
                Some(incoming) => self.next = Some(incoming),
                None => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<DuplexStream>>> {
        ready!(self.poll_readable(cx))?;
        self.next
            .take()
            .map_or(Poll::Pending, |it| Poll::Ready(Ok(it)))
    }

    fn local_addrs(&self) -> Vec<Address> {
        vec![Address::Memory(0)]
    }
}

type Connect = mpsc::Sender<Incoming<DuplexStream>>;

trait Connects {
    /// Connects from an IP address.
    async fn ip(&self, ip: &str) -> Client<DuplexStream>;

    /// Connects from any address.
    async fn at(&self, address: Address) -> Client<DuplexStream>;
}

impl Connects for Served<Connect> {
    async fn ip(&self, ip: &str) -> Client<DuplexStream> {
        self.at(address(ip)).await
    }

    async fn at(&self, address: Address) -> Client<DuplexStream> {
        let (client, io) = tokio::io::duplex(1024);
        let incoming = Incoming::new(io, address, Address::Memory(0));
        let sent = self.connector().send(incoming).await;
        sent.expect("the server listens");
        Client::new(client)
    }
}

fn address(ip: &str) -> Address {
    SocketAddr::new(ip.parse().expect("an address"), 4711).into()
}

fn serve_as(
    server: tower_tcp::ServerBuilder,
    stack: impl ConnectionService<DuplexStream>,
) -> Served<Connect> {
    let (connect, waiting) = mpsc::channel(1024);
    let next = None;
    serve_with(server.build(FromAnywhere { waiting, next }), connect, stack)
}

fn serve(stack: impl ConnectionService<DuplexStream>) -> Served<Connect> {
    serve_as(Server::builder(), stack)
}

fn echo() -> impl ConnectionService<DuplexStream> + Clone {
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    Pipeline::new(Lines::default).service(echo)
}

/// Serves an echo behind a hook.
macro_rules! behind {
    ($hook:expr) => {
        serve(
            ServiceBuilder::new()
                .layer(PreConnectLayer::new($hook))
                .service(echo()),
        )
    };
}

/// Returns whether the connection is served. It is closed otherwise.
async fn is_served(client: &mut Client<DuplexStream>) -> bool {
    // A closed stream fails.
    let sent = client.0.write_all(b"hi\n").await;
    sent.is_ok() && client.line().await == "hi"
}

fn denied(networks: &str) -> AccessRules {
    AccessRules::new().deny(networks.parse().expect("networks"))
}

// Filters

#[tokio::test(start_paused = true)]
async fn a_denied_address_is_closed_in_the_accept_loop_and_leaves_only_a_count() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let list = AccessList::new(denied("192.0.2.0/24"));
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let stack = ServiceBuilder::new()
        .map_request(move |conn| {
            counted.fetch_add(1, Ordering::SeqCst);
            conn
        })
        .service(echo());
    let served = serve_as(Server::builder().address_filter(list), stack);

    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    assert!(!is_served(&mut served.ip("::ffff:192.0.2.7").await).await);
    assert_eq!(
        (calls.load(Ordering::SeqCst), served.handle().live()),
        (0, 0)
    );
    assert_eq!(served.reasons(), []);
    let mut other = served.ip("192.0.3.7").await;
    assert!(is_served(&mut other).await);

    let why = [("close.reason", "denied")];
    assert_eq!(recorded.sum("tower_tcp.accepted_connections", &[]), 3.0);
    assert_eq!(recorded.sum("tower_tcp.ended_connections", &why), 2.0);
    assert_eq!(recorded.sum("tower_tcp.rejected_connections", &why), 2.0);
    for series in recorded.series(None, &[]) {
        assert!(!format!("{series:?}").contains("192.0"), "{series:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_denied_connection_takes_no_permit() {
    let limit = ConnectionLimit::new(1);
    let builder = Server::builder()
        .limit(limit.clone())
        .address_filter(AccessList::new(denied("192.0.2.0/24")));
    let served = serve_as(builder, echo());

    for _ in 0..100 {
        assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    }
    settled().await;
    assert_eq!(limit.in_use(), 0);
    assert!(is_served(&mut served.ip("192.0.3.7").await).await);
}

#[tokio::test(start_paused = true)]
async fn a_filter_that_panics_costs_one_connection_and_no_permit() {
    let limit = ConnectionLimit::new(1);
    let filter = AddressFilter::new(|client: &Address| {
        panic_if(*client == address("192.0.2.7"));
        Verdict::Allow
    });
    let builder = Server::builder().limit(limit.clone());
    let served = serve_as(builder.address_filter(filter), echo());

    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    settled().await;
    assert_eq!(limit.in_use(), 0);
    assert!(is_served(&mut served.ip("192.0.3.7").await).await);
}

#[tokio::test]
async fn a_denied_tcp_client_is_reset_and_so_leaves_nothing_in_the_system() {
    let filter = AccessList::new(denied("127.0.0.1"));
    let server = Server::builder()
        .listen("127.0.0.1:0")
        .address_filter(filter);
    let served = serve_with(server.bind().await.expect("a port"), (), raw());
    let addr = served.handle().local_addrs()[0].tcp().expect("TCP");

    let ended = async {
        // It may be reset before the client knows that it is connected.
        let mut client = tokio::net::TcpStream::connect(addr).await?;
        client.read_u8().await
    };
    let ended = timeout(20 * SECOND, ended).await.expect("it ends");
    let kind = ended.expect_err("nothing is sent").kind();
    assert_eq!(kind, io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_denied_client_sees_the_end_of_the_stream_where_none_is_reset() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("denied.sock");
    let rules = AccessRules::new().others(Verdict::Deny);
    let server = Server::builder()
        .socket_options(SocketOptions::default().reset_cut_off(false))
        .listen("127.0.0.1:0")
        .listen(format!("unix:{}", path.display()))
        .address_filter(AccessList::new(rules));
    let served = serve_with(server.bind().await.expect("an address"), (), raw());
    let addr = served.handle().local_addrs()[0].tcp().expect("TCP");

    let ended = async {
        let mut tcp = tokio::net::TcpStream::connect(addr).await?;
        let mut unix = tokio::net::UnixStream::connect(path).await?;
        Ok::<_, io::Error>((tcp.read(&mut [0]).await?, unix.read(&mut [0]).await?))
    };
    let ended = timeout(20 * SECOND, ended).await.expect("they end");
    assert_eq!(ended.expect("no reset"), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_denied_connection_is_given_to_no_adapter_of_the_listener() {
    let seen = Arc::new(AtomicUsize::new(0));
    let (tapped, mapped) = (Arc::clone(&seen), Arc::clone(&seen));
    let (connect, waiting) = mpsc::channel(1024);
    let next = None;
    let listener = FromAnywhere { waiting, next }
        .tap_io(move |_| {
            tapped.fetch_add(1, Ordering::SeqCst);
        })
        .map_io(move |io| {
            mapped.fetch_add(1, Ordering::SeqCst);
            io
        });
    let server = Server::builder().address_filter(AccessList::new(denied("192.0.2.0/24")));
    let served = serve_with(server.build(listener), connect, echo());

    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    assert_eq!(seen.load(Ordering::SeqCst), 0);
    assert!(is_served(&mut served.ip("192.0.3.7").await).await);
    assert_eq!(seen.load(Ordering::SeqCst), 2);
}

fn raw() -> impl ConnectionService<tower_tcp::bind::Socket> {
    service_fn(|conn: Connection<_>| async move {
        drop(conn);
        Ok::<_, BoxError>(())
    })
}

#[tokio::test(start_paused = true)]
async fn of_several_filters_each_must_allow() {
    let bans = Bans::new();
    let builder = Server::builder()
        .address_filter(AccessList::new(denied("192.0.2.0/24")))
        .address_filter(bans.clone());
    let served = serve_as(builder, echo());
    bans.ban(&address("192.0.3.7"), SECOND);

    for (ip, is_allowed) in [
        ("192.0.2.7", false),
        ("192.0.3.7", false),
        ("192.0.4.7", true),
    ] {
        assert_eq!(
            is_served(&mut served.ip(ip).await).await,
            is_allowed,
            "{ip}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_filter_that_panics_costs_one_connection() {
    let filter = AddressFilter::new(|address: &Address| {
        support::panic_if(address.to_string().starts_with("192.0.2"));
        Verdict::Allow
    });
    let served = serve_as(Server::builder().address_filter(filter), echo());

    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    assert_eq!(served.handle().live(), 0);
    assert!(is_served(&mut served.ip("192.0.3.7").await).await);
}

/// Stands for the hook of a proxy's protocol: the first line is the client's address.
async fn proxied(mut conn: Connection<DuplexStream>) -> Result<Connection<DuplexStream>, BoxError> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.push(conn.get_mut().read_u8().await?);
    }
    let ip = String::from_utf8(line)?;
    conn.set_client_addr(address(ip.trim()));
    Ok(conn)
}

#[tokio::test(start_paused = true)]
async fn behind_a_proxy_a_hook_denies_the_client_and_not_the_proxy() {
    let list = AccessList::new(denied("192.0.2.0/24"));
    let served = behind!(service_fn(proxied).chain(AddressFilter::from(list)));

    let mut client = served.ip("10.0.0.1").await;
    client.send("192.0.2.7\n").await;
    assert!(!is_served(&mut client).await);
    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::Denied);
    let cause = end.error().expect("it has a cause");
    assert!(find_cause::<AddressDenied>(cause).is_some());

    let mut client = served.ip("10.0.0.1").await;
    client.send("192.0.3.7\n").await;
    assert!(is_served(&mut client).await);
}

// Lists

#[tokio::test(start_paused = true)]
async fn a_list_is_replaced_for_the_next_connection() {
    let list = AccessList::default();
    let served = serve_as(Server::builder().address_filter(list.clone()), echo());
    let mut before = served.ip("192.0.2.7").await;
    assert!(is_served(&mut before).await);

    list.replace(denied("192.0.2.0/24"));

    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    assert!(is_served(&mut before).await);
    list.replace(AccessRules::new());
    assert!(is_served(&mut served.ip("192.0.2.7").await).await);
}

#[test]
fn of_all_networks_the_longest_prefix_decides_and_deny_decides_a_tie() {
    let networks = |texts: &str| texts.parse::<Networks>().expect("networks");
    let rules = AccessRules::new()
        .deny(networks("10.0.0.0/8 10.1.2.0/24 2001:db8::/32 192.0.2.7"))
        .allow(networks("10.1.0.0/16 10.0.0.0/8 2001:db8:1::/48"));
    for (ip, allowed) in [
        ("10.9.9.9", false),
        ("10.1.1.1", true),
        ("::ffff:10.1.1.1", true),
        ("10.1.2.1", false),
        ("192.0.2.7", false),
        ("192.0.2.8", true),
        ("2001:db8:2::1", false),
        ("2001:db8:1::1", true),
    ] {
        let is_allowed = rules.verdict(&address(ip)) == Verdict::Allow;
        assert_eq!(is_allowed, allowed, "{ip}");
    }
}

#[test]
fn a_list_can_allow_some_networks_and_nobody_else() {
    let only = "10.0.0.0/8 unix".parse().expect("networks");
    let rules = AccessRules::new().allow(only).others(Verdict::Deny);
    for (address, verdict) in [
        (address("10.0.0.1"), Verdict::Allow),
        (Address::Unix(None), Verdict::Allow),
        (address("11.0.0.1"), Verdict::Deny),
        (address("::1"), Verdict::Deny),
        (Address::Memory(1), Verdict::Deny),
    ] {
        assert_eq!(rules.verdict(&address), verdict, "{address}");
    }
}

// Bans

#[tokio::test(start_paused = true)]
async fn a_service_bans_its_own_client_for_a_time() {
    let bans = Bans::new();
    let banning = bans.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        let (bans, mut failures) = (banning.clone(), 0);
        let login = service_fn(move |password: Bytes| {
            failures += u32::from(password != "secret");
            let reply = Reply::from(password);
            let reply = if failures < 3 {
                reply
            } else {
                bans.ban(peer.info().client_addr(), 600 * SECOND);
                reply.close()
            };
            async { Ok::<_, Infallible>(reply) }
        });
        async { Ok::<_, Infallible>(login) }
    });
    let stack = Pipeline::new(Lines::default).make_service::<Bytes, _>(make);
    let served = serve_as(Server::builder().address_filter(bans.clone()), stack);

    let mut guessing = served.ip("192.0.2.7").await;
    guessing.send("a\nb\nc\n").await;
    assert_eq!(guessing.rest().await, ["a", "b", "c"]);
    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    assert!(is_served(&mut served.ip("192.0.2.8").await).await);
    assert_eq!(bans.len(), 1);

    tokio::time::advance(599 * SECOND).await;
    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    tokio::time::advance(SECOND).await;
    assert!(is_served(&mut served.ip("192.0.2.7").await).await);
    assert!(bans.is_empty());
}

#[tokio::test(start_paused = true)]
async fn of_two_bans_the_later_end_holds_and_either_can_be_lifted() {
    let (bans, ip) = (Bans::new(), address("192.0.2.7"));
    for times in [[10, 1], [1, 10]] {
        for time in times {
            bans.ban(&ip, time * SECOND);
        }
        tokio::time::advance(9 * SECOND).await;
        assert!(bans.is_banned(&ip), "{times:?}");
        tokio::time::advance(SECOND).await;
        assert!(!bans.is_banned(&ip), "{times:?}");
    }
    bans.ban(&ip, Duration::MAX);
    bans.ban(&ip, Duration::ZERO);
    assert!(bans.is_banned(&ip));
    bans.lift(&ip);
    assert!(!bans.is_banned(&ip) && bans.is_empty());
}

#[tokio::test(start_paused = true)]
async fn bans_are_listed_in_the_order_in_which_they_end() {
    let bans = Bans::new();
    for (ip, seconds) in [("192.0.2.3", 30), ("192.0.2.1", 10), ("2001:db8::1", 20)] {
        bans.ban(&address(ip), seconds * SECOND);
    }
    tokio::time::advance(9 * SECOND).await;
    let listed = || {
        let bans = bans.list().into_iter();
        bans.map(|(ip, rest)| (ip.to_string(), rest.as_secs()))
            .collect::<Vec<_>>()
    };
    let expected = [("192.0.2.1", 1), ("2001:db8::", 11), ("192.0.2.3", 21)];
    assert_eq!(listed(), expected.map(|(ip, rest)| (ip.to_owned(), rest)));

    tokio::time::advance(11 * SECOND).await;

    assert_eq!(listed(), [("192.0.2.3".to_owned(), 10)]);
}

#[tokio::test(start_paused = true)]
async fn bans_are_bounded_and_the_first_to_end_makes_room() {
    let bans = Bans::new().capacity(100);
    let ip = |n: u32| address(&std::net::Ipv4Addr::from_bits(n).to_string());
    for n in 0..1_000 {
        bans.ban(&ip(n), n * SECOND + SECOND);
        assert!(bans.len() <= 100);
    }
    let banned: Vec<_> = (0..1_000).filter(|n| bans.is_banned(&ip(*n))).collect();
    assert_eq!(banned, (900..1_000).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn an_ipv6_host_is_banned_with_its_network_and_a_unix_client_not_at_all() {
    let bans = Bans::new();
    bans.ban(&address("2001:db8:1:2::1"), SECOND);
    assert!(bans.is_banned(&address("2001:db8:1:2:ffff::1")));
    assert!(!bans.is_banned(&address("2001:db8:1:3::1")));

    bans.ban(&Address::Unix(None), SECOND);
    assert!(!bans.is_banned(&Address::Unix(None)));
    assert_eq!(bans.len(), 1);
}

// The connections of a client

#[tokio::test(start_paused = true)]
async fn a_client_over_its_limit_is_refused_and_others_are_served() {
    let recorded = Recorded::default();
    let _guard = set_default_local_recorder(&recorded);
    let per_client = PerClient::new(2);
    let served = behind!(per_client.clone());
    let (mut a, mut b) = (served.ip("192.0.2.7").await, served.ip("192.0.2.7").await);
    assert!(is_served(&mut a).await && is_served(&mut b).await);

    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::ClientLimitExceeded);
    let cause = find_cause::<OverClientLimit>(end.error().expect("it has a cause"));
    assert_eq!(cause, Some(&OverClientLimit::Connections(2)));
    let mut other = served.ip("192.0.2.8").await;
    assert!(is_served(&mut other).await);
    let open = |ip: &str| per_client.open(&address(ip));
    assert_eq!(
        (open("192.0.2.7"), open("192.0.2.8"), open("192.0.2.9")),
        (2, 1, 0)
    );

    drop(a);
    assert_eq!(served.reason().await, EndReason::PeerClosed);
    assert!(is_served(&mut served.ip("192.0.2.7").await).await);
    assert!(is_served(&mut b).await);
    let why = [("close.reason", "client_limit_exceeded")];
    assert_eq!(recorded.sum("tower_tcp.rejected_connections", &why), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_place_is_given_back_however_its_connection_ends() {
    let per_client = PerClient::new(1);
    let act = service_fn(|line: Bytes| async move {
        match &line[..] {
            b"panic" => panic!("as asked"),
            b"fail" => Err(BoxError::from("as asked")),
            b"hang" => std::future::pending().await,
            _ => Ok(line),
        }
    });
    let pipeline = Pipeline::new(Lines::default)
        .service(act)
        .shutdown_on_error(true);
    let hook = service_fn(|mut conn: Connection<DuplexStream>| async move {
        match conn.get_mut().read_u8().await? {
            b'-' => Err(BoxError::from("refused by the next hook")),
            b'!' => panic!("in the next hook"),
            _ => Ok(conn),
        }
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(per_client.clone().chain(hook)))
        .service(pipeline);
    let served = serve(stack);
    let ip = "192.0.2.7";

    for (text, reason) in [
        ("-", EndReason::Rejected),
        ("!", EndReason::Panic),
        ("", EndReason::PreConnectTimeout),
        ("+", EndReason::FirstByteTimeout),
        ("+panic\n", EndReason::Panic),
        ("+fail\n", EndReason::ServiceError),
        ("+hi\n", EndReason::IdleTimeout),
    ] {
        let mut client = served.ip(ip).await;
        client.send(text).await;
        settled().await;
        assert_eq!(served.reason().await, reason, "{text:?}");
        assert_eq!(per_client.clients(), 0, "{text:?}");
    }
    for abort in [true, false] {
        let mut client = served.ip(ip).await;
        client.send("+hang\n").await;
        settled().await;
        assert_eq!(per_client.open(&address(ip)), 1);
        if abort {
            served.handle().connections().for_each(|conn| conn.abort());
            assert_eq!(served.reason().await, EndReason::Aborted);
        } else {
            drop(client);
            assert_eq!(served.reason().await, EndReason::PeerReset);
        }
        assert_eq!(per_client.clients(), 0);
    }
    let _client = served.ip(ip).await;
    settled().await;
    assert_eq!(per_client.clients(), 1);
    drop(served);
    settled().await;
    assert_eq!(per_client.clients(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_ipv6_client_is_its_network_and_unix_clients_are_not_limited() {
    let served = behind!(PerClient::new(1));
    let mut kept = vec![served.ip("2001:db8:1:2::1").await];
    assert!(is_served(&mut kept[0]).await);
    assert!(!is_served(&mut served.ip("2001:db8:1:2:ffff::1").await).await);
    let mut neighbour = served.ip("2001:db8:1:3::1").await;
    assert!(is_served(&mut neighbour).await);
    for _ in 0..3 {
        let mut unix = served.at(Address::Unix(None)).await;
        assert!(is_served(&mut unix).await);
        kept.push(unix);
    }

    let served = behind!(PerClient::new(1).v6_prefix(128));
    kept = vec![served.ip("2001:db8:1:2::1").await];
    assert!(is_served(&mut kept[0]).await);
    assert!(is_served(&mut served.ip("2001:db8:1:2::2").await).await);
}

#[tokio::test(start_paused = true)]
async fn behind_a_proxy_the_client_is_limited_and_not_the_proxy() {
    let served = behind!(service_fn(proxied).chain(PerClient::new(1)));
    let mut kept = Vec::new();
    for (ip, is_let_in) in [
        ("192.0.2.7", true),
        ("192.0.2.8", true),
        ("192.0.2.7", false),
    ] {
        let mut client = served.ip("10.0.0.1").await;
        client.send(format!("{ip}\n")).await;
        assert_eq!(is_served(&mut client).await, is_let_in, "{ip}");
        kept.push(client);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_connects_too_often_is_refused_until_its_rate_allows_more() {
    let per_client = PerClient::new(100).rate(2, SECOND);
    let served = behind!(per_client.clone());
    for _ in 0..2 {
        assert!(is_served(&mut served.ip("192.0.2.7").await).await);
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }

    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::ClientRateExceeded);
    let cause = find_cause::<OverClientLimit>(end.error().expect("it has a cause"));
    assert_eq!(cause, Some(&OverClientLimit::Rate));
    assert!(is_served(&mut served.ip("192.0.2.8").await).await);
    // A client is remembered even without a connection. Otherwise its rate would begin anew.
    assert_eq!(per_client.clients(), 2);

    tokio::time::advance(SECOND / 2).await;
    assert!(is_served(&mut served.ip("192.0.2.7").await).await);
    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
}

#[tokio::test(start_paused = true)]
async fn connections_over_the_limit_can_wait_in_turn_and_further_ones_are_refused() {
    let per_client = PerClient::new(1).wait(2);
    let served = behind!(per_client.clone());
    let mut inside = served.ip("192.0.2.7").await;
    assert!(is_served(&mut inside).await);
    let mut first = served.ip("192.0.2.7").await;
    let mut second = served.ip("192.0.2.7").await;
    assert!(first.hears_nothing().await && second.hears_nothing().await);

    assert!(!is_served(&mut served.ip("192.0.2.7").await).await);
    assert_eq!(served.reason().await, EndReason::ClientLimitExceeded);
    drop(inside);
    assert!(is_served(&mut first).await);
    assert!(second.hears_nothing().await);
    drop(first);
    assert!(is_served(&mut second).await);
    drop(second);
    settled().await;
    assert_eq!(per_client.clients(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_at_the_deadline_of_the_hooks_and_leaves_nothing_behind() {
    let per_client = PerClient::new(1).wait(1);
    let served = behind!(per_client.clone());
    let mut inside = served.ip("192.0.2.7").await;
    assert!(is_served(&mut inside).await);

    for _ in 0..3 {
        let begun = Instant::now();
        let waiting = served.ip("192.0.2.7").await;
        assert_eq!(served.reason().await, EndReason::PreConnectTimeout);
        assert_eq!(begun.elapsed(), 10 * SECOND);
        drop(waiting);
        assert!(is_served(&mut inside).await);
    }
    assert_eq!(per_client.open(&address("192.0.2.7")), 1);
}

#[tokio::test(start_paused = true)]
async fn connections_that_wait_end_with_a_drain_and_at_once_with_an_abort() {
    for (is_abort, time) in [(false, SECOND), (true, Duration::ZERO)] {
        let per_client = PerClient::new(1).rate(2, 3600 * SECOND).wait(5);
        let mut served = behind!(per_client.clone());
        let mut inside = served.ip("192.0.2.7").await;
        assert!(is_served(&mut inside).await);
        let mut waiting = Vec::new();
        for _ in 0..5 {
            waiting.push(served.ip("192.0.2.7").await);
        }
        // The first one has its place now, and waits for the rate.
        drop(inside);
        assert!(is_served(&mut waiting.remove(0)).await);
        assert!(waiting[0].hears_nothing().await);

        let begun = Instant::now();
        if is_abort {
            served.handle().abort();
        } else {
            served.handle().shutdown();
        }
        served.closed().await.expect("it ends in good order");
        assert_eq!(begun.elapsed(), time, "abort: {is_abort}");
        assert_eq!(per_client.open(&address("192.0.2.7")), 0);
        // Only the rate is remembered.
        assert_eq!(per_client.clients(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_over_the_rate_can_wait_for_it() {
    let served = behind!(PerClient::new(100).rate(1, SECOND).wait(5));
    let begun = Instant::now();
    let mut kept = Vec::new();
    for n in 0..3 {
        let mut client = served.ip("192.0.2.7").await;
        assert!(is_served(&mut client).await);
        assert_eq!(begun.elapsed().as_secs(), n);
        kept.push(client);
    }
}

#[tokio::test(start_paused = true)]
async fn a_newcomer_does_not_overtake_a_connection_that_waits_for_the_rate() {
    // tokio's timer wakes tasks only at whole milliseconds. The newcomers arrive when the rate
    // already allows a connection, but the waiting one has not been woken yet.
    let fraction = Duration::from_micros(300);
    tokio::time::advance(fraction).await;
    let per_client = PerClient::new(100).rate(1, SECOND).wait(5);
    let served = behind!(per_client.clone());
    let begun = Instant::now();
    assert!(is_served(&mut served.ip("192.0.2.7").await).await);
    let (done, mut order) = mpsc::channel(5);
    let mut waiting = tokio::task::JoinSet::new();
    for n in 0..5 {
        let mut client = served.ip("192.0.2.7").await;
        let done = done.clone();
        waiting.spawn(async move {
            assert!(is_served(&mut client).await);
            done.send(n).await.expect("the test waits");
        });
        if n == 0 {
            settled().await;
            tokio::time::advance(SECOND + fraction - begun.elapsed()).await;
        }
    }

    for n in 0..5 {
        assert_eq!(order.recv().await, Some(n));
    }
}

// A word before the close

fn busy() -> impl ConnectionService<DuplexStream> + Clone {
    service_fn(|mut conn: Connection<DuplexStream>| async move {
        conn.write_all(b"421 not you\r\n").await?;
        conn.close(Default::default()).await?;
        Ok::<_, BoxError>(())
    })
}

#[tokio::test(start_paused = true)]
async fn a_connection_over_its_clients_limit_can_be_told() {
    let per_client = PerClient::new(1);
    let stack = ServiceBuilder::new()
        .layer(per_client.clone().overflow(busy()))
        .service(echo());
    let served = serve(stack);
    let mut inside = served.ip("192.0.2.7").await;
    assert!(is_served(&mut inside).await);

    assert_eq!(served.ip("192.0.2.7").await.rest().await, ["421 not you"]);
    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::ClientLimitExceeded);
    assert!(find_cause::<OverClientLimit>(end.error().expect("it has a cause")).is_some());
    assert!(is_served(&mut served.ip("192.0.2.8").await).await);
    drop(inside);
    settled().await;
    assert!(is_served(&mut served.ip("192.0.2.7").await).await);
}

#[tokio::test(start_paused = true)]
async fn a_banned_client_can_be_told() {
    let bans = Bans::new();
    let stack = ServiceBuilder::new()
        .layer(AddressFilter::from(bans.clone()).overflow(busy()))
        .service(echo());
    let served = serve(stack);
    bans.ban(&address("192.0.2.7"), SECOND);

    assert_eq!(served.ip("192.0.2.7").await.rest().await, ["421 not you"]);
    assert_eq!(served.reason().await, EndReason::Denied);
    assert!(is_served(&mut served.ip("192.0.2.8").await).await);
}

// The requests of a client

/// Serves an echo with a rate for the requests of each client.
macro_rules! rated {
    ($rate:expr, $layers:expr) => {{
        let rate: ClientRate = $rate;
        let make = service_fn(move |peer: Peer<Bytes>| {
            let echo = $layers
                .layer(rate.layer(peer.info()))
                .service_fn(|line: Bytes| async move { Ok::<_, BoxError>(line) });
            async { Ok::<_, Infallible>(echo) }
        });
        serve(Pipeline::new(Lines::default).make_service::<Bytes, _>(make))
    }};
}

#[tokio::test(start_paused = true)]
async fn the_connections_of_a_client_share_its_rate_and_requests_over_it_wait() {
    let served = rated!(ClientRate::new(2, SECOND), ServiceBuilder::new());
    let (mut a, mut b) = (served.ip("192.0.2.7").await, served.ip("192.0.2.7").await);
    let mut other = served.ip("192.0.2.8").await;
    let begun = Instant::now();
    assert_eq!(
        (a.ask("1").await, b.ask("2").await),
        ("1".into(), "2".into())
    );
    assert_eq!(begun.elapsed(), Duration::ZERO);

    assert_eq!(a.ask("3").await, "3");
    assert_eq!(begun.elapsed().as_millis() / 10, 50);
    assert_eq!(b.ask("4").await, "4");
    assert_eq!(begun.elapsed().as_millis() / 10, 100);
    assert_eq!(
        (other.ask("1").await, other.ask("2").await),
        ("1".into(), "2".into())
    );
    assert_eq!(begun.elapsed().as_millis() / 10, 100);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_comes_back_has_the_rate_that_it_left() {
    let rate = ClientRate::new(2, 60 * SECOND);
    let served = rated!(rate.clone(), ServiceBuilder::new());
    let mut client = served.ip("192.0.2.7").await;
    assert_eq!(
        (client.ask("1").await, client.ask("2").await),
        ("1".into(), "2".into())
    );
    drop(client);
    settled().await;
    assert_eq!(rate.clients(), 1);

    let mut again = served.ip("192.0.2.7").await;
    again.send("3\n").await;
    assert!(timeout(29 * SECOND, again.line()).await.is_err());
    assert_eq!(again.line().await, "3");
}

#[tokio::test(start_paused = true)]
async fn stock_load_shed_outside_of_the_rate_makes_requests_over_it_fail() {
    let served = rated!(
        ClientRate::new(1, SECOND),
        ServiceBuilder::new()
            .map_result(|reply: Result<Bytes, BoxError>| {
                Ok::<_, BoxError>(reply.unwrap_or_else(|_shed| "slow down".into()))
            })
            .load_shed()
    );
    let mut client = served.ip("192.0.2.7").await;
    assert_eq!(client.ask("1").await, "1");
    assert_eq!(client.ask("2").await, "slow down");
    tokio::time::advance(SECOND).await;
    assert_eq!(client.ask("3").await, "3");
    let mut unix = served.at(Address::Unix(None)).await;
    assert_eq!(
        (unix.ask("1").await, unix.ask("2").await),
        ("1".into(), "2".into())
    );
}
