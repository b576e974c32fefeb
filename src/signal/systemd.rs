//! Tells systemd the state of a server, by the protocol of [`sd_notify(3)`].
//!
//! | message | when | for the unit |
//! | --- | --- | --- |
//! | `READY=1` | the accept loop has taken its first turn | `Type=notify` or `notify-reload` |
//! | `STATUS=` | then, and when the phase or the line of [`Health`] changes; of the figures at most every 5 s | shown by `systemctl status` |
//! | `WATCHDOG=1` | at half of the unit's time, as long as the accept loop takes turns | `WatchdogSec=` |
//! | `RELOADING=1` and `MONOTONIC_USEC=`, then `READY=1` | around a [`reload`] | `Type=notify-reload` |
//! | `STOPPING=1` | a shutdown begins, also one that systemd has not asked for | |
//!
//! Without systemd, which is without `NOTIFY_SOCKET` in the environment, nothing is sent. A message
//! that cannot be sent is the event `systemd is not told`, as with a socket in the abstract
//! namespace, whose name begins with `@`. As in systemd's own library, sending waits while the
//! queue of systemd's socket is full.
//!
//! The watchdog is tied to the accept loop ([`Handle::heartbeat`]): a loop that is blocked by a
//! layer stops the messages, and systemd restarts the process. A server that is paused, at its
//! limit or draining goes on sending them.
//!
//! Set `TimeoutStopSec=` to more than [`lame_duck`](crate::ServerBuilder::lame_duck) and
//! [`shutdown_deadline`](crate::ServerBuilder::shutdown_deadline) together, or systemd kills the
//! process while it drains. The folder `contrib/systemd` of the repository has a unit with its
//! sockets.
//!
//! ```no_run
//! use tokio::signal::unix::{SignalKind, signal};
//! # use tower::service_fn;
//! # use tower_tcp::{BoxError, Connection, bind::Socket};
//! use tower_tcp::{Server, signal::{self as signals, systemd}};
//!
//! # async fn load() -> Result<(), BoxError> { Ok(()) }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), BoxError> {
//! # let stack = service_fn(|_: Connection<Socket>| async { Ok::<_, BoxError>(()) });
//! let server = Server::bind("127.0.0.1:7000").await?;
//! signals::install(&server.handle())?;
//! systemd::install(&server.handle());
//! let mut hangups = signal(SignalKind::hangup())?;
//! tokio::spawn(async move {
//!     while hangups.recv().await.is_some() {
//!         if let Err(err) = systemd::reload(load()).await {
//!             eprintln!("not reloaded: {err}");
//!         }
//!     }
//! });
//! server.serve(stack).await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`sd_notify(3)`]: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::sleep;

use crate::handle::{Handle, ServerPhase};
use crate::health::Health;

/// The shortest time between two messages of which only the figures differ. systemd handles all
/// messages of all services in one process.
const FIGURES: Duration = Duration::from_secs(5);

/// Tells systemd the state of the server from now on, in a task that ends with the server.
///
/// Does nothing if systemd does not wait for messages of this process.
///
/// # Panics
///
/// Panics if called outside a tokio runtime with time enabled.
pub fn install(handle: &Handle) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    let handle = handle.clone();
    tokio::spawn(async move {
        if handle.heartbeat().await {
            tokio::join!(tell_state(&handle), feed_watchdog(&handle));
        }
    });
}

/// Tells systemd that the program reloads its configuration while `work` runs, and that it is ready
/// again when `work` completes or is dropped.
///
/// systemd has no message for a reload that has failed, so the output is the caller's to report.
///
/// # Cancel safety
///
/// As that of `work`.
pub async fn reload<F: Future>(work: F) -> F::Output {
    let _ready_again = Reloading::begin();
    work.await
}

struct Reloading;

impl Reloading {
    fn begin() -> Self {
        // Without its time, `Type=notify-reload` ignores the message, and `Type=notify` does not.
        match NotifyState::monotonic_usec_now() {
            Ok(now) => send(&[NotifyState::Reloading, now]),
            Err(_no_clock) => send(&[NotifyState::Reloading]),
        }
        Self
    }
}

impl Drop for Reloading {
    fn drop(&mut self) {
        send(&[NotifyState::Ready]);
    }
}

/// Tells that the server is ready, then each change of its state, until it has ended.
async fn tell_state(handle: &Handle) {
    let now = || (handle.phase(), handle.0.is_stopping());
    let (mut is_ready, mut is_stopping) = (false, false);
    let mut told = String::new();
    loop {
        let state = now();
        let status = Health::of(handle).to_string();
        let mut news = Vec::new();
        if !std::mem::replace(&mut is_ready, true) {
            news.push(NotifyState::Ready);
        }
        if state.1 && !std::mem::replace(&mut is_stopping, true) {
            news.push(NotifyState::Stopping);
        }
        if status != told {
            news.push(NotifyState::Status(&status));
        }
        if !news.is_empty() {
            send(&news);
        }
        if state.0 == ServerPhase::Ended {
            return;
        }
        told = status;
        let changed = handle.0.advanced_until(|| (now() != state).then_some(()));
        tokio::select! {
            () = changed => {}
            () = sleep(FIGURES) => {}
        }
    }
}

/// Feeds the watchdog as long as the accept loop takes turns.
async fn feed_watchdog(handle: &Handle) {
    let time = sd_notify::watchdog_enabled().filter(|time| !time.is_zero());
    let Some(time) = time else {
        return;
    };
    while handle.heartbeat().await {
        send(&[NotifyState::Watchdog]);
        tokio::select! {
            _ = handle.closed() => {}
            () = sleep(time / 2) => {}
        }
    }
}

fn send(messages: &[NotifyState<'_>]) {
    if let Err(err) = sd_notify::notify(messages) {
        tracing::warn!(target: "tower_tcp", { error = %err }, "systemd is not told");
    }
}
