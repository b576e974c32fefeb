//! Parsing of the addresses to listen on.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// An address, a name or a Unix path to listen on, or a socket that is already listening.
///
/// | written as | means |
/// | --- | --- |
/// | `127.0.0.1:7000`, `[::]:7000` | this address; `[::]` includes IPv4, unless [`only_v6`] is on |
/// | `localhost:7000` | every address to which the name resolves; if one of them cannot be bound, the bind fails |
/// | `unix:/run/app.sock` | a Unix socket at this path |
/// | `unix:@app` | a Unix socket with an abstract name (Linux, Android) |
/// | `fd:3` | the socket that was passed to this process as descriptor 3 |
/// | `systemd:web` | the sockets that systemd has passed under this name (`FileDescriptorName=`) |
/// | `systemd:*` | every passed socket that no earlier endpoint has taken |
///
/// With port 0 the operating system chooses the port; [`local_addrs`] returns it. If a name with
/// port 0 has several addresses, all of them get the same port.
///
/// The last three forms need the feature `handover`. They take sockets that systemd, or another
/// supervisor, has passed with the variables `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES`. A
/// passed socket belongs to the first endpoint that takes it. The server makes passed sockets
/// non-blocking, and sets `SO_OOBINLINE`, which keeps TCP's urgent data in the stream. The other
/// options of passed sockets stay as they are, and the server does not remove the paths of passed
/// Unix sockets. When the server drains, the clients in the backlog wait for the next process that
/// gets the sockets.
///
/// In a process that [replaces](crate::replace) another one, an endpoint takes the sockets that the
/// old process had for an endpoint with the same text, if there are any. This includes endpoints
/// with port 0.
///
/// `From` accepts every string, so a list of strings needs no error handling. For an invalid
/// string, [`Sockets::bind`] returns an error that contains the string. For command lines, use
/// [`FromStr`], which returns the error at once.
///
/// ```
/// use tower_tcp::bind::Endpoint;
///
/// assert_eq!(Endpoint::from("unix:/run/app.sock").to_string(), "unix:/run/app.sock");
/// assert!("localhost".parse::<Endpoint>().is_err()); // no port
/// ```
///
/// [`only_v6`]: super::SocketOptions::only_v6
/// [`local_addrs`]: super::Listener::local_addrs
/// [`Sockets::bind`]: super::Sockets::bind
#[derive(Debug)]
pub struct Endpoint {
    text: String,
    place: Target,
}

/// The parsed form of an [`Endpoint`].
#[derive(Debug)]
pub(super) enum Target {
    Address(SocketAddr),
    Name {
        host: String,
        port: u16,
    },
    Path(PathBuf),
    Abstract(String),
    Tcp(TcpListener),
    Unix(UnixListener),
    #[cfg_attr(not(feature = "handover"), expect(dead_code, reason = "only an error"))]
    Passed(Passed),
    Failed(io::Error),
    Invalid(InvalidEndpoint),
}

/// Selects the sockets of an endpoint from those that were passed to this process.
#[derive(Debug)]
#[cfg_attr(not(feature = "handover"), expect(dead_code, reason = "only an error"))]
pub(super) enum Passed {
    Descriptor(RawFd),
    Name(String),
    Rest,
}

impl Endpoint {
    /// Creates an endpoint for a Unix path, which need not be valid UTF-8.
    ///
    /// A relative path that begins with `@` becomes `./@...`, because `unix:@...` would mean an
    /// abstract name.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        let mut path = path.into();
        if path.as_os_str().as_encoded_bytes().starts_with(b"@") {
            path = Path::new(".").join(path);
        }
        Self {
            text: format!("unix:{}", path.display()),
            place: Target::Path(path),
        }
    }

    /// Creates an endpoint that fails to bind, for a listener of tokio that could not be converted.
    pub(super) fn failed(err: io::Error) -> Self {
        Self {
            text: "a listener of tokio".to_owned(),
            place: Target::Failed(err),
        }
    }

    /// Returns the name under which the endpoint's sockets are passed to another process. Returns
    /// `None` for an endpoint that was converted from a listener, because the listener's socket is
    /// passed under its local address.
    pub(super) fn name(&self) -> Option<Arc<str>> {
        match self.place {
            Target::Tcp(_) | Target::Unix(_) => None,
            _ => Some(self.text.as_str().into()),
        }
    }

    pub(super) fn into_place(self) -> Target {
        self.place
    }
}

/// The error for a string that is not a valid [`Endpoint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "neither `address:port`, `name:port`, `unix:/path`, `unix:@name`, `fd:3` nor `systemd:name`"
)]
pub struct InvalidEndpoint(());

fn parse(text: &str) -> Result<Target, InvalidEndpoint> {
    let invalid = InvalidEndpoint(());
    if let Some(path) = text.strip_prefix("unix:") {
        return match path.strip_prefix('@') {
            Some("") => Err(invalid),
            Some(name) => Ok(Target::Abstract(name.to_owned())),
            None if path.is_empty() => Err(invalid),
            None => Ok(Target::Path(path.into())),
        };
    }
    if let Some(fd) = text.strip_prefix("fd:") {
        let fd = fd.parse().map_err(|_| invalid)?;
        return Ok(Target::Passed(Passed::Descriptor(fd)));
    }
    if let Some(name) = text.strip_prefix("systemd:") {
        return match name {
            "" => Err(invalid),
            "*" => Ok(Target::Passed(Passed::Rest)),
            name => Ok(Target::Passed(Passed::Name(name.to_owned()))),
        };
    }
    if let Ok(addr) = text.parse() {
        return Ok(Target::Address(addr));
    }
    let (host, port) = text.rsplit_once(':').ok_or(invalid)?;
    let port = port.parse().map_err(|_| invalid)?;
    // A colon or bracket here means a malformed IPv6 address. The resolver's error for it would be
    // less clear.
    if host.is_empty() || host.contains([':', '[', ']', '/']) || host.contains(char::is_whitespace)
    {
        return Err(invalid);
    }
    Ok(Target::Name {
        host: host.to_owned(),
        port,
    })
}

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    fn from_str(text: &str) -> Result<Self, InvalidEndpoint> {
        Ok(Self {
            text: text.to_owned(),
            place: parse(text)?,
        })
    }
}

impl From<String> for Endpoint {
    fn from(text: String) -> Self {
        let place = parse(&text).unwrap_or_else(Target::Invalid);
        Self { text, place }
    }
}

impl From<&str> for Endpoint {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(addr: SocketAddr) -> Self {
        Self {
            text: addr.to_string(),
            place: Target::Address(addr),
        }
    }
}

impl From<(IpAddr, u16)> for Endpoint {
    fn from(addr: (IpAddr, u16)) -> Self {
        SocketAddr::from(addr).into()
    }
}

/// Uses a socket that is already listening, such as one inherited from a supervisor. The server
/// makes the socket non-blocking, and sets `SO_OOBINLINE`, which keeps urgent data in the stream.
/// The listening socket's other options stay as they are. A server that is
/// [suspended](crate::Handle::suspend) and resumed opens a new socket with the server's options.
impl From<TcpListener> for Endpoint {
    fn from(listener: TcpListener) -> Self {
        Self {
            text: "an inherited tcp socket".to_owned(),
            place: Target::Tcp(listener),
        }
    }
}

/// Uses a socket that is already listening, such as one inherited from a supervisor. The server
/// does not remove the socket's path when it closes the socket. Exception: a server that was
/// [suspended](crate::Handle::suspend) and resumed removes the path, because it has bound the path
/// again itself.
impl From<UnixListener> for Endpoint {
    fn from(listener: UnixListener) -> Self {
        Self {
            text: "an inherited unix socket".to_owned(),
            place: Target::Unix(listener),
        }
    }
}

/// Writes the endpoint in the form that [`FromStr`] parses. In a path, bytes that are not valid
/// UTF-8 are replaced. An endpoint that was converted from a listener has no such form, so a short
/// description is written instead.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
