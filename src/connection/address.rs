use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

/// The address of one end of a connection, or of a listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// An IP address and port. `From<SocketAddr>` converts an IPv4-mapped IPv6 address to IPv4. It
    /// drops the flow label of an IPv6 address, and keeps the scope, without which nobody can
    /// connect to a link-local address.
    Tcp(SocketAddr),
    /// The path of a Unix socket, or `@` and its abstract name. `None` if the socket has neither,
    /// as is usual for a client's socket.
    Unix(Option<Arc<Path>>),
    /// A number that stands for one end of an in-memory connection. In `testkit`, the server's end
    /// has the number 0, and the clients' ends are numbered from 1.
    Memory(u64),
}

impl Address {
    /// Returns the socket address, if this is a TCP address.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(addr) => Some(*addr),
            _ => None,
        }
    }

    /// Returns the value of OpenTelemetry's `network.transport`: `tcp`, `unix`, or `pipe` for
    /// in-memory connections.
    pub fn transport(&self) -> &'static str {
        match self {
            Self::Tcp(_) => "tcp",
            Self::Unix(_) => "unix",
            Self::Memory(_) => "pipe",
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp(match (addr, addr.ip().to_canonical()) {
            (SocketAddr::V6(mut addr), IpAddr::V6(_)) => {
                addr.set_flowinfo(0);
                addr.into()
            }
            (_, ip) => SocketAddr::new(ip, addr.port()),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            // A peer chooses its socket's path, and could forge a log line with a line break in
            // the path.
            Self::Unix(Some(path)) => {
                write!(f, "unix:{}", path.to_string_lossy().escape_debug())
            }
            Self::Unix(None) => f.write_str("unix:"),
            Self::Memory(n) => write!(f, "memory:{n}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6};

    use super::*;

    #[test]
    fn a_link_local_address_keeps_its_scope_and_a_mapped_one_becomes_ipv4() {
        let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
        let with_label = SocketAddrV6::new(link_local, 7000, 5, 2);
        let address = Address::from(SocketAddr::from(with_label));
        assert_eq!(address.to_string(), "[fe80::1%2]:7000");
        let without_label = SocketAddrV6::new(link_local, 7000, 0, 2);
        assert_eq!(address.tcp(), Some(without_label.into()));

        let mapped = Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped();
        let address = Address::from(SocketAddr::from(SocketAddrV6::new(mapped, 7000, 0, 0)));
        assert_eq!(address.to_string(), "192.0.2.7:7000");
    }
}
