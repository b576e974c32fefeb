use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime;

use super::accept_loop::AcceptErrorPolicy;
use super::workers::Runtimes;
use super::{CutOff, Server};
use crate::accept::AcceptErrorAction;
use crate::admit::ConnectionLimit;
use crate::bind::{Endpoint, Listener, SocketOptions, Sockets};
use crate::error::Error;
use crate::handle::{Handle, Plan};

/// Makes a [`Server`]: where it listens, and what it does by default.
///
/// | option | default | why |
/// | --- | --- | --- |
/// | [`limit`](Self::limit) | 10,000 connections | something must bound memory; a process needs as many descriptors, of which many systems allow it 1,024 until told otherwise |
/// | [`shutdown_deadline`](Self::shutdown_deadline) | 30 s | as long as Kubernetes waits before it kills |
/// | [`lame_duck`](Self::lame_duck) | none | only behind a load balancer that polls |
/// | [`workers`](Self::workers) | none: connections run where the server does | work is shared out between threads by the runtime, which suits most |
/// | [`socket_options`](Self::socket_options) | see [`SocketOptions`] | |
#[must_use = "a builder does nothing until it binds"]
pub struct ServerBuilder {
    name: Option<Arc<str>>,
    endpoints: Vec<Endpoint>,
    options: SocketOptions,
    limit: ConnectionLimit,
    plan: Plan,
    policy: AcceptErrorPolicy,
    runtimes: Runtimes,
}

impl Default for ServerBuilder {
    fn default() -> Self {
        Self {
            name: None,
            endpoints: Vec::new(),
            options: SocketOptions::default(),
            limit: ConnectionLimit::new(10_000),
            plan: Plan {
                lame_duck: Duration::ZERO,
                deadline: Duration::from_secs(30),
                abort_at: None,
            },
            policy: super::default_policy(),
            runtimes: Runtimes::Own(0),
        }
    }
}

impl ServerBuilder {
    /// Names the server, for [`Handle::name`] and the events about it.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Listens on one more address.
    pub fn listen(mut self, endpoint: impl Into<Endpoint>) -> Self {
        self.endpoints.push(endpoint.into());
        self
    }

    /// Listens on each of several addresses: those of a command line, or a configuration.
    pub fn listen_all<E: Into<Endpoint>>(mut self, endpoints: impl IntoIterator<Item = E>) -> Self {
        self.endpoints.extend(endpoints.into_iter().map(Into::into));
        self
    }

    /// Sets the options of the sockets.
    pub fn socket_options(mut self, options: SocketOptions) -> Self {
        self.options = options;
        self
    }

    /// Sets how many connections may be open; a clone of it changes it later. Default 10,000.
    ///
    /// At the limit nothing more is accepted: clients wait in the backlog.
    pub fn limit(mut self, limit: ConnectionLimit) -> Self {
        self.limit = limit;
        self
    }

    /// Sets how long a shutdown waits for connections to finish. Default 30 s.
    pub fn shutdown_deadline(mut self, deadline: Duration) -> Self {
        self.plan.deadline = deadline;
        self
    }

    /// Sets how long, at a shutdown, connections are still accepted after all were told to leave: for load balancers that
    /// take their time to notice. Default zero.
    pub fn lame_duck(mut self, time: Duration) -> Self {
        self.plan.lame_duck = time;
        self
    }

    /// Decides about failed accepts in place of [`classify`](crate::accept::classify), which can still be asked.
    pub fn on_accept_error(
        mut self,
        policy: impl Fn(&io::Error) -> AcceptErrorAction + Send + Sync + 'static,
    ) -> Self {
        self.policy = Arc::new(policy);
        self
    }

    /// Runs the connections on so many threads, a current-thread runtime on each: one thread a core. Default none: they run on the runtime that
    /// [`serve`](Server::serve) is awaited on.
    ///
    /// The accept loop stays the one loop it is, with its one stack and its exact limit, so the stack need not be `Clone`. It gives each
    /// connection to the thread with the fewest of them, in turn where several have as few, and there everything of it stays: its
    /// stream, its timers, its task, and what the connection and request services spawn.
    ///
    /// It pays where connections stay and requests are many and small, of some microseconds each: none of them wakes another thread, and nothing is
    /// taken from one by another. It does not where a request computes for long, where few connections do most of the work (those
    /// on a thread wait for each other, whatever others have to spare), or where a connection has but a request or two (it costs some
    /// microseconds to hand it over): there a multi-thread runtime, which spreads *tasks*, serves better. Take as many as there are
    /// cores ([`std::thread::available_parallelism`]); the accept loop needs none to itself. On these threads `tokio::task::block_in_place`
    /// panics.
    ///
    /// They are named after the server (`echo-0`, `echo-1`), start with it, and end with it. What was spawned there and is still
    /// running is dropped then. A thread that is blocked is waited for no longer than 1 s. With zero threads it is as without this.
    pub fn workers(mut self, threads: usize) -> Self {
        self.runtimes = Runtimes::Own(threads);
        self
    }

    /// Runs the connections on these runtimes, as [`workers`](Self::workers) does on its own: where threads are to be pinned to
    /// cores, or several servers share them. With none of them, they run where the server does.
    ///
    /// Each needs I/O and time enabled (where one lacks them, tokio panics as the first connection comes), and must be at work as long as the
    /// server is: a current-thread runtime is only while something blocks on it. One that is shut down cuts its connections off, and is given no more; when all are, the server ends with [`Error::Workers`] at the next connection.
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

    /// Listens on all the addresses.
    ///
    /// # Errors
    ///
    /// [`Error::Bind`], which names the address at fault. Then none of them is left bound.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with I/O enabled.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives back all that was bound.
    pub async fn bind(mut self) -> Result<Server, Error> {
        let endpoints = std::mem::take(&mut self.endpoints);
        let sockets = Sockets::bind(endpoints, &self.options).await?;
        Ok(self.build(sockets))
    }

    /// Makes the server of a listener of your own. The addresses given to [`listen`](Self::listen) are not used.
    pub fn build<L: Listener>(self, listener: L) -> Server<L> {
        let handle = Handle::new(self.name, listener.local_addrs(), self.limit, self.plan);
        Server {
            listener,
            end: CutOff(Arc::clone(&handle.0)),
            handle,
            policy: self.policy,
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
