//! The rooms: the members on this node, and the lines from all nodes.

use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, ConnectOptions, Event};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, future, stream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tower_tcp::registry::{Groups, JoinError, Registry, SlowPeer};
use tower_tcp::{BoxError, ConnectionId, Peer};

/// A member that is too slow misses lines, and delays nobody. A member that takes nothing for this
/// time is closed.
const SLOW: SlowPeer = SlowPeer::CloseAfter(Duration::from_secs(5));
/// The interval of pings to NATS while it sends nothing else. The connection counts as lost when
/// the third ping is due and the first two are not answered.
const PING: Duration = Duration::from_secs(1);
/// The maximum wait for NATS while a member waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// The maximum number of lines that wait for NATS to take them.
const UNSENT: usize = 128;
/// The maximum number of lines of a room that wait for this node to take them.
const UNREAD: usize = 4096;

pub(crate) struct Rooms {
    /// The members on this node, by room. The node is subscribed to a room as long as it has a
    /// member there.
    members: Groups<String, Bytes>,
    /// All connections to this node.
    everybody: Registry<ConnectionId, Bytes>,
    nats: Option<Client>,
}

impl Rooms {
    /// Opens rooms that span all nodes that use the NATS server at `url`. Without a URL, the rooms
    /// are only on this node.
    pub(crate) async fn open(url: Option<String>) -> Result<Self, BoxError> {
        let everybody = Registry::new();
        let Some(url) = url else {
            let members = Groups::new();
            return Ok(Self {
                members,
                everybody,
                nats: None,
            });
        };
        let (news, latest) = watch::channel("");
        tokio::spawn(tell(everybody.clone(), latest));
        let nats = ConnectOptions::new()
            .ping_interval(PING)
            .connection_timeout(PATIENCE)
            .client_capacity(UNSENT)
            .subscription_capacity(UNREAD)
            .reconnect_delay_callback(|_attempt| PING / 2)
            .retry_on_initial_connect()
            .event_callback(move |event| {
                if let Some(line) = headline(&event) {
                    news.send_replace(line);
                }
                future::ready(())
            })
            .connect(url)
            .await?;
        let members = {
            let nats = nats.clone();
            Groups::fed_by(
                move |room: String| subscribe(nats.clone(), subject(&room)),
                SLOW,
            )
        };
        Ok(Self {
            members,
            everybody,
            nats: Some(nats),
        })
    }

    pub(crate) fn enter(&self, peer: &Peer<Bytes>) {
        let entered = self.everybody.insert(peer.info().id(), peer);
        entered.expect("the number of a connection is its own");
    }

    /// Adds a member to a room. After that, the member is sent every line of the room that NATS
    /// delivers to this node.
    pub(crate) async fn join(&self, room: &str, peer: &Peer<Bytes>) -> Result<(), JoinError> {
        self.members.join(room.to_owned(), peer).await
    }

    pub(crate) fn leave(&self, room: &str, peer: &Peer<Bytes>) {
        self.members.leave(room, peer);
    }

    /// Sends a line to all members of a room, including its sender. An error is a notice for the
    /// sender, so that no line is lost silently.
    pub(crate) async fn say(&self, room: &str, line: String) -> Result<(), &'static str> {
        let Some(nats) = &self.nats else {
            let said = self.members.broadcast(room, line.into(), |_| true, SLOW);
            let _counts = said.await;
            return Ok(());
        };
        if nats.connection_state() != State::Connected {
            return Err("* not said: the other nodes are out of reach");
        }
        let connects = || nats.statistics().connects.load(Ordering::Relaxed);
        let connected = connects();
        let said = async {
            nats.publish(subject(room), line.into()).await?;
            taken(nats).await
        };
        match timeout(PATIENCE, said).await {
            // If the connection was replaced meanwhile, the line may have been lost with the old
            // one.
            Ok(Ok(())) if connects() == connected => Ok(()),
            _ => Err("* not said, or late: NATS has not taken it in time"),
        }
    }

    /// Sends a line to all connections of this node, whichever room they are in.
    pub(crate) async fn announce(&self, line: &'static str) {
        self.everybody
            .broadcast(line.into(), |_, _| true, SLOW)
            .await;
    }
}

/// Waits until NATS has passed on everything that was published before, to all nodes that it can
/// reach. NATS does not confirm this. But it handles everything in order, so when a message of this
/// node comes back, NATS has passed on all earlier ones.
async fn taken(nats: &Client) -> Result<(), BoxError> {
    let _unsubscribed = subscribe(nats.clone(), nats.new_inbox()).await?;
    Ok(())
}

/// Returns the lines of a room, from all nodes. Dropping the stream unsubscribes.
async fn subscribe(nats: Client, subject: String) -> Result<impl Stream<Item = Bytes>, BoxError> {
    let opened = async {
        let mut lines = nats.subscribe(subject.clone()).await?;
        // The subscription is active once this empty line, or any other line, arrives.
        nats.publish(subject, Bytes::new()).await?;
        let first = lines.next().await;
        Ok::<_, BoxError>(stream::iter(first).chain(lines))
    };
    let lines = timeout(PATIENCE, opened).await??.map(|line| line.payload);
    Ok(lines.filter(|line| future::ready(!line.is_empty())))
}

fn subject(room: &str) -> String {
    format!("room.{room}")
}

/// Returns the notice to all members about an event of the NATS client, or `None` if the event
/// needs none.
fn headline(event: &Event) -> Option<&'static str> {
    Some(match event {
        Event::Disconnected => "* the other nodes are out of reach: nothing can be said",
        Event::Connected => "* the other nodes are in reach: you may have missed lines",
        Event::SlowConsumer(_) => "* this node is too slow: you have missed lines",
        _ => return None,
    })
}

/// Sends the latest notice to all connections of this node, at most once a second.
async fn tell(everybody: Registry<ConnectionId, Bytes>, mut latest: watch::Receiver<&'static str>) {
    while latest.changed().await.is_ok() {
        let line = *latest.borrow_and_update();
        everybody.broadcast(line.into(), |_, _| true, SLOW).await;
        sleep(Duration::from_secs(1)).await;
    }
}
