//! Answers the checks of load balancers, Kubernetes and systemd: is the server alive, and is it
//! ready for more connections?
//!
//! | asked by | answered by |
//! | --- | --- |
//! | HTTP checks: Kubernetes, HAProxy, AWS | `HealthChecks`, a service of HTTP requests (feature `http`) |
//! | HAProxy's `agent-check` | [`AgentCheck`], a connection service |
//! | a router or protocol of your own | [`Health`] and [`is_live`] |
//! | systemd | `signal::systemd` (feature `systemd`) |
//!
//! Serve the checks on a listener of their own, the *admin listener*. A check on the server's own
//! port waits in the backlog when the server is paused or at its limit, and finds the listener
//! closed during a drain. The admin listener has a limit and a shutdown of its own, so it answers
//! until the server has ended. The page [`balancers`](crate::balancers) has a table of which check
//! sees which state.
//!
//! ```no_run
//! use std::time::Duration;
//! # use tower::service_fn;
//! # use tower_tcp::{BoxError, Connection, bind::Socket};
//! use tower_tcp::{Server, health, signal};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), BoxError> {
//! # let stack = service_fn(|_: Connection<Socket>| async { Ok::<_, BoxError>(()) });
//! let server = Server::builder().listen("0.0.0.0:7000").lame_duck(Duration::from_secs(5));
//! let server = server.bind().await?;
//! let handle = server.handle();
//! signal::install(&handle)?;
//!
//! let agent = Server::bind("127.0.0.1:7001").await?;
//! let agent = agent.serve(health::AgentCheck::new(handle.clone()));
//! let agent = agent.with_graceful_shutdown(async move { drop(handle.closed().await) });
//! tokio::try_join!(server.serve(stack), agent)?;
//! # Ok(())
//! # }
//! ```
//!
//! # Ready and live
//!
//! *Ready* means that a new connection would be accepted now, and that the server will not shut
//! down soon. A server that is not ready gets no new connections. [`Readiness`] lists the reasons.
//! A lack of file descriptors is not among them, because it shows only when a client connects. A
//! server that gets no new connections could not find out that it is ready again. Watch for the
//! event `accept.stalled` instead.
//!
//! *Live* means that the accept loop is polled and does not block ([`Handle::heartbeat`]). Restart
//! a process that is not live. A server that is paused, at its limit or draining is live: a restart
//! would only lose its connections.

mod agent;
#[cfg(feature = "http")]
mod http;
mod readiness;

use std::time::Duration;

use tokio::time::timeout;

use crate::handle::Handle;

pub use agent::AgentCheck;
#[cfg(feature = "http")]
pub use http::HealthChecks;
pub use readiness::{Health, Readiness};

/// The time that an accept loop has for a heartbeat. A loop that is not blocked takes a turn within
/// microseconds, and a probe of Kubernetes waits for 1 s by default.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// Returns whether the server is live: its accept loop takes a turn within 500 ms.
///
/// Returns `false` for a server that has ended, or that is not served yet.
///
/// The call must run on a runtime with time enabled. If the accept loop blocks the only thread of
/// the runtime that also runs this call, the call does not return, and a probe fails because it
/// gets no answer.
///
/// # Cancel safety
///
/// Nothing is lost if the future is dropped.
pub async fn is_live(handle: &Handle) -> bool {
    timeout(HEARTBEAT, handle.heartbeat())
        .await
        .unwrap_or(false)
}
