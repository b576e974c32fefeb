use std::fmt;

use crate::handle::{Handle, ServerPhase};

/// The readiness of a server for new connections. Each variant except `Ready` is a reason why the
/// server is not ready. Returned by [`Health::readiness`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Readiness {
    /// A new connection would be accepted now, unless the connection stack is not ready or
    /// accepting fails (for example, for lack of file descriptors).
    Ready,
    /// The [limit](Handle::limit) is reached, so new connections wait in the backlog.
    AtLimit,
    /// Accepting is [paused](Handle::pause), so new connections wait in the backlog.
    Paused,
    /// The server is [suspended](Handle::suspend), so new connections are refused. If the listening
    /// socket stays open, for example because a supervisor keeps it open, they wait in the backlog
    /// instead.
    Suspended,
    /// The server is in its lame-duck phase and will drain later. Until then it accepts as before,
    /// unless [`lame_duck_closes_listener`](crate::ServerBuilder::lame_duck_closes_listener) has
    /// closed the listener.
    LameDuck,
    /// The server drains or aborts its connections, and closes its listener.
    Draining,
    /// The server has ended.
    Ended,
}

impl Readiness {
    /// Returns the name in lower case, such as `at_limit`, for status pages and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::AtLimit => "at_limit",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::LameDuck => "lame_duck",
            Self::Draining => "draining",
            Self::Ended => "ended",
        }
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The health of a server at one moment. Its `Display` output is one line, such as `ready: phase
/// serving, 12 connections, limit 10000 with 12 in use`.
///
/// ```
/// use tower_tcp::{Handle, health::{Health, Readiness}};
///
/// /// A handler for your own router.
/// fn ready(server: &Handle) -> (u16, String) {
///     let health = Health::of(server);
///     let status = match health.readiness() {
///         Readiness::Ready => 200,
///         _ => 503,
///     };
///     (status, health.to_string())
/// }
/// # let _ = ready;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    phase: ServerPhase,
    is_paused: bool,
    is_suspended: bool,
    connections: usize,
    in_use: usize,
    limit: Option<usize>,
}

impl Health {
    /// Returns the health of the server now.
    pub fn of(handle: &Handle) -> Self {
        Self {
            phase: handle.phase(),
            is_paused: handle.is_paused(),
            is_suspended: handle.is_suspended(),
            connections: handle.live(),
            in_use: handle.limit().in_use(),
            limit: handle.limit().get(),
        }
    }

    /// Returns `Ready`, or the reason why the server is not ready for new connections. Of several
    /// reasons it returns the first in this order: a phase other than `Serving`, a suspension, a
    /// pause, the limit.
    pub fn readiness(&self) -> Readiness {
        match self.phase {
            ServerPhase::Ended => Readiness::Ended,
            ServerPhase::Draining => Readiness::Draining,
            ServerPhase::LameDuck => Readiness::LameDuck,
            ServerPhase::Serving if self.is_suspended => Readiness::Suspended,
            ServerPhase::Serving if self.is_paused => Readiness::Paused,
            ServerPhase::Serving if self.limit.is_some_and(|limit| self.in_use >= limit) => {
                Readiness::AtLimit
            }
            ServerPhase::Serving => Readiness::Ready,
        }
    }

    /// Returns whether the server is ready for new connections.
    pub fn is_ready(&self) -> bool {
        self.readiness() == Readiness::Ready
    }

    /// Returns the server's phase.
    pub fn phase(&self) -> ServerPhase {
        self.phase
    }

    /// Returns the number of the server's open connections.
    pub fn connections(&self) -> usize {
        self.connections
    }

    /// Returns the number of permits of the server's [limit](Handle::limit) that are in use. If
    /// several servers share the limit, the number includes the permits of all of them.
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    /// Returns the server's [limit](Handle::limit), or `None` if there is none.
    pub fn limit(&self) -> Option<usize> {
        self.limit
    }

    /// Returns the free part of the server's [limit](Handle::limit) in percent, rounded up. It is
    /// 100 if all of the limit is free, or if there is no limit. It is 0 if the limit is reached.
    pub fn free_percent(&self) -> u8 {
        let Some(limit) = self.limit.filter(|limit| *limit > 0) else {
            return if self.limit.is_none() { 100 } else { 0 };
        };
        let free = limit.saturating_sub(self.in_use) as u128 * 100;
        // The quotient is at most 100, because the free part is at most the limit.
        u8::try_from(free.div_ceil(limit as u128)).unwrap_or(100)
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            phase, connections, ..
        } = self;
        let readiness = self.readiness();
        write!(f, "{readiness}: phase {phase}, {connections} connections, ")?;
        match self.limit {
            Some(limit) => write!(f, "limit {limit} with {} in use", self.in_use),
            None => f.write_str("no limit"),
        }
    }
}
