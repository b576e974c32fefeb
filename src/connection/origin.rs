use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;

use super::address::Address;
use super::facts::Facts;

/// The number of a connection. It is never used twice in a process.
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

/// The client's address, as a hook has set it.
struct ClientAddr(Address);

/// The facts known at accept, and the facts that hooks add.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) id: ConnectionId,
    pub(crate) peer_addr: Address,
    pub(crate) local_addr: Address,
    pub(crate) accepted_at: Instant,
    pub(crate) facts: Facts,
}

impl Origin {
    pub(super) fn new(peer_addr: Address, local_addr: Address) -> Self {
        Self {
            id: ConnectionId::next(),
            peer_addr,
            local_addr,
            accepted_at: Instant::now(),
            facts: Facts::default(),
        }
    }

    pub(super) fn set_client_addr(&self, client_addr: Address) {
        self.facts.insert(ClientAddr(client_addr));
    }

    /// Returns the client's address, if a hook has set it.
    pub(crate) fn vouched_client_addr(&self) -> Option<&Address> {
        self.facts.get().map(|ClientAddr(addr)| addr)
    }

    /// Returns the client's address if a hook has set it, or else the peer's.
    pub(crate) fn client_addr(&self) -> &Address {
        self.vouched_client_addr().unwrap_or(&self.peer_addr)
    }
}
