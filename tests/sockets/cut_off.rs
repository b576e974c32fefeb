//! A peer that is cut off is gone. However its connection was served, at its end its place is free,
//! and the system keeps nothing for it.

use std::collections::BTreeSet;
use std::future::ready;
use std::io;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;
use tower::service_fn;
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::SocketOptions;
use tower_tcp::close::Linger;
use tower_tcp::deadline::{Deadlines, MinRate};
use tower_tcp::frame::Lines;
use tower_tcp::{BoxError, EndReason, Handle, Pipeline, Server};

use crate::over::{Io, Over, TRANSPORTS, Transport};
use crate::support::{Client, Ends, until};
use crate::{NET, SHORT, Way, lines, small};

/// Returns which sockets the system still has for the connections of a server with these peers.
/// The system's table may show a socket twice, or not at all, while others come and go.
fn kept(over: &Over, peers: &[Box<dyn Io>]) -> BTreeSet<String> {
    const ACCEPTS: &str = "00010000";
    let is_unix = over.transport() == Transport::Unix;
    let table = if is_unix { "unix" } else { "tcp" };
    let table = std::fs::read_to_string(format!("/proc/net/{table}")).expect("Linux has it");
    // An earlier server may have left other sockets on this port.
    let ports = peers.iter().filter_map(|peer| peer.port());
    let ports: Vec<_> = ports.map(|port| format!(":{port:04X}")).collect();
    let rows = table.lines().skip(1).filter_map(|row| {
        let fields: Vec<_> = row.split_whitespace().collect();
        if is_unix {
            let is_kept = fields.last() == over.path().to_str().as_ref() && fields[3] != ACCEPTS;
            is_kept.then(|| fields[0].to_owned())
        } else {
            let [local, remote] = [fields[1], fields[2]];
            let is_kept = local.ends_with(&format!(":{:04X}", over.addr().port()))
                && ports.iter().any(|port| remote.ends_with(port));
            is_kept.then(|| remote.to_owned())
        }
    });
    rows.collect()
}

/// Connects this many peers, which ask for more than they take.
async fn blocked(way: &Way, peers: usize) -> Vec<Box<dyn Io>> {
    let mut connected = Vec::new();
    for _ in 0..peers {
        connected.push(way.ask("large").await);
    }
    connected
}

/// Cuts off peers that take nothing, in each way over each transport, by `cut` or by a deadline.
/// Checks that nothing is left of them.
async fn each_is_gone(deadlines: Deadlines, cut: Option<fn(&Handle)>, reason: EndReason) {
    const PEERS: usize = 2;
    let mut ways = Vec::new();
    for transport in TRANSPORTS {
        let builder = || small().limit(ConnectionLimit::new(PEERS));
        ways.extend(Way::each(transport, builder, deadlines).await);
    }
    let checked = ways.into_iter().map(async |way| {
        let (name, handle) = (way.name(), way.over.served.handle());
        let peers = blocked(&way, PEERS).await;
        if let Some(cut) = cut {
            let held = || {
                handle
                    .connections()
                    .filter_map(|live| live.unacknowledged())
            };
            until(|| held().filter(|bytes| *bytes > 10_000).count() == PEERS).await;
            cut(handle);
        }

        for _ in 0..PEERS {
            let ended = timeout(NET, way.over.served.reason()).await;
            let ended = ended.unwrap_or_else(|_| panic!("{name}: it goes on"));
            assert_eq!(ended, reason, "{name}");
        }

        assert_eq!(kept(&way.over, &peers), BTreeSet::new(), "{name}");
        way.over.served.all_gone().await;
        if way.over.transport() != Transport::Unix {
            for mut peer in peers {
                let read = peer.read_to_end(&mut Vec::new()).await;
                let end = read.map_err(|err| err.kind());
                assert_eq!(end, Err(io::ErrorKind::ConnectionReset), "{name}");
            }
        }
    });
    join_all(checked).await;
}

#[tokio::test]
async fn a_peer_that_takes_nothing_by_its_deadline_is_gone() {
    let deadlines = Deadlines::default().write(SHORT);

    each_is_gone(deadlines, None, EndReason::WriteTimeout).await;
}

#[tokio::test]
async fn a_peer_that_reads_too_slowly_is_gone() {
    let deadlines = Deadlines::default().min_rate(MinRate::new(1_000, SHORT));

    each_is_gone(deadlines, None, EndReason::SlowReader).await;
}

#[tokio::test]
async fn an_aborted_peer_is_gone() {
    let abort = |handle: &Handle| handle.connections().for_each(|live| live.abort());

    each_is_gone(Deadlines::default(), Some(abort), EndReason::Aborted).await;
}

#[tokio::test]
async fn a_peer_that_outlasts_a_shutdown_is_gone() {
    let shut_down = |handle: &Handle| handle.shutdown_within(SHORT);

    each_is_gone(
        Deadlines::default(),
        Some(shut_down),
        EndReason::DrainDeadline,
    )
    .await;
}

#[tokio::test]
async fn the_peers_of_an_aborted_server_are_gone() {
    each_is_gone(Deadlines::default(), Some(Handle::abort), EndReason::Killed).await;
}

#[tokio::test]
async fn a_peer_that_takes_none_of_the_last_answer_is_ended_by_the_time_to_write() {
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(lines))
        .linger(Linger::default().time(SHORT).write(SHORT));
    let mut all = Vec::new();
    for transport in TRANSPORTS {
        let request: &[u8] = match transport {
            Transport::Unix => b"last over unix\n",
            Transport::Tcp | Transport::Tls => b"last\n",
        };
        let ways = Over::each_way(transport, Server::builder, pipeline.clone()).await;
        all.extend(ways.map(|over| (over, request)));
    }
    let checked = all.into_iter().map(async |(over, request)| {
        let peer = over.send(request).await;

        let reason = timeout(NET, over.served.reason()).await.expect("in time");

        assert_eq!(reason, EndReason::WriteTimeout, "{}", over.served.way());
        assert_eq!(
            kept(&over, &[peer]),
            BTreeSet::new(),
            "{}",
            over.served.way()
        );
    });
    join_all(checked).await;
}

/// Has eight peers take nothing, two at a time, until all have ended, and then calls `check`.
async fn flooded(options: SocketOptions, check: impl AsyncFnOnce(&Over, &[Box<dyn Io>])) {
    let builder = Server::builder()
        .socket_options(options)
        .limit(ConnectionLimit::new(2));
    let large = || Bytes::from(vec![b'x'; 12_000_000]);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(move |_: Bytes| {
            ready(Ok::<_, BoxError>(large()))
        }))
        .deadlines(Deadlines::default().write(SHORT));
    let over = Over::serve(Transport::Tcp, "limited", builder, pipeline).await;
    let mut peers = Vec::new();
    for _ in 0..8 {
        peers.push(over.send(b"a\n").await);
    }
    for _ in 0..8 {
        let reason = timeout(NET, over.served.reason()).await;
        assert_eq!(reason.expect("in time"), EndReason::WriteTimeout);
    }
    check(&over, &peers).await;
}

#[tokio::test]
async fn the_memory_of_a_peer_that_takes_nothing_goes_with_its_place() {
    let nothing = async |over: &Over, peers: &[_]| assert!(kept(over, peers).is_empty());

    flooded(SocketOptions::default(), nothing).await;
}

#[tokio::test]
async fn the_system_may_keep_what_a_peer_that_is_cut_off_has_not_read() {
    let all = async |over: &Over, peers: &[_]| until(|| kept(over, peers).len() == 8).await;

    flooded(SocketOptions::default().reset_cut_off(false), all).await;
}

#[tokio::test]
async fn an_aborted_connection_is_reset_and_a_closed_one_is_not() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(lines));
    for (transport, abort) in [Transport::Tcp, Transport::Tls]
        .into_iter()
        .flat_map(|transport| [(transport, true), (transport, false)])
    {
        for over in Over::each_way(transport, small, pipeline.clone()).await {
            let mut client = Client::new(over.connect().await);
            assert_eq!(client.ask("a").await, "a");

            for connection in over.served.handle().connections() {
                if abort {
                    connection.abort();
                } else {
                    connection.close();
                }
            }

            let end = client.0.read_u8().await.expect_err("it ends").kind();
            let wanted = if abort {
                io::ErrorKind::ConnectionReset
            } else {
                io::ErrorKind::UnexpectedEof
            };
            assert_eq!(end, wanted, "{}", over.served.way());
        }
    }
}
