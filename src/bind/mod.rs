//! Listening sockets and other sources of connections.
//!
//! An [`Endpoint`] is an address, a name or a path to listen on, or a socket that is already
//! listening. [`SocketOptions`] are the options of the sockets. [`Sockets`] combines any number of
//! TCP and Unix sockets into one [`Listener`]. To get connections from another source, implement
//! `Listener` and call [`Server::from_listener`](crate::Server::from_listener).

mod departure;
mod endpoint;
#[cfg(feature = "handover")]
pub(crate) mod handover;
mod listener_ext;
mod listening;
mod open;
mod options;
#[cfg(feature = "handover")]
mod passed;
#[cfg(feature = "metrics")]
mod queue;
mod socket;
mod sockets;
mod tokio_listeners;
mod unix;

use std::fmt;
use std::io;
use std::task::{Context, Poll, ready};

use crate::connection::{Address, Probe};

pub(crate) use departure::Departing;
#[cfg(feature = "metrics")]
pub(crate) use queue::accept_queue;

pub(crate) use listening::WeakSocket;

pub use endpoint::{Endpoint, InvalidEndpoint};
pub use listener_ext::{ListenerExt, MapIo, TapIo};
pub use listening::ListeningSocket;
pub use options::SocketOptions;
#[cfg(feature = "handover")]
pub use passed::PassedError;
pub use socket::Socket;
pub use sockets::Sockets;
pub use tokio_listeners::IntoListener;

/// A source of connections.
///
/// For each connection the accept loop calls [`poll_readable`](Self::poll_readable), then waits
/// until the connection stack is ready, and then calls [`poll_accept_if`](Self::poll_accept_if). So
/// the stack takes a permit of a shared limit only when a connection is waiting, unless the
/// listener uses the default `poll_readable`.
pub trait Listener: Send + 'static {
    /// The stream of a connection.
    type Io: Send + 'static;

    /// Completes when a connection can probably be accepted.
    ///
    /// The default implementation always completes at once. It is for listeners that notice a
    /// connection only by accepting it. With such a listener, the stack becomes ready before a
    /// connection is waiting, and the stack's layers hold their permits until a connection arrives.
    ///
    /// # Errors
    ///
    /// The server treats an error like an error of [`poll_accept`](Self::poll_accept).
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _unused = cx;
        Poll::Ready(Ok(()))
    }

    /// Accepts a connection. Returns `Pending` if none is waiting.
    ///
    /// The accept loop calls [`poll_accept_if`](Self::poll_accept_if), whose default implementation
    /// calls this method. The call is made in the context of the runtime on which the connection
    /// will run, so that the stream is registered there. That runtime may differ from the
    /// listener's.
    ///
    /// # Cancel safety
    ///
    /// Return a connection in the same poll in which it was taken from the operating system. The
    /// accept loop may be dropped between two polls, and a connection kept across them would be
    /// lost.
    ///
    /// # Errors
    ///
    /// The server's accept-error policy decides how the accept loop reacts to each error. By
    /// default, [`ListenerClosed`] ends the server.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Self::Io>>>;

    /// Accepts a connection, and returns it if `admits` returns `true` for its peer's address.
    /// Otherwise closes the connection and returns `None`.
    ///
    /// The accept loop calls this method, not `poll_accept`. `admits` applies the server's
    /// [filters](crate::ServerBuilder::address_filter) and counts the connections that they deny,
    /// so call it exactly once for each connection.
    ///
    /// The default implementation calls `admits` after [`poll_accept`](Self::poll_accept).
    /// [`Sockets`] calls `admits` before it registers the socket with the runtime, so a denied
    /// connection costs less. A listener that wraps another one should forward this method.
    ///
    /// # Cancel safety
    ///
    /// As for [`poll_accept`](Self::poll_accept).
    ///
    /// # Errors
    ///
    /// As for [`poll_accept`](Self::poll_accept).
    fn poll_accept_if(
        &mut self,
        cx: &mut Context<'_>,
        admits: &mut dyn FnMut(&Address) -> bool,
    ) -> Poll<io::Result<Option<Incoming<Self::Io>>>> {
        let incoming = ready!(self.poll_accept(cx))?;
        if admits(&incoming.peer_addr) {
            return Poll::Ready(Ok(Some(incoming)));
        }
        incoming.probe.reset_at_close();
        Poll::Ready(Ok(None))
    }

    /// Returns the addresses on which the listener listens.
    fn local_addrs(&self) -> Vec<Address>;

    /// Returns the listening sockets, so that they can be passed to another process.
    ///
    /// The default implementation returns none. A listener that wraps [`Sockets`] should return the
    /// sockets of the inner listener.
    fn listening_sockets(&self) -> Vec<ListeningSocket> {
        Vec::new()
    }

    /// Closes the listening sockets, so that clients are refused until [`resume`](Self::resume).
    ///
    /// The accept loop calls this method after [`Handle::suspend`](crate::Handle::suspend). The
    /// loop's next call is `resume`, or `suspend` again. Until `resume` succeeds, the loop calls no
    /// other method. The default implementation does nothing, so clients wait in the backlog, as in
    /// a [pause](crate::Handle::pause). A listener that wraps another one should forward `suspend`
    /// and `resume`.
    fn suspend(&mut self) {}

    /// Listens again after [`suspend`](Self::suspend).
    ///
    /// The default implementation does nothing.
    ///
    /// # Errors
    ///
    /// The server treats an error like an error of [`poll_accept`](Self::poll_accept). If it
    /// continues, it calls this method again, usually after a back-off.
    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection accepted by a [`Listener`].
#[derive(Debug)]
pub struct Incoming<Io> {
    /// The stream.
    pub io: Io,
    /// The peer's address.
    pub peer_addr: Address,
    /// The local address.
    pub local_addr: Address,
    /// The access to the socket beneath the stream.
    pub(crate) probe: Probe,
}

impl<Io> Incoming<Io> {
    /// Creates a connection from a stream and the addresses of its two ends.
    ///
    /// The library has no access to the socket beneath such a stream. So
    /// [`Peer::unacknowledged`](crate::Peer::unacknowledged) returns `None`, and
    /// [`Deadlines::write`](crate::deadline::Deadlines::write) counts the peer as taking output
    /// whenever the stream accepts more bytes.
    pub fn new(io: Io, peer_addr: Address, local_addr: Address) -> Self {
        Self {
            io,
            peer_addr,
            local_addr,
            probe: Probe::default(),
        }
    }

    /// Replaces the stream, as [`ListenerExt::map_io`] does. The library keeps its access to the
    /// socket beneath the original stream, if it had any.
    pub fn map_io<B>(self, f: impl FnOnce(Io) -> B) -> Incoming<B> {
        Incoming {
            io: f(self.io),
            peer_addr: self.peer_addr,
            local_addr: self.local_addr,
            probe: self.probe,
        }
    }
}

impl Incoming<Socket> {
    /// Creates a connection with a [`Probe`] of its socket.
    fn of(io: Socket, peer_addr: Address, local_addr: Address) -> Self {
        Self {
            probe: io.probe(),
            ..Self::new(io, peer_addr, local_addr)
        }
    }
}

/// The error of a listener that will never accept another connection. A listener returns it wrapped
/// in an [`io::Error`].
#[derive(Clone, Copy, Debug)]
pub struct ListenerClosed;

impl fmt::Display for ListenerClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the listener is closed")
    }
}

impl std::error::Error for ListenerClosed {}
