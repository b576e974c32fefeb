//! HTTP/1 and HTTP/2, by hyper: axum, tonic, and any other service of HTTP requests, on this crate's connections.

mod clock;
mod end;
mod lent;
mod limits;
mod maker;
mod requests;
mod serve;
mod streams;

use std::fmt;
use std::sync::Arc;

use hyper_util::rt::TokioTimer;
use hyper_util::server::conn::auto::Builder;

use crate::connection::Life;
use crate::shutdown::Signal;

pub use limits::Limits;
pub use maker::{Made, Shared};
pub use serve::HttpFuture;
pub use streams::Streams;

/// The connection service for HTTP. See the [module docs](self).
#[derive(Clone)]
pub struct Http<K> {
    maker: K,
    settings: Arc<Settings>,
}

type Configure = Arc<dyn Fn(&mut Builder<Streams>) + Send + Sync>;

#[derive(Clone, Default)]
struct Settings {
    limits: Limits,
    configure: Vec<Configure>,
}

impl Settings {
    fn configure(&self, hyper: &mut Builder<Streams>) {
        hyper
            .http2()
            .timer(TokioTimer::new())
            .enable_connect_protocol();
        for configure in &self.configure {
            configure(hyper);
        }
    }
}

impl<S> Http<Shared<S>> {
    /// Serves requests with clones of `service`, one for each request, made ready when the request is at hand.
    pub fn new(service: S) -> Self {
        Self::with(Shared(service))
    }
}

impl<K> Http<Made<K>> {
    /// Makes a service for each connection.
    pub fn make_service(make: K) -> Self {
        Self::with(Made(make))
    }
}

impl<K> Http<K> {
    fn with(maker: K) -> Self {
        Self {
            maker,
            settings: Arc::default(),
        }
    }

    /// Sets the times of a connection.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        Arc::make_mut(&mut self.settings).limits = limits;
        self
    }

    /// Changes hyper's settings.
    #[must_use]
    pub fn configure(
        mut self,
        configure: impl Fn(&mut Builder<Streams>) + Send + Sync + 'static,
    ) -> Self {
        configure(&mut Builder::new(Streams::default()));
        Arc::make_mut(&mut self.settings)
            .configure
            .push(Arc::new(configure));
        self
    }
}

impl<K: fmt::Debug> fmt::Debug for Http<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http")
            .field("maker", &self.maker)
            .field("limits", &self.settings.limits)
            .finish_non_exhaustive()
    }
}

/// Tells when a connection should end. See [`Http`].
#[derive(Clone)]
pub struct Draining(Arc<Life>);

impl Draining {
    /// Returns whether the connection was told to leave.
    pub fn is_draining(&self) -> bool {
        self.0.signals.is_raised(Signal::Drain)
    }

    /// Waits until the connection is told to leave.
    ///
    /// # Cancel safety
    ///
    /// The signal stays raised: dropping this and asking again loses nothing.
    pub async fn draining(&self) {
        self.0.signals.raised(Signal::Drain).await;
    }
}

impl fmt::Debug for Draining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Draining")
            .field(&self.is_draining())
            .finish()
    }
}
