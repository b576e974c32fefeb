//! Answers the health checks of load balancers, Kubernetes and systemd: is the server alive, and is
//! it ready for more connections?
//!
//! | checks | answered by |
//! | --- | --- |
//! | HTTP checks of Kubernetes, HAProxy, AWS | `HealthChecks`, a service of HTTP requests (feature `http`) |
//! | HAProxy's `agent-check` | [`AgentCheck`], a connection service |
//! | checks by your own protocol, or in your own HTTP router | your code, with [`Health`] and [`is_live`] |
//! | the watchdog of systemd | `signal::systemd` (feature `systemd`) |
//!
//! Serve the checks on a separate listener, the *admin listener*. On the server's own port, a check
//! would wait in the backlog while the server is paused or at its limit, and would be refused
//! during a drain. The admin listener belongs to another server, with its own limit and shutdown,
//! so it answers until the main server has ended. The page [`balancers`](crate::balancers) shows
//! which check detects which state.
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
//! down soon. Balancers should send no new connections to a server that is not ready. [`Readiness`]
//! lists the reasons why a server may not be ready. It does not include two conditions: a layer of
//! the connection stack that is not ready, and a lack of file descriptors. A server notices such a
//! lack only when an accept fails. The client then waits in the backlog, and the server tries again
//! until a descriptor is free. Watch for the event `accept.stalled` instead.
//!
//! *Live* means that the accept loop runs and is not blocked ([`Handle::heartbeat`]). Restart a
//! process that is not live. A server that is paused, at its limit or draining is live: a restart
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

/// The time that an accept loop has to answer a heartbeat. A loop that is not blocked answers
/// within microseconds. A Kubernetes probe waits for 1 s by default, so it still gets the result.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// Returns whether the server is live: its accept loop answers a heartbeat within 500 ms.
///
/// Returns `false` for a server that has ended, or whose future of [`serve`](crate::Server::serve)
/// has not been polled yet.
///
/// The call must run on a runtime with time enabled. While the accept loop blocks the only thread
/// of that runtime, the call does not complete. A probe then fails because it gets no answer.
///
/// # Cancel safety
///
/// Dropping the future loses nothing.
pub async fn is_live(handle: &Handle) -> bool {
    timeout(HEARTBEAT, handle.heartbeat())
        .await
        .unwrap_or(false)
}
