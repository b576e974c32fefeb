//! The server: binds, accepts, and ends in good order.

mod accept_loop;
mod builder;
mod connection;
mod workers;

use std::fmt;
use std::future::IntoFuture;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::time::{Instant, timeout_at};
use tower_layer::Layer;
use tower_service::Service;

use crate::bind::{Endpoint, Listener, Sockets};
use crate::connection::Connection;
use crate::end_reason::EndReason;
use crate::error::{BoxError, Error};
use crate::handle::{Handle, Phase, Shared};
use crate::shutdown::Report;
use accept_loop::{AcceptLoop, Policy, Until};
use workers::{Runtimes, Workers};

pub use builder::ServerBuilder;

/// At a shutdown, how many are taken in from the backlog at most: what the default backlog holds. Those who come meanwhile must not keep
/// the door open.
const BACKLOG: usize = 1024;

/// How long connections that were cut off may take to be gone. They are in their next turn; one that blocks its thread has none.
const GONE: Duration = Duration::from_secs(1);

/// A server that listens, and accepts nobody yet.
pub struct Server<L = Sockets> {
    listener: L,
    handle: Handle,
    policy: Policy,
    runtimes: Runtimes,
    // Last: nobody is told of the end before the listener is closed.
    end: CutOff,
}

impl Server {
    /// Listens on one address: `127.0.0.1:7000`, `[::]:0`, `localhost:7000`, `unix:/run/my.sock`, or a listener of `std`.
    ///
    /// # Errors
    ///
    /// [`Error::Bind`], which names the address.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with I/O enabled.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives back all that was bound.
    pub async fn bind(endpoint: impl Into<Endpoint>) -> Result<Self, Error> {
        Self::builder().listen(endpoint).bind().await
    }

    /// Begins a server with several addresses, a name, or other options.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }
}

impl<L: Listener> Server<L> {
    /// Makes a server of a listener of your own, with default options.
    pub fn from_listener(listener: L) -> Self {
        Server::builder().build(listener)
    }

    /// Returns a handle to the server, good for its whole life.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves connections with `stack`: a service that is given each [`Connection`], and whose future is its life.
    ///
    /// The loop accepts when `stack` is ready. Its calls are made in the loop, and so must not block; their futures run in a
    /// task each. What they give back is ignored: an end is told by [`Connection::on_end`].
    pub fn serve<S>(self, stack: S) -> Serve<L, S>
    where
        S: Service<Connection<L::Io>> + Send + 'static,
        S::Response: 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
    {
        Serve {
            server: self,
            stack,
            signal: None,
        }
    }
}

impl<L> fmt::Debug for Server<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A server at work, once it is awaited. It ends by a shutdown, with a [`Report`], or by an [`Error`].
///
/// # Cancel safety
///
/// Dropping the future closes the listener and cuts all connections off.
#[must_use = "a server serves nobody unless it is awaited"]
pub struct Serve<L, S> {
    server: Server<L>,
    stack: S,
    signal: Option<BoxFuture<()>>,
}

impl<L, S> Serve<L, S> {
    /// Shuts the server down when `signal` is done.
    pub fn with_graceful_shutdown(
        mut self,
        signal: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        self.signal = Some(Box::pin(signal));
        self
    }
}

impl<L, S> fmt::Debug for Serve<L, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serve")
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

impl<L, S> IntoFuture for Serve<L, S>
where
    L: Listener,
    S: Service<Connection<L::Io>> + Send + 'static,
    S::Response: 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    type Output = Result<Report, Error>;
    type IntoFuture = BoxFuture<Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let Self {
            server,
            stack,
            signal,
        } = self;
        Box::pin(async move {
            let shared = Arc::clone(&server.handle.0);
            let serving = serve(server, stack);
            let Some(signal) = signal else {
                return serving.await;
            };
            match select(std::pin::pin!(serving), signal).await {
                Either::Left((ended, _)) => ended,
                Either::Right(((), serving)) => {
                    shared.advance(Phase::LameDuck);
                    serving.await
                }
            }
        })
    }
}

/// Cuts everybody off when the server, or its future, is dropped before its end, and reports that as its end.
struct CutOff(Arc<Shared>);

impl Drop for CutOff {
    fn drop(&mut self) {
        self.0.advance(Phase::Aborting);
        self.0.report(Duration::ZERO);
    }
}

async fn serve<L, S>(server: Server<L>, stack: S) -> Result<Report, Error>
where
    L: Listener,
    S: Service<Connection<L::Io>> + Send + 'static,
    S::Response: 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    // Before all else, and so dropped last: connections are cut off before their runtime is.
    let mut workers = Workers::start(server.runtimes, server.handle.name())
        .await
        .map_err(Error::Workers)?;
    let Server {
        listener,
        handle,
        policy,
        end: _cut_off,
        ..
    } = server;
    let shared = handle.0;
    let stack = shared.limit.layer().layer(stack);
    let mut accepting = AcceptLoop::new(listener, stack, Arc::clone(&shared), policy, &mut workers);

    let mut served = accepting.run(Until::PhaseEnds(Phase::Serving)).await;

    // From here on the server ends, because it was told to, or because it has to.
    shared.advance(Phase::LameDuck);
    let begun = Instant::now();
    let plan = shared.plan();
    if served.is_ok() && !plan.lame_duck.is_zero() {
        let lame_duck = accepting.run(Until::PhaseEnds(Phase::LameDuck));
        // At the end of the time, or with an error: either way it is over.
        served = match begun.checked_add(plan.lame_duck) {
            Some(end) => timeout_at(end, lame_duck).await.unwrap_or(Ok(())),
            None => lame_duck.await,
        };
    }
    shared.advance(Phase::Draining);
    if served.is_ok() {
        // Those who are in the backlog have been told that they are connected.
        served = accepting.run(Until::Empty(BACKLOG)).await;
    }
    drop(accepting);
    shared.watch_ends(true);

    let deadline = begun.checked_add(plan.lame_duck.saturating_add(plan.deadline));
    if !all_gone(&shared, Some(Phase::Aborting), deadline).await {
        let reason = if shared.phase() == Phase::Aborting {
            EndReason::Killed
        } else {
            EndReason::DrainDeadline
        };
        shared.cut_off(reason);
        all_gone(&shared, None, Instant::now().checked_add(GONE)).await;
    }
    workers.stop().await;
    let report = shared.report(begun.elapsed());
    served.map(|()| report)
}

/// Waits until no connection is left. Returns whether that came before the phase or the deadline.
async fn all_gone(shared: &Shared, until: Option<Phase>, deadline: Option<Instant>) -> bool {
    let gone = std::future::poll_fn(|cx| {
        shared.register_server(cx.waker());
        if shared.live() == 0 {
            Poll::Ready(true)
        } else if until == Some(shared.phase()) {
            Poll::Ready(false)
        } else {
            Poll::Pending
        }
    });
    match deadline {
        Some(deadline) => timeout_at(deadline, gone).await.unwrap_or(false),
        None => gone.await,
    }
}

/// The default for what accept errors mean.
fn default_policy() -> Policy {
    Arc::new(|err: &io::Error| crate::accept::classify(err))
}
