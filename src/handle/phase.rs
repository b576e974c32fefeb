/// The phase of a server, returned by [`Handle::phase`](super::Handle::phase). Phases only advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ServerPhase {
    /// The server accepts connections and serves them.
    Serving,
    /// The server accepts and serves connections as before, but will shut down. The listener is
    /// closed if [`lame_duck_closes_listener`](crate::ServerBuilder::lame_duck_closes_listener) is
    /// set and no supervisor keeps a socket open. A readiness check should now tell load balancers
    /// to send no more connections.
    LameDuck,
    /// Connections finish their requests in progress and close. If the listener is still open,
    /// connections in its backlog are accepted as far as the [limit](crate::ServerBuilder::limit)
    /// allows, and then the listener closes. A backlog that another process shares is left to that
    /// process.
    ///
    /// This is also the phase of a server that aborts its connections.
    Draining,
    /// The server has ended.
    Ended,
}

impl ServerPhase {
    /// Returns the phase as a lower-case word, for events, metrics and status pages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::LameDuck => "lame_duck",
            Self::Draining => "draining",
            Self::Ended => "ended",
        }
    }
}

impl std::fmt::Display for ServerPhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The phase of the server's loop. Unlike [`ServerPhase`], it has a variant for an abort, and none
/// for the end of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    Serving,
    LameDuck,
    Draining,
    /// The server aborts its connections.
    Aborting,
}

impl Phase {
    pub(super) const ALL: [Self; 4] = [
        Self::Serving,
        Self::LameDuck,
        Self::Draining,
        Self::Aborting,
    ];
}

impl From<Phase> for ServerPhase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Serving => Self::Serving,
            Phase::LameDuck => Self::LameDuck,
            Phase::Draining | Phase::Aborting => Self::Draining,
        }
    }
}
