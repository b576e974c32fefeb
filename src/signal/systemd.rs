//! Tells systemd the state of a server, by the protocol of [`sd_notify(3)`].
//!
//! | message | when | for the unit |
//! | --- | --- | --- |
//! | `READY=1` | the accept loop has taken its first turn | `Type=notify` or `notify-reload` |
//! | `STATUS=` | with `READY=1`, and when the phase changes; other changes of the line of [`Health`] within 5 s | shown by `systemctl status` |
//! | `WATCHDOG=1` | at half of the unit's time, as long as the accept loop takes turns | `WatchdogSec=` |
//! | `RELOADING=1` and `MONOTONIC_USEC=`, then `READY=1` | around a [`reload`] | `Type=notify-reload` |
//! | `STOPPING=1` | a shutdown begins, also one that systemd has not asked for | |
//!
//! Without `NOTIFY_SOCKET` in the environment, nothing is sent, because systemd then does not wait
//! for messages of this process. If a message cannot be sent, the event `systemd is not told` is
//! logged, and the state is sent again within 5 s. This happens if the queue of systemd's socket
//! has no room for 100 ms, or if the socket is in the abstract namespace (its name begins with
//! `@`), which is not supported.
//!
//! The watchdog's messages depend on the accept loop ([`Handle::heartbeat`]). If a layer blocks the
//! loop, the messages stop, and systemd restarts the process. A server that is paused, at its limit
//! or draining goes on sending them.
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

use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::sleep;

use crate::handle::{Handle, ServerPhase};
use crate::health::Health;

/// The shortest time between two messages of which only the figures differ. systemd handles all
/// messages of all services in one process.
const FIGURES: Duration = Duration::from_secs(5);

/// The longest wait for room in the queue of systemd's socket. It blocks a thread of the runtime.
const SEND: Duration = Duration::from_millis(100);

const SOCKET: &str = "NOTIFY_SOCKET";

/// Tells systemd the state of the server from now on, in a task that ends with the server.
///
/// Does nothing if systemd does not wait for messages of this process.
///
/// # Panics
///
/// Panics if called outside a tokio runtime with time enabled.
pub fn install(handle: &Handle) {
    if std::env::var_os(SOCKET).is_none() {
        return;
    }
    let handle = handle.clone();
    tokio::spawn(async move {
        if handle.heartbeat().await {
            let mut told = Told::new(handle.clone());
            tokio::join!(told.follow(), feed_watchdog(&handle));
        }
    });
}

/// Tells systemd that the program reloads its configuration while `work` runs, and that it is ready
/// again when `work` completes or is dropped.
///
/// systemd has no message for a reload that has failed, so the caller must report a failure that
/// `work` returns.
///
/// # Cancel safety
///
/// That of `work`. systemd is told that the program is ready again, also if the future is dropped.
pub async fn reload<F: Future>(work: F) -> F::Output {
    let _ready_again = Reloading::begin();
    work.await
}

struct Reloading;

impl Reloading {
    fn begin() -> Self {
        // Without the time, systemd ignores the message for `Type=notify-reload`, but not for
        // `Type=notify`.
        match NotifyState::monotonic_usec_now() {
            Ok(now) => send(&[NotifyState::Reloading, now]),
            Err(_no_clock) => send(&[NotifyState::Reloading]),
        };
        Self
    }
}

impl Drop for Reloading {
    fn drop(&mut self) {
        send(&[NotifyState::Ready]);
    }
}

/// The state of a server as systemd knows it.
struct Told {
    handle: Handle,
    is_ready: bool,
    is_stopping: bool,
    status: String,
}

impl Told {
    fn new(handle: Handle) -> Self {
        Self {
            handle,
            is_ready: false,
            is_stopping: false,
            status: String::new(),
        }
    }

    /// Sends what is new. A message that fails is sent again by the next call.
    fn tell(&mut self) {
        let is_stopping = self.handle.0.is_shutting_down();
        let status = Health::of(&self.handle).to_string();
        let mut news = Vec::new();
        if !self.is_ready {
            news.push(NotifyState::Ready);
        }
        if is_stopping && !self.is_stopping {
            news.push(NotifyState::Stopping);
        }
        if status != self.status {
            news.push(NotifyState::Status(&status));
        }
        if !news.is_empty() && send(&news) {
            self.is_ready = true;
            self.is_stopping = is_stopping;
            self.status = status;
        }
    }

    /// Tells that the server is ready, then each change of its state, until it has ended.
    async fn follow(&mut self) {
        let handle = self.handle.clone();
        let now = || (handle.phase(), handle.0.is_shutting_down());
        loop {
            let state = now();
            self.tell();
            if state.0 == ServerPhase::Ended {
                return;
            }
            let changed = handle.0.advanced_until(|| (now() != state).then_some(()));
            tokio::select! {
                () = changed => {}
                () = sleep(FIGURES) => {}
            }
        }
    }
}

impl Drop for Told {
    /// Tells systemd of a shutdown that the task has not seen, because the runtime ended first.
    fn drop(&mut self) {
        if self.handle.0.is_shutting_down() && !self.is_stopping {
            self.tell();
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

/// Returns whether the message was sent.
fn send(messages: &[NotifyState<'_>]) -> bool {
    let sent = try_send(messages);
    if let Err(err) = &sent {
        tracing::warn!(target: "tower_tcp", { error = %err }, "systemd is not told");
    }
    sent.is_ok()
}

/// Sends as `sd_notify::notify` does, but with a limit on the wait. `notify` itself would wait
/// forever for a systemd that hangs.
fn try_send(messages: &[NotifyState<'_>]) -> io::Result<()> {
    let Some(path) = std::env::var_os(SOCKET) else {
        return Ok(());
    };
    let message: String = messages.iter().map(|state| format!("{state}\n")).collect();
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(SEND))?;
    socket.connect(path)?;
    socket.send(message.as_bytes())?;
    Ok(())
}
