//! `accept`, `server`: connections that come, ask once and leave, and the cost between accept and
//! the first byte.

use std::future::{poll_fn, ready};

use divan::Bencher;
use divan::counter::ItemsCount;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tower::{ServiceBuilder, service_fn};
use tower_tcp::bind::Listener;
use tower_tcp::frame::Lines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::Connector;
use tower_tcp::{BoxError, Connection, Pipeline};

use crate::support::{echo, measured, memory, runtime, serve};

/// The number of connections that are timed together, one after the other.
const CONNECTIONS: usize = 64;

#[derive(Clone, Copy, Debug)]
enum Server {
    ByHand,
    Raw,
    Pipeline,
    PipelineTraced,
    PipelinePreConnect,
}

#[divan::bench(args = [
    Server::ByHand,
    Server::Raw,
    Server::Pipeline,
    Server::PipelineTraced,
    Server::PipelinePreConnect,
])]
fn connections(bencher: Bencher, server: Server) {
    let pipeline = || Pipeline::new(Lines::default).service(service_fn(echo));
    let new = ServiceBuilder::new;
    let runtime = runtime();
    let connector = runtime.block_on(async {
        match server {
            Server::ByHand => spawning_loop(),
            Server::Raw => serve(service_fn(by_hand::<Connection<DuplexStream>>)),
            Server::Pipeline => serve(pipeline()),
            Server::PipelineTraced => {
                serve(new().layer(ConnectionTraceLayer::new()).service(pipeline()))
            }
            Server::PipelinePreConnect => {
                let hook =
                    service_fn(|conn: Connection<DuplexStream>| ready(Ok::<_, BoxError>(conn)));
                serve(new().layer(PreConnectLayer::new(hook)).service(pipeline()))
            }
        }
    });
    bencher
        .counter(ItemsCount::new(CONNECTIONS))
        .bench_local(|| {
            measured(|| {
                runtime.block_on(async {
                    for _ in 0..CONNECTIONS {
                        come_and_go(&connector).await;
                    }
                });
            });
        });
}

async fn come_and_go(connector: &Connector) {
    let mut client = connector.connect().await.unwrap();
    let mut answer = [0; 6];
    client.write_all(b"hello\n").await.unwrap();
    client.read_exact(&mut answer).await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(client.read(&mut answer).await.unwrap(), 0);
}

/// The baseline: an accept loop that spawns a task for each connection.
fn spawning_loop() -> Connector {
    let (mut listener, connector) = memory();
    tokio::spawn(async move {
        loop {
            let incoming = poll_fn(|cx| listener.poll_accept(cx)).await.unwrap();
            tokio::spawn(by_hand(incoming.io));
        }
    });
    connector
}

/// The loop of this room. Unlike the loop of the other rooms, it allocates no large buffer.
async fn by_hand<Io>(mut io: Io) -> Result<(), BoxError>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut input = [0; 1024];
    loop {
        match io.read(&mut input).await? {
            0 => return Ok(()),
            read => io.write_all(&input[..read]).await?,
        }
    }
}
