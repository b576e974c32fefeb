//! Lists of allowed and denied networks.

use std::sync::{Arc, PoisonError, RwLock};

use super::{AddressFilter, Verdict};
use crate::connection::Address;
use crate::networks::Networks;

/// The rules of an [`AccessList`].
///
/// Of all networks that contain an address, the one with the longest prefix decides, as in a
/// routing table. A network that is both allowed and denied is denied. [`others`](Self::others)
/// sets the decision about addresses in none of the networks.
///
/// ```
/// use std::net::SocketAddr;
/// use tower_tcp::admit::{AccessRules, Verdict};
/// use tower_tcp::networks::Networks;
///
/// let rules = AccessRules::new()
///     .deny(Networks::parse(["10.0.0.0/8"])?)
///     .allow(Networks::parse(["10.1.0.0/16"])?);
/// let verdict = |ip: [u8; 4]| rules.verdict(&SocketAddr::from((ip, 4711)).into());
///
/// assert_eq!(verdict([10, 2, 0, 1]), Verdict::Deny);
/// assert_eq!(verdict([10, 1, 0, 1]), Verdict::Allow);
/// assert_eq!(verdict([192, 0, 2, 1]), Verdict::Allow);
/// # Ok::<_, tower_tcp::networks::InvalidNetwork>(())
/// ```
#[derive(Clone, Debug)]
pub struct AccessRules {
    allow: Networks,
    deny: Networks,
    others: Verdict,
}

impl Default for AccessRules {
    fn default() -> Self {
        Self::new()
    }
}

impl AccessRules {
    /// Creates rules that allow every address.
    pub fn new() -> Self {
        Self {
            allow: Networks::new(),
            deny: Networks::new(),
            others: Verdict::Allow,
        }
    }

    /// Sets the networks that are allowed. Default: none.
    #[must_use]
    pub fn allow(mut self, networks: Networks) -> Self {
        self.allow = networks;
        self
    }

    /// Sets the networks that are denied. Default: none.
    #[must_use]
    pub fn deny(mut self, networks: Networks) -> Self {
        self.deny = networks;
        self
    }

    /// Sets the decision about addresses in none of the networks. Default: [`Verdict::Allow`].
    #[must_use]
    pub fn others(mut self, verdict: Verdict) -> Self {
        self.others = verdict;
        self
    }

    /// Returns the decision about an address.
    pub fn verdict(&self, address: &Address) -> Verdict {
        match (self.allow.longest(address), self.deny.longest(address)) {
            (None, None) => self.others,
            (allowed, denied) if allowed > denied => Verdict::Allow,
            _ => Verdict::Deny,
        }
    }
}

/// A list of allowed and denied networks, which can be replaced while the server runs. Clones share
/// the list.
///
/// [`AddressFilter::from`] converts the list into a filter:
///
/// ```
/// use tower_tcp::Server;
/// use tower_tcp::admit::{AccessList, AccessRules};
/// use tower_tcp::networks::Networks;
///
/// let list = AccessList::default();
/// let server = Server::builder().address_filter(list.clone());
/// // Later, for example at a SIGHUP:
/// list.replace(AccessRules::new().deny(Networks::parse(["203.0.113.0/24"])?));
/// # drop(server);
/// # Ok::<_, tower_tcp::networks::InvalidNetwork>(())
/// ```
#[derive(Clone, Debug, Default)]
#[doc(alias = "allowlist")]
#[doc(alias = "denylist")]
#[doc(alias = "blocklist")]
pub struct AccessList(Arc<RwLock<AccessRules>>);

impl AccessList {
    /// Creates a list with these rules.
    pub fn new(rules: AccessRules) -> Self {
        Self(Arc::new(RwLock::new(rules)))
    }

    /// Replaces all rules in one step. Open connections are not affected.
    pub fn replace(&self, rules: AccessRules) {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let replaced = std::mem::replace(&mut *current, rules);
        drop(current);
        // The old rules are dropped after unlocking, because dropping a long list takes time.
        drop(replaced);
    }

    /// Returns the decision about an address.
    pub fn verdict(&self, address: &Address) -> Verdict {
        let rules = self.0.read().unwrap_or_else(PoisonError::into_inner);
        rules.verdict(address)
    }
}

impl From<AccessRules> for AccessList {
    fn from(rules: AccessRules) -> Self {
        Self::new(rules)
    }
}

impl From<AccessList> for AddressFilter {
    fn from(list: AccessList) -> Self {
        Self::new(move |address| list.verdict(address))
    }
}
