//! Reports the state of a server to systemd, with the protocol of [`sd_notify(3)`].
//!
//! | message | sent | setting of the unit |
//! | --- | --- | --- |
//! | `READY=1` | when the accept loop has run once | `Type=notify` or `notify-reload` |
//! | `STATUS=` | with `READY=1`, and when the phase changes; within 5 s of any other change of the text of [`Health`] | none; shown by `systemctl status` |
//! | `WATCHDOG=1` | twice per watchdog interval of the unit, while the accept loop runs | `WatchdogSec=` |
//! | `RELOADING=1` and `MONOTONIC_USEC=`, then `READY=1` | around a [`reload`] | `Type=notify-reload` |
//! | `STOPPING=1` | when a shutdown begins, even if systemd has not requested it | none |
//!
//! If the environment has no `NOTIFY_SOCKET`, nothing is sent, because systemd then expects no
//! messages from this process. If a message cannot be sent, for example because the queue of
//! systemd's socket stays full for 100 ms, the event `systemd was not notified` is logged. If the
//! server has not ended, its state (`READY=1`, `STATUS=`, `STOPPING=1`) is sent again within 5 s.
//! Messages of a reload and of the watchdog are not sent again. A socket in the abstract namespace
//! (its name begins with `@`) is not supported: no message can be sent to it.
//!
//! The watchdog's messages depend on the accept loop ([`Handle::heartbeat`]). If a layer blocks the
//! loop, the messages stop, and systemd kills the process. systemd then starts the program again if
//! the unit's `Restart=` allows that (`on-failure`, for example). A server that is paused, at its
//! limit or draining continues to send the messages.
//!
//! Set the unit's `TimeoutStopSec=` to more than the sum of
//! [`lame_duck`](crate::ServerBuilder::lame_duck) and
//! [`shutdown_deadline`](crate::ServerBuilder::shutdown_deadline), or systemd kills the process
//! while it drains. The folder `contrib/systemd` of the repository has an example of a unit and its
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

/// The interval at which a changed status, such as a new number of connections, is sent. A change
/// of the phase is sent immediately. Sending each change of the status immediately would be a lot
/// of work for systemd, which handles the messages of all services in one process.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// The longest wait for room in the queue of systemd's socket. The wait blocks a thread of the
/// runtime.
const SEND: Duration = Duration::from_millis(100);

const SOCKET: &str = "NOTIFY_SOCKET";

/// Spawns a task that reports the state of the server to systemd until the server has ended.
///
/// Does nothing if the environment has no `NOTIFY_SOCKET`, because systemd then expects no messages
/// from this process.
///
/// # Panics
///
/// Panics if called outside a tokio runtime. If the runtime does not have time enabled, the spawned
/// task panics.
pub fn install(handle: &Handle) {
    if std::env::var_os(SOCKET).is_none() {
        return;
    }
    let handle = handle.clone();
    tokio::spawn(async move {
        if handle.heartbeat().await {
            let mut notifier = Notifier::new(handle.clone());
            tokio::join!(notifier.follow(), feed_watchdog(&handle));
        }
    });
}

/// Runs `work`, and reports to systemd that the program is reloading its configuration. When `work`
/// completes or is dropped, reports that the program is ready again.
///
/// systemd has no message for a failed reload. If `work` returns an error, the caller must report
/// it.
///
/// # Cancel safety
///
/// This function is cancel safe if `work` is. Even if the future is dropped, systemd gets the
/// message that the program is ready again.
pub async fn reload<F: Future>(work: F) -> F::Output {
    let _ready_again = Reloading::begin();
    work.await
}

struct Reloading;

impl Reloading {
    fn begin() -> Self {
        // If the time is not available, the message is sent without it. systemd ignores such a
        // message for `Type=notify-reload`, but not for `Type=notify`.
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

/// Reports the state of a server to systemd. Contains the state that was sent last.
struct Notifier {
    handle: Handle,
    is_ready: bool,
    is_stopping: bool,
    status: String,
}

impl Notifier {
    fn new(handle: Handle) -> Self {
        Self {
            handle,
            is_ready: false,
            is_stopping: false,
            status: String::new(),
        }
    }

    /// Sends the changes since the last message that was sent successfully. So if this message
    /// fails, the next call includes its changes.
    fn send_changes(&mut self) {
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

    /// Reports to systemd that the server is ready. Then reports changes of the server's state
    /// until the server has ended.
    async fn follow(&mut self) {
        let handle = self.handle.clone();
        let now = || (handle.phase(), handle.0.is_shutting_down());
        loop {
            let state = now();
            self.send_changes();
            if state.0 == ServerPhase::Ended {
                return;
            }
            let changed = handle.0.advanced_until(|| (now() != state).then_some(()));
            tokio::select! {
                () = changed => {}
                () = sleep(STATUS_INTERVAL) => {}
            }
        }
    }
}

impl Drop for Notifier {
    /// Reports a shutdown to systemd if the runtime ends before the task has noticed the shutdown.
    fn drop(&mut self) {
        if self.handle.0.is_shutting_down() && !self.is_stopping {
            self.send_changes();
        }
    }
}

/// Sends keep-alive messages to systemd's watchdog for as long as the accept loop answers
/// heartbeats.
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

/// Sends messages, if systemd expects any. Returns `false` if that failed, and logs the failure.
fn send(messages: &[NotifyState<'_>]) -> bool {
    let sent = try_send(messages);
    if let Err(err) = &sent {
        tracing::warn!(target: "tower_tcp", { error = %err }, "systemd was not notified");
    }
    sent.is_ok()
}

/// Sends messages as `sd_notify::notify` does, but with a limit on the wait. `notify` would wait
/// forever if systemd hangs.
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
