use std::fmt;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum ConnectionPhase {
    /// In its pre-connect hooks: TLS, checks.
    PreConnect,
    /// With its service.
    Serving,
    /// With its service, and told to leave: by a drain, or by its own program.
    Draining,
    /// Everything was said: its output is flushed and shut down, and it lingers.
    Closing,
}

impl ConnectionPhase {
    /// Every phase there is, in their order, for tables and tests.
    pub const ALL: &[Self] = &[
        Self::PreConnect,
        Self::Serving,
        Self::Draining,
        Self::Closing,
    ];

    /// Returns the word used in metrics; it does not change between releases.
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
