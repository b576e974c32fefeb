//! A listener that combines any number of listening sockets, and serves them in turn.

use std::ffi::OsStr;
use std::io;
use std::mem;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::SockAddr;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::is_rt_shutdown_err;

use super::endpoint::Endpoint;
use super::listening::{Listening, ListeningSocket, Opened, accepts};
use super::open::{self, Place};
use super::options::{SocketOptions, keep_urgent_data};
use super::socket::Socket;
use super::{Incoming, Listener, ListenerClosed};
use crate::connection::Address;
use crate::error::Error;

/// Any number of TCP and Unix sockets as one listener.
///
/// The sockets are served in turn, so a busy one does not starve the others. When the listener is
/// dropped, it removes the path of each Unix socket that it has bound, if the file there is still
/// the one that it created. If a new process has taken over the socket (see the module `replace`),
/// that process removes the path instead.
///
/// TCP's urgent data stays in the stream, as [RFC 6093] recommends. A read ends where urgent data
/// begins, and the runtime reports the bytes after that point only when more bytes arrive. So a
/// [`Pipeline`](crate::Pipeline) that has read part of a frame asks the system for the rest, and a
/// pipeline that drains asks for all bytes that have arrived. HTTP, TLS and services that read the
/// stream themselves do not ask, because asking would cost a system call for each request.
///
/// [RFC 6093]: https://www.rfc-editor.org/rfc/rfc6093
///
/// ```no_run
/// use tower_tcp::bind::{Listener, SocketOptions, Sockets};
///
/// # async fn run() -> Result<(), tower_tcp::Error> {
/// let endpoints = vec!["[::]:7000".into(), "unix:/run/app.sock".into()];
/// let sockets = Sockets::bind(endpoints, &SocketOptions::default()).await?;
/// println!("{:?}", sockets.local_addrs());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[doc(alias = "TcpListener")]
#[doc(alias = "UnixListener")]
#[doc(alias = "TcpIncoming")]
pub struct Sockets {
    sources: Vec<Source>,
    options: SocketOptions,
    /// The index of the socket to check first.
    next: usize,
    /// The index of a socket that was readable, and from which nothing has been accepted since.
    readable: Option<usize>,
    /// The reason why there are no sockets. The first accept fails with it.
    failed: Option<io::Error>,
    /// The sockets that are closed until the listener resumes.
    suspended: Vec<Suspended>,
}

/// A suspended socket: the address, path or name at which it listens again when the listener
/// resumes, and the value of its [`Listening::endpoint`].
#[derive(Debug)]
struct Suspended {
    place: Place,
    endpoint: (Arc<str>, usize),
}

impl Sockets {
    /// Listens on all endpoints, or on none.
    ///
    /// If a file exists at the path of a Unix socket, it is replaced only if it is a socket that
    /// refuses connections, such as one left behind by a crashed server. Two servers that start at
    /// the same moment can still take the path from each other. If that may happen, hold a lock on
    /// another file during the bind.
    ///
    /// The sockets belong to the runtime on which this future is polled, even if the server is
    /// served on another one. When that runtime is shut down, the listener is closed
    /// ([`ListenerClosed`]), so by default the server drains and ends with [`Error::Accept`].
    ///
    /// # Errors
    ///
    /// Returns [`Error::Bind`], which names the endpoint that could not be resolved, bound or
    /// listened on, or states that there is no endpoint. Everything bound before the failure is
    /// released, including paths.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime with I/O enabled, like all of tokio's sockets.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future releases everything that was bound.
    pub async fn bind(endpoints: Vec<Endpoint>, options: &SocketOptions) -> Result<Self, Error> {
        if endpoints.is_empty() {
            return Err(Error::Bind {
                address: "no address".to_owned(),
                source: io::Error::new(io::ErrorKind::InvalidInput, "no endpoint was given"),
            });
        }
        let mut sources = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            let address = endpoint.to_string();
            let name = endpoint.name();
            let opened = open::open(endpoint, options).await.and_then(|opened| {
                let number = next_endpoint();
                for one in opened {
                    sources.push(Source::new(one, name.clone(), number)?);
                }
                Ok(())
            });
            opened.map_err(|source| Error::Bind { address, source })?;
        }
        Ok(Self::new(sources, options.clone()))
    }

    /// Creates a listener from one socket that is already listening. Accepted sockets get the
    /// default options.
    pub(super) fn of(socket: socket2::Socket) -> io::Result<Self> {
        let source = Source::new(socket.into(), None, next_endpoint())?;
        Ok(Self::new(vec![source], SocketOptions::default()))
    }

    /// Creates a listener without sockets. Its first accept fails with `err`.
    pub(super) fn failed(err: io::Error) -> Self {
        let mut sockets = Self::new(Vec::new(), SocketOptions::default());
        sockets.failed = Some(err);
        sockets
    }

    fn new(sources: Vec<Source>, options: SocketOptions) -> Self {
        Self {
            sources,
            options,
            next: 0,
            readable: None,
            failed: None,
            suspended: Vec::new(),
        }
    }
}

impl Listener for Sockets {
    type Io = Socket;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let count = self.sources.len();
        if count == 0 {
            return Poll::Ready(Ok(()));
        }
        self.readable = None;
        for index in (self.next..count).chain(0..self.next) {
            if !self.sources[index].is_released()
                && self.sources[index].poll_readable(cx)?.is_ready()
            {
                self.readable = Some(index);
                return Poll::Ready(Ok(()));
            }
        }
        Poll::Pending
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Socket>>> {
        loop {
            if let Some(accepted) = ready!(self.poll_accept_if(cx, &mut |_| true))? {
                return Poll::Ready(Ok(accepted));
            }
        }
    }

    fn poll_accept_if(
        &mut self,
        cx: &mut Context<'_>,
        admits: &mut dyn FnMut(&Address) -> bool,
    ) -> Poll<io::Result<Option<Incoming<Socket>>>> {
        if self.sources.is_empty() {
            let err = self.failed.take();
            return Poll::Ready(Err(err.unwrap_or_else(|| io::Error::other(ListenerClosed))));
        }
        loop {
            let Some(index) = self.readable.take() else {
                ready!(self.poll_readable(cx))?;
                continue;
            };
            match self.sources[index].accept(&self.options, admits) {
                // No connection is left. For example, another process with the same socket accepted
                // first. The next check registers a wakeup.
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                accepted => {
                    self.next = (index + 1) % self.sources.len();
                    return Poll::Ready(accepted);
                }
            }
        }
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.sources
            .iter()
            .map(|source| source.local.clone())
            .collect()
    }

    fn listening_sockets(&self) -> Vec<ListeningSocket> {
        self.sources
            .iter()
            .map(|source| ListeningSocket(Arc::clone(source.socket.get_ref())))
            .collect()
    }

    fn suspend(&mut self) {
        for source in mem::take(&mut self.sources) {
            let listening = source.socket.get_ref();
            match Place::of(listening) {
                Some(place) => self.suspended.push(Suspended {
                    place,
                    endpoint: listening.endpoint.clone(),
                }),
                // This socket stays open: either a supervisor would keep it listening anyway, or no
                // new socket could be opened at its address later.
                None => self.sources.push(source),
            }
        }
        self.next = 0;
        self.readable = None;
    }

    fn resume(&mut self) -> io::Result<()> {
        let open = |Suspended { place, endpoint }: &Suspended| {
            let (name, number) = endpoint.clone();
            Source::new(place.open(&self.options)?, Some(name), number)
        };
        // All sockets are opened, or none. Nobody would accept the clients of one that is open
        // while another one cannot be opened.
        let opened: Vec<_> = self.suspended.iter().map(open).collect::<io::Result<_>>()?;
        self.suspended.clear();
        for source in &self.sources {
            source
                .socket
                .get_ref()
                .released
                .store(false, Ordering::Relaxed);
        }
        self.sources.extend(opened);
        Ok(())
    }
}

/// Returns a new number for an endpoint.
fn next_endpoint() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// One listening socket.
#[derive(Debug)]
struct Source {
    socket: AsyncFd<Arc<Listening>>,
    /// If this is set and the runtime reports readiness, a connection has arrived, so the system
    /// need not be asked. Set when the socket is registered, and when the runtime's readiness is
    /// cleared. Cleared by an accept.
    is_news: bool,
    /// Set if the server's options were applied to this TCP socket. If so, accepted sockets inherit
    /// most of these options on Linux.
    prepared: bool,
    local: Address,
}

impl Source {
    #[allow(
        clippy::allow_attributes,
        deprecated,
        reason = "newer tokio deprecates this constructor for an unsafe one, because some types \
                  change their descriptor; a socket does not, and older tokio has only this one"
    )]
    fn new(opened: Opened, endpoint: Option<Arc<str>>, number: usize) -> io::Result<Self> {
        let Opened {
            path,
            socket,
            prepared,
            kept,
            handed_on,
        } = opened;
        // A socket from the program or from its parent process is not always listening, even if its
        // Rust type is a listener. A socket that does not listen would never be readable, or each
        // accept would fail.
        if !accepts(&socket)? {
            let err = "the socket does not listen for connections";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, err));
        }
        socket.set_nonblocking(true)?;
        keep_urgent_data(&socket);
        let local = to_address(&socket.local_addr()?);
        let listening = Arc::new(Listening {
            path,
            socket,
            local: local.clone(),
            endpoint: (endpoint.unwrap_or_else(|| endpoint_at(&local)), number),
            kept,
            released: AtomicBool::new(false),
            handed_on,
        });
        Ok(Self {
            socket: AsyncFd::with_interest(listening, Interest::READABLE)?,
            is_news: true,
            prepared,
            local,
        })
    }

    /// Returns whether this process has stopped accepting from the socket, so that the socket's
    /// clients wait for another process.
    fn is_released(&self) -> bool {
        self.socket.get_ref().released.load(Ordering::Relaxed)
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut queried = false;
        loop {
            let Poll::Ready(guard) = self.socket.poll_read_ready(cx) else {
                // The system may have a connection that tokio has not noticed yet. In a shutdown,
                // the accept loop might not check again.
                return if !queried && has_event(self.socket.get_ref()) {
                    Poll::Ready(Ok(()))
                } else {
                    Poll::Pending
                };
            };
            let mut guard = guard.map_err(closed_if_shut_down)?;
            // tokio's readiness stays set after the last connection was accepted, so ask the
            // system.
            if self.is_news || has_event(self.socket.get_ref()) {
                return Poll::Ready(Ok(()));
            }
            guard.clear_ready();
            self.is_news = true;
            queried = true;
        }
    }

    /// Accepts a connection. If its peer is not admitted, closes it at once and returns `None`.
    fn accept(
        &mut self,
        options: &SocketOptions,
        admits: &mut dyn FnMut(&Address) -> bool,
    ) -> io::Result<Option<Incoming<Socket>>> {
        self.is_news = false;
        let listener = self.socket.get_ref();
        let (socket, peer) = accept(listener).map_err(|err| closed_or(err, listener))?;
        let peer = self.peer(&peer);
        if admits(&peer) {
            return self.open(socket, peer, options).map(Some);
        }
        if options.resets_cut_off() && self.local.tcp().is_some() {
            // If the system rejects the option, the socket is closed without a reset.
            let _rejected = socket.set_linger(Some(Duration::ZERO));
        }
        Ok(None)
    }

    fn peer(&self, peer: &SockAddr) -> Address {
        match self.local {
            // On some systems, a peer that has reset its connection in the backlog has no address.
            // That is not a failure of the listener. The connection ends at its first read.
            Address::Tcp(_) => peer
                .as_socket()
                .unwrap_or_else(|| SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))
                .into(),
            _ => to_address(peer),
        }
    }

    /// Registers an accepted socket with the runtime. If it is a TCP socket, sets its options
    /// first.
    fn open(
        &self,
        socket: socket2::Socket,
        peer: Address,
        options: &SocketOptions,
    ) -> io::Result<Incoming<Socket>> {
        let Address::Tcp(bound) = self.local else {
            let stream = UnixStream::from_std(socket.into())?;
            return Ok(Incoming::of(stream.into(), peer, self.local.clone()));
        };
        options.apply(&socket, self.prepared);
        let local = if bound.ip().is_unspecified() {
            socket
                .local_addr()
                .ok()
                .and_then(|addr| addr.as_socket())
                .unwrap_or(bound)
        } else {
            bound
        };
        let stream = TcpStream::from_std(socket.into())?;
        Ok(Incoming::of(
            Socket::tcp(stream, options),
            peer,
            local.into(),
        ))
    }
}

/// Accepts a connection, as a non-blocking socket.
#[cfg(target_os = "linux")]
fn accept(listener: &socket2::Socket) -> io::Result<(socket2::Socket, SockAddr)> {
    listener.accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)
}

/// Accepts a connection, and makes its socket non-blocking.
#[cfg(not(target_os = "linux"))]
fn accept(listener: &socket2::Socket) -> io::Result<(socket2::Socket, SockAddr)> {
    let (socket, peer) = listener.accept()?;
    socket.set_nonblocking(true)?;
    Ok((socket, peer))
}

/// Returns whether an accept would return at once. If the query fails, returns `true`, so that the
/// accept reports the error.
fn has_event(socket: &socket2::Socket) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}

/// The error of a listening socket whose runtime was shut down. It has [`ListenerClosed`] as its
/// source, because the socket will never become ready again.
#[derive(Debug, thiserror::Error)]
#[error("the runtime on which the listener was bound was shut down")]
struct RuntimeGone(#[source] ListenerClosed);

/// Replaces the error of a socket whose runtime was shut down with [`RuntimeGone`]. Returns any
/// other error unchanged.
fn closed_if_shut_down(err: io::Error) -> io::Error {
    if is_rt_shutdown_err(&err) {
        return io::Error::new(err.kind(), RuntimeGone(ListenerClosed));
    }
    err
}

/// Replaces the error of a socket that no longer listens, for example after a call of
/// `shutdown(2)`, with [`ListenerClosed`]. Returns any other error unchanged.
fn closed_or(err: io::Error, listener: &socket2::Socket) -> io::Error {
    if err.kind() == io::ErrorKind::InvalidInput && !listens(listener) {
        return io::Error::new(err.kind(), ListenerClosed);
    }
    err
}

#[cfg(any(target_os = "android", target_os = "freebsd", target_os = "linux"))]
fn listens(listener: &socket2::Socket) -> bool {
    listener.is_listener().unwrap_or(true)
}

/// Returns `false`. These systems do not report whether a socket listens, but [`closed_or`] calls
/// this function only after an accept has failed with `EINVAL`. On these systems, that happens only
/// if the socket does not listen.
#[cfg(not(any(target_os = "android", target_os = "freebsd", target_os = "linux")))]
fn listens(_listener: &socket2::Socket) -> bool {
    false
}

/// Returns the text of an endpoint at this address. Unlike the `Display` output of [`Address`], it
/// has a path as it is, because an [`Endpoint`] has no escapes.
fn endpoint_at(local: &Address) -> Arc<str> {
    match local {
        Address::Unix(Some(path)) => format!("unix:{}", path.display()).into(),
        _ => local.to_string().into(),
    }
}

/// Converts a socket address. An abstract name gets the prefix `@`, as in an [`Endpoint`].
fn to_address(addr: &SockAddr) -> Address {
    if let Some(addr) = addr.as_socket() {
        return addr.into();
    }
    let path = addr.as_pathname().map(Arc::from).or_else(|| {
        let name = [b"@", addr.as_abstract_namespace()?].concat();
        Some(Arc::from(Path::new(OsStr::from_bytes(&name))))
    });
    Address::Unix(path)
}
