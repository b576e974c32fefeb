//! Reloads certificates on SIGHUP. Several examples use this module.

use std::error::Error;
use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tower_tcp::tls::{Tls, TlsBuilder};

/// Starts a task that reads all files again at each SIGHUP.
pub(crate) fn reload_on_hangup(tls: Tls, files: TlsBuilder) -> io::Result<()> {
    let mut hangups = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            match tokio::task::block_in_place(|| tls.reload(&files)) {
                Ok(()) => eprintln!("reloaded"),
                Err(err) => {
                    let cause = err.source().map(|cause| format!(": {cause}"));
                    eprintln!("not reloaded: {err}{}", cause.unwrap_or_default());
                }
            }
        }
    });
    Ok(())
}
