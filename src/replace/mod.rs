//! Replaces this process with a new one without losing a request, for example to start a new
//! version of the program.
//!
//! [`Replace`] starts the new process with the listening sockets of this process, and waits until
//! the new process is ready. Then this process drains. If the new process does not become ready,
//! this process continues to serve:
//!
//! ```no_run
//! use tokio::signal::unix::{SignalKind, signal};
//! use tower_tcp::replace::Replace;
//! # use tower::service_fn;
//! # use tower_tcp::{BoxError, Connection, Server};
//!
//! # async fn run() -> Result<(), BoxError> {
//! # let stack = service_fn(|conn: Connection<tower_tcp::bind::Socket>| async move {
//! #     drop(conn);
//! #     Ok::<_, BoxError>(())
//! # });
//! let server = Server::bind("127.0.0.1:7000").await?;
//! let handle = server.handle();
//! let mut hangups = signal(SignalKind::hangup())?;
//! tokio::spawn(async move {
//!     while hangups.recv().await.is_some() {
//!         // A failure is logged, and the server continues to serve.
//!         let _failed = Replace::new(&handle).run().await;
//!     }
//! });
//! server.serve(stack).await?;
//! # Ok(())
//! # }
//! ```
//!
//! This module needs the feature `handover`. [`signal::install`](crate::signal::install) does not
//! handle SIGHUP, so the program can handle it. Register the handler before
//! [`serve`](crate::Server::serve), as here, because SIGHUP ends a process without a handler.
//! `pkill -HUP NAME` also signals an old process that is still draining. There,
//! [`run`](Replace::run) fails with [`ReplaceError::ShuttingDown`], and the drain continues.
//!
//! # The new process
//!
//! The new process needs no special code. When it binds an endpoint, it takes the sockets that the
//! old process had for an endpoint with the same text. So `127.0.0.1:0` has the same port as
//! before, several sockets on one address (`SO_REUSEPORT`) keep their number and order, and
//! `systemd:web` is still systemd's socket. Any other endpoint is bound as usual, but a socket of
//! systemd that the old process did not have cannot be added.
//!
//! The length of the backlog and the other [`SocketOptions`] are those of the new program, with
//! these exceptions:
//!
//! - The options that must be set before a socket is bound, and the mode of a Unix socket, stay as
//!   the old program set them.
//! - An option that the new program turns off or does not set may stay as the old program set it.
//!   On Linux most such options do.
//! - A socket of systemd keeps its backlog.
//!
//! The new process is ready once it has begun to serve, or has closed, each socket of the old one.
//! Bind additional addresses before that. Until the new process is ready, it accepts nothing, so no
//! connection is lost if it has to be killed. Clients of a socket that the new process neither
//! serves nor closes would wait in vain. So as long as there is such a socket, the new process is
//! not ready, and the replacement fails when the time of [`ready_within`](Replace::ready_within)
//! has passed. If a new version might listen on fewer addresses, let it call [`close_unused`].
//!
//! The sockets are passed by systemd's protocol (`LISTEN_FDS`), but without a `LISTEN_PID`. If the
//! new process is started through a script, the script must `exec` the program, because the new
//! process must be a child of the old one.
//!
//! # During the change
//!
//! Both processes share the listening sockets, so connections in the backlog are not lost. The old
//! process stops accepting and drains. It skips the [`lame_duck`] phase, because either process may
//! answer a readiness check. The new process has its own connection limit, so during the drain
//! there may be twice as many connections as one limit allows. The drain closes connections of the
//! old process as in any shutdown. If clients send several requests in a row, set
//! [`DrainDeadlines::next_frame`], so that the drain waits for a connection's next request.
//!
//! Only the process that serves a Unix socket removes its path. A path that systemd has created is
//! never removed.
//!
//! # How to restart
//!
//! | method | clients lost | use it if |
//! | --- | --- | --- |
//! | a socket that systemd keeps (`systemd:web`) | none; they wait while no process runs | systemd starts the program, and a start is fast |
//! | this module | none, and none waits | no supervisor keeps the socket, a start is slow, or a failed start must cost nothing |
//! | a balancer, which drains one of several servers | none, if it [checks](crate::balancers) readiness | there are several machines or containers |
//! | `SO_REUSEPORT`: the new process starts while the old one still listens | those in the old process's backlog that its limit does not admit | no other method is possible |
//!
//! With `SO_REUSEPORT` each process has its own backlog. When the old process drains, it accepts
//! connections from its backlog until its connection limit is reached, and the kernel resets the
//! others. (Linux can move these to the new process's socket, but `net.ipv4.tcp_migrate_req` is off
//! by default.)
//!
//! In each run of a measurement, 32 clients sent 30,000 requests in all to a server with
//! [`DrainDeadlines::next_frame`], which was restarted 20 times. The table shows how many requests
//! were lost: the first number is from a run with one request on each connection, and the second
//! from a run with ten:
//!
//! | limit | a kept socket | this module | `SO_REUSEPORT` |
//! | --- | --- | --- | --- |
//! | 10,000 | 0, 0 | 0, 0 | 0, 0 |
//! | 8 | 0, 0 | 0, 0 | 431, 470; also, 5 connections were refused |
//!
//! The new process is a child of the old one, and the old one ends after its drain. So do not use
//! this module in a process that another program watches by its process ID. Examples are the first
//! process of a container, whose end is the end of the container, and a service of systemd, which
//! would need the new ID (`MAINPID=`).
//!
//! [`SocketOptions`]: crate::bind::SocketOptions
//! [`lame_duck`]: crate::ServerBuilder::lame_duck
//! [`DrainDeadlines::next_frame`]: crate::deadline::DrainDeadlines::next_frame

mod child;
mod error;

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::select_all;
use tokio::time::{sleep, timeout};

use crate::bind::{ListeningSocket, handover};
use crate::handle::{Handle, ServerPhase};
use crate::observe::ErrorChain;
use child::Child;

pub use error::ReplaceError;

/// Replaces this process with a new one. See the [module docs](self).
#[derive(Debug)]
#[must_use = "nothing is replaced before `run`"]
pub struct Replace {
    handles: Vec<Handle>,
    command: Option<Command>,
    ready_within: Duration,
}

impl Replace {
    /// Creates a replacement that passes the sockets of the server to the new process, and then
    /// drains the server.
    pub fn new(handle: &Handle) -> Self {
        Self {
            handles: vec![handle.clone()],
            command: None,
            ready_within: Duration::from_secs(30),
        }
    }

    /// Adds another server of this process. Its sockets are passed, too, and it drains at the same
    /// time as the first server. A server that was added before is not added again.
    pub fn and(mut self, handle: &Handle) -> Self {
        let is_same = |known: &Handle| Arc::ptr_eq(&known.0, &handle.0);
        if !self.handles.iter().any(is_same) {
            self.handles.push(handle.clone());
        }
        self
    }

    /// Sets the command that starts the new process.
    ///
    /// Default: the file from which this process was started, with the same arguments. Why: a new
    /// version is usually installed in place of the old file. If the program was started by an
    /// absolute path, symbolic links in that path are resolved again, so they may now lead to
    /// another file.
    pub fn command(mut self, command: Command) -> Self {
        self.command = Some(command);
        self
    }

    /// Sets how long the new process may take to become ready.
    ///
    /// Default: 30 s. Why: this process serves meanwhile, so a slow start costs nothing, but a
    /// hanging start must be reported. When reached: the new process is killed, and
    /// [`run`](Self::run) returns [`ReplaceError::NotReady`].
    ///
    /// If this process itself replaces an older one, `run` first waits at most as long for the
    /// reply of that process, and otherwise returns [`ReplaceError::NotAccepting`].
    pub fn ready_within(mut self, time: Duration) -> Self {
        self.ready_within = time;
        self
    }

    /// Starts the new process, waits until it is ready, and begins to drain the servers passed to
    /// [`new`](Self::new) and [`and`](Self::and). Returns the process ID of the new process.
    ///
    /// Logs one event: `process.replaced`, or `process.not_replaced` with the error.
    ///
    /// # Errors
    ///
    /// Returns a [`ReplaceError`] if the new process could not be started, if it ended or was not
    /// ready in time, if one of the servers to drain is already shutting down or has ended, if
    /// another replacement is in progress, or if this process itself replaces an older process and
    /// is not ready yet. In all these cases, any process that this call started has ended, and this
    /// process continues as before.
    ///
    /// # Panics
    ///
    /// Panics if polled outside a tokio runtime with I/O and time enabled.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future kills the new process, unless this process has begun to drain.
    pub async fn run(self) -> Result<u32, ReplaceError> {
        let replaced = self.try_run().await;
        match &replaced {
            Ok(pid) => tracing::info!(target: "tower_tcp", pid, "process.replaced"),
            Err(error) => tracing::error!(
                target: "tower_tcp",
                error = %ErrorChain(error),
                "process.not_replaced"
            ),
        }
        replaced
    }

    async fn try_run(mut self) -> Result<u32, ReplaceError> {
        let _only_one = Running::begin()?;
        // A caller may know that the old process has been replaced before its reply has arrived.
        if timeout(self.ready_within, handover::accepts()).await != Ok(true) {
            return Err(ReplaceError::NotAccepting);
        }
        if self.is_shutting_down() {
            return Err(ReplaceError::ShuttingDown);
        }
        let command = self.command.take().map_or_else(same_command, Ok);
        let sockets: Vec<_> = self
            .handles
            .iter()
            .flat_map(Handle::listening_sockets)
            .collect();
        let mut child = Child::start(command.map_err(ReplaceError::Start)?, &sockets).await?;
        match self.change_over(&mut child, &sockets).await {
            Ok(()) => Ok(child.release()),
            Err(err) => {
                child.kill().await;
                Err(err)
            }
        }
    }

    /// Waits until the new process is ready, hands the sockets over to it, and begins to drain the
    /// servers of this process.
    async fn change_over(
        &self,
        child: &mut Child,
        sockets: &[ListeningSocket],
    ) -> Result<(), ReplaceError> {
        let drains = |handle: &Handle| Box::pin(handle.reached(ServerPhase::Draining));
        let indexes = tokio::select! {
            ready = child.ready() => ready?,
            _ = select_all(self.handles.iter().map(drains)) => {
                return Err(ReplaceError::ShuttingDown);
            }
            () = sleep(self.ready_within) => return Err(ReplaceError::NotReady {
                after: self.ready_within,
                waits_for: child.waits_for(sockets),
            }),
        };
        // A shutdown should end the whole service, so the new process must not continue it.
        if self.is_shutting_down() {
            return Err(ReplaceError::ShuttingDown);
        }
        let served = || indexes.iter().filter_map(|index| sockets.get(*index));
        served().for_each(|socket| socket.own_path(false));
        if !child.go() {
            served().for_each(|socket| socket.own_path(true));
            return Err(child.killed().await);
        }
        served().for_each(ListeningSocket::release);
        self.handles.iter().for_each(Handle::drain);
        Ok(())
    }

    fn is_shutting_down(&self) -> bool {
        let mut states = self.handles.iter().map(|handle| &handle.0);
        states.any(|state| state.is_shutting_down())
    }
}

/// Closes the sockets that the old process has passed to this process but that no endpoint of this
/// process has taken.
///
/// Call this after the last bind, in a new version that might listen on fewer addresses than the
/// old one. The old process still serves the clients in the backlogs of these sockets, as it would
/// in a shutdown. In a process that replaces no other process, this does nothing.
pub fn close_unused() {
    handover::close_unused();
}

/// Marks a replacement as running, because only one may run at a time in a process.
struct Running;

static IS_RUNNING: AtomicBool = AtomicBool::new(false);

impl Running {
    fn begin() -> Result<Self, ReplaceError> {
        if IS_RUNNING.swap(true, Ordering::AcqRel) {
            return Err(ReplaceError::InProgress);
        }
        Ok(Self)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        IS_RUNNING.store(false, Ordering::Release);
    }
}

/// Returns a command that starts the file that is now at the path of this program, with the same
/// arguments.
fn same_command() -> io::Result<Command> {
    let mut args = env::args_os();
    let called = args
        .next()
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let file = match called {
        Some(file) => file,
        None => without_mark(env::current_exe()?),
    };
    let mut command = Command::new(file);
    command.args(args);
    Ok(command)
}

/// Removes the suffix that Linux adds to the path of a running program whose file was replaced.
fn without_mark(file: PathBuf) -> PathBuf {
    let path = file.as_os_str().as_bytes().strip_suffix(b" (deleted)");
    match path.map(|path| Path::new(OsStr::from_bytes(path))) {
        Some(path) if !file.exists() => path.to_owned(),
        _ => file,
    }
}
