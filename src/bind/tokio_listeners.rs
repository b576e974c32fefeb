//! Conversions from tokio's own listeners.
//!
//! A listener of tokio reports a waiting connection only by accepting it. So its socket is moved
//! into [`Sockets`], which checks for a connection before it accepts.

use std::io;

use thiserror::Error;
use tokio::net::{TcpListener, UnixListener};

use super::endpoint::Endpoint;
use super::{Listener, ListenerClosed, Sockets};
use crate::make::Known;

/// A type that can be converted into a listener: every [`Listener`], and tokio's `TcpListener` and
/// `UnixListener`.
///
/// tokio's listeners become [`Sockets`]. Accepted sockets get the default
/// [`SocketOptions`](super::SocketOptions), including `TCP_NODELAY`. To set other options, pass the
/// listener to [`ServerBuilder::listen`](crate::ServerBuilder::listen). The server does not remove
/// the path of a `UnixListener` when it closes the socket. Exception: a server that was
/// [suspended](crate::Handle::suspend) and resumed removes the path, because it has bound the path
/// again itself.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a listener",
    label = "does not implement `tower_tcp::bind::Listener`",
    note = "give an address, or a listener of `std`, to `Server::bind`; implement `Listener` for \
        one of your own"
)]
pub trait IntoListener: Sized {
    /// The resulting listener.
    type Listener: Listener;

    /// Converts this value into a listener.
    ///
    /// # Panics
    ///
    /// Panics if called on a listener of tokio outside a tokio runtime with I/O enabled.
    fn into_listener(self) -> Self::Listener;
}

#[diagnostic::do_not_recommend]
impl<L: Listener> IntoListener for L {
    // If `L` is not a listener, the compiler cannot resolve the server's type, and so reports the
    // mistake only once.
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

/// Takes over a listener of tokio. The server sets `SO_OOBINLINE`, which keeps urgent data in the
/// stream. The listening socket's other options stay as they are. A server that is
/// [suspended](crate::Handle::suspend) and resumed opens a new socket with the server's options.
impl From<TcpListener> for Endpoint {
    fn from(listener: TcpListener) -> Self {
        match listener.into_std() {
            Ok(listener) => listener.into(),
            Err(err) => Self::failed(err),
        }
    }
}

/// Takes over a listener of tokio. The server does not remove the socket's path when it closes the
/// socket. Exception: a server that was [suspended](crate::Handle::suspend) and resumed removes the
/// path, because it has bound the path again itself.
impl From<UnixListener> for Endpoint {
    fn from(listener: UnixListener) -> Self {
        match listener.into_std() {
            Ok(listener) => listener.into(),
            Err(err) => Self::failed(err),
        }
    }
}

/// The error for a listener of tokio that could not be taken over: it could not be removed from the
/// runtime, its socket could not be registered again, or its socket does not listen.
#[derive(Debug, Error)]
#[error("a listener of tokio could not be taken over")]
struct NotTakenOver(#[source] Refused);

/// Wraps the error that prevented the takeover, and has [`ListenerClosed`] as its source, so that
/// the default accept-error policy stops the server.
#[derive(Debug, Error)]
#[error("{error}")]
struct Refused {
    error: io::Error,
    #[source]
    end: ListenerClosed,
}

fn not_taken_over(error: io::Error) -> io::Error {
    let end = ListenerClosed;
    io::Error::new(error.kind(), NotTakenOver(Refused { error, end }))
}
