//! Shuts a server down on signals from the operating system, and reports its state to systemd.

#[cfg(feature = "systemd")]
pub mod systemd;

use std::io;

use tokio::signal::unix::{SignalKind, signal};

use crate::handle::Handle;

/// Shuts the server down at the first `SIGTERM` or `SIGINT`, and aborts it at the second.
///
/// Spawns a task that ends at the second signal, or when the server has ended. The handlers replace
/// the default action of both signals for the whole process, and stay installed after the server
/// has ended.
///
/// # Errors
///
/// Returns an error if a signal handler cannot be installed.
///
/// # Panics
///
/// Panics if called outside a tokio runtime with I/O enabled.
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
