//! Controls a running server from outside: pauses it, changes its limit, lists its connections and
//! shuts it down.

mod connections;
mod heartbeat;
mod live;
#[cfg(feature = "metrics")]
mod metrics;
mod phase;
mod plan;
mod table;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use crate::admit::ConnectionLimit;
use crate::bind::{ListeningSocket, WeakSocket};
use crate::connection::{Address, ConnectionId};
use crate::signals::Report;

use heartbeat::Heartbeat;
pub use live::LiveConnection;
pub(crate) use phase::Phase;
pub use phase::ServerPhase;
pub(crate) use plan::{Plan, earliest};
use table::Table;

/// A handle that pauses a server, changes its limit, lists its connections and shuts it down. Cheap
/// to clone.
#[derive(Clone)]
#[doc(alias = "ServerHandle")]
#[doc(alias = "GracefulShutdown")]
pub struct Handle(pub(crate) Arc<ServerState>);

/// The state shared by the server's loop, its connections and its handles.
pub(crate) struct ServerState {
    pub(crate) name: Option<Arc<str>>,
    pub(crate) addresses: Vec<Address>,
    sockets: Mutex<Vec<WeakSocket>>,
    pub(crate) limit: ConnectionLimit,
    phase: AtomicU8,
    paused: AtomicBool,
    suspended: AtomicBool,
    watched: AtomicBool,
    plan: Mutex<Plan>,
    table: Table,
    /// The number of connections that have entered the table. Wraps around.
    entered: AtomicUsize,
    /// The number of connections that left the table before the drain began. Wraps around.
    left_before: AtomicUsize,
    /// The number of connections that have left the table since the drain began, and that neither
    /// timed out nor were aborted by the server.
    drained: AtomicUsize,
    /// The number of connections that have left the table since the drain began, and that ended at
    /// one of their own deadlines, or because their peer was too slow for a broadcast.
    timed_out: AtomicUsize,
    #[cfg(feature = "metrics")]
    counts: metrics::Counts,
    /// The waker of the server's loop, to wake when this state changes.
    server: AtomicWaker,
    report: Mutex<Option<Report>>,
    /// Wakes the tasks that wait in [`advanced_until`](Self::advanced_until).
    advanced: Notify,
    heartbeat: Heartbeat,
}

impl Handle {
    pub(crate) fn new(
        name: Option<Arc<str>>,
        addresses: Vec<Address>,
        sockets: &[ListeningSocket],
        limit: ConnectionLimit,
        plan: Plan,
    ) -> Self {
        Self(Arc::new(ServerState {
            #[cfg(feature = "metrics")]
            counts: metrics::Counts::new(name.clone()),
            name,
            addresses,
            sockets: Mutex::new(sockets.iter().map(ListeningSocket::downgrade).collect()),
            limit,
            phase: AtomicU8::new(Phase::Serving as u8),
            paused: AtomicBool::new(false),
            suspended: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            plan: Mutex::new(plan),
            table: Table::default(),
            entered: AtomicUsize::new(0),
            left_before: AtomicUsize::new(0),
            drained: AtomicUsize::new(0),
            timed_out: AtomicUsize::new(0),
            server: AtomicWaker::new(),
            report: Mutex::new(None),
            advanced: Notify::new(),
            heartbeat: Heartbeat::default(),
        }))
    }

    /// Returns the addresses that the server listens on, with the ports that the system chose.
    pub fn local_addrs(&self) -> &[Address] {
        &self.0.addresses
    }

    /// Returns the listening sockets, for example to pass them to another process. There are none
    /// while the server does not listen, or if its [`Listener`](crate::bind::Listener) does not
    /// return them.
    pub fn listening_sockets(&self) -> impl Iterator<Item = ListeningSocket> + '_ {
        self.0.sockets()
    }

    /// Returns the server's name, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    /// Returns the server's limit on open connections, which can be read and changed.
    pub fn limit(&self) -> &ConnectionLimit {
        &self.0.limit
    }

    /// Returns the number of open connections: those that were accepted and have not ended.
    pub fn live(&self) -> usize {
        self.0.live()
    }

    /// Returns the open connections, with their address, age, phase and counters.
    ///
    /// The table is read in parts, so a connection that begins or ends meanwhile may be included or
    /// not. Reading the table delays no request. To find connections by your own keys, use a
    /// [`Registry`](crate::registry::Registry).
    pub fn connections(&self) -> impl Iterator<Item = LiveConnection> + '_ {
        self.0.table.all().map(|life| LiveConnection { life })
    }

    /// Returns the open connection with this number, if there is one.
    pub fn connection(&self, id: ConnectionId) -> Option<LiveConnection> {
        let shard = self.0.table.shard(id);
        shard.get(&id).map(|entry| LiveConnection {
            life: Arc::clone(&entry.0),
        })
    }

    /// Pauses accepting. The server keeps listening, so clients wait in the backlog. A health check
    /// that only connects does not notice a pause (see [`balancers`](crate::balancers)).
    ///
    /// Open connections are not affected. A [shutdown](Self::shutdown) accepts the clients in the
    /// backlog as usual, even if the server is paused.
    ///
    /// One more client is accepted after this call if the server is already waiting for a layer of
    /// the connection stack, such as tower's `ConcurrencyLimit` at its limit. Such a layer may get
    /// a permit during the pause, and releases it only after a connection has used it. If the
    /// server accepted no client, the layer would hold the permit until the pause ends, and other
    /// servers that share the layer's limit could not use it. If the server is waiting only for its
    /// own limit ([`ServerBuilder::limit`](crate::ServerBuilder::limit)), no further client is
    /// accepted, even if several servers share that limit.
    pub fn pause(&self) {
        self.0.paused.store(true, Ordering::Release);
        self.0.server.wake();
    }

    /// Stops listening, so that clients are refused. Even a health check that only connects notices
    /// this. Open connections are not affected.
    ///
    /// First the clients in the backlog are accepted, as far as the limit allows without waiting,
    /// because their connections are already established. Then the listening sockets are closed,
    /// and the paths of Unix sockets are removed. A socket that a supervisor keeps open is not
    /// closed, so its clients wait as in a [pause](Self::pause). The same is true for a custom
    /// [`Listener`](crate::bind::Listener) that does not implement
    /// [`suspend`](crate::bind::Listener::suspend).
    ///
    /// [`resume`](Self::resume) listens at the same addresses again, including a port that the
    /// system chose. Until then, another program can take the addresses. Also, if several servers
    /// share one of tower's limits, that limit may reserve a permit for this server, and the other
    /// servers cannot use that permit meanwhile. A pause has neither of these effects. A suspended
    /// server that is shut down does not listen again.
    pub fn suspend(&self) {
        self.0.suspended.store(true, Ordering::Release);
        self.0.server.wake();
    }

    /// Resumes accepting after [`pause`](Self::pause), and listening after
    /// [`suspend`](Self::suspend).
    ///
    /// If the server cannot listen at all of its addresses again, for example because another
    /// program has taken one, it listens at none, and the accept-error policy decides what happens
    /// ([`ServerBuilder::on_accept_error`](crate::ServerBuilder::on_accept_error)). By default, the
    /// server logs the event `accept.stalled` and tries again, at least once a second.
    pub fn resume(&self) {
        self.0.paused.store(false, Ordering::Release);
        self.0.suspended.store(false, Ordering::Release);
        self.0.server.wake();
    }

    /// Returns whether the server is [suspended](Self::suspend).
    pub fn is_suspended(&self) -> bool {
        self.0.is_suspended()
    }

    /// Returns whether accepting is [paused](Self::pause).
    pub fn is_paused(&self) -> bool {
        self.0.is_paused()
    }

    /// Returns the server's phase. A readiness check should report the server as not ready in any
    /// phase other than [`Serving`](ServerPhase::Serving).
    pub fn phase(&self) -> ServerPhase {
        match self.0.reported() {
            Some(_report) => ServerPhase::Ended,
            None => self.0.phase().into(),
        }
    }

    /// Waits until the server has reached `phase` or a later one. Returns the phase that the server
    /// is then in.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: phases only advance, so a later call does not miss one.
    pub fn reached(&self, phase: ServerPhase) -> impl Future<Output = ServerPhase> + Send + use<> {
        let handle = self.clone();
        async move {
            let reached = || Some(handle.phase()).filter(|now| *now >= phase);
            handle.0.advanced_until(reached).await
        }
    }

    /// Begins the lame-duck phase: the server serves as before, but [`phase`](Self::phase) shows
    /// that it will shut down. With
    /// [`lame_duck_closes_listener`](crate::ServerBuilder::lame_duck_closes_listener), it also
    /// refuses new connections. The phase lasts until a shutdown is requested, for example by
    /// [`shutdown`](Self::shutdown), but at least for the time of
    /// [`ServerBuilder::lame_duck`](crate::ServerBuilder::lame_duck). It ends earlier if
    /// [`drain`](Self::drain) or [`abort`](Self::abort) is called, if a deadline of
    /// [`shutdown_within`](Self::shutdown_within) is reached first, or if accepting fails with an
    /// error that ends the server.
    ///
    /// [`shutdown`](Self::shutdown) begins the phase by itself. Call this method to take a server
    /// out of a load balancer's rotation now and shut it down later.
    pub fn lame_duck(&self) {
        self.0.lock_plan().begin_lame_duck();
        self.0.advance(Phase::LameDuck);
    }

    /// Begins a graceful shutdown. A second call does nothing.
    ///
    /// A shutdown has two phases. The first is the lame-duck phase. Its length is set with
    /// [`ServerBuilder::lame_duck`](crate::ServerBuilder::lame_duck) (default: zero). In this phase
    /// the server accepts and serves as before, unless
    /// [`lame_duck_closes_listener`](crate::ServerBuilder::lame_duck_closes_listener) closes the
    /// listener at the beginning of the phase. Then the server drains: connections finish their
    /// requests in progress and close. Connections in the backlog are still accepted, as far as the
    /// limit allows; then the listener closes. If a supervisor keeps a socket open, the backlog of
    /// that socket is left to the next process. Connections that are still open at the deadline
    /// (default: 30 s, see
    /// [`ServerBuilder::shutdown_deadline`](crate::ServerBuilder::shutdown_deadline)) are aborted.
    #[doc(alias = "graceful_shutdown")]
    #[doc(alias = "stop")]
    pub fn shutdown(&self) {
        self.0.shutdown(None);
    }

    /// Begins a graceful shutdown with this deadline instead of the one set by
    /// [`ServerBuilder::shutdown_deadline`](crate::ServerBuilder::shutdown_deadline). The deadline
    /// counts from the end of the lame-duck phase. If a shutdown is in progress, the deadline
    /// counts from this call instead, and applies only if it is earlier than the current one.
    pub fn shutdown_within(&self, deadline: Duration) {
        self.0.shutdown(Some(deadline));
    }

    /// Begins a graceful shutdown without a lame-duck phase, or ends that phase early if it has
    /// begun. In all other respects, it is like [`shutdown`](Self::shutdown).
    pub fn drain(&self) {
        self.0.drain();
    }

    /// Aborts all connections and ends the server, as a second signal does after
    /// [`signal::install`](crate::signal::install).
    pub fn abort(&self) {
        self.0.advance(Phase::Aborting);
    }

    /// Waits until the server has ended, and returns the result of its shutdown.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: a later call returns the same report.
    pub async fn closed(&self) -> Report {
        self.0.advanced_until(|| self.0.reported()).await
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("name", &self.name())
            .field("addresses", &self.local_addrs())
            .field("live", &self.live())
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}

impl ServerState {
    pub(crate) fn phase(&self) -> Phase {
        let phase = self.phase.load(Ordering::SeqCst);
        Phase::ALL
            .into_iter()
            .find(|known| *known as u8 == phase)
            .unwrap_or(Phase::Aborting)
    }

    /// Advances to a phase. Returns `false` if the server was already in that phase, or in a later
    /// one.
    pub(crate) fn advance(&self, phase: Phase) -> bool {
        let advanced = self.phase.fetch_max(phase as u8, Ordering::SeqCst) < phase as u8;
        if advanced {
            self.server.wake();
            self.advanced.notify_waiters();
            self.table
                .all()
                .for_each(|life| self.signal_phase(&life, phase));
        }
        advanced
    }

    pub(crate) fn plan(&self) -> Plan {
        *self.lock_plan()
    }

    /// Begins a shutdown, or makes the deadline of the current one earlier.
    pub(crate) fn shutdown(&self, deadline: Option<Duration>) {
        let drains = self.lock_plan().begin_shutdown(deadline);
        let phase = if drains {
            Phase::Draining
        } else {
            Phase::LameDuck
        };
        if !self.advance(phase) {
            self.server.wake();
            self.advanced.notify_waiters();
        }
    }

    /// Returns whether a shutdown has begun. A lame-duck phase alone is not a shutdown.
    #[cfg(any(feature = "handover", feature = "systemd"))]
    pub(crate) fn is_shutting_down(&self) -> bool {
        self.plan().begun.is_some() || self.phase() >= Phase::Draining
    }

    /// Begins to drain, because of a shutdown or an error.
    pub(crate) fn drain(&self) {
        self.lock_plan().begin_drain();
        self.advance(Phase::Draining);
    }

    /// Returns the listening sockets that are still open.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = ListeningSocket> + use<> {
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        let open: Vec<_> = sockets.iter().filter_map(WeakSocket::upgrade).collect();
        open.into_iter()
    }

    /// Records the listening sockets after a resume, which has opened some of them again.
    pub(crate) fn listens_on(&self, sockets: &[ListeningSocket]) {
        let sockets = sockets.iter().map(ListeningSocket::downgrade).collect();
        *self.sockets.lock().unwrap_or_else(PoisonError::into_inner) = sockets;
    }

    /// Waits until `look` returns `Some`. `look` is called again when the phase or the shutdown's
    /// deadline changes, when heartbeats are answered, and when the report is ready.
    pub(crate) async fn advanced_until<R>(&self, look: impl Fn() -> Option<R>) -> R {
        loop {
            let mut advanced = std::pin::pin!(self.advanced.notified());
            advanced.as_mut().enable();
            if let Some(found) = look() {
                return found;
            }
            advanced.await;
        }
    }

    fn lock_plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    pub(crate) fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::Acquire)
    }

    pub(crate) fn live(&self) -> usize {
        self.table.live.load(Ordering::SeqCst)
    }

    /// Registers the waker of the server's loop, and answers pending heartbeats. Check the state
    /// *after* this call. If it is checked before, a change between the check and this call is
    /// missed.
    pub(crate) fn register_server(&self, waker: &std::task::Waker) {
        self.server.register(waker);
        self.answer_heartbeats();
    }

    /// Waits, in the server's loop, until `holds` returns `true`. `holds` is called again whenever
    /// the loop is woken.
    pub(crate) async fn until(&self, holds: impl Fn() -> bool) {
        std::future::poll_fn(|cx| {
            self.register_server(cx.waker());
            if holds() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}
