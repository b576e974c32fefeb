//! The sockets that were passed to this process by systemd's protocol.

use std::env;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::{mem, process};

use listenfd::ListenFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;
use thiserror::Error;

use super::endpoint::Passed;
use super::listening::{Opened, accepts};

/// The error for an endpoint such as `fd:3`, `systemd:name` or `systemd:*` whose sockets were not
/// passed to this process, or cannot be used. It is wrapped in the [`io::Error`] of
/// [`Error::Bind`](crate::Error::Bind).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PassedError {
    /// The variable `LISTEN_FDS` is not set, or is not a positive number.
    #[error(
        "no socket was passed to this process, as `LISTEN_FDS` is not set: start it by a socket \
         unit of systemd, or by `systemd-socket-activate --listen=PORT PROGRAM`"
    )]
    NonePassed,

    /// The variable `LISTEN_PID` is set, but not to the ID of this process.
    #[error(
        "the sockets were passed to process {pid}, and this is {}: a script that starts this \
         program must `exec` it",
        process::id()
    )]
    OtherProcess {
        /// The value of `LISTEN_PID`.
        pid: String,
    },

    /// No passed socket has this name.
    #[error(
        "no socket was passed under the name `{name}`, only `{passed}`: set \
         `FileDescriptorName={name}` in its socket unit"
    )]
    NoSuchName {
        /// The name in the endpoint.
        name: String,
        /// The names of the passed sockets, as in `LISTEN_FDNAMES`.
        passed: String,
    },

    /// The descriptor is not one of those that were passed.
    #[error("the descriptor was not passed: `LISTEN_FDS` passes those from {first} to {last}")]
    NoSuchDescriptor {
        /// The first descriptor that was passed.
        first: RawFd,
        /// The last descriptor that was passed.
        last: RawFd,
    },

    /// The descriptor is not a listening TCP or Unix stream socket.
    #[error(
        "descriptor {descriptor} is no listening stream socket: its socket unit needs \
         `ListenStream=` and `Accept=no`"
    )]
    NotListening {
        /// The descriptor.
        descriptor: RawFd,
    },

    /// Another endpoint of this process has already taken the sockets.
    #[error("another endpoint has taken the passed socket: name it in one endpoint only")]
    Taken,

    /// The process that this one replaces passed no sockets for this endpoint, or another endpoint
    /// of this process has already taken them.
    #[error(
        "the process that this one replaces did not listen on this endpoint: stop that process, \
         and let its supervisor start the new version"
    )]
    NotHandedOn,
}

impl From<PassedError> for io::Error {
    fn from(err: PassedError) -> Self {
        Self::new(io::ErrorKind::InvalidInput, err)
    }
}

/// The sockets that were passed to this process, or the reason why there are none. The environment
/// is read only once, because each descriptor must have one owner, and because `ListenFd` removes
/// the variables `LISTEN_FDS` and `LISTEN_PID`.
static PASSED: LazyLock<Result<Mutex<Descriptors>, PassedError>> =
    LazyLock::new(|| Descriptors::from_env().map(Mutex::new));

struct Descriptors {
    /// All passed descriptors. When the environment is read, every stream socket among them is
    /// taken from `ListenFd`, even if no endpoint takes the socket later. `ListenFd` then marks it
    /// close-on-exec, so that child processes do not inherit it.
    slots: Vec<Slot>,
    first: RawFd,
    names: String,
}

/// A descriptor that was passed.
enum Slot {
    Socket(Socket),
    Taken,
    /// Not a TCP or Unix stream socket. The descriptor stays open and is not used.
    Other,
}

impl Slot {
    fn from_env(fds: &mut ListenFd, at: usize) -> Self {
        let tcp = fds.take_tcp_listener(at).map(|tcp| tcp.map(Socket::from));
        let taken = tcp.or_else(|_| {
            let unix = fds.take_unix_listener(at);
            unix.map(|unix| unix.map(Socket::from))
        });
        taken.ok().flatten().map_or(Self::Other, Self::Socket)
    }
}

impl Descriptors {
    fn from_env() -> Result<Self, PassedError> {
        let variable = |name| env::var(name).unwrap_or_default();
        if matches!(variable("LISTEN_FDS").as_str(), "" | "0") {
            return Err(PassedError::NonePassed);
        }
        let pid = variable("LISTEN_PID");
        // If `LISTEN_PID` is not set, the sockets are assumed to be for this process. Most parents
        // cannot set it, because they do not know the ID of a child process before they start it.
        if !pid.is_empty() && pid.parse() != Ok(process::id()) {
            return Err(PassedError::OtherProcess { pid });
        }
        let first = variable("LISTEN_FDS_FIRST_FD").parse().unwrap_or(3);
        let names = variable("LISTEN_FDNAMES");
        let mut fds = ListenFd::from_env();
        if fds.len() == 0 {
            return Err(PassedError::NonePassed);
        }
        let all = 0..fds.len();
        let slots = all.map(|at| Slot::from_env(&mut fds, at)).collect();
        Ok(Self {
            slots,
            first,
            names,
        })
    }

    fn take(&mut self, which: &Passed) -> Result<Vec<Opened>, PassedError> {
        let all = 0..self.slots.len();
        let wanted: Vec<usize> = match which {
            Passed::Rest => all.collect(),
            Passed::Descriptor(fd) => {
                let wanted = all.clone().find(|at| self.descriptor(*at) == Some(*fd));
                let last = self.descriptor(all.end - 1).unwrap_or(RawFd::MAX);
                let first = self.first;
                vec![wanted.ok_or(PassedError::NoSuchDescriptor { first, last })?]
            }
            Passed::Name(name) => {
                let names = self.names.split(':').enumerate();
                let wanted: Vec<_> = names
                    .filter(|(at, known)| all.contains(at) && known == name)
                    .map(|(at, _)| at)
                    .collect();
                if wanted.is_empty() {
                    return Err(PassedError::NoSuchName {
                        name: name.clone(),
                        passed: self.names.clone(),
                    });
                }
                wanted
            }
        };
        let mut opened = Vec::new();
        for at in wanted {
            match self.take_at(at) {
                Err(PassedError::Taken) => {}
                taken => opened.push(Opened {
                    kept: true,
                    ..taken?.into()
                }),
            }
        }
        if opened.is_empty() {
            return Err(PassedError::Taken);
        }
        Ok(opened)
    }

    fn take_at(&mut self, at: usize) -> Result<Socket, PassedError> {
        let descriptor = self.descriptor(at).unwrap_or(RawFd::MAX);
        let slot = self.slots.get_mut(at).ok_or(PassedError::Taken)?;
        match slot {
            Slot::Socket(socket) if !accepts(socket).unwrap_or(false) => {
                Err(PassedError::NotListening { descriptor })
            }
            Slot::Other => Err(PassedError::NotListening { descriptor }),
            Slot::Taken => Err(PassedError::Taken),
            Slot::Socket(_) => match mem::replace(slot, Slot::Taken) {
                Slot::Socket(socket) => Ok(socket),
                _ => Err(PassedError::Taken),
            },
        }
    }

    fn descriptor(&self, at: usize) -> Option<RawFd> {
        self.first.checked_add(RawFd::try_from(at).ok()?)
    }
}

fn lock() -> Result<MutexGuard<'static, Descriptors>, PassedError> {
    let passed = PASSED.as_ref().map_err(Clone::clone)?;
    Ok(passed.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Takes the sockets that `which` selects.
pub(super) fn take(which: &Passed) -> Result<Vec<Opened>, PassedError> {
    lock()?.take(which)
}

/// Takes the socket with this index among the passed descriptors.
pub(super) fn take_at(at: usize) -> Result<Socket, PassedError> {
    lock()?.take_at(at)
}

/// Returns whether the last descriptor is a Unix socket whose other end is closed.
pub(super) fn last_is_closed_unix() -> bool {
    let Ok(passed) = lock() else {
        return false;
    };
    let Some(Slot::Socket(stream)) = passed.slots.last() else {
        return false;
    };
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    let polled = poll(&mut fds, Some(&Timespec::default()));
    polled.is_ok()
        && fds[0].revents().contains(PollFlags::HUP)
        && stream.local_addr().is_ok_and(|local| local.is_unix())
}

/// Takes the last descriptor, which the caller expects to be a connected Unix socket, and returns
/// it with its index. Returns `None` if there is none, or if it is not a stream socket.
pub(super) fn take_last_unix() -> Option<(usize, OwnedFd)> {
    let mut passed = lock().ok()?;
    let at = passed.slots.len().checked_sub(1)?;
    match passed.slots.pop()? {
        Slot::Socket(stream) => Some((at, stream.into())),
        _ => None,
    }
}
