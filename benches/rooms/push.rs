//! `pipeline::peer`, `registry`: pushed frames, beside channels to the connections.

use std::io;

use bytes::Bytes;
use divan::Bencher;
use divan::counter::ItemsCount;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::runtime::Runtime;
use tokio::sync::{broadcast, mpsc};
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::registry::{Groups, Registry, SlowPeer};
use tower_tcp::{BoxError, ConnectionId, Peer, Pipeline};

use crate::support::{WIRE, echo, measured, runtime, serve};

/// As many frames as a pipeline queues by default.
const QUEUE: usize = 16;
const FRAME: &[u8] = b"0123456789abcde";

#[derive(Clone, Copy, Debug)]
enum To {
    ByHand,
    Peer,
}

const BOTH: [To; 2] = [To::ByHand, To::Peer];

/// One sender, one connection, a thousand frames.
#[divan::bench(args = BOTH)]
fn send(bencher: Bencher, to: To) {
    const FRAMES: usize = 1024;
    let frame = Bytes::from_static(FRAME);
    let runtime = runtime();
    match to {
        To::ByHand => {
            let (mut clients, senders) = runtime.block_on(channels(1, QUEUE));
            time(bencher, &runtime, &mut clients, FRAMES, async || {
                for _ in 0..FRAMES {
                    senders[0].send(frame.clone()).await.unwrap();
                }
            });
        }
        To::Peer => {
            let (mut clients, peers) = runtime.block_on(peers(1));
            time(bencher, &runtime, &mut clients, FRAMES, async || {
                for _ in 0..FRAMES {
                    peers[0].send(frame.clone()).await.unwrap();
                }
            });
        }
    }
}

/// One frame to each of a hundred connections.
#[divan::bench(args = BOTH)]
fn broadcast_to_100(bencher: Bencher, to: To) {
    let frame = Bytes::from_static(FRAME);
    let runtime = runtime();
    match to {
        To::ByHand => {
            let (mut clients, senders) = runtime.block_on(channels(100, QUEUE));
            time(bencher, &runtime, &mut clients, 1, async || {
                for sender in &senders {
                    sender.try_send(frame.clone()).unwrap();
                }
            });
        }
        To::Peer => {
            let (mut clients, peers) = runtime.block_on(peers(100));
            let everybody = Registry::<ConnectionId, Bytes>::new();
            for peer in &peers {
                everybody.insert(peer.info().id(), peer).unwrap();
            }
            time(bencher, &runtime, &mut clients, 1, async || {
                everybody
                    .broadcast(frame.clone(), |_, _| true, SlowPeer::Skip)
                    .await;
            });
        }
    }
}

/// The ways in which a burst reaches all connections.
#[derive(Clone, Copy, Debug)]
enum Burst {
    ByHand,
    Groups,
    /// A channel that all connections share.
    TokioBroadcast,
}

const BURSTS: [Burst; 3] = [Burst::ByHand, Burst::Groups, Burst::TokioBroadcast];

/// 64 frames to each of 500 connections.
#[divan::bench(args = BURSTS)]
fn burst_to_500(bencher: Bencher, by: Burst) {
    const MEMBERS: usize = 500;
    const FRAMES: usize = 64;
    let frame = Bytes::from_static(FRAME);
    let runtime = runtime();
    match by {
        Burst::ByHand => {
            let (mut clients, senders) = runtime.block_on(channels(MEMBERS, FRAMES));
            time(bencher, &runtime, &mut clients, FRAMES, async || {
                for _ in 0..FRAMES {
                    for sender in &senders {
                        sender.try_send(frame.clone()).unwrap();
                    }
                }
            });
        }
        Burst::Groups => {
            let (mut clients, peers) = runtime.block_on(peers(MEMBERS));
            let group = Groups::<(), Bytes>::new();
            runtime.block_on(async {
                for peer in &peers {
                    group.join((), peer).await.unwrap();
                }
            });
            time(bencher, &runtime, &mut clients, FRAMES, async || {
                for _ in 0..FRAMES {
                    let sent = group
                        .broadcast(&(), frame.clone(), |_| true, SlowPeer::Skip)
                        .await;
                    assert_eq!(sent.sent(), MEMBERS);
                }
            });
        }
        Burst::TokioBroadcast => {
            let sender = broadcast::Sender::new(FRAMES);
            let mut clients = runtime.block_on(async {
                let client = |_| {
                    let (client, stream) = tokio::io::duplex(WIRE);
                    tokio::spawn(by_broadcast(stream, sender.subscribe()));
                    client
                };
                (0..MEMBERS).map(client).collect::<Vec<_>>()
            });
            time(bencher, &runtime, &mut clients, FRAMES, async || {
                for _ in 0..FRAMES {
                    sender.send(frame.clone()).unwrap();
                }
            });
        }
    }
}

/// Times pushing this many frames to each client, until all have received them.
fn time(
    bencher: Bencher,
    runtime: &Runtime,
    clients: &mut [DuplexStream],
    frames: usize,
    send: impl AsyncFn(),
) {
    let mut read = vec![0; frames * (FRAME.len() + 1)];
    bencher
        .counter(ItemsCount::new(frames * clients.len()))
        .bench_local(|| {
            measured(|| {
                runtime.block_on(async {
                    send().await;
                    for client in &mut *clients {
                        client.read_exact(&mut read).await.unwrap();
                    }
                });
            });
        });
}

/// Returns the clients of a server, and the handles of their connections.
async fn peers(count: usize) -> (Vec<DuplexStream>, Vec<Peer<Bytes>>) {
    let (sender, mut made) = mpsc::channel(count);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let sender = sender.clone();
        async move {
            sender.send(peer).await?;
            Ok::<_, BoxError>(service_fn(echo))
        }
    });
    // The clients send nothing for the whole run.
    let deadlines = Deadlines::default().first_byte(None).idle(None);
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let connector = serve(pipeline.deadlines(deadlines));
    let (mut clients, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..count {
        clients.push(connector.connect().await.unwrap());
        peers.push(made.recv().await.unwrap());
    }
    (clients, peers)
}

/// The baseline: a channel of `queue` frames for each connection.
async fn channels(count: usize, queue: usize) -> (Vec<DuplexStream>, Vec<mpsc::Sender<Bytes>>) {
    let channel = |_| {
        let (client, stream) = tokio::io::duplex(WIRE);
        let (sender, frames) = mpsc::channel(queue);
        tokio::spawn(by_hand(stream, frames, queue));
        (client, sender)
    };
    (0..count).map(channel).unzip()
}

/// Writes all queued frames together, and reads to notice when the peer closes.
async fn by_hand(
    mut stream: DuplexStream,
    mut frames: mpsc::Receiver<Bytes>,
    queue: usize,
) -> io::Result<()> {
    let (mut input, mut output, mut taken) = ([0; 1024], Vec::new(), Vec::new());
    loop {
        tokio::select! {
            read = stream.read(&mut input) => if read? == 0 {
                return Ok(());
            },
            count = frames.recv_many(&mut taken, queue) => {
                if count == 0 {
                    return Ok(());
                }
                for frame in taken.drain(..) {
                    put(&mut output, &frame);
                }
                stream.write_all(&output).await?;
                output.clear();
            }
        }
    }
}

/// Does the same as `by_hand`, with a channel that all connections share.
async fn by_broadcast(
    mut stream: DuplexStream,
    mut frames: broadcast::Receiver<Bytes>,
) -> io::Result<()> {
    let (mut input, mut output) = ([0; 1024], Vec::new());
    loop {
        tokio::select! {
            read = stream.read(&mut input) => if read? == 0 {
                return Ok(());
            },
            frame = frames.recv() => {
                let Ok(frame) = frame else {
                    return Ok(());
                };
                put(&mut output, &frame);
                while let Ok(frame) = frames.try_recv() {
                    put(&mut output, &frame);
                }
                stream.write_all(&output).await?;
                output.clear();
            }
        }
    }
}

fn put(output: &mut Vec<u8>, frame: &[u8]) {
    output.extend_from_slice(frame);
    output.push(b'\n');
}
