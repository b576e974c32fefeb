use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime;

use super::accept_loop::AcceptErrorPolicy;
use super::workers::Runtimes;
use super::{CutOff, Server};
use crate::accept::AcceptErrorAction;
use crate::admit::{AddressFilter, ConnectionLimit};
use crate::bind::{Endpoint, IntoListener, Listener, SocketOptions, Sockets};
use crate::error::Error;
use crate::handle::{Handle, Plan};

/// Configures a [`Server`]: its addresses and its options.
///
/// | option | default | why |
/// | --- | --- | --- |
/// | [`name`](Self::name) | none | a process with one server needs none |
/// | [`limit`](Self::limit) | 10,000 connections | bounds the memory of connections |
/// | [`shutdown_deadline`](Self::shutdown_deadline) | 30 s | the default grace period of Kubernetes |
/// | [`lame_duck`](Self::lame_duck) | zero | only a load balancer that polls the server needs it |
/// | [`lame_duck_closes_listener`](Self::lame_duck_closes_listener) | off | a closed listener refuses connections that a balancer still sends |
/// | [`address_filter`](Self::address_filter) | none | only the program knows which addresses are unwelcome |
/// | [`on_accept_error`](Self::on_accept_error) | [`classify`](crate::accept::classify) | it stops the server only if the listener is closed |
/// | [`workers`](Self::workers), [`runtimes`](Self::runtimes) | zero, none | a multi-thread runtime suits most programs |
/// | [`socket_options`](Self::socket_options) | see [`SocketOptions`] | |
#[must_use = "a builder does nothing until it binds"]
pub struct ServerBuilder {
    name: Option<Arc<str>>,
    endpoints: Vec<Endpoint>,
    options: SocketOptions,
    limit: ConnectionLimit,
    plan: Plan,
    policy: AcceptErrorPolicy,
    filters: Vec<AddressFilter>,
    runtimes: Runtimes,
}

impl Default for ServerBuilder {
    fn default() -> Self {
        Self {
            name: None,
            endpoints: Vec::new(),
            options: SocketOptions::default(),
            limit: ConnectionLimit::new(10_000),
            plan: Plan::new(Duration::ZERO, Duration::from_secs(30)),
            policy: super::default_policy(),
            filters: Vec::new(),
            runtimes: Runtimes::Own(0),
        }
    }
}

impl ServerBuilder {
    /// Sets the server's name, which [`Handle::name`] returns. The name is the value of the
    /// attribute `server.name` in the server's metrics, and the prefix of the names of the threads
    /// that the server starts ([`workers`](Self::workers)), without NUL characters, which a
    /// thread's name cannot contain.
    ///
    /// Default: none. The threads are then named `tower-tcp-0`, `tower-tcp-1` and so on.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Adds an address to listen on.
    pub fn listen(mut self, endpoint: impl Into<Endpoint>) -> Self {
        self.endpoints.push(endpoint.into());
        self
    }

    /// Adds several addresses to listen on, such as those of a command line or a configuration.
    pub fn listen_all<E: Into<Endpoint>>(mut self, endpoints: impl IntoIterator<Item = E>) -> Self {
        self.endpoints.extend(endpoints.into_iter().map(Into::into));
        self
    }

    /// Sets the options of the sockets. [`SocketOptions`] states the default of each option.
    #[doc(alias = "backlog")]
    #[doc(alias = "keepalive")]
    #[doc(alias = "nodelay")]
    pub fn socket_options(mut self, options: SocketOptions) -> Self {
        self.options = options;
        self
    }

    /// Sets the limit on open connections. To change it later, keep a clone of it, or use
    /// [`Handle::limit`].
    ///
    /// Default: 10,000. Why: to bound the memory of connections. When reached: the server stops
    /// accepting, and clients wait in the backlog.
    ///
    /// Connections in their hooks, such as a TLS handshake, count, too. If this limit is not well
    /// above their maximum number (512 by default), set a lower
    /// [`PreConnectLayer::pending`](crate::preconnect::PreConnectLayer::pending). Otherwise, silent
    /// peers in their hooks can take all of this limit.
    ///
    /// The process needs at least one file descriptor for each connection. A connection may need a
    /// second one while a request is answered, to notice that the peer disconnects. This applies to
    /// HTTP/1, and to a pipeline's connection that drains, has much unread input, or whose peer has
    /// finished sending. So peers can make the process use two descriptors for each connection.
    /// Second descriptors leave at least an eighth of the process's descriptors free. Without one,
    /// a disconnect may be noticed later. Many systems allow only 1,024 descriptors unless
    /// configured otherwise.
    #[doc(alias = "max_connections")]
    #[doc(alias = "concurrency")]
    #[doc(alias = "max_clients")]
    pub fn limit(mut self, limit: ConnectionLimit) -> Self {
        self.limit = limit;
        self
    }

    /// Sets how long a shutdown waits for connections to finish. The time starts at the end of the
    /// [`lame_duck`](Self::lame_duck) phase.
    ///
    /// Default: 30 s. Why: by default, Kubernetes kills a process after that time. When reached:
    /// the remaining connections are aborted.
    pub fn shutdown_deadline(mut self, deadline: Duration) -> Self {
        self.plan.deadline(deadline);
        self
    }

    /// Sets how long a shutdown waits before it drains connections: the length of the lame-duck
    /// phase. During this phase the server serves as before, and [`Handle::phase`] returns
    /// [`LameDuck`](crate::ServerPhase::LameDuck), so that a readiness check can tell load
    /// balancers to send no more connections.
    ///
    /// Default: zero. Why: only a load balancer that polls the server needs the phase. When
    /// reached: connections drain, and the listener closes.
    ///
    /// A balancer stops sending connections only after a number of failed checks. Choose a time
    /// that is longer than this number times the interval of the checks. The page
    /// [`balancers`](crate::balancers) shows which checks notice the phase.
    pub fn lame_duck(mut self, time: Duration) -> Self {
        self.plan.lame_duck(time);
        self
    }

    /// Closes the listener at the beginning of the [`lame_duck`](Self::lame_duck) phase, instead of
    /// at its end. Open connections are served as before for the whole phase. Connections that wait
    /// in the backlog when the phase begins are still accepted and served, as far as the limit
    /// allows.
    ///
    /// Default: off. Why: a balancer sends connections until it has noticed the phase, and a closed
    /// listener refuses them.
    ///
    /// Use this for a balancer whose checks only connect. Examples are the TCP checks of an AWS
    /// NLB, `tcpSocket` probes of Kubernetes, and HAProxy's plain `check`. Such a check notices the
    /// phase only if its connection is refused. The balancer should try another server when a
    /// connection is refused, as HAProxy does with `option redispatch`, and nginx by default.
    ///
    /// This setting has no effect if a supervisor such as systemd keeps one of the sockets open,
    /// because clients of that socket would not be refused. They would wait for the next process.
    pub fn lame_duck_closes_listener(mut self) -> Self {
        self.plan.closes_listener = true;
        self
    }

    /// Adds a filter of peer addresses, such as an [`AccessList`](crate::admit::AccessList) or
    /// [`Bans`](crate::admit::Bans). If there are several filters, each must allow the address.
    ///
    /// Default: none. Why: only the program knows which addresses are unwelcome. When a filter
    /// denies an address: the accept loop closes the connection without starting a task for it. A
    /// TCP connection is reset (see [`SocketOptions::reset_cut_off`]). The connection is counted in
    /// the metrics with [`EndReason::Denied`](crate::EndReason::Denied), and logged only at trace
    /// level (`connection.denied`).
    ///
    /// Behind a proxy, the peer's address is that of the proxy. In that case, use the filter as a
    /// pre-connect hook instead.
    #[doc(alias = "allow_hosts")]
    #[doc(alias = "ban")]
    pub fn address_filter(mut self, filter: impl Into<AddressFilter>) -> Self {
        self.filters.push(filter.into());
        self
    }

    /// Sets the policy for failed accepts.
    ///
    /// Default: [`classify`](crate::accept::classify). A custom policy can call that function for
    /// errors that the policy does not handle itself.
    pub fn on_accept_error(
        mut self,
        policy: impl Fn(&io::Error) -> AcceptErrorAction + Send + Sync + 'static,
    ) -> Self {
        self.policy = Arc::new(policy);
        self
    }

    /// Runs the connections on this many threads, each with a current-thread runtime.
    ///
    /// Default: zero; connections run on the runtime on which [`serve`](Server::serve) is awaited.
    /// Why: a multi-thread runtime suits most programs.
    ///
    /// There is still one accept loop, with one stack and an exact limit, so the stack need not be
    /// `Clone`. The loop passes each connection to the thread with the fewest connections. The
    /// stream, the timers and the task of a connection stay on its thread, and so do tasks that its
    /// services start with `tokio::spawn`.
    ///
    /// Workers suit long-lived connections with many small requests of a few microseconds each,
    /// because a request never moves to another thread, and wakes no other thread unless its
    /// service does. A multi-thread runtime, which distributes *tasks*, is better in these cases:
    ///
    /// - A request computes for a long time.
    /// - A few connections do most of the work. Connections on one thread wait for each other, even
    ///   if other threads are idle.
    /// - A connection has only one or two requests. Passing a connection to a thread costs a few
    ///   microseconds.
    ///
    /// Use as many threads as there are cores ([`std::thread::available_parallelism`]); the accept
    /// loop needs no thread of its own. On these threads `tokio::task::block_in_place` panics.
    ///
    /// The threads are named after the server (`echo-0`, `echo-1`). They start and end with the
    /// server. Tasks that still run on them at the end are dropped. The server waits at most 1 s
    /// for the threads to end, because a task may block its thread for longer.
    ///
    /// Of several calls of this method and [`runtimes`](Self::runtimes), the last one applies.
    #[doc(alias = "worker_threads")]
    #[doc(alias = "reuse_port")]
    pub fn workers(mut self, threads: usize) -> Self {
        self.runtimes = Runtimes::Own(threads);
        self
    }

    /// Runs the connections on these runtimes, as [`workers`](Self::workers) does on its own
    /// threads. Use this method for threads that are pinned to cores, or for runtimes that several
    /// servers share. Of several calls of `workers` and this method, the last one applies.
    ///
    /// Default: an empty list; connections run on the runtime on which [`serve`](Server::serve) is
    /// awaited.
    ///
    /// Each runtime must have I/O and time enabled, or tokio panics when the first connection
    /// arrives. Each must run as long as the server does; a current-thread runtime runs only while
    /// a thread blocks on it. If a runtime is shut down, its connections are aborted, and it gets
    /// no new ones. If all runtimes are shut down, the server ends with [`Error::Workers`] at the
    /// next connection.
    ///
    /// ```
    /// use tokio::runtime::Builder;
    /// use tower_tcp::Server;
    ///
    /// # fn main() -> std::io::Result<()> {
    /// let others = Builder::new_multi_thread().worker_threads(2).thread_name("clients").build()?;
    /// let server = Server::builder().runtimes([others.handle().clone()]);
    /// # drop(server);
    /// # Ok(())
    /// # }
    /// ```
    pub fn runtimes(mut self, runtimes: impl IntoIterator<Item = runtime::Handle>) -> Self {
        self.runtimes = Runtimes::Given(runtimes.into_iter().collect());
        self
    }

    /// Binds all addresses and returns the server.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Bind`], which names the address that could not be bound, or states that
    /// there is no address to bind. No address is left bound.
    ///
    /// # Panics
    ///
    /// Panics if polled outside a tokio runtime with I/O enabled.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes every socket that was bound.
    pub async fn bind(mut self) -> Result<Server, Error> {
        let endpoints = std::mem::take(&mut self.endpoints);
        let sockets = Sockets::bind(endpoints, &self.options).await?;
        Ok(self.build(sockets))
    }

    /// Creates a server from a [`Listener`], or from tokio's `TcpListener` or `UnixListener`.
    ///
    /// The addresses passed to [`listen`](Self::listen) and the
    /// [`socket_options`](Self::socket_options) are ignored.
    ///
    /// # Panics
    ///
    /// With a listener of tokio, panics if called outside a tokio runtime with I/O enabled.
    pub fn build<I: IntoListener>(self, listener: I) -> Server<I::Listener> {
        let listener = listener.into_listener();
        let sockets = listener.listening_sockets();
        let addresses = listener.local_addrs();
        let handle = Handle::new(self.name, addresses, &sockets, self.limit, self.plan);
        Server {
            listener,
            end: CutOff(Arc::clone(&handle.0)),
            handle,
            policy: self.policy,
            filters: self.filters,
            runtimes: self.runtimes,
        }
    }
}

impl fmt::Debug for ServerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerBuilder")
            .field("name", &self.name)
            .field("options", &self.options)
            .field("limit", &self.limit)
            .field("plan", &self.plan)
            .field("runtimes", &self.runtimes)
            .finish_non_exhaustive()
    }
}
