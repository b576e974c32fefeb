//! A listening socket. The accept loop shares it with the code that passes it to another process.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use socket2::{Socket, Type};

use super::unix::OwnPath;
use crate::connection::Address;

/// A listening socket of a server. Use it to pass the socket to another process, or to read the
/// socket's options.
///
/// This value keeps the socket open, so hold it only for a moment. As long as the socket is open,
/// clients can connect. If no server accepts from the socket any more, these clients wait until
/// they give up.
///
/// ```
/// use socket2::SockRef;
/// use tower_tcp::Server;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let server = Server::bind("127.0.0.1:0").await?;
/// for socket in server.handle().listening_sockets() {
///     let buffer = SockRef::from(&socket).recv_buffer_size()?;
///     println!("{} at {}: {buffer} bytes", socket.endpoint(), socket.local_addr());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ListeningSocket(pub(super) Arc<Listening>);

/// A weak reference to a listening socket. It does not keep the socket open.
#[derive(Debug)]
pub(crate) struct WeakSocket(Weak<Listening>);

/// A listening socket, with the facts that the server needs about it.
#[derive(Debug)]
pub(super) struct Listening {
    // `OwnPath` must be dropped before the socket. Fields are dropped in this order.
    pub(super) path: Option<OwnPath>,
    pub(super) socket: Socket,
    pub(super) local: Address,
    /// The endpoint's text, and the endpoint's number in this process. The number keeps the sockets
    /// of one endpoint together when they are passed to another process.
    pub(super) endpoint: (Arc<str>, usize),
    /// Set if a supervisor also keeps the socket open. The clients in the socket's backlog can then
    /// wait for another process.
    pub(super) kept: bool,
    /// Set if this process has stopped accepting from the socket, so that the socket's clients
    /// wait for another process.
    pub(super) released: AtomicBool,
    /// The socket's index among the sockets that the replaced process passed. `None` if no replaced
    /// process passed this socket.
    #[cfg_attr(not(feature = "handover"), expect(dead_code, reason = "always none"))]
    pub(super) handed_on: Option<usize>,
}

/// A listening socket that is new, or that the program or another process has opened before.
#[derive(Debug)]
pub(super) struct Opened {
    // `OwnPath` must be dropped before the socket. Fields are dropped in this order.
    pub(super) path: Option<OwnPath>,
    pub(super) socket: Socket,
    /// Set if the server's options were applied to this TCP socket. If so, accepted sockets inherit
    /// most of these options on Linux.
    pub(super) prepared: bool,
    /// Set if a supervisor also keeps the socket open.
    pub(super) kept: bool,
    /// The socket's index among the sockets that the replaced process passed. `None` if no replaced
    /// process passed this socket.
    pub(super) handed_on: Option<usize>,
}

impl From<Socket> for Opened {
    fn from(socket: Socket) -> Self {
        Self {
            path: None,
            socket,
            prepared: false,
            kept: false,
            handed_on: None,
        }
    }
}

impl ListeningSocket {
    /// Returns the text of the endpoint for which this socket was opened. For a socket that was
    /// passed to this library as a listener, returns the socket's local address.
    pub fn endpoint(&self) -> &str {
        &self.0.endpoint.0
    }

    /// Returns the address that the socket listens on.
    pub fn local_addr(&self) -> &Address {
        &self.0.local
    }

    pub(crate) fn downgrade(&self) -> WeakSocket {
        WeakSocket(Arc::downgrade(&self.0))
    }

    /// Stops accepting from the socket, so that the socket's clients wait for another process.
    pub(crate) fn release(&self) {
        self.0.released.store(true, Ordering::Relaxed);
    }

    /// Returns whether this process has stopped accepting from the socket, so that the socket's
    /// clients wait for another process.
    #[cfg(feature = "handover")]
    pub(super) fn is_released(&self) -> bool {
        self.0.released.load(Ordering::Relaxed)
    }

    /// Returns whether a supervisor also keeps the socket open for the next process.
    pub(crate) fn is_kept(&self) -> bool {
        self.0.kept
    }

    /// Stops accepting from the socket, if a supervisor also keeps it open for the next process.
    pub(crate) fn release_if_kept(&self) {
        if self.is_kept() {
            self.release();
        }
    }
}

impl WeakSocket {
    /// Returns the socket, unless it was closed.
    pub(crate) fn upgrade(&self) -> Option<ListeningSocket> {
        self.0.upgrade().map(ListeningSocket)
    }
}

impl AsFd for ListeningSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }
}

impl Deref for Listening {
    type Target = Socket;

    fn deref(&self) -> &Socket {
        &self.socket
    }
}

impl AsRawFd for Listening {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Returns whether the socket is a stream socket that listens, as far as the system reports it.
pub(super) fn accepts(socket: &Socket) -> io::Result<bool> {
    #[cfg(any(target_os = "android", target_os = "freebsd", target_os = "linux"))]
    let listens = socket.is_listener()?;
    // On other systems, a socket that does not listen can be recognized only if it is connected.
    #[cfg(not(any(target_os = "android", target_os = "freebsd", target_os = "linux")))]
    let listens = socket.peer_addr().is_err();
    Ok(listens && socket.r#type()? == Type::STREAM)
}
