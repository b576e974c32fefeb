use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;

use super::Address;

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

/// What is known of a connection and its peer.
///
/// Hooks add to it what they learn ([`Connection::insert`](super::Connection::insert)), under the type of what they add: the
/// `tls` feature its `TlsInfo`, yours whatever you like.
#[derive(Clone)]
pub struct ConnectionInfo {
    origin: Arc<Origin>,
    facts: Vec<Arc<dyn Any + Send + Sync>>,
}

/// What is known at accept.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) id: ConnectionId,
    pub(crate) peer: Address,
    pub(crate) local: Address,
    pub(crate) accepted_at: Instant,
}

impl ConnectionInfo {
    pub(super) fn new(peer: Address, local: Address) -> Self {
        let origin = Origin {
            id: ConnectionId::next(),
            peer,
            local,
            accepted_at: Instant::now(),
        };
        Self {
            origin: Arc::new(origin),
            facts: Vec::new(),
        }
    }

    pub(super) fn origin(&self) -> &Arc<Origin> {
        &self.origin
    }

    pub(super) fn insert<F: Any + Send + Sync>(&mut self, fact: F) {
        self.facts.push(Arc::new(fact));
    }

    /// Returns the connection's number.
    pub fn id(&self) -> ConnectionId {
        self.origin.id
    }

    /// Returns the address of the socket's other end.
    pub fn peer(&self) -> &Address {
        &self.origin.peer
    }

    /// Returns the address the peer connected to.
    pub fn local(&self) -> &Address {
        &self.origin.local
    }

    /// Returns when the connection was accepted.
    pub fn accepted_at(&self) -> Instant {
        self.origin.accepted_at
    }

    /// Returns what a hook has learned, by its type.
    pub fn get<F: Any + Send + Sync>(&self) -> Option<&F> {
        self.facts.iter().rev().find_map(|fact| fact.downcast_ref())
    }
}

impl fmt::Debug for ConnectionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionInfo")
            .field("id", &self.id())
            .field("peer", self.peer())
            .field("local", self.local())
            .finish_non_exhaustive()
    }
}
