//! Signals of the system that end a server.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

use crate::handle::Handle;

/// Shuts the server down at the first `SIGTERM` or `SIGINT`, and cuts it off at the second.
///
/// Runs in a task of its own that ends with the server. It takes the two signals over for the whole process, also after the server has
/// ended: that is how the system's handlers work.
///
/// # Errors
///
/// When the system does not let the handlers be installed.
///
/// # Panics
///
/// Outside a tokio runtime.
pub fn install(handle: &Handle) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let handle = handle.clone();
    tokio::spawn(async move {
        for end in [Handle::shutdown, Handle::abort] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = handle.closed() => return,
            }
            tracing::info!(target: "tower_tcp", live = handle.live(), "signal.received");
            end(&handle);
        }
    });
    Ok(())
}
