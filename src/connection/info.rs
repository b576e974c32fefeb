use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;

use super::{Address, Life};
use crate::signals::Signal;

/// The number of a connection, never used twice in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(u64);

impl ConnectionId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns the number.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is known of a connection and its peer. Cheap to clone.
///
/// Hooks add to it what they learn ([`Connection::insert`](super::Connection::insert)), under the type of what they add: the
/// `tls` feature its `TlsInfo`, yours whatever you like.
#[derive(Clone)]
pub struct ConnectionInfo {
    pub(crate) life: Arc<Life>,
    facts: Option<Arc<Fact>>,
}

/// What a hook has learned, and what was known before. A clone of the info that was made before it goes on without it.
struct Fact {
    fact: Box<dyn Any + Send + Sync>,
    before: Option<Arc<Self>>,
}

/// What is known at accept.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) id: ConnectionId,
    pub(crate) peer_addr: Address,
    pub(crate) local_addr: Address,
    pub(crate) accepted_at: Instant,
}

impl ConnectionInfo {
    pub(super) fn new(peer_addr: Address, local_addr: Address) -> Self {
        let origin = Origin {
            id: ConnectionId::next(),
            peer_addr,
            local_addr,
            accepted_at: Instant::now(),
        };
        Self {
            life: Arc::new(Life::new(origin)),
            facts: None,
        }
    }

    pub(super) fn insert<F: Any + Send + Sync>(&mut self, fact: F) {
        self.facts = Some(Arc::new(Fact {
            fact: Box::new(fact),
            before: self.facts.take(),
        }));
    }

    /// Returns the connection's number.
    pub fn id(&self) -> ConnectionId {
        self.life.origin.id
    }

    /// Returns the address of the socket's other end.
    pub fn peer_addr(&self) -> &Address {
        &self.life.origin.peer_addr
    }

    /// Returns the address the peer connected to.
    pub fn local_addr(&self) -> &Address {
        &self.life.origin.local_addr
    }

    /// Returns when the connection was accepted.
    pub fn accepted_at(&self) -> Instant {
        self.life.origin.accepted_at
    }

    /// Returns whether the connection was told to leave: the server drains, or [`LiveConnection::close`](crate::LiveConnection::close) was called.
    pub fn is_draining(&self) -> bool {
        self.life.signals.is_raised(Signal::Drain)
    }

    /// Waits until the connection is told to leave. What serves something without an end of its own (a WebSocket, server-sent events) ends
    /// it then. The future holds nothing of the stream.
    ///
    /// # Cancel safety
    ///
    /// The signal stays raised: dropping this and asking again loses nothing.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + use<> {
        let life = Arc::clone(&self.life);
        async move { life.signals.raised(Signal::Drain).await }
    }

    /// Returns what a hook has learned, by its type.
    pub fn get<F: Any + Send + Sync>(&self) -> Option<&F> {
        std::iter::successors(self.facts.as_deref(), |fact| fact.before.as_deref())
            .find_map(|fact| fact.fact.downcast_ref())
    }
}

impl fmt::Debug for ConnectionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionInfo")
            .field("id", &self.id())
            .field("peer", self.peer_addr())
            .field("local", self.local_addr())
            .finish_non_exhaustive()
    }
}
