//! Options of listening sockets and of the sockets they accept.

use std::io;
use std::time::Duration;

use socket2::{Domain, Socket, TcpKeepalive};

/// The options of listening sockets and of the sockets they accept.
///
/// ```
/// use std::time::Duration;
/// use tower_tcp::bind::SocketOptions;
///
/// let options = SocketOptions::default()
///     .backlog(4096)
///     .keepalive(Duration::from_secs(60))
///     .unix_mode(0o660);
/// # let _ = options;
/// ```
///
/// The options `backlog`, `reuse_address`, `reuse_port`, `only_v6`, `recv_buffer`, `send_buffer`
/// and `unix_mode` apply to the listening socket, and the two buffer sizes also to accepted
/// sockets. If one of these options cannot be set on the listening socket, the bind fails. The
/// other options apply only to accepted sockets. If an option cannot be set for accepted sockets,
/// connections are served without the option. The failure is logged at debug level, except for
/// `reset_cut_off`.
#[derive(Clone, Debug)]
#[must_use = "options do nothing until sockets are bound with them"]
pub struct SocketOptions {
    backlog: u32,
    reuse_address: bool,
    reuse_port: bool,
    only_v6: bool,
    nodelay: bool,
    keepalive: Option<Duration>,
    linger: Option<Duration>,
    recv_buffer: Option<usize>,
    send_buffer: Option<usize>,
    unsent: Option<u32>,
    reset_cut_off: bool,
    unix_mode: Option<u32>,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self {
            backlog: 1024,
            reuse_address: true,
            reuse_port: false,
            only_v6: false,
            nodelay: true,
            keepalive: None,
            linger: None,
            recv_buffer: None,
            send_buffer: None,
            unsent: None,
            reset_cut_off: true,
            unix_mode: None,
        }
    }
}

impl SocketOptions {
    /// Sets the maximum length of the accept queue: the number of connections that may wait to be
    /// accepted.
    ///
    /// Default: 1024. Why: clients of a server at its connection limit wait in this queue, so it is
    /// longer than the 128 of tokio's own `TcpListener::bind`. When reached: a TCP client's system
    /// tries again by itself. On Linux, a Unix client waits, or gets the error `WouldBlock` if its
    /// socket is non-blocking, as tokio's are. On macOS and the BSDs, a Unix client is refused. The
    /// system limits the length, too (`net.core.somaxconn` on Linux).
    #[doc(alias = "ListenQueue")]
    #[doc(alias = "somaxconn")]
    pub fn backlog(mut self, connections: u32) -> Self {
        self.backlog = connections;
        self
    }

    /// Sets whether an address can be bound while connections of an earlier server at the same
    /// address are still closing (`SO_REUSEADDR`).
    ///
    /// Default: on. Why: so that a restarted server need not wait for those connections.
    #[doc(alias = "SO_REUSEADDR")]
    pub fn reuse_address(mut self, reuse_address: bool) -> Self {
        self.reuse_address = reuse_address;
        self
    }

    /// Sets whether several sockets may listen on one address and share its connections
    /// (`SO_REUSEPORT`).
    ///
    /// Default: off. Why: so that a second server started by mistake fails.
    ///
    /// With this option a program can run an accept loop on each of several runtimes. Most programs
    /// should use [`ServerBuilder::workers`](crate::ServerBuilder::workers) instead, which needs
    /// only one loop. With several loops, Linux distributes connections by their addresses, not by
    /// load, and resets connections that a loop leaves in its backlog when it ends. Other systems
    /// may give all connections to one loop. Use several loops only if one cannot accept
    /// connections fast enough. Each loop needs its own stack, for example a clone. To enforce one
    /// exact limit on the connections of all loops together, give each loop a clone of the limit:
    ///
    /// ```
    /// use tower::service_fn;
    /// use tower_tcp::{BoxError, Connection, Error, Server};
    /// use tower_tcp::admit::ConnectionLimit;
    /// use tower_tcp::bind::{Socket, SocketOptions};
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Error> {
    /// let limit = ConnectionLimit::new(10_000);
    /// let stack = service_fn(|conn: Connection<Socket>| async move {
    ///     drop(conn);
    ///     Ok::<_, BoxError>(())
    /// });
    /// let loops = || {
    ///     let options = SocketOptions::default().reuse_port(true);
    ///     Server::builder().socket_options(options).limit(limit.clone())
    /// };
    /// let first = loops().listen("127.0.0.1:0").bind().await?;
    /// let addr = first.handle().local_addrs()[0].to_string();
    /// let second = loops().listen(addr).bind().await?;
    ///
    /// let handles = [first.handle(), second.handle()];
    /// let first = tokio::spawn(first.serve(stack)); // or on a runtime of its own
    /// let second = tokio::spawn(second.serve(stack));
    /// # let joined = async { (first.await, second.await) };
    /// handles.iter().for_each(|handle| handle.shutdown());
    /// # joined.await;
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "SO_REUSEPORT")]
    pub fn reuse_port(mut self, reuse_port: bool) -> Self {
        self.reuse_port = reuse_port;
        self
    }

    /// Sets whether IPv6 sockets exclude IPv4 (`IPV6_V6ONLY`).
    ///
    /// Default: off. Why: so that `[::]` means every address, including IPv4, whatever the system's
    /// default is. Turn it on to listen on `0.0.0.0` and `[::]` with two sockets at one port. On
    /// OpenBSD it is always on.
    #[doc(alias = "IPV6_V6ONLY")]
    #[doc(alias = "dual stack")]
    pub fn only_v6(mut self, only_v6: bool) -> Self {
        self.only_v6 = only_v6;
        self
    }

    /// Sets whether accepted TCP sockets send written bytes immediately (`TCP_NODELAY`).
    ///
    /// Default: on. Why: replies are already written in batches, so a delay would only make a reply
    /// wait for the peer's acknowledgement.
    #[doc(alias = "TCP_NODELAY")]
    pub fn nodelay(mut self, nodelay: bool) -> Self {
        self.nodelay = nodelay;
        self
    }

    /// Sets the time without traffic, in whole seconds, after which TCP checks that the peer is
    /// still there. A fraction is dropped, so a time below 1 s becomes zero, which the system
    /// rejects.
    ///
    /// Default: never. Why: the deadlines of pipelines and HTTP already end silent connections.
    /// When reached: TCP sends probes, and if the peer answers none of them, the connection ends
    /// with [`PeerReset`](crate::EndReason::PeerReset).
    ///
    /// Set it if the deadlines [`first_byte`](crate::deadline::Deadlines::first_byte) and
    /// [`idle`](crate::deadline::Deadlines::idle) are off, as for clients that only receive.
    /// If this option is not set, and such a client vanishes without closing the connection, the
    /// server notices only when it next sends something.
    #[doc(alias = "SO_KEEPALIVE")]
    #[doc(alias = "tcp_keepalive")]
    pub fn keepalive(mut self, silence: Duration) -> Self {
        self.keepalive = Some(silence);
        self
    }

    /// Sets `SO_LINGER` on accepted TCP sockets, in whole seconds. A fraction is dropped, so any
    /// time below 1 s counts as zero.
    ///
    /// Default: not set. Why: so that the system sends remaining bytes in the background.
    ///
    /// Zero makes every close a reset, which discards the bytes that the peer has not received.
    /// With any other time, the close blocks the runtime's thread until these bytes are
    /// acknowledged, for at most that time. The [graceful close](crate::close) does not need this
    /// option.
    #[doc(alias = "SO_LINGER")]
    pub fn linger(mut self, linger: Duration) -> Self {
        // The system's option has 31 bits.
        self.linger = Some(linger.min(Duration::from_secs(i32::MAX as u64)));
        self
    }

    /// Sets the size in bytes of the system's receive buffer of a TCP socket.
    ///
    /// Default: not set. Why: the system then adapts the size to the connection.
    #[doc(alias = "SO_RCVBUF")]
    pub fn recv_buffer(mut self, bytes: usize) -> Self {
        self.recv_buffer = Some(bytes.min(i32::MAX as usize));
        self
    }

    /// Sets the size in bytes of the system's send buffer of a TCP socket.
    ///
    /// Default: not set. Why: the system then adapts the size to the connection.
    #[doc(alias = "SO_SNDBUF")]
    pub fn send_buffer(mut self, bytes: usize) -> Self {
        self.send_buffer = Some(bytes.min(i32::MAX as usize));
        self
    }

    /// Sets the maximum number of unsent bytes that the system holds for a TCP socket
    /// (`TCP_NOTSENT_LOWAT`, only on Linux). `0` restores the system's own maximum
    /// (`net.ipv4.tcp_notsent_lowat`), which by default is none.
    ///
    /// Default: not set. Why: the size of the send buffer already bounds these bytes, and bulk
    /// transfers take the least CPU time without this option. When reached: the connection's writes
    /// wait.
    ///
    /// Set this, for example to 128 KiB, if many peers read slowly. The system then holds at most
    /// that many unsent bytes for each peer, instead of megabytes. Bytes in transit to the peer are
    /// not counted.
    #[doc(alias = "TCP_NOTSENT_LOWAT")]
    pub fn unsent(mut self, bytes: u32) -> Self {
        self.unsent = Some(bytes);
        self
    }

    /// Sets whether the server resets a TCP connection when it cuts the connection off. The server
    /// cuts off a connection
    ///
    /// - that reaches its deadline [`write`](crate::deadline::Deadlines::write), or
    ///   [`Linger::write`](crate::close::Linger::write);
    /// - that has not begun to close when the deadline of a shutdown passes, when the server is
    ///   aborted, or when the future of `serve` is dropped;
    /// - whose peer reads too slowly ([`SlowReader`](crate::EndReason::SlowReader));
    /// - whose address an [`address_filter`](crate::ServerBuilder::address_filter) of the server
    ///   denies;
    /// - that is aborted individually, for example by [`Peer::abort`](crate::Peer::abort).
    ///
    /// Default: on. Why: otherwise the system would keep the bytes that the peer has not read. It
    /// may keep several megabytes for minutes, while the connection no longer counts against the
    /// connection limit. A reset discards these bytes. With `false`, a peer that still reads
    /// receives them.
    #[doc(alias = "reset_timedout_connection")]
    #[doc(alias = "set_zero_linger")]
    pub fn reset_cut_off(mut self, reset_cut_off: bool) -> Self {
        self.reset_cut_off = reset_cut_off;
        self
    }

    /// Sets the file mode of a Unix socket, such as `0o660`. The mode is set before the socket
    /// listens, so no process without permission can ever connect.
    ///
    /// Default: not set. Why: so that the process's umask applies.
    pub fn unix_mode(mut self, mode: u32) -> Self {
        self.unix_mode = Some(mode);
        self
    }
}

impl SocketOptions {
    pub(super) fn resets_cut_off(&self) -> bool {
        self.reset_cut_off
    }

    pub(super) fn mode(&self) -> Option<u32> {
        self.unix_mode
    }

    /// Returns the backlog as the signed integer that `listen` takes, or the largest such integer
    /// if the backlog is larger.
    pub(super) fn queue(&self) -> i32 {
        i32::try_from(self.backlog).unwrap_or(i32::MAX)
    }

    /// Sets the options of a listening TCP socket before it is bound. On Linux, also sets the
    /// options that accepted sockets will inherit.
    pub(super) fn prepare(&self, socket: &Socket, domain: Domain) -> io::Result<()> {
        socket.set_reuse_address(self.reuse_address)?;
        if self.reuse_port {
            socket.set_reuse_port(true)?;
        }
        // OpenBSD has only sockets that do not include IPv4, and rejects this option.
        if domain == Domain::IPV6 && cfg!(not(target_os = "openbsd")) {
            socket.set_only_v6(self.only_v6)?;
        }
        // The size of the receive buffer must be set before a connection arrives, because it
        // determines the window scale, which the TCP handshake negotiates.
        if let Some(bytes) = self.recv_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        if let Some(bytes) = self.send_buffer {
            socket.set_send_buffer_size(bytes)?;
        }
        if INHERITED {
            self.inherit(socket);
        }
        Ok(())
    }

    /// Applies the backlog to a listening socket that the replaced process has opened, and on Linux
    /// also the options that accepted TCP sockets inherit. An option that is off or not set in
    /// `self` stays as it is on the socket. So do the options that must be set before the bind.
    #[cfg(feature = "handover")]
    pub(super) fn renew(&self, socket: &Socket) -> io::Result<()> {
        if INHERITED && socket.local_addr()?.as_socket().is_some() {
            self.inherit(socket);
        }
        socket.listen(self.queue())
    }

    /// Sets the options of an accepted TCP socket, as far as the system allows. On Linux, the
    /// socket has inherited most of them if its listener was [prepared](Self::prepare).
    pub(super) fn apply(&self, socket: &Socket, prepared: bool) {
        if !(INHERITED && prepared) {
            self.inherit(socket);
        }
        if let Some(linger) = self.linger {
            note("linger", socket.set_linger(Some(linger)));
        }
    }

    /// Sets the options that accepted sockets inherit from their listening socket on Linux.
    /// `socket` is such a listening socket, or an accepted socket that has not inherited them.
    fn inherit(&self, socket: &Socket) {
        if self.nodelay {
            note("nodelay", socket.set_tcp_nodelay(true));
        }
        if let Some(silence) = self.keepalive {
            let keepalive = TcpKeepalive::new().with_time(silence);
            note("keepalive", socket.set_tcp_keepalive(&keepalive));
        }
        if let Some(bytes) = self.recv_buffer {
            note("recv_buffer", socket.set_recv_buffer_size(bytes));
        }
        if let Some(bytes) = self.send_buffer {
            note("send_buffer", socket.set_send_buffer_size(bytes));
        }
        #[cfg(target_os = "linux")]
        if let Some(bytes) = self.unsent {
            note("unsent", unsent::set(socket, bytes));
        }
    }
}

/// True on Linux, where an accepted socket inherits the options of its listening socket, so they
/// need not be set for each connection.
const INHERITED: bool = cfg!(target_os = "linux");

#[cfg(target_os = "linux")]
mod unsent {
    use std::io;

    use nix::sys::socket::SetSockOpt;
    use nix::{setsockopt_impl, sockopt_impl};

    sockopt_impl!(
        NotSentLowat,
        SetOnly,
        libc::IPPROTO_TCP,
        libc::TCP_NOTSENT_LOWAT,
        u32
    );

    pub(super) fn set(socket: &socket2::Socket, bytes: u32) -> io::Result<()> {
        Ok(NotSentLowat.set(socket, &bytes)?)
    }
}

/// Makes accepted TCP sockets keep the urgent byte in the stream (`SO_OOBINLINE`), as RFC 6093
/// recommends. Without this byte, commands of the telnet protocol would be incomplete. On all
/// systems accepted sockets inherit this option from their listening socket.
pub(super) fn keep_urgent_data(listener: &Socket) {
    note("oob_inline", listener.set_out_of_band_inline(true));
}

/// Logs an option that could not be set. The level is debug, because on some systems this happens
/// whenever a peer resets a connection in the backlog.
fn note(option: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(target: "tower_tcp", option, %error, "a socket option could not be set");
    }
}
