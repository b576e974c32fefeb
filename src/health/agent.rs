use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tower_service::Service;

use super::{Health, Readiness};
use crate::close::Linger;
use crate::connection::Connection;
use crate::error::BoxError;
use crate::handle::Handle;

/// The maximum time to send the answer and close the connection. HAProxy needs far less time,
/// because it reads one line and closes.
const TIME: Duration = Duration::from_secs(5);

/// Answers HAProxy's [`agent-check`], as a connection service for an admin listener.
///
/// HAProxy connects at an interval and reads one line of words. Its other checks normally report
/// only that a server is up or down. An agent's answer can also stop new connections while open
/// ones continue.
///
/// | the server is | answer | HAProxy |
/// | --- | --- | --- |
/// | ready | `up ready` | sends connections |
/// | at its limit | `up drain` | sends no new connections, except those of [persistent] clients |
/// | lame duck | `up drain` | as at the limit |
/// | paused, suspended | `up maint` | sends no connections, and pauses its other checks |
/// | draining, ended | `stopped # draining`, `stopped # ended` | marks the server as down; open connections continue |
///
/// Until a server drains, its answers begin with `up`, and the answer of a ready server also
/// contains `ready`. So when a new process replaces an old one, the new one's answers bring the
/// server back into rotation, whatever the old one has answered. HAProxy keeps the last answer
/// while the agent does not answer.
///
/// ```text
/// backend lines
///     server a 10.0.0.9:7000 check agent-check agent-port 7001 agent-inter 1s weight 100
/// ```
///
/// - **Use `check`, too.** HAProxy does not count a missing answer of an agent as a failure. Only
///   `check` notices that a machine is gone.
/// - **Drains by an operator.** The answer `ready` also ends the state `DRAIN` or `MAINT` that an
///   operator has set through HAProxy's runtime API (the stats socket). To keep such a state, first
///   send `disable agent lines/a` to this API.
///
/// [`agent-check`]: https://docs.haproxy.org/2.6/configuration.html#5.2-agent-check
/// [persistent]: https://docs.haproxy.org/2.6/configuration.html#4-cookie
#[derive(Clone, Debug)]
pub struct AgentCheck {
    handle: Handle,
    weighs: bool,
}

impl AgentCheck {
    /// Creates the service for the server of this handle.
    pub fn new(handle: Handle) -> Self {
        Self {
            handle,
            weighs: false,
        }
    }

    /// Adds the [free part of the connection limit](Health::free_percent) in percent to the answer
    /// of a ready server, as in `up ready 75%`. HAProxy multiplies the server's weight by this
    /// percentage.
    ///
    /// Default: off. Why: HAProxy's default weight is 1, and any percentage below 100 of it is
    /// rounded down to 0. So the server would be out of rotation as soon as 1 % of its limit is in
    /// use. Set `weight 100` in HAProxy's `server` line before you turn this on.
    #[must_use]
    pub fn weight_by_load(mut self) -> Self {
        self.weighs = true;
        self
    }

    fn answer(&self) -> String {
        let health = Health::of(&self.handle);
        match health.readiness() {
            Readiness::Ready if self.weighs => format!("up ready {}%\n", health.free_percent()),
            Readiness::Ready => "up ready\n".to_owned(),
            Readiness::AtLimit | Readiness::LameDuck => "up drain\n".to_owned(),
            Readiness::Paused | Readiness::Suspended => "up maint\n".to_owned(),
            ended @ (Readiness::Draining | Readiness::Ended) => format!("stopped # {ended}\n"),
        }
    }
}

impl<Io> Service<Connection<Io>> for AgentCheck
where
    Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Response = ();
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut conn: Connection<Io>) -> Self::Future {
        let answer = self.answer();
        Box::pin(async move {
            let answered = async {
                conn.write_all(answer.as_bytes()).await?;
                conn.close(Linger::default()).await
            };
            timeout(TIME, answered).await??;
            Ok(())
        })
    }
}
