//! Where connections come from.
//!
//! An [`Endpoint`] says where to listen, [`SocketOptions`] how, and [`Sockets`] does it: any number
//! of TCP and Unix sockets as one [`Listener`]. A listener of your own takes the place of the last.

mod endpoint;
mod listener_ext;
mod open;
mod options;
#[cfg(feature = "metrics")]
mod queue;
mod socket;
mod sockets;
mod tokio_listeners;
mod unix;

use std::fmt;
use std::io;
use std::task::{Context, Poll};

use crate::connection::Address;

#[cfg(feature = "metrics")]
pub(crate) use queue::accept_queue;

pub use endpoint::{Endpoint, InvalidEndpoint};
pub use listener_ext::{ListenerExt, MapIo, TapIo};
pub use options::SocketOptions;
pub use socket::Socket;
pub use sockets::Sockets;
pub use tokio_listeners::IntoListener;

/// A source of connections.
///
/// The accept loop asks it in this order: readable? — then it makes the connection stack ready —
/// then accept. So a permit of a shared limit is taken only when a connection is at hand.
pub trait Listener: Send + 'static {
    /// The stream of a connection.
    type Io: Send + 'static;

    /// Returns ready when a connection can be accepted, as far as is known.
    ///
    /// The provided one always says so, for listeners that cannot tell without accepting: the stack
    /// is then made ready first, and waits, ready, for a connection.
    ///
    /// # Errors
    ///
    /// As [`poll_accept`](Self::poll_accept).
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _unused = cx;
        Poll::Ready(Ok(()))
    }

    /// Accepts a connection; pending when there is none.
    ///
    /// It is called in the context of the runtime that the connection will run on, which may be
    /// another than the listener's: there a stream is made of a socket.
    ///
    /// # Cancel safety
    ///
    /// A connection that was taken from the system must be returned, not kept across a pending
    /// poll: the accept loop may be dropped between any two.
    ///
    /// # Errors
    ///
    /// Any error is put to the server's accept-error policy. By the default one, [`ListenerClosed`]
    /// ends the server.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Self::Io>>>;

    /// Returns the addresses that it listens on.
    fn local_addrs(&self) -> Vec<Address>;
}

/// A connection as a [`Listener`] hands it over.
#[derive(Debug)]
pub struct Incoming<Io> {
    /// The stream.
    pub io: Io,
    /// The address of its other end.
    pub peer_addr: Address,
    /// The address of this end.
    pub local_addr: Address,
}

/// The error, inside an [`io::Error`], of a listener that will never accept again.
#[derive(Clone, Copy, Debug)]
pub struct ListenerClosed;

impl fmt::Display for ListenerClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the listener is closed")
    }
}

impl std::error::Error for ListenerClosed {}
