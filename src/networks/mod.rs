//! Sets of IP networks, such as those of denied clients or of trusted proxies.
//!
//! [`Networks::contains`] returns whether an address is in one of the networks. A lookup takes well
//! under a microsecond, even if there are 100,000 networks.

mod ranges;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use thiserror::Error;

use crate::connection::Address;
use ranges::Ranges;

/// A set of networks, parsed from text.
///
/// | written as | means |
/// | --- | --- |
/// | `10.0.0.0/8`, `2001:db8::/32` | the addresses of this network |
/// | `192.0.2.7`, `2001:db8::7` | this address |
/// | `unix` | every Unix socket |
///
/// An IPv4-mapped IPv6 address counts as the IPv4 address, both in the set and in a lookup:
/// `::ffff:10.0.0.0/104` is the network `10.0.0.0/8`. So `0.0.0.0/0` contains all IPv4 clients,
/// including those that connect to an IPv6 socket, and `::/0` contains no IPv4 client. No set
/// contains the address of an in-memory connection.
///
/// A network whose address has bits set after its prefix, such as `10.0.0.1/8`, is an error,
/// because it is unclear whether the single address or the whole network is meant.
///
/// [`str::parse`] reads a text that lists any number of networks, such as the contents of a file.
/// They are separated by white space or commas, and `#` begins a comment:
///
/// ```
/// use tower_tcp::networks::Networks;
///
/// let file = "10.0.0.0/8, unix  # the balancers\n2001:db8::/32";
/// let networks: Networks = file.parse()?;
/// assert_eq!(networks, Networks::parse(["10.0.0.0/8", "2001:db8::/32", "unix"])?);
///
/// let peer = std::net::SocketAddr::from(([10, 1, 2, 3], 4711));
/// assert!(networks.contains(&peer.into()));
/// assert!("10.0.0.1/8".parse::<Networks>().is_err());
/// # Ok::<_, tower_tcp::networks::InvalidNetwork>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
#[doc(alias = "cidr")]
#[doc(alias = "subnet")]
#[doc(alias = "IpNet")]
pub struct Networks {
    /// Sorted, without duplicates.
    networks: Vec<IpNet>,
    unix: bool,
    v4: Ranges,
    v6: Ranges,
}

impl Networks {
    /// Creates an empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses a list of strings. Each string is one network.
    ///
    /// # Errors
    ///
    /// Returns an error that names the first string that is not a network.
    pub fn parse<T: AsRef<str>>(
        networks: impl IntoIterator<Item = T>,
    ) -> Result<Self, InvalidNetwork> {
        let mut unique = BTreeSet::new();
        let mut unix = false;
        for text in networks {
            match text.as_ref() {
                "unix" => unix = true,
                text => _ = unique.insert(network(text)?),
            }
        }
        // In this order, IPv4 comes first, and a network comes before the smaller ones in it.
        let networks: Vec<_> = unique.into_iter().collect();
        let (v4, v6) = networks.split_at(networks.partition_point(|it| matches!(it, IpNet::V4(_))));
        Ok(Self {
            unix,
            v4: Ranges::new(v4),
            v6: Ranges::new(v6),
            networks,
        })
    }

    /// Returns whether the address is in one of the networks.
    pub fn contains(&self, address: &Address) -> bool {
        self.longest(address).is_some()
    }

    /// Returns whether the IP address is in one of the networks.
    pub fn contains_ip(&self, ip: IpAddr) -> bool {
        self.longest_ip(ip).is_some()
    }

    /// Returns the longest prefix length of the networks that contain the address, if any does.
    /// `unix` counts as a network with a prefix length of zero.
    pub(crate) fn longest(&self, address: &Address) -> Option<u8> {
        match address {
            Address::Tcp(addr) => self.longest_ip(addr.ip()),
            Address::Unix(_) if self.unix => Some(0),
            _ => None,
        }
    }

    fn longest_ip(&self, ip: IpAddr) -> Option<u8> {
        match ip.to_canonical() {
            IpAddr::V4(v4) => self.v4.longest(v4.to_bits().into()),
            IpAddr::V6(v6) => self.v6.longest(v6.to_bits()),
        }
    }

    /// Returns the number of networks. `unix` counts as one.
    pub fn len(&self) -> usize {
        self.networks.len() + usize::from(self.unix)
    }

    /// Returns whether the set is empty. An empty set contains no address.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn texts(&self) -> impl Iterator<Item = String> {
        let unix = self.unix.then(|| "unix".to_owned());
        self.networks.iter().map(IpNet::to_string).chain(unix)
    }
}

/// Parses one network.
fn network(text: &str) -> Result<IpNet, InvalidNetwork> {
    let invalid = |problem| InvalidNetwork {
        text: text.to_owned(),
        problem,
    };
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(ip.to_canonical().into());
    }
    // The parser of `ipnet` also accepts leading zeros in an IPv4 address, which other programs
    // read as octal.
    let address = text.split('/').next().unwrap_or_default();
    if address.parse::<IpAddr>().is_err() {
        return Err(invalid(Problem::Syntax));
    }
    let prefix: IpNet = text.parse().map_err(|_| invalid(Problem::Syntax))?;
    if prefix != prefix.trunc() {
        return Err(invalid(Problem::HostBits(prefix.trunc())));
    }
    Ok(canonical(prefix))
}

/// Converts an IPv4-mapped network to the IPv4 network. Returns any other network unchanged.
fn canonical(prefix: IpNet) -> IpNet {
    /// The number of bits before the IPv4 address in an IPv4-mapped address.
    const MAPPED: u8 = 96;
    let v4 = || {
        let ip = prefix.addr().to_canonical();
        let IpAddr::V4(ip) = ip else { return None };
        let len = prefix.prefix_len().checked_sub(MAPPED)?;
        Ipv4Net::new(ip, len).ok()
    };
    match prefix {
        IpNet::V6(_) => v4().map_or(prefix, IpNet::V4),
        IpNet::V4(_) => prefix,
    }
}

impl FromStr for Networks {
    type Err = InvalidNetwork;

    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        let lines = text.lines();
        let entries = lines.flat_map(|line| {
            let entries = line.split('#').next().unwrap_or_default();
            entries.split(|c: char| c == ',' || c.is_whitespace())
        });
        Self::parse(entries.filter(|entry| !entry.is_empty()))
    }
}

impl fmt::Debug for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.texts()).finish()
    }
}

/// The error for a string that is not a network. Its message names the string.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{}` is not a network: {problem}", text.escape_debug())]
pub struct InvalidNetwork {
    text: String,
    problem: Problem,
}

#[derive(Clone, Debug, PartialEq, Eq, Error)]
enum Problem {
    #[error("neither `address/bits`, an IP address, nor `unix`")]
    Syntax,
    #[error("it has bits set after its prefix; the network is {0}")]
    HostBits(IpNet),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_in(networks: &str, ip: &str) -> bool {
        let networks: Networks = networks.parse().expect("networks");
        networks.contains_ip(ip.parse().expect("an address"))
    }

    #[test]
    fn a_network_contains_its_first_and_last_address_and_no_neighbour() {
        for (ip, inside) in [
            ("9.255.255.255", false),
            ("10.0.0.0", true),
            ("10.255.255.255", true),
            ("11.0.0.0", false),
        ] {
            assert_eq!(is_in("10.0.0.0/8", ip), inside, "{ip}");
        }
        for (ip, inside) in [
            ("2001:db7:ffff:ffff:ffff:ffff:ffff:ffff", false),
            ("2001:db8::", true),
            ("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", true),
            ("2001:db9::", false),
        ] {
            assert_eq!(is_in("2001:db8::/32", ip), inside, "{ip}");
        }
    }

    #[test]
    fn a_bare_address_is_the_network_of_itself() {
        assert!(is_in("192.0.2.7", "192.0.2.7"));
        assert!(!is_in("192.0.2.7", "192.0.2.6"));
        assert!(is_in("2001:db8::7", "2001:db8::7"));
        assert!(!is_in("2001:db8::7", "2001:db8::6"));
    }

    #[test]
    fn an_ipv4_mapped_address_is_the_ipv4_address_in_the_set_and_in_a_lookup() {
        for networks in ["10.0.0.0/8", "::ffff:10.0.0.0/104"] {
            assert!(is_in(networks, "10.1.2.3"), "{networks}");
            assert!(is_in(networks, "::ffff:10.1.2.3"), "{networks}");
            assert!(!is_in(networks, "11.1.2.3"), "{networks}");
        }
        assert!(is_in("::ffff:192.0.2.7", "192.0.2.7"));
        assert!(is_in("::ffff:0.0.0.0/96", "192.0.2.7"));
    }

    #[test]
    fn everything_of_one_family_is_nothing_of_the_other() {
        assert!(is_in("0.0.0.0/0", "::ffff:1.2.3.4"));
        assert!(!is_in("0.0.0.0/0", "2001:db8::1"));
        assert!(is_in("::/0", "2001:db8::1"));
        assert!(!is_in("::/0", "1.2.3.4"));
    }

    #[test]
    fn a_unix_socket_is_in_a_set_that_names_unix_only() {
        let unix = Address::Unix(None);
        assert!(Networks::parse(["unix"]).expect("unix").contains(&unix));
        let all = Networks::parse(["0.0.0.0/0", "::/0"]).expect("networks");
        assert!(!all.contains(&unix));
        assert!(!all.contains(&Address::Memory(1)));
    }

    #[test]
    fn a_text_that_is_no_network_is_an_error_that_names_it() {
        for text in [
            "",
            "10",
            "10.0.0",
            "10.0.0.0/",
            "10.0.0.0/33",
            "010.0.0.0/8",
            "::/129",
            "10.0.0.0/-1",
            "/8",
            "localhost",
            "unix:/run/a.sock",
            "10.0.0.1 ",
            "[::1]",
            "10.0.0.1:80",
            "*",
        ] {
            let err = Networks::parse([text]).expect_err(text).to_string();
            assert!(err.contains(&format!("`{text}`")), "{err}");
        }
        let err = Networks::parse(["10.0.0.1/8"]).expect_err("host bits");
        assert!(
            err.to_string().ends_with("the network is 10.0.0.0/8"),
            "{err}"
        );
    }

    #[test]
    fn the_text_of_a_file_has_comments_and_any_white_space() {
        let text = "# none, of these\n\t10.0.0.0/8,192.0.2.7\r\n\n unix # last\n::1";
        let networks: Networks = text.parse().expect("networks");
        let debug = r#"{"10.0.0.0/8", "192.0.2.7/32", "::1/128", "unix"}"#;
        assert_eq!(
            (networks.len(), format!("{networks:?}").as_str()),
            (4, debug)
        );
        assert!(
            "# nothing"
                .parse::<Networks>()
                .expect("networks")
                .is_empty()
        );
    }
}
