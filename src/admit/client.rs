//! A bounded map of the clients to which a limit applies. A client is one IPv4 address or one IPv6
//! network.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::ops::Deref;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::connection::Address;

/// The default number of leading bits of an IPv6 address that identify a client. A host usually has
/// a network of this size, and can use any address in it.
pub(super) const V6_PREFIX: u8 = 64;

/// The default maximum number of clients that are remembered while they have no open connection.
pub(super) const REMEMBERED: usize = 65_536;

/// The longest period of a rate. governor counts nanoseconds in a `u64`, and panics if they
/// overflow.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);

/// The number of clients below which the map is not searched for clients to forget. If
/// `remembered` is smaller than `FEW`, `remembered` is used instead.
const FEW: usize = 1024;

/// Returns the key of a client in the map: its IPv4 address, or the first `v6_prefix` bits of its
/// IPv6 address. Returns `None` if the address is not an IP address.
pub(super) fn client_network(address: &Address, v6_prefix: u8) -> Option<IpAddr> {
    match address.tcp()?.ip().to_canonical() {
        v4 @ IpAddr::V4(_) => Some(v4),
        IpAddr::V6(ip) => {
            let hosts = u128::MAX.checked_shr(v6_prefix.into()).unwrap_or(0);
            Some(Ipv6Addr::from_bits(ip.to_bits() & !hosts).into())
        }
    }
}

/// The clients to which one limit applies, and the settings of the limit.
#[derive(Clone)]
pub(super) struct Clients {
    pub(super) v6_prefix: u8,
    /// The maximum number of open connections of one client.
    pub(super) connections: usize,
    pub(super) quota: Option<Quota>,
    pub(super) remembered: usize,
    map: Arc<Mutex<Map>>,
}

#[derive(Default)]
struct Map {
    clients: HashMap<IpAddr, Known>,
    /// The number of clients at which the map is next searched for clients to forget.
    sweep_at: usize,
}

struct Known {
    client: Arc<Client>,
    /// The number of [`Held`] values for the client. While there are any, the client is not
    /// forgotten.
    holders: usize,
}

impl Known {
    /// Returns whether the client's state is that of a new client, so that the client can be
    /// forgotten. If this returns `true`, the caller must forget the client, because the check has
    /// used up the burst of the client's rate.
    fn is_fresh(&self) -> bool {
        self.holders == 0 && self.client.rate.as_ref().is_none_or(Rate::is_fresh)
    }
}

/// The state of one client: its slots, its waiting connections and its rate.
pub(super) struct Client {
    pub(super) slots: Semaphore,
    /// The number of connections that wait for a slot or for the rate.
    pub(super) waiting: AtomicUsize,
    /// Locked by the first waiting connection, so that connections are admitted in order of
    /// arrival.
    pub(super) turn: tokio::sync::Mutex<()>,
    pub(super) rate: Option<Rate>,
}

impl Client {
    /// Counts one connection or request against the rate. If the rate is exceeded, fails with the
    /// earliest time at which to try again.
    pub(super) fn take_rate(&self) -> Result<(), Instant> {
        self.rate.as_ref().map_or(Ok(()), Rate::take)
    }
}

impl Clients {
    pub(super) fn new(connections: usize, quota: Option<Quota>) -> Self {
        Self {
            v6_prefix: V6_PREFIX,
            connections,
            quota,
            remembered: REMEMBERED,
            map: Arc::default(),
        }
    }

    /// Returns the client that has the address. Returns `None` for an address that identifies no
    /// client, such as that of a Unix socket.
    pub(super) fn of(&self, address: &Address) -> Option<Held> {
        let network = client_network(address, self.v6_prefix)?;
        let mut map = lock(&self.map);
        if !map.clients.contains_key(&network) {
            map.make_room(self.remembered);
        }
        let entry = map.clients.entry(network).or_insert_with(|| Known {
            client: Arc::new(self.new_client()),
            holders: 0,
        });
        entry.holders += 1;
        let client = Arc::clone(&entry.client);
        drop(map);
        Some(Held {
            client,
            network,
            map: Arc::clone(&self.map),
        })
    }

    fn new_client(&self) -> Client {
        Client {
            slots: Semaphore::new(self.connections.min(Semaphore::MAX_PERMITS)),
            waiting: AtomicUsize::new(0),
            turn: tokio::sync::Mutex::default(),
            rate: self.quota.map(Rate::new),
        }
    }

    /// Returns the number of open connections of the client that has the address.
    pub(super) fn open(&self, address: &Address) -> usize {
        let network = client_network(address, self.v6_prefix);
        let map = lock(&self.map);
        let client = network.and_then(|network| map.clients.get(&network));
        let most = self.connections.min(Semaphore::MAX_PERMITS);
        client.map_or(0, |entry| most - entry.client.slots.available_permits())
    }

    /// Returns the number of clients in the map.
    pub(super) fn len(&self) -> usize {
        lock(&self.map).clients.len()
    }
}

fn lock(map: &Mutex<Map>) -> MutexGuard<'_, Map> {
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Map {
    /// Makes room for another client: if the map has grown enough since the last search, searches
    /// it for clients to forget.
    ///
    /// After a search, at most `remembered` clients without a holder are left, and at least
    /// `remembered / 8` clients are added before the next search. So in a flood, a search costs
    /// only a few steps for each new client.
    fn make_room(&mut self, remembered: usize) {
        if self.clients.len() < self.sweep_at.max(FEW.min(remembered)) {
            return;
        }
        self.clients.retain(|_, entry| !entry.is_fresh());
        // The remaining clients are in use or have used some of their rate. Of those that are not
        // in use, as many as necessary are forgotten, in no particular order. The only effect is
        // that a forgotten client gets back the rate that it had used.
        let entries = self.clients.values();
        let idle = entries.filter(|entry| entry.holders == 0).count();
        let most = (remembered - remembered / 8).saturating_sub(1);
        let mut over = idle.saturating_sub(most);
        self.clients.retain(|_, entry| {
            let kept = over == 0 || entry.holders > 0;
            over -= usize::from(!kept);
            kept
        });
        // The clients in use take no room from the others.
        let idle = idle.min(most);
        let in_use = self.clients.len() - idle;
        let others = (2 * idle).min(remembered).max(idle + remembered / 8);
        self.sweep_at = in_use + others.max(1);
    }
}

/// A client in use. It is not forgotten while this value exists.
pub(super) struct Held {
    client: Arc<Client>,
    network: IpAddr,
    map: Arc<Mutex<Map>>,
}

impl Deref for Held {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut map = lock(&self.map);
        if let Entry::Occupied(mut known) = map.clients.entry(self.network) {
            known.get_mut().holders -= 1;
            if known.get().is_fresh() {
                known.remove();
            }
        }
    }
}

/// Returns a quota that allows a burst of `n` connections or requests, and then as many in each
/// `period`, evenly spread.
pub(super) fn quota(n: u32, period: Duration) -> Quota {
    let n = NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
    let each = (period.min(LONGEST) / n.get()).max(Duration::from_nanos(1));
    // `with_period` returns `None` only for a duration of zero.
    let quota = Quota::with_period(each).unwrap_or(Quota::per_second(n));
    quota.allow_burst(n)
}

/// The rate limiter of one client.
pub(super) struct Rate {
    limiter: RateLimiter<NotKeyed, InMemoryState, Time, NoOpMiddleware<Duration>>,
    burst: NonZeroU32,
}

impl Rate {
    fn new(quota: Quota) -> Self {
        Self {
            limiter: RateLimiter::direct_with_clock(quota, Time(Instant::now())),
            burst: quota.burst_size(),
        }
    }

    /// Counts one connection or request against the rate. If the rate is exceeded, fails with the
    /// earliest time at which to try again.
    pub(super) fn take(&self) -> Result<(), Instant> {
        self.limiter.check().map_err(|not_until| {
            let Time(begun) = self.limiter.clock();
            *begun + not_until.earliest_possible()
        })
    }

    /// Returns whether the whole burst is available, as in a new limiter. If this returns `true`,
    /// the limiter must not be used again, because the check has used up the burst.
    fn is_fresh(&self) -> bool {
        matches!(self.limiter.check_n(self.burst), Ok(Ok(())))
    }
}

/// A clock that counts from the creation of the rate limiter. It is based on tokio's clock, so that
/// tests can pause it.
struct Time(Instant);

impl Clock for Time {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn a_client_is_counted_by_its_ipv4_address_and_the_prefix_of_its_ipv6_address() {
        let client = |ip: &str, bits| {
            let ip: IpAddr = ip.parse().expect("an address");
            // `From` is not used, because it would convert an IPv4-mapped address to IPv4.
            let network = client_network(&Address::Tcp((ip, 1).into()), bits);
            network.expect("TCP").to_string()
        };
        assert_eq!(client("192.0.2.7", 0), "192.0.2.7");
        assert_eq!(client("::ffff:192.0.2.7", 64), "192.0.2.7");
        assert_eq!(client("2001:db8:1:2:3:4:5:6", 64), "2001:db8:1:2::");
        assert_eq!(client("2001:db8:1:2:3:4:5:6", 0), "::");
        assert_eq!(client("2001:db8:1:2:3:4:5:6", 127), "2001:db8:1:2:3:4:5:6");
        assert_eq!(client("2001:db8:1:2:3:4:5:7", 127), "2001:db8:1:2:3:4:5:6");
        assert_eq!(client("2001:db8:1:2:3:4:5:7", 128), "2001:db8:1:2:3:4:5:7");
        assert_eq!(client_network(&Address::Unix(None), 64), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_fresh_again_when_everything_taken_has_come_back() {
        let rate = || Rate::new(quota(4, Duration::from_secs(1)));
        assert!(rate().is_fresh());
        let used = rate();
        assert_eq!((0..5).filter(|_| used.take().is_ok()).count(), 4);
        let next = used.take().expect_err("used up");
        assert_eq!(next - Instant::now(), Duration::from_millis(250));

        tokio::time::advance(Duration::from_millis(999)).await;
        assert!(!used.is_fresh());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(used.is_fresh());
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_addresses_leaves_no_more_than_the_bound() {
        let mut clients = Clients::new(1, Some(quota(1, Duration::from_secs(3600))));
        clients.remembered = 4_000;
        let address = |n: u32| {
            let ip = IpAddr::V4(n.wrapping_mul(2_654_435_761).into());
            Address::from(std::net::SocketAddr::new(ip, 1))
        };
        let held: Vec<_> = (0..100).map(|n| clients.of(&address(n))).collect();

        for n in 100..50_000 {
            let client = clients.of(&address(n)).expect("it has an address");
            let rate = client.rate.as_ref().expect("it has a rate");
            rate.take().expect("it is new");
            drop(client);
            assert!(clients.len() <= 100 + 4_000, "after {n}");
        }

        assert!(clients.len() > 100 + 3_000, "{}", clients.len());
        for client in held.into_iter().flatten() {
            assert!(lock(&clients.map).clients.contains_key(&client.network));
        }
        // After an hour all rates are full again, so the next search forgets all clients.
        tokio::time::advance(Duration::from_secs(3600)).await;
        lock(&clients.map).sweep_at = 0;
        drop(clients.of(&address(0)));
        assert_eq!(clients.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn clients_in_use_leave_the_room_for_the_remembered_ones() {
        let mut clients = Clients::new(1, Some(quota(1, Duration::from_secs(3600))));
        clients.remembered = 80;
        let address = |n: u32| {
            let ip = IpAddr::V4(n.into());
            Address::from(std::net::SocketAddr::new(ip, 1))
        };
        let client = |n| clients.of(&address(n)).expect("it has an address");
        let _in_use: Vec<_> = (0..500).map(client).collect();

        for n in 500..550 {
            client(n).take_rate().expect("it is new");
        }

        for n in 500..550 {
            assert!(client(n).take_rate().is_err(), "{n} is forgotten");
        }
    }

    #[test]
    fn any_numbers_make_a_quota() {
        for n in [0, 1, u32::MAX] {
            for period in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
                assert_eq!(quota(n, period).burst_size().get(), n.max(1));
                assert!(Rate::new(quota(n, period)).take().is_ok());
            }
        }
    }
}
