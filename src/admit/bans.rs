//! Addresses that are denied for a time.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::client::{V6_PREFIX, client_network};
use super::{AddressFilter, Verdict};
use crate::connection::Address;

/// The default maximum number of bans. This many bans take about 10 MB.
const MOST: usize = 65_536;

/// The longest ban. A longer one could overflow the clock.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A set of addresses that are denied, each for a time. Clones share the set.
///
/// A service bans its client by calling [`ban`](Self::ban) with the address that
/// [`ConnectionInfo::client_addr`] returns. A ban denies only new connections. To close the current
/// connection, send a [closing reply](crate::Reply::close). A ban of an IPv4 address applies to
/// this address alone. A ban of an IPv6 address applies to all addresses with the same first
/// [`v6_prefix`](Self::v6_prefix) bits. Only IP addresses can be banned. Clients of Unix sockets and
/// of in-memory connections have no IP address, unless a proxy's header contains one.
///
/// [`AddressFilter::from`] converts the set into a filter:
///
/// ```
/// use std::time::Duration;
/// use bytes::Bytes;
/// use tower::service_fn;
/// use tower_tcp::{BoxError, Peer, Pipeline, Reply, Server, admit::Bans, frame::Lines};
///
/// let bans = Bans::new();
/// let server = Server::builder().address_filter(bans.clone());
/// // A client that sends three wrong passwords is banned for 10 minutes.
/// let make = service_fn(move |peer: Peer<Bytes>| {
///     let (bans, mut failures) = (bans.clone(), 0);
///     let login = service_fn(move |password: Bytes| {
///         failures += u32::from(password != "secret");
///         let reply = if failures < 3 {
///             Reply::from(Bytes::from("again"))
///         } else {
///             bans.ban(peer.info().client_addr(), Duration::from_secs(600));
///             Reply::from(Bytes::from("denied")).close()
///         };
///         async { Ok::<_, BoxError>(reply) }
///     });
///     async { Ok::<_, BoxError>(login) }
/// });
/// # drop((server, Pipeline::new(Lines::default).make_service::<Bytes, _>(make)));
/// ```
///
/// This example counts failures for each connection, so a client that connects again has three more
/// attempts. Use [`PerClient::rate`](super::PerClient::rate) to limit how often a client can
/// connect.
///
/// Behind a proxy, `address_filter` sees the address of the proxy, so it cannot apply the bans of
/// clients. Instead, use `AddressFilter::from(bans)` as a pre-connect hook, after the hook that
/// reads the proxy's header.
///
/// [`ConnectionInfo::client_addr`]: crate::ConnectionInfo::client_addr
#[derive(Clone)]
#[doc(alias = "blocklist")]
#[doc(alias = "fail2ban")]
pub struct Bans {
    banned: Arc<Mutex<Banned>>,
    v6_prefix: u8,
    most: usize,
}

#[derive(Default)]
struct Banned {
    until: HashMap<IpAddr, Instant>,
    /// The bans in `until`, ordered by the time at which they end.
    ends: BTreeSet<(Instant, IpAddr)>,
}

impl Banned {
    fn remove_ended(&mut self, now: Instant) {
        while self.ends.first().is_some_and(|(until, _)| *until <= now) {
            self.remove_first();
        }
    }

    fn remove_first(&mut self) {
        if let Some((_, network)) = self.ends.pop_first() {
            self.until.remove(&network);
        }
    }

    fn remove(&mut self, network: IpAddr) {
        if let Some(until) = self.until.remove(&network) {
            self.ends.remove(&(until, network));
        }
    }
}

impl Default for Bans {
    fn default() -> Self {
        Self::new()
    }
}

impl Bans {
    /// Creates an empty set of bans.
    pub fn new() -> Self {
        Self {
            banned: Arc::default(),
            v6_prefix: V6_PREFIX,
            most: MOST,
        }
    }

    /// Sets the prefix length of a ban of an IPv6 address: the ban applies to all addresses with
    /// the same first `bits` bits.
    ///
    /// Clones share their bans, but not this setting. Set it before cloning, because a clone with
    /// another prefix can miss the IPv6 bans of this clone, or apply them to other addresses.
    ///
    /// Default: 64. Why: a host usually has a network of this size, and can use any address in it.
    #[must_use]
    pub fn v6_prefix(mut self, bits: u8) -> Self {
        self.v6_prefix = bits;
        self
    }

    /// Sets the maximum number of bans. `0` counts as 1.
    ///
    /// Clones share their bans, but not this setting. When a clone bans an address, it applies its
    /// own maximum to the bans of all clones, so set the maximum before cloning.
    ///
    /// Default: 65,536. Why: to bound memory to about 10 MB. When reached: each new ban replaces
    /// the one that would end first.
    #[must_use]
    pub fn capacity(mut self, bans: usize) -> Self {
        self.most = bans.max(1);
        self
    }

    /// Bans an address for `time`, but for at most 10 years. If the address is already banned, the
    /// ban that ends later applies. Does nothing if the address is not an IP address.
    pub fn ban(&self, address: &Address, time: Duration) {
        let Some(network) = client_network(address, self.v6_prefix) else {
            return;
        };
        let now = Instant::now();
        let until = now + time.min(LONGEST);
        let mut banned = self.lock();
        banned.remove_ended(now);
        if banned
            .until
            .get(&network)
            .is_some_and(|known| *known >= until)
        {
            return;
        }
        banned.remove(network);
        while banned.until.len() >= self.most {
            banned.remove_first();
        }
        banned.until.insert(network, until);
        banned.ends.insert((until, network));
    }

    /// Ends the ban of an address, if there is one.
    pub fn lift(&self, address: &Address) {
        if let Some(network) = client_network(address, self.v6_prefix) {
            self.lock().remove(network);
        }
    }

    /// Returns whether the address is banned now.
    pub fn is_banned(&self, address: &Address) -> bool {
        let Some(network) = client_network(address, self.v6_prefix) else {
            return false;
        };
        let until = self.lock().until.get(&network).copied();
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Returns the banned addresses, each with its remaining time, ordered by the time at which the
    /// bans end. For IPv6, the address is that of the banned network.
    pub fn list(&self) -> Vec<(IpAddr, Duration)> {
        let now = Instant::now();
        let mut banned = self.lock();
        banned.remove_ended(now);
        let ends = banned.ends.iter();
        ends.map(|(until, network)| (*network, *until - now))
            .collect()
    }

    /// Returns the number of bans that have not ended.
    pub fn len(&self) -> usize {
        let mut banned = self.lock();
        banned.remove_ended(Instant::now());
        banned.until.len()
    }

    /// Returns whether no address is banned now.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Banned> {
        self.banned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Bans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bans")
            .field("len", &self.len())
            .field("capacity", &self.most)
            .finish_non_exhaustive()
    }
}

impl From<Bans> for AddressFilter {
    fn from(bans: Bans) -> Self {
        Self::new(move |address| {
            if bans.is_banned(address) {
                Verdict::Deny
            } else {
                Verdict::Allow
            }
        })
    }
}
