use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use thiserror::Error;

/// The error of a failed replacement. This process continues as before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReplaceError {
    /// The new process could not be started.
    #[error("the new process could not be started")]
    Start(#[source] io::Error),

    /// The new process ended before it was ready, for example because it could not bind an address.
    /// Look for the reason in what it wrote to standard error.
    #[error("the new process ended before it was ready: {0}")]
    Ended(ExitStatus),

    /// The new process was not ready in time, and was killed.
    #[error(
        "the new process was not ready within {after:?}: {}",
        reason(.waits_for.as_deref())
    )]
    NotReady {
        /// The time that the new process had to become ready.
        after: Duration,
        /// The endpoints of the sockets that the new process had neither begun to serve nor closed.
        /// `None` if these are all of the sockets, or if there are no such sockets.
        waits_for: Option<String>,
    },

    /// A server of this process is shutting down, or has ended. The new process was not started, or
    /// was killed, because a shutdown should end the whole service.
    #[error("the server is shutting down")]
    ShuttingDown,

    /// Another replacement of this process is in progress.
    #[error("the process is being replaced already")]
    InProgress,

    /// This process itself replaces an older process, and does not accept yet.
    #[error("the process does not accept connections yet")]
    NotAccepting,
}

fn reason(waits_for: Option<&str>) -> String {
    match waits_for {
        Some(endpoints) => format!("it does not serve {endpoints}"),
        None => "it does not accept connections yet".to_owned(),
    }
}
