//! How sockets listen, and what is set on those they accept.

use std::io;
use std::time::Duration;

use socket2::{Domain, Socket, TcpKeepalive};

/// How to listen, and what to set on every accepted socket.
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
/// An option that cannot be set on a listening socket is an error of the bind. One that cannot be
/// set on an accepted socket costs nobody the connection: it is logged at debug level, and the
/// connection is served without.
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
            unix_mode: None,
        }
    }
}

impl SocketOptions {
    /// Sets how many connections may wait to be accepted: 1024.
    ///
    /// A server at its connection limit leaves clients here, so it is larger than the 128 of
    /// tokio's own `bind`. The system has a ceiling of its own (`net.core.somaxconn` on Linux).
    /// Beyond it TCP clients try again by themselves, and Unix clients are told so.
    #[doc(alias = "ListenQueue")]
    #[doc(alias = "somaxconn")]
    pub fn backlog(mut self, connections: u32) -> Self {
        self.backlog = connections;
        self
    }

    /// Sets whether an address may be bound while connections of an earlier server on it wind down
    /// (`SO_REUSEADDR`): on, so that a server can be restarted at once.
    #[doc(alias = "SO_REUSEADDR")]
    pub fn reuse_address(mut self, reuse_address: bool) -> Self {
        self.reuse_address = reuse_address;
        self
    }

    /// Sets whether several sockets may listen on one address and share its connections
    /// (`SO_REUSEPORT`): off, so that a second server started by mistake is an error.
    ///
    /// With it a program can run an accept loop on each of several runtimes.
    /// [`ServerBuilder::workers`](crate::ServerBuilder::workers) needs one loop only, and is what
    /// most want: the kernel spreads connections by their addresses, not by who has the time, and
    /// resets those that wait in the backlog of a loop that ends. Loops are for more connections a
    /// second than one can accept, and for stacks that are `Clone`. A clone of one limit in each
    /// keeps it exact over all:
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
    /// let stack = service_fn(|conn: Connection<Socket>| async move { Ok::<_, BoxError>(drop(conn)) });
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

    /// Sets whether IPv6 sockets leave IPv4 alone (`IPV6_V6ONLY`): off, so that `[::]` means every
    /// address, whatever the system's own default is. To listen on `0.0.0.0` and `[::]` at one port
    /// as two sockets, turn it on.
    #[doc(alias = "IPV6_V6ONLY")]
    #[doc(alias = "dual stack")]
    pub fn only_v6(mut self, only_v6: bool) -> Self {
        self.only_v6 = only_v6;
        self
    }

    /// Sets whether accepted TCP sockets send at once what is written (`TCP_NODELAY`): on, since
    /// replies are written in batches already, and a held-back one would wait for the peer's
    /// acknowledgement.
    #[doc(alias = "TCP_NODELAY")]
    pub fn nodelay(mut self, nodelay: bool) -> Self {
        self.nodelay = nodelay;
        self
    }

    /// Sets after how long a silence TCP itself asks whether the peer is still there: not at all,
    /// since the pipeline has deadlines of its own.
    #[doc(alias = "SO_KEEPALIVE")]
    #[doc(alias = "tcp_keepalive")]
    pub fn keepalive(mut self, silence: Duration) -> Self {
        self.keepalive = Some(silence);
        self
    }

    /// Sets `SO_LINGER` on accepted TCP sockets: not set, which sends what is left in the
    /// background.
    ///
    /// Zero makes every close a reset, which discards what the peer has not got yet; any other time
    /// blocks the runtime's thread in the close for as long. Neither is a part of a graceful close.
    #[doc(alias = "SO_LINGER")]
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = Some(linger);
        self
    }

    /// Sets the size in bytes of the system's receive buffer of a TCP socket: left to the system,
    /// which adapts it.
    #[doc(alias = "SO_RCVBUF")]
    pub fn recv_buffer(mut self, bytes: usize) -> Self {
        self.recv_buffer = Some(bytes);
        self
    }

    /// Sets the size in bytes of the system's send buffer of a TCP socket: left to the system,
    /// which adapts it.
    #[doc(alias = "SO_SNDBUF")]
    pub fn send_buffer(mut self, bytes: usize) -> Self {
        self.send_buffer = Some(bytes);
        self
    }

    /// Sets the mode of the file of a Unix socket, as `0o660`: left to the process's umask.
    ///
    /// It is set before the socket listens: at no time can anyone connect whom the mode does not
    /// let.
    pub fn unix_mode(mut self, mode: u32) -> Self {
        self.unix_mode = Some(mode);
        self
    }
}

impl SocketOptions {
    pub(super) fn mode(&self) -> Option<u32> {
        self.unix_mode
    }

    /// `listen` takes a signed number, and a larger one has no meaning to any system.
    pub(super) fn queue(&self) -> i32 {
        i32::try_from(self.backlog).unwrap_or(i32::MAX)
    }

    /// Sets what must be set before a TCP socket is bound.
    pub(super) fn prepare(&self, socket: &Socket, domain: Domain) -> io::Result<()> {
        socket.set_reuse_address(self.reuse_address)?;
        if self.reuse_port {
            socket.set_reuse_port(true)?;
        }
        if domain == Domain::IPV6 {
            socket.set_only_v6(self.only_v6)?;
        }
        // Here as well as after accept: the window's scale is agreed on in the handshake, which is
        // over by then.
        if let Some(bytes) = self.recv_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        if let Some(bytes) = self.send_buffer {
            socket.set_send_buffer_size(bytes)?;
        }
        Ok(())
    }

    /// Sets what is set on an accepted TCP socket, as far as the system lets it.
    pub(super) fn apply(&self, socket: &Socket) {
        if self.nodelay {
            note("nodelay", socket.set_tcp_nodelay(true));
        }
        if let Some(silence) = self.keepalive {
            let keepalive = TcpKeepalive::new().with_time(silence);
            note("keepalive", socket.set_tcp_keepalive(&keepalive));
        }
        if let Some(linger) = self.linger {
            note("linger", socket.set_linger(Some(linger)));
        }
        if let Some(bytes) = self.recv_buffer {
            note("recv_buffer", socket.set_recv_buffer_size(bytes));
        }
        if let Some(bytes) = self.send_buffer {
            note("send_buffer", socket.set_send_buffer_size(bytes));
        }
    }
}

/// A peer that reset its connection in the queue makes some systems refuse options; that is no
/// fault of the server.
fn note(option: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(target: "tower_tcp", option, %error, "a socket option could not be set");
    }
}
