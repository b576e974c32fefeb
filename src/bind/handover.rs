//! The protocol between a process and the one that replaces it.
//!
//! The old process passes its listening sockets as systemd does. After them it passes one more
//! descriptor, a stream between the two processes. Environment variables describe each socket. When
//! the new process is ready to accept, it writes `ready` to the stream. It accepts only after the
//! old process has replied or has ended. So if the new process is not ready in time, and the old
//! process kills it, the new process has no connections yet.
//!
//! In the new process, one server waits for the reply, and the other servers wait for this server.
//! If this server ends before the reply arrives, the other servers accept without the reply.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::parent_id;
use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use command_fds::{CommandFdExt, FdMapping};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use super::endpoint::Passed;
use super::listening::{ListeningSocket, Opened, WeakSocket};
use super::options::SocketOptions;
use super::passed::{self, PassedError};
use super::unix::OwnPath;

/// The variable that contains the process ID of the old process. Children of the new process
/// inherit the variable, too. They ignore it, because it does not contain the ID of their own
/// parent. If the old process has ended, it is no longer the parent of the new process either. The
/// new process then recognizes its stream by the closed other end.
const REPLACES: &str = "TOWER_TCP_REPLACES";
/// The prefix of the variables that describe the passed sockets. The socket's index follows the
/// prefix. The value has three parts: the number of the endpoint; `1` if a supervisor keeps the
/// socket open, otherwise `0`; and the text of the endpoint, as [`without_nul`] returns it.
const SOCKET: &str = "TOWER_TCP_SOCKET_";
/// The prefix of the variables for those Unix sockets whose paths the server removes when it closes
/// the sockets. The socket's index follows the prefix. The value has three parts: the device number
/// of the socket's file, the file's inode number, and the path.
const PATH: &str = "TOWER_TCP_PATH_";

/// The number of the first passed descriptor, as in systemd's protocol.
const FIRST: RawFd = 3;

/// Makes `command` pass `sockets` and `stream` to the process that it starts. `stream` is the new
/// process's end of the stream between the two processes.
pub(crate) fn hand_on(
    command: &mut Command,
    sockets: &[ListeningSocket],
    stream: UnixStream,
) -> io::Result<()> {
    // This process may have inherited variables that describe sockets from the process that it
    // replaced. Remove them.
    for (name, _) in env::vars_os() {
        if [SOCKET, PATH]
            .iter()
            .any(|of| name.as_bytes().starts_with(of.as_bytes()))
        {
            command.env_remove(name);
        }
    }
    for name in ["LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_FDS_FIRST_FD"] {
        command.env_remove(name);
    }
    command.env("LISTEN_FDS", (sockets.len() + 1).to_string());
    command.env(REPLACES, process::id().to_string());

    let mut passed = Vec::new();
    for (at, ListeningSocket(socket)) in sockets.iter().enumerate() {
        let (endpoint, number) = &socket.endpoint;
        let kept = u8::from(socket.kept);
        command.env(
            format!("{SOCKET}{at}"),
            format!("{number} {kept} {}", without_nul(endpoint)),
        );
        if let Some(path) = &socket.path {
            let (device, file) = path.file;
            let mut value = OsString::from(format!("{device} {file} "));
            value.push(&path.path);
            command.env(format!("{PATH}{at}"), value);
        }
        passed.push(socket.as_fd().try_clone_to_owned()?);
    }
    passed.push(stream.into());
    let mappings = (FIRST..)
        .zip(passed)
        .map(|(child_fd, parent_fd)| FdMapping {
            parent_fd,
            child_fd,
        });
    command
        .fd_mappings(mappings.collect())
        .map_err(io::Error::other)?;
    Ok(())
}

/// Returns the text of an endpoint as it is in a variable, which cannot contain a NUL byte. An
/// abstract name can.
fn without_nul(endpoint: &str) -> String {
    endpoint.replace('\0', "\\0")
}

/// A line from the new process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FromChild {
    /// The new process has decided what to do with the sockets with these indexes: it is ready to
    /// serve them, or does not need them and has closed them.
    Has(Vec<usize>),
    /// The new process is ready to serve the sockets with these indexes, and will not serve the
    /// others. It waits for the reply.
    Ready(Vec<usize>),
}

impl FromChild {
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let word = words.next()?;
        let indexes = words.map(str::parse).collect::<Result<_, _>>().ok()?;
        match word {
            "has" => Some(Self::Has(indexes)),
            "ready" => Some(Self::Ready(indexes)),
            _ => None,
        }
    }

    fn line(&self) -> String {
        let (word, indexes) = match self {
            Self::Has(indexes) => ("has", indexes),
            Self::Ready(indexes) => ("ready", indexes),
        };
        let words = indexes.iter().map(|at| format!(" {at}"));
        format!("{word}{}\n", words.collect::<String>())
    }
}

/// The old process's reply to the line `ready`. It lets the new process accept.
pub(crate) const GO: &[u8] = b"go\n";

impl ListeningSocket {
    /// Sets whether this process removes the socket's path when it closes the socket. Does nothing
    /// for a socket that has no path to remove, such as a TCP socket.
    pub(crate) fn own_path(&self, owned: bool) {
        if let Some(path) = &self.0.path {
            path.own(owned);
        }
    }
}

/// The sockets that the replaced process has passed. `None` if this process replaces no other
/// process, or if the environment variables or the last passed descriptor are not as the protocol
/// requires.
static REPLACING: LazyLock<Option<Replacing>> = LazyLock::new(Replacing::from_env);

struct Replacing {
    state: Mutex<State>,
    /// A counter that is incremented when the servers that wait in `may_accept` must check `state`
    /// and `over` again.
    changes: watch::Sender<u64>,
    /// Set when the servers of this process may accept: the old process has replied to `ready`, or
    /// the wait for its reply has ended in another way.
    over: AtomicBool,
}

struct State {
    sockets: Vec<HandedOn>,
    /// The stream to the old process. `None` once this process is ready.
    stream: Option<UnixStream>,
}

struct HandedOn {
    endpoint: String,
    number: usize,
    kept: bool,
    path: Option<(PathBuf, (u64, u64))>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Waiting,
    Bound,
    Serving(WeakSocket),
    Unused,
}

impl Replacing {
    fn from_env() -> Option<Self> {
        let old: u32 = env::var(REPLACES).ok()?.parse().ok()?;
        if old != parent_id() && !passed::last_is_closed_unix() {
            return None;
        }
        let (count, stream) = passed::take_last_unix()?;
        let sockets = (0..count).map(HandedOn::from_env).collect::<Option<_>>()?;
        let stream = UnixStream::from(stream);
        stream.set_nonblocking(true).ok()?;
        let stream = Some(stream);
        Some(Self {
            state: Mutex::new(State { sockets, stream }),
            changes: watch::Sender::new(0),
            over: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

impl HandedOn {
    fn from_env(at: usize) -> Option<Self> {
        let socket = env::var(format!("{SOCKET}{at}")).ok()?;
        let mut words = socket.splitn(3, ' ');
        let number = words.next()?.parse().ok()?;
        let kept = words.next()? == "1";
        let endpoint = words.next()?.to_owned();
        let path = env::var_os(format!("{PATH}{at}")).and_then(|value| {
            let value = value.into_vec();
            let mut words = value.splitn(3, |byte| *byte == b' ');
            let mut number = || std::str::from_utf8(words.next()?).ok()?.parse().ok();
            let file = (number()?, number()?);
            let path = OsString::from_vec(words.next()?.to_vec());
            Some((path.into(), file))
        });
        Some(Self {
            endpoint,
            number,
            kept,
            path,
            stage: Stage::Waiting,
        })
    }
}

/// Takes the sockets that the replaced process passed for this endpoint. Returns `None` if there
/// are none, if all of them were already taken, or if this process replaces no other process.
pub(super) fn take(endpoint: &str, options: &SocketOptions) -> io::Result<Option<Vec<Opened>>> {
    let Some(replacing) = &*REPLACING else {
        return Ok(None);
    };
    let endpoint = without_nul(endpoint);
    let mut state = replacing.lock();
    let is_waiting = |one: &HandedOn| matches!(one.stage, Stage::Waiting);
    // Several endpoints of the old process may have had the same text. Each call takes the sockets
    // of one of them.
    let mut found = state.sockets.iter();
    let Some(first) = found.find(|one| one.endpoint == endpoint && is_waiting(one)) else {
        return Ok(None);
    };
    let number = first.number;
    let mut taken = Vec::new();
    for (at, one) in state.sockets.iter_mut().enumerate() {
        if one.number != number {
            continue;
        }
        one.stage = Stage::Bound;
        let mut opened = Opened::from(passed::take_at(at)?);
        opened.handed_on = Some(at);
        opened.kept = one.kept;
        opened.path = one
            .path
            .take()
            .map(|(path, file)| OwnPath::of_other(path, file));
        if !one.kept {
            options.renew(&opened.socket)?;
            opened.prepared = true;
        }
        taken.push(opened);
    }
    Ok(Some(taken))
}

/// Takes the sockets that a supervisor has passed for this endpoint. Called after [`take`] has
/// returned `None`. In a process that replaces another one, this function always fails, because
/// there the old process passes the sockets, and [`take`] returns them.
pub(super) fn take_passed(which: &Passed) -> Result<Vec<Opened>, PassedError> {
    if REPLACING.is_some() {
        return Err(PassedError::NotHandedOn);
    }
    passed::take(which)
}

/// Closes the sockets that the replaced process passed but no endpoint has taken.
pub(crate) fn close_unused() {
    let Some(replacing) = &*REPLACING else {
        return;
    };
    let mut state = replacing.lock();
    let mut closed = Vec::new();
    for (at, one) in state.sockets.iter_mut().enumerate() {
        if matches!(one.stage, Stage::Waiting) {
            one.stage = Stage::Unused;
            drop(passed::take_at(at));
            closed.push(at);
        }
    }
    state.has(closed);
    drop(state);
    replacing.changed();
}

/// Returns whether the servers of this process may accept. If this process has reported to the old
/// process that it is ready, waits for the reply first.
pub(crate) async fn accepts() -> bool {
    let Some(replacing) = &*REPLACING else {
        return true;
    };
    let mut changes = replacing.changes.subscribe();
    while !replacing.over.load(Ordering::Acquire) {
        let is_ready = replacing.lock().stream.is_none();
        if !is_ready || changes.changed().await.is_err() {
            return false;
        }
    }
    true
}

/// Waits until a server with these sockets may accept. Returns at once in a process that replaces
/// no other process. Otherwise, first reports to the old process which of the passed sockets this
/// server serves. Then waits until all passed sockets are served or closed, and after that until
/// the old process has replied or ended, or the server that waits for the reply has ended.
pub(crate) async fn may_accept(sockets: impl Iterator<Item = ListeningSocket>) {
    if let Some(replacing) = &*REPLACING {
        replacing.may_accept(sockets).await;
    }
}

impl State {
    /// Reports to the old process the sockets that this process now serves or has closed.
    fn has(&mut self, indexes: Vec<usize>) {
        if let Some(stream) = &mut self.stream {
            // A failed write is ignored, because the old process uses this line only for the error
            // message if the replacement fails.
            let _ended = stream.write_all(FromChild::Has(indexes).line().as_bytes());
        }
    }

    /// Takes the stream to the old process out of this value, if all sockets are served or closed.
    /// Returns `None` if some are not, or if the stream was already taken.
    fn settled(&mut self) -> Option<UnixStream> {
        let waits = |one: &HandedOn| matches!(one.stage, Stage::Waiting | Stage::Bound);
        if self.sockets.iter().any(waits) {
            return None;
        }
        self.stream.take()
    }
}

/// Sets [`Replacing::over`] when dropped, so that all servers of this process may accept.
struct Over<'a>(&'a Replacing);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
        self.0.changed();
    }
}

impl Replacing {
    async fn may_accept(&self, sockets: impl Iterator<Item = ListeningSocket>) {
        let mut changes = self.changes.subscribe();
        {
            let mut state = self.lock();
            let mut served = Vec::new();
            for socket in sockets {
                if let Some(at) = socket.0.handed_on
                    && let Some(one) = state.sockets.get_mut(at)
                {
                    one.stage = Stage::Serving(socket.downgrade());
                    served.push(at);
                }
            }
            state.has(served);
        }
        self.changed();
        while !self.over.load(Ordering::Acquire) {
            let settled = self.lock().settled();
            if let Some(stream) = settled {
                // If this server ends before the reply arrives, the stream is closed, so the other
                // servers must stop waiting for the reply. They may accept, because the old process
                // has either already replied, or kills this process when it notices the closed
                // stream.
                let _over = Over(self);
                // If the stream ends without a reply, the old process has ended, and only this
                // process can serve.
                let _ended = self.ready(stream).await;
            } else if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Reports to the old process that this process is ready, and waits for the reply. After that,
    /// this process owns the paths of the sockets that it serves: it removes a path when it closes
    /// the socket.
    async fn ready(&self, stream: UnixStream) -> io::Result<()> {
        let served: Vec<_> = {
            let state = self.lock();
            let sockets = state.sockets.iter().enumerate();
            sockets
                .filter_map(|(at, one)| match &one.stage {
                    Stage::Serving(socket) => Some((at, socket.upgrade()?)),
                    _ => None,
                })
                .filter(|(_, socket)| !socket.is_released())
                .collect()
        };
        let replied = async {
            let mut stream = tokio::net::UnixStream::from_std(stream)?;
            let ready = FromChild::Ready(served.iter().map(|(at, _)| *at).collect());
            stream.write_all(ready.line().as_bytes()).await?;
            stream.read_exact(&mut [0; GO.len()]).await.map(drop)
        }
        .await;
        served.iter().for_each(|(_, socket)| socket.own_path(true));
        replied
    }
}
