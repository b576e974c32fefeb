use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::accept_loop::Policy;
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
/// | [`socket_options`](Self::socket_options) | see [`SocketOptions`] | |
#[must_use = "a builder does nothing until it binds"]
pub struct ServerBuilder {
    name: Option<Arc<str>>,
    endpoints: Vec<Endpoint>,
    options: SocketOptions,
    limit: ConnectionLimit,
    plan: Plan,
    policy: Policy,
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
            },
            policy: super::default_policy(),
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
        let handle = Handle::new(self.name, listener.local_addresses(), self.limit, self.plan);
        Server {
            listener,
            end: CutOff(Arc::clone(&handle.0)),
            handle,
            policy: self.policy,
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
            .finish_non_exhaustive()
    }
}
