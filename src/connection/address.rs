use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

/// The address of one end of a connection, or of a listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// An IP address and port. `From<SocketAddr>` converts an IPv4-mapped IPv6 address to IPv4,
    /// and drops the flow label and the scope of an IPv6 address.
    Tcp(SocketAddr),
    /// The path of a Unix socket, or `@` and its abstract name. `None` if the socket has neither,
    /// as is usual for a client's socket.
    Unix(Option<Arc<Path>>),
    /// The number of one end of an in-memory connection.
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
        Self::Tcp(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
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
