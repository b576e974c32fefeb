//! A connection: its stream, the facts known about it, and its end.

mod address;
mod facts;
mod hooks;
mod info;
mod life;
mod not_a_layer;
mod origin;
mod phase;
mod rewind;
mod service;
mod wire;

use std::any::Any;
use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::end::{ConnectionEnded, End, EndReason};

pub use address::Address;
pub(crate) use hooks::{Hook, HookId, Moment};
pub use info::ConnectionInfo;
pub(crate) use life::Life;
pub(crate) use not_a_layer::{BehindPreConnectLayer, not_a_layer};
pub use origin::ConnectionId;
pub(crate) use origin::Origin;
pub use phase::ConnectionPhase;
pub use rewind::Rewind;
pub use service::ConnectionService;
pub(crate) use wire::{Family, Probe, Sent, Wire};

/// A connection on its way through the stack: its stream, and the facts known about it, such as the
/// peer's address.
///
/// It implements [`AsyncRead`] and [`AsyncWrite`], so a raw service (one that reads and writes
/// bytes itself) can use it as the stream. It counts the bytes read and written.
#[doc(alias = "session")]
#[doc(alias = "stream")]
#[doc(alias = "AddrStream")]
pub struct Connection<Io> {
    io: Io,
    info: ConnectionInfo,
}

impl<Io> Connection<Io> {
    pub(crate) fn new(io: Io, peer_addr: Address, local_addr: Address, probe: Probe) -> Self {
        let origin = Origin::new(peer_addr, local_addr);
        let life = Arc::new(Life::new(origin, probe));
        let info = ConnectionInfo { life };
        Self { io, info }
    }

    pub(crate) fn life(&self) -> &Arc<Life> {
        &self.info.life
    }

    /// Returns the facts known about the connection.
    pub fn info(&self) -> &ConnectionInfo {
        &self.info
    }

    /// Adds a fact: a value that is found by its type. Services and layers read it with
    /// [`ConnectionInfo::get`], and the rest of the program with
    /// [`LiveConnection::get`](crate::LiveConnection::get).
    ///
    /// A second fact of the same type hides the first. Facts are dropped with the last
    /// [`ConnectionInfo`] or handle of the connection, which may be after the connection's end. A
    /// fact must not hold a `ConnectionInfo` or a [`Peer`](crate::Peer) of its own connection,
    /// because the facts would then never be dropped. A fact may hold the connection's
    /// [`id`](ConnectionInfo::id).
    pub fn insert<F: Any + Send + Sync>(&mut self, fact: F) {
        self.life().origin.facts.insert(fact);
    }

    /// Sets the client's address, as reported by a trusted hop in front of this server (a proxy or
    /// load balancer). The hook that reads the hop's header calls this method.
    ///
    /// After this call, [`ConnectionInfo::client_addr`] returns the address. The connection's span
    /// and closing event record it as `client.address` and `client.port`. If several hooks set the
    /// address, the last one wins, because it has read the header of the hop that is nearest to the
    /// client.
    ///
    /// ```
    /// use tower::{ServiceBuilder, service_fn};
    /// use tower_tcp::bind::Socket;
    /// use tower_tcp::preconnect::PreConnectLayer;
    /// use tower_tcp::{Address, BoxError, Connection};
    ///
    /// /// The address in the header that the connection begins with.
    /// async fn read_header(conn: &mut Connection<Socket>) -> Result<Address, BoxError> {
    ///     # let _ = conn;
    ///     # Ok(Address::Unix(None))
    ///     // ..
    /// }
    ///
    /// let header = service_fn(|mut conn: Connection<Socket>| async move {
    ///     let client_addr = read_header(&mut conn).await?;
    ///     conn.set_client_addr(client_addr);
    ///     Ok::<_, BoxError>(conn)
    /// });
    /// let stack = ServiceBuilder::new()
    ///     .layer(PreConnectLayer::new(header))
    ///     .service_fn(|conn: Connection<Socket>| async move { Ok::<_, BoxError>(drop(conn)) });
    /// # drop(stack);
    /// ```
    pub fn set_client_addr(&mut self, client_addr: impl Into<Address>) {
        self.life().origin.set_client_addr(client_addr.into());
    }

    /// Returns a reference to the stream.
    pub fn get_ref(&self) -> &Io {
        &self.io
    }

    /// Returns a mutable reference to the stream. Bytes read or written through it are not counted,
    /// so [`DeadlineLayer`](crate::deadline::DeadlineLayer) does not see them either.
    pub fn get_mut(&mut self) -> &mut Io {
        &mut self.io
    }

    /// Replaces the stream, for example by one that decrypts it. The facts, the counters and the
    /// callbacks stay.
    pub fn map_io<B>(self, f: impl FnOnce(Io) -> B) -> Connection<B> {
        Connection {
            io: f(self.io),
            info: self.info,
        }
    }

    /// Separates the stream from the connection. Use [`map_io`](Self::map_io) to give the
    /// connection a stream again. Bytes that are read from or written to the separate stream are
    /// not counted.
    pub fn into_parts(self) -> (Io, Connection<()>) {
        (
            self.io,
            Connection {
                io: (),
                info: self.info,
            },
        )
    }

    /// Registers a callback for the moment when closing begins, as
    /// [`ConnectionInfo::on_closing`] does.
    pub fn on_closing(&self, f: impl FnOnce(&End) + Send + 'static) {
        self.info.on_closing(f);
    }

    /// Registers a callback for the end of the connection.
    ///
    /// The callback runs exactly once, however the connection ends: after an orderly close, a panic
    /// or an abort, or when the connection's future is dropped. It runs after the stream is
    /// dropped, unless the service has moved the stream to another task. It normally runs in the
    /// connection's task, and must not block. Callbacks run in registration order; one that is
    /// registered after the end runs at once.
    ///
    /// Before its end, a connection that closes gracefully writes the remaining output, and then
    /// lingers for up to 2 s by default ([`Linger`](crate::close::Linger)). To act before that, use
    /// [`on_closing`](Self::on_closing).
    pub fn on_end(&self, f: impl FnOnce(&End) + Send + 'static) {
        self.life().on(Moment::End, |_, end| f(end));
    }

    /// Returns whether this connection should finish and close. See
    /// [`ConnectionInfo::is_draining`].
    pub fn is_draining(&self) -> bool {
        self.info.is_draining()
    }

    /// Waits until this connection should finish and close. See [`ConnectionInfo::draining`]. The
    /// future does not borrow or hold the stream.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: the signal stays raised, so a later call completes at
    /// once.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + 'static + use<Io> {
        self.info.draining()
    }

    /// Sets the reason to report when the connection ends.
    ///
    /// The first reason wins, with one exception: an error replaces an orderly reason
    /// ([`EndReason::is_orderly`]).
    ///
    /// If a raw service returns `Ok` and no reason was set, the connection ends with
    /// [`Drained`](EndReason::Drained) if it was draining, else with
    /// [`PeerClosed`](EndReason::PeerClosed) if the service has read to the end of input, and else
    /// with [`ServiceClosed`](EndReason::ServiceClosed).
    pub fn set_end_reason(&self, reason: EndReason) {
        self.life().set_reason(reason, None);
    }

    /// Records whether the connection now waits for the peer to take output, and returns `polled`.
    #[inline]
    fn noted<T>(&self, polled: Poll<T>) -> Poll<T> {
        self.life().note_write_pending(polled.is_pending());
        polled
    }

    /// Proposes an end with its cause. Returns the end that now applies.
    pub(crate) fn ended(&self, ended: ConnectionEnded) -> ConnectionEnded {
        self.life().ended(ended)
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
        let room = buf.remaining();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let n = buf.filled().len() - before;
        if n > 0 {
            self.life().count_read(n);
        } else if room > 0 {
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
        let polled = Pin::new(&mut self.io).poll_write(cx, buf);
        let n = ready!(self.noted(polled))?;
        self.life().count_written(n);
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        let n = ready!(self.noted(polled))?;
        self.life().count_written(n);
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_flush(cx);
        self.noted(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_shutdown(cx);
        self.noted(polled)
    }
}
