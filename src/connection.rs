//! What travels between the rooms: one connection, what is known of it, and how it will be known to have ended.

use std::any::Any;
use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::end_reason::{Cause, ConnectionEnded, End, EndReason};
use crate::shutdown::{Signal, Signals};

/// One end of a connection, or what a server listens on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// An IP address and port. IPv4 addresses that came in over IPv6 are shown as IPv4.
    Tcp(SocketAddr),
    /// A Unix socket's path, if it has one; that of a client mostly has none.
    Unix(Option<Arc<Path>>),
    /// An end of an in-memory connection, by number.
    Memory(u64),
}

impl Address {
    /// Returns the socket address, if it is one of TCP.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(addr) => Some(*addr),
            _ => None,
        }
    }

    /// Returns OpenTelemetry's `network.transport`: `tcp`, `unix`, or `pipe` for one in memory.
    pub fn transport(&self) -> &'static str {
        match self {
            Self::Tcp(_) => "tcp",
            Self::Unix(_) => "unix",
            Self::Memory(_) => "pipe",
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            // A peer chooses its own, and may have chosen it to break a line of the log.
            Self::Unix(Some(path)) => {
                write!(f, "unix:{}", path.to_string_lossy().escape_debug())
            }
            Self::Unix(None) => f.write_str("unix:"),
            Self::Memory(n) => write!(f, "memory:{n}"),
        }
    }
}

/// The number of a connection, never used twice in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(u64);

impl ConnectionId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Returns the number.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is known of a connection and its peer.
///
/// Hooks add to it what they learn ([`Connection::insert`]), under the type of what they add: the
/// `tls` feature its `TlsInfo`, yours whatever you like.
#[derive(Clone)]
pub struct ConnectionInfo {
    id: ConnectionId,
    peer: Address,
    local: Address,
    accepted_at: Instant,
    facts: Vec<Arc<dyn Any + Send + Sync>>,
}

impl ConnectionInfo {
    /// Returns the connection's number.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// Returns the address of the socket's other end.
    pub fn peer(&self) -> &Address {
        &self.peer
    }

    /// Returns the address the peer connected to.
    pub fn local(&self) -> &Address {
        &self.local
    }

    /// Returns when the connection was accepted.
    pub fn accepted_at(&self) -> Instant {
        self.accepted_at
    }

    /// Returns what a hook has learned, by its type.
    pub fn get<F: Any + Send + Sync>(&self) -> Option<&F> {
        self.facts.iter().rev().find_map(|fact| fact.downcast_ref())
    }
}

impl fmt::Debug for ConnectionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionInfo")
            .field("id", &self.id)
            .field("peer", &self.peer)
            .field("local", &self.local)
            .finish_non_exhaustive()
    }
}

type Hook = Box<dyn FnOnce(&End) + Send>;

#[derive(Default)]
struct EndCell {
    reason: Option<ConnectionEnded>,
    hooks: Vec<Hook>,
    end: Option<End>,
}

/// The part of a connection that outlives its stream: signals in, totals, and the end out.
pub(crate) struct Life {
    pub(crate) id: ConnectionId,
    accepted_at: Instant,
    pub(crate) signals: Signals,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    requests: AtomicU64,
    /// The peer has finished sending: what tells "the peer left" from "the service was done" for a raw service.
    peer_done: AtomicBool,
    end: Mutex<EndCell>,
}

impl Life {
    /// Adds without a locked instruction: each counter has one writer, the task that owns the stream.
    fn add(counter: &AtomicU64, n: u64) {
        counter.store(
            counter.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    pub(crate) fn count_requests(&self, n: u64) {
        Self::add(&self.requests, n);
    }

    fn cell(&self) -> std::sync::MutexGuard<'_, EndCell> {
        // No user code runs under this lock, so poison can only come from a failed allocation.
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Proposes a reason, and returns the one that stands.
    ///
    /// It is the first: what came first is what happened. Only an end in good order gives way to one that is not: then
    /// something was lost on the way.
    pub(crate) fn set_reason(&self, reason: EndReason, cause: Option<Cause>) -> ConnectionEnded {
        let mut cell = self.cell();
        let stands = match cell.reason.take() {
            Some(first) if reason.is_orderly() || !first.reason.is_orderly() => first,
            _ => ConnectionEnded { reason, cause },
        };
        cell.reason = Some(stands.clone());
        stands
    }

    /// Cuts the connection off, for the reason given unless it has one already.
    /// Returns whether it was not cut off before.
    pub(crate) fn abort(&self, reason: EndReason) -> bool {
        self.set_reason(reason, None);
        self.signals.raise(Signal::Abort)
    }

    /// Settles the end and tells those who asked. Only the connection's task calls this; a second call does nothing.
    ///
    /// `outcome` is the last to propose a reason.
    pub(crate) fn finish(&self, outcome: impl FnOnce(bool) -> ConnectionEnded) {
        let outcome = outcome(self.peer_done.load(Ordering::Relaxed));
        let ConnectionEnded { reason, cause } = self.set_reason(outcome.reason, outcome.cause);
        let (end, hooks) = {
            let mut cell = self.cell();
            if cell.end.is_some() {
                return;
            }
            let end = End {
                reason,
                cause,
                duration: self.accepted_at.elapsed(),
                bytes_read: self.bytes_read.load(Ordering::Relaxed),
                bytes_written: self.bytes_written.load(Ordering::Relaxed),
                requests: self.requests.load(Ordering::Relaxed),
            };
            cell.end = Some(end.clone());
            (end, std::mem::take(&mut cell.hooks))
        };
        for hook in hooks {
            run_hook(hook, &end);
        }
    }

    fn on_end(&self, hook: Hook) {
        let mut cell = self.cell();
        match cell.end.clone() {
            None => cell.hooks.push(hook),
            Some(end) => {
                drop(cell);
                run_hook(hook, &end);
            }
        }
    }
}

/// A panic in one hook must not keep the others, or the connection's permit, from their turn.
fn run_hook(hook: Hook, end: &End) {
    if catch_unwind(AssertUnwindSafe(|| hook(end))).is_err() {
        tracing::error!(target: "tower_tcp", "an on_end callback panicked");
    }
}

/// A connection on its way through the stack: the stream, and what is known of it.
///
/// It reads and writes by itself, so that a raw service can use it as the stream it is, and counts the bytes.
pub struct Connection<Io> {
    io: Io,
    info: Arc<ConnectionInfo>,
    life: Arc<Life>,
}

impl<Io> Connection<Io> {
    pub(crate) fn new(io: Io, peer: Address, local: Address) -> Self {
        let id = ConnectionId::next();
        let accepted_at = Instant::now();
        Self {
            io,
            info: Arc::new(ConnectionInfo {
                id,
                peer,
                local,
                accepted_at,
                facts: Vec::new(),
            }),
            life: Arc::new(Life {
                id,
                accepted_at,
                signals: Signals::default(),
                bytes_read: AtomicU64::new(0),
                bytes_written: AtomicU64::new(0),
                requests: AtomicU64::new(0),
                peer_done: AtomicBool::new(false),
                end: Mutex::default(),
            }),
        }
    }

    pub(crate) fn life(&self) -> &Arc<Life> {
        &self.life
    }

    /// Returns what is known of the connection.
    pub fn info(&self) -> &Arc<ConnectionInfo> {
        &self.info
    }

    /// Adds a fact for everything behind this hook to see, by its type, in [`ConnectionInfo::get`].
    ///
    /// A second of the same type hides the first.
    pub fn insert<F: Any + Send + Sync>(&mut self, fact: F) {
        Arc::make_mut(&mut self.info).facts.push(Arc::new(fact));
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
            life: self.life,
        }
    }

    /// Takes the stream out. The rest goes on to be the connection of another stream, by [`map_io`](Self::map_io).
    pub fn into_parts(self) -> (Io, Connection<()>) {
        (
            self.io,
            Connection {
                io: (),
                info: self.info,
                life: self.life,
            },
        )
    }

    /// Registers a callback for the end of the connection.
    ///
    /// It runs exactly once, whatever happens to the connection: an orderly close, a panic, a dropped
    /// future, an abort. It runs in the connection's task when the stream is gone, so it must not block.
    pub fn on_end(&self, f: impl FnOnce(&End) + Send + 'static) {
        self.life.on_end(Box::new(f));
    }

    /// Returns whether the server is shutting down and this connection should finish what it has and close.
    pub fn is_draining(&self) -> bool {
        self.life.signals.is_raised(Signal::Drain)
    }

    /// Waits until the server is shutting down. The future holds nothing of the stream.
    ///
    /// # Cancel safety
    ///
    /// The signal stays raised: dropping this and asking again loses nothing.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + 'static {
        let life = Arc::clone(&self.life);
        async move { life.signals.raised(Signal::Drain).await }
    }

    /// Says why the connection is about to end, for the one report of it. The first word stands, unless
    /// it was one of good order and a later one is not.
    ///
    /// A raw service that returns `Ok` without a word has ended with
    /// [`PeerClosed`](EndReason::PeerClosed) if it read to the end, else with [`ServiceClosed`](EndReason::ServiceClosed).
    pub fn set_end_reason(&self, reason: EndReason) {
        self.life.set_reason(reason, None);
    }

    /// Proposes an end with its cause, and returns the one that stands.
    pub(crate) fn ended(&self, ended: ConnectionEnded) -> ConnectionEnded {
        self.life.set_reason(ended.reason, ended.cause)
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
            Life::add(&self.life.bytes_read, n as u64);
        } else if asked > 0 {
            self.life.peer_done.store(true, Ordering::Relaxed);
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
        Life::add(&self.life.bytes_written, n as u64);
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        Life::add(&self.life.bytes_written, n as u64);
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
