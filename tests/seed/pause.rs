//! Scenario 12: paused input.

use std::convert::Infallible;
use std::future::ready;

use bytes::Bytes;
use tokio::sync::mpsc;
use tower::service_fn;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{EndReason, Peer, Pipeline};

use super::support::{Clients, Ends, settled};
use super::{Journal, text};

/// Serves and records lines. `pause` pauses the input.
fn pausing(journal: &Journal) -> (Served, mpsc::Receiver<Peer<Bytes>>) {
    let (tell, told) = mpsc::channel(1);
    let journal = journal.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer.clone()).expect("there is room for one");
        let noted = journal.clone();
        ready(Ok::<_, Infallible>(service_fn(move |line: Bytes| {
            noted.note(text(&line));
            if &*line == b"pause" {
                peer.pause_input();
            }
            ready(Ok::<_, Infallible>(None::<Bytes>))
        })))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    (serve(pipeline), told)
}

#[tokio::test(start_paused = true)]
async fn s12_x76_nothing_is_delivered_while_input_is_paused_and_nothing_is_lost() {
    let journal = Journal::default();
    let (served, mut peers) = pausing(&journal);
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is connected");

    client.send("a\npause\nb\nc\n").await;
    settled().await;
    client.send("d\n").await;
    settled().await;
    let meanwhile = journal.all();
    peer.resume_input();
    settled().await;

    assert_eq!(meanwhile, ["a", "pause"]);
    assert_eq!(journal.all(), ["a", "pause", "b", "c", "d"]);
    client.finish().await;
    assert_eq!(served.reason().await, EndReason::PeerClosed);
}

#[tokio::test(start_paused = true)]
async fn s12_x76_a_close_while_input_is_paused_delivers_first_what_came_before_it() {
    let journal = Journal::default();
    let (served, mut peers) = pausing(&journal);
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is connected");

    client.send("pause\nb\n").await;
    settled().await;
    drop(client);
    settled().await;
    let meanwhile = journal.all();
    peer.resume_input();

    assert_eq!(meanwhile, ["pause"]);
    assert_eq!(served.reason().await, EndReason::PeerClosed);
    assert_eq!(journal.all(), ["pause", "b"]);
}

#[tokio::test(start_paused = true)]
async fn s12_x76b_input_that_is_paused_again_and_again_loses_nothing() {
    let journal = Journal::default();
    let (served, mut peers) = pausing(&journal);
    let mut client = served.client().await;
    let peer = peers.recv().await.expect("it is connected");

    client.send("pause\nrest\npause\nx\n").await;
    settled().await;
    peer.resume_input();
    settled().await;
    let between = journal.all();
    peer.resume_input();
    client.finish().await;

    assert_eq!(served.reason().await, EndReason::PeerClosed);
    assert_eq!(between, ["pause", "rest", "pause"]);
    assert_eq!(journal.all(), ["pause", "rest", "pause", "x"]);
}
