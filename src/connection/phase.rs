use std::fmt;

/// The phase of a connection's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum ConnectionPhase {
    /// Pre-connect hooks run, for example a TLS handshake.
    PreConnect,
    /// The connection's service runs.
    Serving,
    /// The service runs but should finish: the server drains, the connection has reached its
    /// maximum age, or the program closed it. An HTTP connection is also in this phase after a
    /// panic, and an HTTP/1 connection also after a body timeout.
    Draining,
    /// The service is done. The connection writes the remaining output, shuts down writing, and
    /// lingers.
    Closing,
}

impl ConnectionPhase {
    /// Every phase in order, for tables and tests.
    pub const ALL: &[Self] = &[
        Self::PreConnect,
        Self::Serving,
        Self::Draining,
        Self::Closing,
    ];

    /// Returns the word used in metrics. It does not change between releases.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PreConnect => "pre_connect",
            Self::Serving => "serving",
            Self::Draining => "draining",
            Self::Closing => "closing",
        }
    }
}

impl fmt::Display for ConnectionPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
