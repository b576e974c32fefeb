//! What travels between the rooms: one connection, what is known of it, and how it will be known to have ended.

mod address;
mod info;
mod life;
mod phase;
mod rewind;

use std::any::Any;
use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::end::{ConnectionEnded, End, EndReason};

pub use address::Address;
pub(crate) use info::Origin;
pub use info::{ConnectionId, ConnectionInfo};
pub(crate) use life::{HookId, Life};
pub use phase::ConnectionPhase;
pub use rewind::Rewind;

/// A deadline that is noticed so late passed while the process stood still: stopped, suspended, or starved. The peer may have done its
/// part meanwhile, and the runtime, which may fire timers first, does not know yet. So once it is put off for as long again.
pub(crate) const STOOD_STILL: Duration = Duration::from_millis(50);

/// A connection on its way through the stack: the stream, and what is known of it.
///
/// It reads and writes by itself, so that a raw service can use it as the stream it is, and counts the bytes.
pub struct Connection<Io> {
    io: Io,
    info: ConnectionInfo,
}

impl<Io> Connection<Io> {
    pub(crate) fn new(io: Io, peer_addr: Address, local_addr: Address) -> Self {
        let info = ConnectionInfo::new(peer_addr, local_addr);
        Self { io, info }
    }

    pub(crate) fn life(&self) -> &Arc<Life> {
        &self.info.life
    }

    /// Returns what is known of the connection.
    pub fn info(&self) -> &ConnectionInfo {
        &self.info
    }

    /// Adds a fact for everything behind this hook to see, by its type, in [`ConnectionInfo::get`].
    ///
    /// A second of the same type hides the first.
    pub fn insert<F: Any + Send + Sync>(&mut self, fact: F) {
        self.info.insert(fact);
    }

    /// Returns the stream.
    pub fn get_ref(&self) -> &Io {
        &self.io
    }

    /// Returns the stream, to be changed. What is read or written through it is not counted.
    pub fn get_mut(&mut self) -> &mut Io {
        &mut self.io
    }

    /// Replaces the stream, as a hook does; everything else stays.
    pub fn map_io<B>(self, f: impl FnOnce(Io) -> B) -> Connection<B> {
        Connection {
            io: f(self.io),
            info: self.info,
        }
    }

    /// Takes the stream out. The rest goes on to be the connection of another stream, by [`map_io`](Self::map_io).
    pub fn into_parts(self) -> (Io, Connection<()>) {
        (
            self.io,
            Connection {
                io: (),
                info: self.info,
            },
        )
    }

    /// Registers a callback for the end of the connection.
    ///
    /// It runs exactly once, whatever happens to the connection: an orderly close, a panic, a dropped
    /// future, an abort. Those of one connection run in the order in which they were registered. It runs in the connection's task when the stream is gone, so it must not block.
    pub fn on_end(&self, f: impl FnOnce(&End) + Send + 'static) {
        self.life().on_end(|_, end| f(end));
    }

    /// Returns whether the server is shutting down and this connection should finish what it has and close.
    pub fn is_draining(&self) -> bool {
        self.info.is_draining()
    }

    /// Waits until the server is shutting down. The future holds nothing of the stream.
    ///
    /// # Cancel safety
    ///
    /// The signal stays raised: dropping this and asking again loses nothing.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + 'static + use<Io> {
        self.info.draining()
    }

    /// Says why the connection is about to end, for the one report of it. The first word stands, unless
    /// it was one of good order and a later one is not.
    ///
    /// A raw service that returns `Ok` without a word has ended with
    /// [`PeerClosed`](EndReason::PeerClosed) if it read to the end, else with [`ServiceClosed`](EndReason::ServiceClosed).
    pub fn set_end_reason(&self, reason: EndReason) {
        self.life().set_reason(reason, None);
    }

    /// Proposes an end with its cause, and returns the one that stands.
    pub(crate) fn ended(&self, ended: ConnectionEnded) -> ConnectionEnded {
        self.life().set_reason(ended.reason, ended.cause)
    }
}

impl<Io> fmt::Debug for Connection<Io> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Connection<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let asked = buf.remaining();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let n = buf.filled().len() - before;
        if n > 0 {
            self.life().count_read(n);
        } else if asked > 0 {
            self.life().peer_is_done();
        }
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Connection<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.life().count_written(n);
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        self.life().count_written(n);
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
