use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

/// One end of a connection, or what a server listens on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// An IP address and port. IPv4 addresses that came in over IPv6 are shown as IPv4.
    Tcp(SocketAddr),
    /// A Unix socket's path, if it has one; that of a client mostly has none.
    Unix(Option<Arc<Path>>),
    /// An end of an in-memory connection, by number.
    Memory(u64),
}

impl Address {
    /// Returns the socket address, if it is one of TCP.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(addr) => Some(*addr),
            _ => None,
        }
    }

    /// Returns OpenTelemetry's `network.transport`: `tcp`, `unix`, or `pipe` for one in memory.
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
            // A peer chooses its own, and may have chosen it to break a line of the log.
            Self::Unix(Some(path)) => {
                write!(f, "unix:{}", path.to_string_lossy().escape_debug())
            }
            Self::Unix(None) => f.write_str("unix:"),
            Self::Memory(n) => write!(f, "memory:{n}"),
        }
    }
}
