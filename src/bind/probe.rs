//! Queries the system about a socket's peer.

use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::{TcpStream, UnixStream};

use crate::connection::PeerSide;

pub(super) use unacknowledged::{tcp, unix};

/// Returns the state of the peer's side.
pub(super) fn peer_side(socket: &impl AsFd) -> PeerSide {
    let mut fds = [PollFd::new(socket, FINISHED)];
    let told = match poll(&mut fds, Some(&Timespec::default())) {
        Ok(_) => fds[0].revents(),
        Err(_) => PollFlags::empty(),
    };
    if told.intersects(PollFlags::ERR | PollFlags::HUP) {
        PeerSide::Gone
    } else if told.intersects(FINISHED) {
        PeerSide::Finished
    } else {
        PeerSide::Open
    }
}

#[cfg(any(target_os = "android", target_os = "freebsd", target_os = "linux"))]
const FINISHED: PollFlags = PollFlags::RDHUP;
/// These systems report the end of input only after all unread bytes.
#[cfg(not(any(target_os = "android", target_os = "freebsd", target_os = "linux")))]
const FINISHED: PollFlags = PollFlags::empty();

#[cfg(target_os = "linux")]
mod unacknowledged {
    use nix::sys::socket::GetSockOpt;
    use nix::{getsockopt_impl, sockopt_impl};

    use super::{TcpStream, UnixStream};

    /// The first 16 words of `tcp_info`, which Linux has had since 4.1.
    type TcpInfo = [u64; 16];
    /// `bytes_acked`, the last of them.
    const ACKNOWLEDGED: usize = 15;
    /// `TCP_CLOSE`: the connection was reset, or both sides are done.
    const CLOSED: u8 = 7;

    /// The memory of a socket, in the order of the kernel's `SK_MEMINFO_*`.
    type Memory = [u32; 9];
    /// The memory of what was written and the peer has not read: `SK_MEMINFO_WMEM_ALLOC`.
    const WRITTEN: usize = 2;

    sockopt_impl!(
        TcpInfoOption,
        GetOnly,
        libc::IPPROTO_TCP,
        libc::TCP_INFO,
        TcpInfo
    );
    sockopt_impl!(
        MemoryOption,
        GetOnly,
        libc::SOL_SOCKET,
        libc::SO_MEMINFO,
        Memory
    );

    pub(in crate::bind) fn tcp(stream: &TcpStream, written: u64) -> Option<u64> {
        // Linux has this option since 4.12. An older system may have a shorter `tcp_info`, at which
        // nix panics, or one that is not filled in.
        MemoryOption.get(stream).ok()?;
        let info = TcpInfoOption.get(stream).ok()?;
        let [state, ..] = info[0].to_ne_bytes();
        if state == CLOSED {
            return Some(0);
        }
        // The end of the stream is acknowledged as a byte.
        Some(written.saturating_sub(info[ACKNOWLEDGED]))
    }

    pub(in crate::bind) fn unix(stream: &UnixStream) -> Option<u64> {
        let memory = MemoryOption.get(stream).ok()?;
        Some(memory[WRITTEN].into())
    }
}

#[cfg(not(target_os = "linux"))]
mod unacknowledged {
    use super::{TcpStream, UnixStream};

    pub(in crate::bind) fn tcp(_stream: &TcpStream, _written: u64) -> Option<u64> {
        None
    }

    pub(in crate::bind) fn unix(_stream: &UnixStream) -> Option<u64> {
        None
    }
}
