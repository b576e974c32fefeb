//! Access to the socket beneath a connection, whatever streams the hooks have put around it.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use rustix::process::{Resource, getrlimit};
use socket2::SockRef;
use tokio::net::{TcpStream, UnixStream};

/// A socket, and the state that its stream (`bind::Socket`) shares with a [`Probe`]. The stream is
/// the only owner, because a probe must not keep the socket open.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) family: Family,
    /// Set if the server resets the connection when it cuts the connection off (see
    /// `SocketOptions::reset_cut_off`).
    resets: bool,
    /// The number of bytes written to the socket. Only the stream changes it.
    written: AtomicU64,
    /// The number of bytes that [`Probe::count_arrived`] counted and that are not read yet. It is
    /// not updated once [`PASSED`] is set.
    arrived: AtomicU32,
    flags: AtomicU8,
}

/// Flag: the last read may have left bytes in the socket that the runtime does not report.
/// [`Probe::look_again`] clears the flag.
const MAY_LEAVE: u8 = 1;
/// Flag: the next read asks the system for bytes, even if the runtime reports none.
const LOOK: u8 = 2;
/// Flag: data was written since the last [`Probe::acknowledge`].
const WROTE: u8 = 4;
/// Flag: [`Probe::count_arrived`] has counted the arrived bytes.
const COUNTS: u8 = 8;
/// Flag: one read has returned the last of the counted bytes together with later bytes.
const PASSED: u8 = 16;
/// Flag: after reads had returned all counted bytes, another read has returned bytes. This shows
/// that the streams around the socket have passed all counted bytes on, because such a stream reads
/// the socket again only when it has passed them on.
const LATER: u8 = 32;

#[derive(Debug)]
pub(crate) enum Family {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Wire {
    pub(crate) fn new(family: Family, resets: bool) -> Arc<Self> {
        Arc::new(Self {
            family,
            resets,
            written: AtomicU64::new(0),
            arrived: AtomicU32::new(0),
            flags: AtomicU8::new(0),
        })
    }

    /// Counts written bytes.
    pub(crate) fn count(&self, written: usize) {
        let sum = self.written.load(Ordering::Relaxed) + written as u64;
        self.written.store(sum, Ordering::Relaxed);
        self.set(WROTE, true);
    }

    /// Records a read of `n` bytes. `may_leave` is `true` if the read may have left bytes in the
    /// socket that the runtime does not report. That is possible if the read returned bytes, and
    /// either did not fill its buffer or was requested by [`look`](Self::look).
    pub(crate) fn read(&self, n: usize, may_leave: bool) {
        self.set(MAY_LEAVE, may_leave);
        let flags = self.flags.load(Ordering::Relaxed);
        if flags & COUNTS == 0 || n == 0 {
            return;
        }
        if flags & PASSED != 0 {
            self.set(LATER, true);
            return;
        }
        let arrived = self.arrived.load(Ordering::Relaxed);
        match u32::try_from(n).ok().and_then(|n| arrived.checked_sub(n)) {
            Some(left) => self.arrived.store(left, Ordering::Relaxed),
            None if arrived == 0 => self.set(LATER, true),
            None => self.set(PASSED, true),
        }
    }

    /// Makes the next read ask the system whether bytes have arrived, even if the runtime has not
    /// reported any.
    pub(crate) fn look(&self) {
        self.set(LOOK, true);
    }

    /// Returns whether [`look`](Self::look) was called since the last call of this method.
    pub(crate) fn take_look(&self) -> bool {
        self.take(LOOK)
    }

    fn take(&self, flag: u8) -> bool {
        let is_set = self.flags.load(Ordering::Relaxed) & flag != 0;
        if is_set {
            self.set(flag, false);
        }
        is_set
    }

    /// Changes a flag with a load and a store. No change is lost, because the stream and the engine
    /// of its connection are polled by the same task.
    fn set(&self, flag: u8, on: bool) {
        let flags = self.flags.load(Ordering::Relaxed) & !flag;
        let flags = if on { flags | flag } else { flags };
        self.flags.store(flags, Ordering::Relaxed);
    }

    /// Asks the system how many of the written bytes the peer has not taken. Returns `None` if the
    /// system does not report that number.
    fn sent(&self) -> Option<Sent> {
        let written = self.written.load(Ordering::Relaxed);
        let left = match &self.family {
            Family::Tcp(stream) => system::tcp(stream, written),
            Family::Unix(stream) => system::unix(stream),
        };
        left.map(|left| Sent { written, left })
    }

    /// Makes closing a TCP socket send a reset if `resets` is set, so that the system frees the
    /// socket's memory immediately.
    fn reset_at_close(&self) {
        if self.resets
            && let Family::Tcp(stream) = &self.family
        {
            // If the system rejects the option, the socket is closed like any other.
            let _rejected = stream.set_zero_linger();
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.family {
            Family::Tcp(stream) => stream.as_fd(),
            Family::Unix(stream) => stream.as_fd(),
        }
    }
}

/// The progress of the bytes written to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    /// The number of bytes written to the socket.
    written: u64,
    /// The number of bytes that the peer has not taken yet. Over TCP these are the bytes that it
    /// has not acknowledged. Over a Unix socket this is the memory, in bytes, of the data that it
    /// has not read. Zero if the connection is closed, because then no more bytes can reach the
    /// peer.
    pub(crate) left: u64,
}

impl Sent {
    /// Returns the number of bytes that the peer has taken, plus a constant. Without the constant,
    /// the result could be negative: over a Unix socket, `left` is an amount of memory, which can
    /// exceed the number of bytes written.
    pub(crate) fn taken(self) -> u64 {
        const LARGEST_MEMORY: u64 = u32::MAX as u64;
        (self.written + LARGEST_MEMORY).saturating_sub(self.left)
    }

    /// Returns whether the peer has taken bytes since `before`, a time at which the socket was
    /// full. A write since then shows that it has, because a full socket accepts more bytes only
    /// after its peer has taken some.
    pub(crate) fn is_beyond(self, before: Self) -> bool {
        self.written != before.written || self.left < before.left
    }
}

/// A connection's access to its socket. It is empty if the listener has not provided the socket.
///
/// A probe does not keep the socket open. Once the socket is closed, every method except
/// [`knows`](Self::knows) acts as if the probe were empty. Some methods ask the system, which costs
/// a system call, so the common path of a request does not use them.
#[derive(Clone, Default)]
pub(crate) struct Probe(Option<Weak<Wire>>);

impl Probe {
    pub(crate) fn new(wire: &Arc<Wire>) -> Self {
        Self(Some(Arc::downgrade(wire)))
    }

    /// Returns whether the listener has provided the socket. The socket may be closed by now.
    pub(crate) fn knows(&self) -> bool {
        self.0.is_some()
    }

    /// Asks the system how many of the written bytes the peer has not taken. Returns `None` if no
    /// socket is known, if it is closed, or if the system does not report the number.
    pub(crate) fn sent(&self) -> Option<Sent> {
        self.wire()?.sent()
    }

    /// Makes closing a TCP socket send a reset, if the socket is still open and its options allow
    /// that.
    pub(crate) fn reset_at_close(&self) {
        if let Some(wire) = self.wire() {
            wire.reset_at_close();
        }
    }

    /// Counts the bytes, at most `most`, that have arrived and are not read yet. After that,
    /// [`has_read_later`](Self::has_read_later) shows whether the reader has got these bytes.
    ///
    /// # Errors
    ///
    /// Returns the error of the socket, if there is one. The system reports it only once.
    pub(crate) fn count_arrived(&self, most: u32) -> io::Result<()> {
        let Some(wire) = self.wire() else {
            return Ok(());
        };
        let socket = SockRef::from(&*wire);
        // Usually nothing has arrived. If bytes have arrived, a large buffer is needed, because the
        // system counts bytes by copying them.
        let mut buf = vec![MaybeUninit::uninit(); 1];
        let mut arrived = match socket.peek(&mut buf) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => 0,
            peeked => peeked?,
        };
        if arrived > 0 {
            buf.resize(most as usize, MaybeUninit::uninit());
            arrived = socket.peek(&mut buf)?;
        }
        let arrived = u32::try_from(arrived).unwrap_or(most);
        wire.arrived.store(arrived, Ordering::Relaxed);
        for flag in [PASSED, LATER] {
            wire.set(flag, false);
        }
        wire.set(COUNTS, true);
        Ok(())
    }

    /// Returns whether a later read of the socket shows that the reader has got all bytes that
    /// [`count_arrived`](Self::count_arrived) counted.
    ///
    /// A read that returns the last counted bytes, even together with later ones, does not show
    /// this, because a stream around the socket, such as TLS, may not have passed them on yet. Such
    /// a stream reads the socket again only when it has passed all bytes on. So the next read that
    /// returns bytes shows this.
    pub(crate) fn has_read_later(&self) -> bool {
        let wire = self.wire();
        wire.is_some_and(|wire| wire.flags.load(Ordering::Relaxed) & LATER != 0)
    }

    /// Returns whether the socket is a Unix socket. When the peer has closed its end of a Unix
    /// socket, no output can reach the peer, but the input that it sent can still be read. Over
    /// TCP, a peer that closes without a reset looks like a peer that has only finished sending.
    pub(crate) fn is_unix(&self) -> bool {
        let wire = self.wire();
        wire.is_some_and(|wire| matches!(wire.family, Family::Unix(_)))
    }

    /// Makes the next read ask the system for bytes that the runtime does not report yet. Returns
    /// `false` if no socket is known, or if it is closed.
    ///
    /// The runtime learns of new bytes only when it polls its driver. Asking the system costs a
    /// system call, so only a reader that would otherwise discard unread bytes should call this.
    pub(crate) fn look(&self) -> bool {
        let wire = self.wire();
        if let Some(wire) = &wire {
            wire.look();
        }
        wire.is_some()
    }

    /// Does the same as [`look`](Self::look) if the last read may have left bytes that the runtime
    /// does not report. Otherwise it does nothing and returns `false`.
    ///
    /// The system ends a read where urgent data begins. The runtime concludes from such a short
    /// read that the socket is empty. It does not report the remaining bytes until more bytes have
    /// arrived. Only a reader that needs more input should call this.
    pub(crate) fn look_again(&self) -> bool {
        self.wire().is_some_and(|wire| wire.take(MAY_LEAVE)) && self.look()
    }

    /// Makes the system acknowledge the peer's bytes immediately, if data was written since the
    /// last call. A reader that has nothing to write calls this method. It has an effect only for
    /// TCP on Linux.
    ///
    /// On a connection with output, the system delays an acknowledgement by 40 ms, to send it along
    /// with a reply. A peer with Nagle's algorithm, which sends no further small segment until it
    /// gets the acknowledgement, would wait that long.
    pub(crate) fn acknowledge(&self) {
        if let Some(wire) = self.wire()
            && wire.take(WROTE)
            && let Family::Tcp(stream) = &wire.family
        {
            system::acknowledge(stream);
        }
    }

    /// Returns a second descriptor of the socket. It keeps the socket open. Returns `None` if few
    /// descriptors of the process are free.
    pub(crate) fn second_descriptor(&self) -> Option<OwnedFd> {
        let second = self.wire()?.as_fd().try_clone_to_owned().ok()?;
        let limit = getrlimit(Resource::Nofile).current;
        leaves_enough(second.as_raw_fd(), limit).then_some(second)
    }

    fn wire(&self) -> Option<Arc<Wire>> {
        self.0.as_ref()?.upgrade()
    }
}

/// Returns whether enough descriptors are free once this one is in use: an eighth of the limit of
/// the process. Otherwise, peers that let many connections need a second descriptor could leave
/// none to the accept loop and the rest of the program.
fn leaves_enough(descriptor: RawFd, limit: Option<u64>) -> bool {
    // The system returns the lowest free number.
    let below = limit.map_or(u64::MAX, |limit| limit - limit / 8);
    u64::try_from(descriptor).is_ok_and(|descriptor| descriptor < below)
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Probe").field(&self.knows()).finish()
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::sync::OnceLock;

    use nix::sys::socket::GetSockOpt;
    use nix::{getsockopt_impl, sockopt_impl};

    use super::{SockRef, TcpStream, UnixStream};

    /// The beginning of `tcp_info`, as 16 words of 64 bits. Linux has had all of them since 4.1.
    type TcpInfo = [u64; 16];
    /// The index of `bytes_acked`, the last word of [`TcpInfo`].
    const ACKNOWLEDGED: usize = 15;
    /// The state `TCP_CLOSE`: the connection was reset or timed out, or both sides have closed it.
    const CLOSED: u8 = 7;

    /// The figures of a socket's memory, in the order of the kernel's constants `SK_MEMINFO_*`.
    type Memory = [u32; 9];
    /// The index of `SK_MEMINFO_WMEM_ALLOC`: the size, in bytes, of the memory for output that the
    /// peer of a Unix socket has not read.
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

    pub(super) fn tcp(stream: &TcpStream, written: u64) -> Option<u64> {
        // Linux has had `SO_MEMINFO` since 4.12. On a system without it, `tcp_info` may lack
        // values, or may be shorter than `TcpInfo`. In the second case, nix would panic.
        static KNOWN: OnceLock<bool> = OnceLock::new();
        if !KNOWN.get_or_init(|| MemoryOption.get(stream).is_ok()) {
            return None;
        }
        let info = TcpInfoOption.get(stream).ok()?;
        let [state, ..] = info[0].to_ne_bytes();
        if state == CLOSED {
            return Some(0);
        }
        // The peer acknowledges the end of the stream as one more byte, so the difference may be
        // negative.
        Some(written.saturating_sub(info[ACKNOWLEDGED]))
    }

    pub(super) fn acknowledge(stream: &TcpStream) {
        // If the system rejects the option, the acknowledgement is only late.
        let _rejected = SockRef::from(stream).set_tcp_quickack(true);
    }

    pub(super) fn unix(stream: &UnixStream) -> Option<u64> {
        let memory = MemoryOption.get(stream).ok()?;
        Some(memory[WRITTEN].into())
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::{TcpStream, UnixStream};

    pub(super) fn tcp(_stream: &TcpStream, _written: u64) -> Option<u64> {
        None
    }

    pub(super) fn unix(_stream: &UnixStream) -> Option<u64> {
        None
    }

    pub(super) fn acknowledge(_stream: &TcpStream) {}
}
