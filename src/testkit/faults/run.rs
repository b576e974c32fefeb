//! One run: a new server, a connection with faults, and a plain connection (one without faults)
//! beside it or after it.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, split};
use tokio::time::{sleep, timeout};

use super::super::memory::{Connector, memory};
use super::super::served::{Served, serve_with};
use super::listener::FailingListener;
use super::plan::{Fault, Plan};
use super::stream::Faulty;
use crate::bind::ListenerExt;
use crate::connection::ConnectionService;
use crate::end::EndReason;
use crate::server::Server;

/// The result of one conversation with the server.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Talk {
    /// The bytes that the client has read.
    pub(super) got: Vec<u8>,
    /// The end reason, or `None` if no end was reported in time.
    pub(super) reason: Option<EndReason>,
}

/// The result of one run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) faulty: Talk,
    /// The result of the conversation on the plain connection, with the same server.
    pub(super) next: Talk,
    /// `true` if, within [`Client::within`], both connections have returned their permits to the
    /// server's connection limit, and the server has shut down.
    pub(super) released: bool,
}

/// A client's stream. [`Check::client`](super::Check::client) may have wrapped it, for example in
/// TLS.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<Io: AsyncRead + AsyncWrite + Unpin> Stream for Io {}

pub(super) type Wrapped = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>>>>;

/// The client of both conversations of a run: the one with faults, and the plain one.
pub(super) struct Client<'a> {
    pub(super) wrap: &'a dyn Fn(DuplexStream) -> Wrapped,
    pub(super) input: &'a [u8],
    /// The maximum duration of each of these steps: connecting, a conversation, and the release of
    /// the permits together with the server's shutdown.
    pub(super) within: Duration,
}

/// Starts a server, and runs the conversation on two connections: one with the faults of `plan`,
/// and a plain one. The server's first accepts fail with `errors`. Returns the result of the run,
/// and the numbers of bytes that the server has read and written on the connection with faults.
pub(super) async fn run<S>(
    stack: S,
    plan: &Plan,
    errors: Vec<io::Error>,
    client: Client<'_>,
) -> (Seen, [u64; 2])
where
    S: ConnectionService<Faulty>,
{
    // The plain connection is usually opened first, to check that the faults do not affect an open
    // connection. But during a stall, time passes, and an open plain connection would reach its own
    // deadlines. So with a stall, the plain connection is opened after the one with faults.
    let before = !plan.has(Fault::Stall);
    let mut plans = VecDeque::from([plan.clone()]);
    if before {
        plans.push_front(Plan::new());
    }
    let streams = Arc::new(Mutex::new((plans, Vec::new())));
    let (listener, connector) = memory();
    let listener = FailingListener::new(listener, errors).map_io({
        let streams = Arc::clone(&streams);
        move |io| {
            let (plans, passed) = &mut *streams.lock().unwrap_or_else(PoisonError::into_inner);
            let io = Faulty::new(io, plans.pop_front().unwrap_or_default());
            passed.push(io.passed());
            io
        }
    });
    let mut served = serve_with(Server::from_listener(listener), connector, stack);

    let neighbour = if before {
        client.connect(&served).await
    } else {
        None
    };
    let faulty = client.connect(&served).await;
    let faulty = client.talk(&served, faulty).await;
    let next = match neighbour {
        Some(open) => Some(open),
        None => client.connect(&served).await,
    };
    let next = client.talk(&served, next).await;

    let released = timeout(client.within, async {
        let handle = served.handle().clone();
        let mut pause = Duration::from_millis(1);
        while handle.live() > 0 || handle.limit().in_use() > 0 {
            sleep(pause).await;
            pause *= 2;
        }
        served.shutdown().await.is_ok()
    });
    let released = released.await.unwrap_or(false);
    let (_, passed) = &*streams.lock().unwrap_or_else(PoisonError::into_inner);
    let passed = passed.get(usize::from(before));
    let passed = passed.map(|passed| passed.each_ref().map(|bytes| bytes.load(Ordering::Relaxed)));
    let seen = Seen {
        faulty,
        next,
        released,
    };
    (seen, passed.unwrap_or_default())
}

impl Client<'_> {
    /// Connects, and wraps the stream. Returns `None` if that fails or takes too long.
    async fn connect(&self, served: &Served<Connector>) -> Option<Box<dyn Stream>> {
        let connected = async { (self.wrap)(served.connect().await?).await };
        timeout(self.within, connected).await.ok()?.ok()
    }

    /// Sends the input, half-closes, reads to the end, and waits for the connection's end.
    async fn talk(&self, served: &Served<Connector>, client: Option<Box<dyn Stream>>) -> Talk {
        let mut talk = Talk::default();
        let got = &mut talk.got;
        let conversation = async {
            if let Some(client) = client {
                let (mut reader, mut writer) = split(client);
                let send = async {
                    // A failed write is ignored, because the server may have closed already. The
                    // received bytes are checked in any case.
                    if writer.write_all(self.input).await.is_ok() {
                        drop(writer.shutdown().await);
                    }
                };
                let read = async { drop(reader.read_to_end(got).await) };
                tokio::join!(send, read);
            }
            served.ended().await
        };
        let ended = timeout(self.within, conversation).await;
        talk.reason = ended.ok().and_then(Result::ok).map(|end| end.reason());
        talk
    }
}
