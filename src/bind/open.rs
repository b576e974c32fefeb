//! Opens the listening sockets of an endpoint.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::endpoint::{Endpoint, Target};
#[cfg(feature = "handover")]
use super::handover;
use super::listening::{Listening, Opened};
use super::options::SocketOptions;
use super::unix;

/// Opens all sockets of an endpoint, or none.
pub(super) async fn open(endpoint: Endpoint, options: &SocketOptions) -> io::Result<Vec<Opened>> {
    #[cfg(feature = "handover")]
    if let Some(name) = endpoint.name()
        && let Some(handed_on) = handover::take(&name, options)?
    {
        return Ok(handed_on);
    }
    match endpoint.into_place() {
        Target::Address(addr) => open_each(&[addr], options),
        Target::Name { host, port } => {
            let mut addrs: Vec<SocketAddr> = Vec::new();
            for addr in tokio::net::lookup_host((host, port)).await? {
                // A hosts file may list the same address twice.
                if !addrs.contains(&addr) {
                    addrs.push(addr);
                }
            }
            if addrs.is_empty() {
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    "the name has no address",
                ));
            }
            open_each(&addrs, options)
        }
        Target::Path(path) => Ok(vec![Place::Path(path).open(options)?]),
        Target::Abstract(name) => Ok(vec![Place::Abstract(name).open(options)?]),
        Target::Tcp(listener) => Ok(vec![Socket::from(listener).into()]),
        Target::Unix(listener) => Ok(vec![Socket::from(listener).into()]),
        #[cfg(feature = "handover")]
        Target::Passed(which) => Ok(handover::take_passed(&which)?),
        #[cfg(not(feature = "handover"))]
        Target::Passed(_) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "sockets that are handed over need the feature `handover` of tower-tcp",
        )),
        Target::Failed(err) => Err(err),
        Target::Invalid(err) => Err(io::Error::new(io::ErrorKind::InvalidInput, err)),
    }
}

/// The maximum number of ports to try for a name with port 0 and several addresses. The port that
/// the system chose for the first address may be in use on another address.
const CHOICES: usize = 16;

/// Opens a socket for each address of one name. If the system chooses the port, all these sockets
/// get the same port.
fn open_each(addrs: &[SocketAddr], options: &SocketOptions) -> io::Result<Vec<Opened>> {
    let mut choices = CHOICES;
    loop {
        let mut chosen = 0;
        let opened = addrs
            .iter()
            .map(|addr| {
                let mut addr = *addr;
                if addr.port() == 0 {
                    addr.set_port(chosen);
                }
                let opened = Place::Tcp(addr).open(options)?;
                if chosen == 0
                    && let Some(local) = opened.socket.local_addr()?.as_socket()
                {
                    chosen = local.port();
                }
                Ok(opened)
            })
            .collect::<io::Result<Vec<_>>>();
        choices -= 1;
        match opened {
            Err(err)
                if err.kind() == io::ErrorKind::AddrInUse
                    && choices > 0
                    && addrs.len() > 1
                    && addrs.iter().all(|addr| addr.port() == 0) => {}
            done => return done,
        }
    }
}

/// An address, a path or an abstract name at which a socket can listen. After a suspension has
/// closed the socket, a new one can listen there.
#[derive(Debug)]
pub(super) enum Place {
    Tcp(SocketAddr),
    Path(PathBuf),
    Abstract(String),
}

impl Place {
    /// Returns the address, path or abstract name at which a socket listens, with the port that the
    /// system chose. Returns `None` if a supervisor keeps the socket open, if the system does not
    /// return the socket's address, or if no [`Endpoint`] can express that address.
    pub(super) fn of(listening: &Listening) -> Option<Self> {
        let bound = listening.socket.local_addr().ok()?;
        match &listening.path {
            _ if listening.kept => None,
            // The absolute path may be too long for a socket, although the path that was bound is
            // not.
            Some(own) if SockAddr::unix(&own.path).is_ok() => Some(Self::Path(own.path.clone())),
            _ => bound
                .as_socket()
                .map(Self::Tcp)
                .or_else(|| Some(Self::Path(bound.as_pathname()?.to_owned())))
                .or_else(|| {
                    let name = bound.as_abstract_namespace()?.to_vec();
                    String::from_utf8(name).ok().map(Self::Abstract)
                }),
        }
    }

    pub(super) fn open(&self, options: &SocketOptions) -> io::Result<Opened> {
        match self {
            Self::Tcp(addr) => {
                let domain = Domain::for_address(*addr);
                let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
                options.prepare(&socket, domain)?;
                socket.bind(&(*addr).into())?;
                socket.listen(options.queue())?;
                Ok(Opened {
                    prepared: true,
                    ..socket.into()
                })
            }
            Self::Path(path) => {
                let (socket, own) = unix::listen(path, options)?;
                Ok(Opened {
                    path: Some(own),
                    ..socket.into()
                })
            }
            Self::Abstract(name) => Ok(unix::listen_abstract(name, options)?.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_several_addresses_gets_one_port_on_all() -> io::Result<()> {
        if std::net::TcpListener::bind("[::1]:0").is_err() {
            eprintln!("skipped: no IPv6 here");
            return Ok(());
        }
        let addrs = [
            ([127, 0, 0, 1], 0).into(),
            ([0, 0, 0, 0, 0, 0, 0, 1], 0).into(),
        ];

        let opened = open_each(&addrs, &SocketOptions::default())?;

        let ports: Vec<_> = opened
            .iter()
            .filter_map(|one| Some(one.socket.local_addr().ok()?.as_socket()?.port()))
            .collect();
        assert_eq!(ports.len(), 2);
        assert_ne!(ports[0], 0);
        assert_eq!(ports[0], ports[1]);
        Ok(())
    }
}
