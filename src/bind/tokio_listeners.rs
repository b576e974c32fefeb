//! tokio's own listeners as ours.
//!
//! tokio says that a connection waits only by accepting it, so its listeners are taken apart: the
//! socket is listened on as one of [`Sockets`], which looks first.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use tokio::net::{TcpListener, UnixListener};

use super::endpoint::Endpoint;
use super::{Listener, ListenerClosed, Sockets};
use crate::make::Known;

/// What a server can be made of: every [`Listener`], and tokio's `TcpListener` and `UnixListener`.
///
/// tokio's listeners become [`Sockets`]. Accepted sockets have the default
/// [`SocketOptions`](super::SocketOptions), `TCP_NODELAY` among them; the path of a Unix socket is
/// not removed. For other options give the listener to
/// [`ServerBuilder::listen`](crate::ServerBuilder::listen).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a listener",
    label = "does not implement `tower_tcp::bind::Listener`",
    note = "give an address, or a listener of `std`, to `Server::bind`; implement `Listener` for \
        one of your own"
)]
pub trait IntoListener: Sized {
    /// The listener that it becomes.
    type Listener: Listener;

    /// Converts it.
    ///
    /// # Panics
    ///
    /// tokio's listeners panic outside a tokio runtime with I/O enabled.
    fn into_listener(self) -> Self::Listener;
}

#[diagnostic::do_not_recommend]
impl<L: Listener> IntoListener for L {
    // Where `L` is no listener the server's type is unknown, and the mistake is reported once.
    type Listener = <L::Io as Known<L>>::Type;

    fn into_listener(self) -> L {
        self
    }
}

impl IntoListener for TcpListener {
    type Listener = Sockets;

    fn into_listener(self) -> Sockets {
        let opened = self.into_std().and_then(|std| Sockets::of(std.into()));
        opened.unwrap_or_else(|err| Sockets::failed(not_taken_over(err)))
    }
}

impl IntoListener for UnixListener {
    type Listener = Sockets;

    fn into_listener(self) -> Sockets {
        let opened = self.into_std().and_then(|std| Sockets::of(std.into()));
        opened.unwrap_or_else(|err| Sockets::failed(not_taken_over(err)))
    }
}

/// Takes over a listener of tokio, with the options it has.
impl From<TcpListener> for Endpoint {
    fn from(listener: TcpListener) -> Self {
        match listener.into_std() {
            Ok(listener) => listener.into(),
            Err(err) => Self::failed(err),
        }
    }
}

/// Takes over a listener of tokio. Its path is not removed at the end.
impl From<UnixListener> for Endpoint {
    fn from(listener: UnixListener) -> Self {
        match listener.into_std() {
            Ok(listener) => listener.into(),
            Err(err) => Self::failed(err),
        }
    }
}

/// The runtime did not give the listener up, or did not take it again. Its chain of causes ends the
/// server.
#[derive(Debug)]
struct NotTakenOver(io::Error);

impl fmt::Display for NotTakenOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a listener of tokio could not be taken over: {}", self.0)
    }
}

impl StdError for NotTakenOver {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&ListenerClosed)
    }
}

fn not_taken_over(err: io::Error) -> io::Error {
    io::Error::new(err.kind(), NotTakenOver(err))
}
