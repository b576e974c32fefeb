//! The server: binds, accepts, and shuts down gracefully.

mod accept_loop;
mod builder;
mod connection;
mod serve;
mod workers;

use std::fmt;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::time::{Instant, timeout, timeout_at};
use tower_layer::Layer;

use crate::admit::AddressFilter;
#[cfg(feature = "handover")]
use crate::bind::handover;
use crate::bind::{Endpoint, IntoListener, Listener, Sockets};
use crate::connection::ConnectionService;
use crate::end::EndReason;
use crate::error::Error;
use crate::handle::{Handle, Phase, Plan, ServerState, earliest};
use crate::signals::Report;
use accept_loop::{AcceptErrorPolicy, AcceptLoop, Door};
use workers::{Runtimes, Workers};

pub use builder::ServerBuilder;
pub use serve::Serve;

/// The maximum time to wait for aborted connections to end. An aborted connection ends when its
/// task runs next, so it takes longer only if its thread is blocked.
const ABORT_WAIT: Duration = Duration::from_secs(1);

/// A server that is bound but does not accept yet.
pub struct Server<L = Sockets> {
    listener: L,
    handle: Handle,
    policy: AcceptErrorPolicy,
    filters: Vec<AddressFilter>,
    runtimes: Runtimes,
    // This is the last field, so it is dropped last: tasks that wait for the server's end wake only
    // after the listener is closed.
    end: CutOff,
}

impl Server {
    /// Binds a server to one endpoint, such as `127.0.0.1:7000`, `[::]:0`, `localhost:7000`,
    /// `unix:/run/my.sock`, or a listener of `std` or tokio.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Bind`], which names the endpoint.
    ///
    /// # Panics
    ///
    /// Panics if polled outside a tokio runtime with I/O enabled.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes every socket that was bound.
    #[doc(alias = "listen")]
    pub async fn bind(endpoint: impl Into<Endpoint>) -> Result<Self, Error> {
        Self::builder().listen(endpoint).bind().await
    }

    /// Creates a builder for a server with several addresses, a name, or other options.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }
}

impl<L: Listener> Server<L> {
    /// Creates a server from a [`Listener`], or from tokio's `TcpListener` or `UnixListener`, with
    /// default options.
    ///
    /// # Panics
    ///
    /// With a listener of tokio, panics if called outside a tokio runtime with I/O enabled.
    #[doc(alias = "from_tcp")]
    pub fn from_listener<I>(listener: I) -> Self
    where
        I: IntoListener<Listener = L>,
    {
        Server::builder().build(listener)
    }

    /// Returns a handle, which controls the running server. It is still valid after the server's
    /// end, so that [`Handle::closed`] can return the report.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves connections with `stack`, a service that is called with each [`Connection`] and whose
    /// future runs as long as the connection.
    ///
    /// The accept loop accepts only when `stack` is ready. It calls `stack` itself, so a call must
    /// not block. (A call that blocks stops the loop, and can stop the runtime's timers.) The
    /// future that a call returns runs in a new task, and its response is ignored. Use
    /// [`Connection::on_end`] to learn how a connection ended. [`layers`](crate::layers) describes
    /// the effect of each of tower's layers in `stack`.
    ///
    /// If the returned future is awaited on a multi-thread runtime but outside a task, as in a
    /// `main` with `#[tokio::main]`, its first poll spawns a task for the accept loop, in the
    /// current span. Why: tokio runs `main` on a thread of its own, and waking that thread for each
    /// client would cost a tenth to a third of a short connection's CPU time.
    ///
    /// In that task, the accept loop, its filters and the calls of `stack` do not see what belongs
    /// to the caller's thread or task: a `LocalSet`, task-locals, a subscriber set by
    /// `tracing::subscriber::set_default`. If a call uses `tokio::task::spawn_local`, await
    /// `spawn_local(server.serve(stack))` in the `LocalSet`.
    ///
    /// # Panics
    ///
    /// The returned future panics if it is polled outside a tokio runtime with time enabled, at the
    /// latest in a shutdown. On a runtime without time, a connection that needs a timer ends with
    /// [`Panic`](EndReason::Panic).
    ///
    /// [`Connection`]: crate::Connection
    /// [`Connection::on_end`]: crate::Connection::on_end
    pub fn serve<S>(self, stack: S) -> Serve
    where
        S: ConnectionService<L::Io>, // wrap a service of requests in `Pipeline` or `Http`
    {
        Serve::new(Arc::clone(&self.handle.0), serve(self, stack))
    }
}

impl<L> fmt::Debug for Server<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

/// A guard that aborts all connections and creates the report of the shutdown if the server or its
/// future is dropped before the end.
struct CutOff(Arc<ServerState>);

impl Drop for CutOff {
    fn drop(&mut self) {
        self.0.advance(Phase::Aborting);
        self.0.report(Duration::ZERO);
    }
}

async fn serve<L, S>(server: Server<L>, stack: S) -> Result<Report, Error>
where
    L: Listener,
    S: ConnectionService<L::Io>,
{
    // The workers are created first, and therefore dropped last: connections must be aborted before
    // their runtimes stop.
    let mut workers = Workers::start(server.runtimes, server.handle.name())
        .await
        .map_err(Error::Workers)?;
    let Server {
        // Declared before the listener, and therefore dropped after it, as in `Server`.
        end: _cut_off,
        listener,
        handle,
        policy,
        filters,
        ..
    } = server;
    let shared = handle.0;
    let stack = shared.limit.layer().layer(stack);
    let door = Door { policy, filters };
    #[cfg(feature = "handover")]
    {
        let may_accept = pin!(handover::may_accept(shared.sockets()));
        let ends = pin!(shared.until(|| shared.is_shutting_down()));
        if let Either::Right(_) = select(may_accept, ends).await {
            // This server shuts down before it has taken over. The process that it was to replace
            // continues to accept from these sockets.
            shared.sockets().for_each(|socket| socket.release());
        }
    }
    let mut accepting = AcceptLoop::new(listener, stack, Arc::clone(&shared), door, &mut workers);

    let mut served = accepting.run(Phase::Serving).await;
    let mut accepting = Some(accepting);
    // With `lame_duck_closes_listener`, the listener is closed before the lame-duck phase, unless a
    // supervisor keeps a socket open. The clients of such a socket would not be refused, but would
    // wait for the next process.
    let closes = shared.plan().closes_listener && !shared.sockets().any(|socket| socket.is_kept());
    if served.is_ok() && closes {
        served = close_listener(&shared, &mut accepting).await;
    }
    if served.is_ok() {
        let lame_duck = pin!(async {
            match &mut accepting {
                Some(accepting) => accepting.run(Phase::LameDuck).await,
                None => {
                    shared.until(|| shared.phase() != Phase::LameDuck).await;
                    Ok(())
                }
            }
        });
        let over = pin!(lame_duck_over(&shared));
        // The lame-duck phase ends when its time is over, when a drain or an abort begins, or when
        // accepting fails.
        served = match select(over, lame_duck).await {
            Either::Left(((), _)) => Ok(()),
            Either::Right((served, _)) => served,
        };
    }

    // From here on the server shuts down, because a shutdown was requested or because accepting
    // failed.
    shared.drain();
    let begun = shared.plan().begun.unwrap_or_else(Instant::now);
    if served.is_ok() {
        served = close_listener(&shared, &mut accepting).await;
    }
    drop(accepting);
    shared.watch_ends(true);

    if !all_drained(&shared).await {
        let reason = if shared.phase() == Phase::Aborting {
            EndReason::Killed
        } else {
            EndReason::DrainDeadline
        };
        shared.abort_all(reason);
        let gone = shared.until(|| shared.live() == 0);
        // The server does not wait longer for a connection that blocks its thread. Such a
        // connection counts as aborted.
        let _left_behind = timeout(ABORT_WAIT, gone).await;
    }
    workers.stop().await;
    let report = shared.report(begun.elapsed());
    served.map(|()| report)
}

/// Accepts the connections in the backlog and closes the listener. If a supervisor keeps a socket
/// open for the next process, the connections in the backlog of that socket are left to the next
/// process, which can serve them for longer.
async fn close_listener<L, S>(
    shared: &ServerState,
    accepting: &mut Option<AcceptLoop<'_, L, S>>,
) -> Result<(), Error>
where
    L: Listener,
    S: ConnectionService<L::Io>,
{
    shared.sockets().for_each(|socket| socket.release_if_kept());
    match accepting.take() {
        Some(mut accepting) => accepting.empty().await,
        None => Ok(()),
    }
}

/// Waits until the time of the lame-duck phase is over, or until the shutdown's deadline.
/// `shutdown_within` may make the deadline earlier meanwhile.
async fn lame_duck_over(state: &ServerState) {
    loop {
        let ends = |plan: Plan| earliest(plan.drain_at, plan.abort_at);
        let end = ends(state.plan());
        let changed = state.until(|| ends(state.plan()) != end);
        match end {
            Some(end) if end <= Instant::now() => return,
            Some(end) => {
                if timeout_at(end, changed).await.is_err() {
                    return;
                }
            }
            None => changed.await,
        }
    }
}

/// Waits until no connection is left. Returns `false` if a connection is still open at the
/// deadline, or when the server aborts.
async fn all_drained(state: &ServerState) -> bool {
    loop {
        let abort_at = state.plan().abort_at;
        let changed = state.until(|| {
            // `shutdown_within` may make the deadline earlier meanwhile.
            state.live() == 0
                || state.phase() == Phase::Aborting
                || state.plan().abort_at != abort_at
        });
        let on_time = match abort_at {
            Some(at) => timeout_at(at, changed).await.is_ok(),
            None => {
                changed.await;
                true
            }
        };
        if state.live() == 0 {
            return true;
        }
        if !on_time || state.phase() == Phase::Aborting {
            return false;
        }
    }
}

/// Returns the default accept-error policy.
fn default_policy() -> AcceptErrorPolicy {
    Arc::new(|err: &io::Error| crate::accept::classify(err))
}
