//! Adapters that change the streams that a listener accepts.

use std::fmt;
use std::io;
use std::task::{Context, Poll, ready};

use super::{Incoming, IntoListener, Listener, ListeningSocket};
use crate::connection::Address;
use crate::error::{Panicked, caught};

/// Methods for every [`Listener`], and for tokio's `TcpListener` and `UnixListener`.
///
/// The closures passed to these methods run in the accept loop, in the context of the runtime on
/// which the connection will run. They must not block. Work that takes time, or may reject a
/// connection, belongs in a [pre-connect hook](crate::preconnect).
///
/// The returned listener has the addresses and the [`poll_readable`](Listener::poll_readable) of
/// the original one.
///
/// If a closure panics, only the connection that was passed to it ends. The accept fails with
/// [`ConnectionAborted`](io::ErrorKind::ConnectionAborted), as if the peer had disconnected.
#[doc(alias = "tap")]
pub trait ListenerExt: IntoListener {
    /// Calls `f` with the stream of each accepted connection.
    ///
    /// ```
    /// use tower_tcp::Server;
    /// use tower_tcp::bind::{ListenerExt, Socket};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> std::io::Result<()> {
    /// let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    /// let server = Server::from_listener(listener.tap_io(|io: &mut Socket| {
    ///     if let Some(tcp) = io.as_tcp() {
    ///         // If the system rejects the option, the connection is served without it.
    ///         let _refused = tcp.set_ttl(64);
    ///     }
    /// }));
    /// # drop(server);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if called on a listener of tokio outside a tokio runtime with I/O enabled.
    fn tap_io<F>(self, f: F) -> TapIo<Self::Listener, F>
    where
        F: FnMut(&mut <Self::Listener as Listener>::Io) + Send + 'static,
    {
        TapIo {
            listener: self.into_listener(),
            f,
        }
    }

    /// Replaces the stream of each accepted connection with the result of `f`.
    ///
    /// ```
    /// use tokio::io::BufStream;
    /// use tower_tcp::bind::ListenerExt;
    /// use tower_tcp::{Server, testkit};
    ///
    /// let (listener, connector) = testkit::memory();
    /// let server = Server::from_listener(listener.map_io(BufStream::new));
    /// # drop((server, connector));
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if called on a listener of tokio outside a tokio runtime with I/O enabled.
    #[doc(alias = "map")]
    fn map_io<F, Io>(self, f: F) -> MapIo<Self::Listener, F>
    where
        F: FnMut(<Self::Listener as Listener>::Io) -> Io + Send + 'static,
        Io: Send + 'static,
    {
        MapIo {
            listener: self.into_listener(),
            f,
        }
    }
}

impl<L: IntoListener> ListenerExt for L {}

/// A listener that calls a function with each stream. Created by [`ListenerExt::tap_io`].
#[derive(Clone)]
pub struct TapIo<L, F> {
    listener: L,
    f: F,
}

impl<L, F> Listener for TapIo<L, F>
where
    L: Listener,
    F: FnMut(&mut L::Io) + Send + 'static,
{
    type Io = L::Io;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.listener.poll_readable(cx)
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<L::Io>>> {
        let incoming = ready!(self.listener.poll_accept(cx))?;
        Poll::Ready(self.tap(incoming))
    }

    fn poll_accept_if(
        &mut self,
        cx: &mut Context<'_>,
        admits: &mut dyn FnMut(&Address) -> bool,
    ) -> Poll<io::Result<Option<Incoming<L::Io>>>> {
        let accepted = ready!(self.listener.poll_accept_if(cx, admits))?;
        Poll::Ready(accepted.map(|incoming| self.tap(incoming)).transpose())
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.listener.local_addrs()
    }

    fn listening_sockets(&self) -> Vec<ListeningSocket> {
        self.listener.listening_sockets()
    }

    fn suspend(&mut self) {
        self.listener.suspend();
    }

    fn resume(&mut self) -> io::Result<()> {
        self.listener.resume()
    }
}

impl<L, F> TapIo<L, F>
where
    L: Listener,
    F: FnMut(&mut L::Io),
{
    fn tap(&mut self, mut incoming: Incoming<L::Io>) -> io::Result<Incoming<L::Io>> {
        let f = &mut self.f;
        let tapped = caught(|| f(&mut incoming.io));
        tapped.map(|()| incoming).map_err(aborted)
    }
}

impl<L: fmt::Debug, F> fmt::Debug for TapIo<L, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TapIo")
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

/// A listener that replaces each stream. Created by [`ListenerExt::map_io`].
#[derive(Clone)]
pub struct MapIo<L, F> {
    listener: L,
    f: F,
}

impl<L, F, Io> Listener for MapIo<L, F>
where
    L: Listener,
    F: FnMut(L::Io) -> Io + Send + 'static,
    Io: Send + 'static,
{
    type Io = Io;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.listener.poll_readable(cx)
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<Io>>> {
        let incoming = ready!(self.listener.poll_accept(cx))?;
        Poll::Ready(self.map(incoming))
    }

    fn poll_accept_if(
        &mut self,
        cx: &mut Context<'_>,
        admits: &mut dyn FnMut(&Address) -> bool,
    ) -> Poll<io::Result<Option<Incoming<Io>>>> {
        let accepted = ready!(self.listener.poll_accept_if(cx, admits))?;
        Poll::Ready(accepted.map(|incoming| self.map(incoming)).transpose())
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.listener.local_addrs()
    }

    fn listening_sockets(&self) -> Vec<ListeningSocket> {
        self.listener.listening_sockets()
    }

    fn suspend(&mut self) {
        self.listener.suspend();
    }

    fn resume(&mut self) -> io::Result<()> {
        self.listener.resume()
    }
}

impl<L, F, Io> MapIo<L, F>
where
    L: Listener,
    F: FnMut(L::Io) -> Io,
{
    fn map(&mut self, incoming: Incoming<L::Io>) -> io::Result<Incoming<Io>> {
        let f = &mut self.f;
        caught(|| incoming.map_io(f)).map_err(aborted)
    }
}

impl<L: fmt::Debug, F> fmt::Debug for MapIo<L, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MapIo")
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

/// Converts a panic of the user's function into an error of the accept, as if the peer had already
/// disconnected. So only this connection ends.
fn aborted(panicked: Panicked) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, panicked)
}
