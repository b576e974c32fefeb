//! One run: a fresh server, a connection with faults, and a plain one next to it or after it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, split};
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

/// The result of one conversation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Talk {
    /// The bytes that the client has read.
    pub(super) got: Vec<u8>,
    /// `None` if the connection has not ended in time.
    pub(super) reason: Option<EndReason>,
}

/// The result of one run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) faulty: Talk,
    /// The plain conversation with the same server.
    pub(super) next: Talk,
    /// `true` if both places of the limit were released, and the server has shut down.
    pub(super) released: bool,
}

/// Runs both conversations with a new server, whose accepts fail with `errors` first.
pub(super) async fn run<S>(
    stack: S,
    plan: &Plan,
    errors: Vec<io::Error>,
    input: &[u8],
    within: Duration,
) -> Seen
where
    S: ConnectionService<Faulty>,
{
    // A stall passes time, in which a second connection would reach its own deadlines. So there
    // the plain one comes after it; otherwise it is open before, and must survive.
    let before = !plan.has(Fault::Stall);
    let mut plans = VecDeque::from([plan.clone()]);
    if before {
        plans.push_front(Plan::new());
    }
    let plans = Mutex::new(plans);
    let (listener, connector) = memory();
    let listener = FailingListener::new(listener, errors).map_io(move |io| {
        let next = plans
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        Faulty::new(io, next.unwrap_or_default())
    });
    let mut served = serve_with(Server::from_listener(listener), connector, stack);

    let neighbour = if before {
        served.connect().await.ok()
    } else {
        None
    };
    let client = served.connect().await.ok();
    let faulty = talk(&served, client, input, within).await;
    let next = match neighbour {
        Some(open) => Some(open),
        None => served.connect().await.ok(),
    };
    let next = talk(&served, next, input, within).await;

    let released = timeout(within, async {
        let handle = served.handle().clone();
        let mut pause = Duration::from_millis(1);
        while handle.live() > 0 || handle.limit().in_use() > 0 {
            sleep(pause).await;
            pause *= 2;
        }
        served.shutdown().await.is_ok()
    });
    let released = released.await.unwrap_or(false);
    Seen {
        faulty,
        next,
        released,
    }
}

/// Sends the input, half-closes, reads to the end, and waits for the connection's end.
async fn talk(
    served: &Served<Connector>,
    client: Option<DuplexStream>,
    input: &[u8],
    within: Duration,
) -> Talk {
    let mut talk = Talk::default();
    let Some(client) = client else {
        return talk;
    };
    let (mut reader, mut writer) = split(client);
    let got = &mut talk.got;
    let conversation = async {
        let send = async {
            // The server may have closed already; what it has replied tells.
            if writer.write_all(input).await.is_ok() {
                drop(writer.shutdown().await);
            }
        };
        let read = async { drop(reader.read_to_end(got).await) };
        tokio::join!(send, read);
        served.ended().await
    };
    let ended = timeout(within, conversation).await;
    talk.reason = ended.ok().and_then(Result::ok).map(|end| end.reason());
    talk
}
