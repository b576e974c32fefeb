//! Opens the listening sockets of an endpoint.

use std::io;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use super::endpoint::{Endpoint, Target};
use super::options::SocketOptions;
use super::unix::{self, OwnPath};

/// A listening socket, and its path to remove at the end.
#[derive(Debug)]
pub(super) struct Listening {
    // Before the socket, as `OwnPath` requires: fields are dropped in this order.
    pub(super) path: Option<OwnPath>,
    pub(super) socket: Socket,
    /// The socket has the options that accepted sockets inherit.
    pub(super) prepared: bool,
}

impl From<Socket> for Listening {
    fn from(socket: Socket) -> Self {
        Self {
            path: None,
            socket,
            prepared: false,
        }
    }
}

/// Opens all sockets of an endpoint, or none.
pub(super) async fn open(
    endpoint: Endpoint,
    options: &SocketOptions,
) -> io::Result<Vec<Listening>> {
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
        Target::Path(path) => {
            let (socket, own) = unix::listen(&path, options)?;
            Ok(vec![Listening {
                path: Some(own),
                socket,
                prepared: false,
            }])
        }
        Target::Abstract(name) => Ok(vec![unix::listen_abstract(&name, options)?.into()]),
        Target::Tcp(listener) => Ok(vec![Socket::from(listener).into()]),
        Target::Unix(listener) => Ok(vec![Socket::from(listener).into()]),
        Target::Failed(err) => Err(err),
        Target::Invalid(err) => Err(io::Error::new(io::ErrorKind::InvalidInput, err)),
    }
}

/// The number of ports to try. The port that the system chose for one address may be in use on the
/// next.
const CHOICES: usize = 16;

/// Opens all addresses of one name. If the system chooses the port, all of them get the same one.
fn open_each(addrs: &[SocketAddr], options: &SocketOptions) -> io::Result<Vec<Listening>> {
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
                let socket = open_tcp(addr, options)?;
                if chosen == 0
                    && let Some(local) = socket.local_addr()?.as_socket()
                {
                    chosen = local.port();
                }
                Ok(Listening {
                    path: None,
                    socket,
                    prepared: true,
                })
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

fn open_tcp(addr: SocketAddr, options: &SocketOptions) -> io::Result<Socket> {
    let domain = Domain::for_address(addr);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    options.prepare(&socket, domain)?;
    socket.bind(&addr.into())?;
    socket.listen(options.queue())?;
    Ok(socket)
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
