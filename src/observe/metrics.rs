//! All metrics of the crate. No other module uses the `metrics` facade.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use metrics::{Counter, Gauge, Histogram, Label, SharedString, Unit, counter, gauge, histogram};
use pin_project::pin_project;
use tokio::time::Instant;
use tower_layer::Layer;
use tower_service::Service;

use crate::connection::ConnectionPhase;
use crate::end::{End, EndReason};

macro_rules! metrics {
    ($($describe:ident $name:ident = $text:literal, $unit:ident, $help:literal;)*) => {
        $(const $name: &str = $text;)*

        /// Registers the unit and description of every metric with the installed recorder. Call
        /// this function once, after the recorder is installed.
        pub fn describe_metrics() {
            $(metrics::$describe!($name, Unit::$unit, $help);)*
        }
    };
}

metrics! {
    describe_counter ACCEPTED = "tower_tcp.accepted_connections", Count,
        "Connections that were accepted.";
    describe_counter ENDED = "tower_tcp.ended_connections", Count,
        "Connections that have ended, by reason.";
    describe_counter REJECTED = "tower_tcp.rejected_connections", Count,
        "Connections that were not admitted, by reason.";
    describe_histogram DURATION = "tower_tcp.connection.duration", Seconds,
        "The time from accept to the end of a connection.";
    describe_histogram HANDSHAKE = "tower_tcp.tls_handshake.duration", Seconds,
        "The time a TLS handshake took.";
    describe_counter ACCEPT_ERRORS = "tower_tcp.accept.errors", Count,
        "Accepts that failed.";
    describe_gauge REQUESTS_ACTIVE = "tower_tcp.requests.active", Count,
        "Requests in progress.";
    describe_histogram REQUEST = "tower_tcp.request.duration", Seconds,
        "The time a service took for a request.";
    describe_gauge ACTIVE = "tower_tcp.active_connections", Count,
        "Connections that are open, by phase.";
    describe_gauge LIMIT = "tower_tcp.connection_limit", Count,
        "The maximum number of open connections.";
    describe_gauge QUEUE = "tower_tcp.accept_queue.length", Count,
        "Connections that wait in the backlog.";
    describe_counter IO = "tower_tcp.connection.io", Bytes,
        "Bytes read from and written to peers.";
    describe_counter REQUESTS = "tower_tcp.requests", Count,
        "Requests passed to a service.";
    describe_gauge DRAIN = "tower_tcp.drain.remaining", Count,
        "Connections that a shutdown still waits for.";
}

/// An attribute's key and value.
type Attribute = (&'static str, &'static str);

/// Returns the labels of a metric: `server.name`, if the server has a name, and `attributes`.
fn labels<const N: usize>(server: Option<&Arc<str>>, attributes: [Attribute; N]) -> Vec<Label> {
    let server =
        server.map(|name| Label::new("server.name", SharedString::from_shared(Arc::clone(name))));
    let attributes = attributes.map(|(key, value)| Label::from_static_parts(key, value));
    server.into_iter().chain(attributes).collect()
}

/// The metrics of a server. The instruments that every connection uses are looked up in the
/// recorder once, on first use, not for each connection.
pub(crate) struct Meter {
    server: Option<Arc<str>>,
    connections: OnceLock<Connections>,
    ends: [OnceLock<Ended>; EndReason::ALL.len()],
}

struct Connections {
    accepted: Counter,
    duration: Histogram,
}

/// The counters for connections that end for the same reason.
struct Ended {
    ended: Counter,
    rejected: Option<Counter>,
}

impl Meter {
    pub(crate) fn new(server: Option<Arc<str>>) -> Self {
        Self {
            server,
            connections: OnceLock::new(),
            ends: [const { OnceLock::new() }; EndReason::ALL.len()],
        }
    }

    fn labels<const N: usize>(&self, attributes: [Attribute; N]) -> Vec<Label> {
        labels(self.server.as_ref(), attributes)
    }

    fn connections(&self) -> &Connections {
        self.connections.get_or_init(|| Connections {
            accepted: counter!(ACCEPTED, self.labels([])),
            duration: histogram!(DURATION, self.labels([])),
        })
    }

    pub(crate) fn accepted(&self) {
        self.connections().accepted.increment(1);
    }

    pub(crate) fn ended(&self, end: &End) {
        self.connections().duration.record(end.duration());
        self.ended_for(end.reason());
    }

    /// Counts a connection that was closed at accept because its address is denied. Its duration is
    /// not recorded.
    pub(crate) fn denied(&self) {
        self.accepted();
        self.ended_for(EndReason::Denied);
    }

    fn ended_for(&self, reason: EndReason) {
        let Ended { ended, rejected } = self.ends[reason as usize].get_or_init(|| {
            let why = ("close.reason", reason.as_str());
            let who = ("close.initiator", reason.initiator().as_str());
            Ended {
                ended: counter!(ENDED, self.labels([why, who])),
                rejected: is_rejection(reason).then(|| counter!(REJECTED, self.labels([why]))),
            }
        });
        ended.increment(1);
        if let Some(rejected) = rejected {
            rejected.increment(1);
        }
    }

    pub(crate) fn accept_failed(&self, error_type: &'static str, action: &'static str) {
        let labels = self.labels([("error.type", error_type), ("action", action)]);
        counter!(ACCEPT_ERRORS, labels).increment(1);
    }

    pub(crate) fn collected(&self, seen: &Collected) {
        let set = |name, value: usize| gauge!(name, self.labels([])).set(as_f64(value));
        for (phase, live) in ConnectionPhase::ALL.iter().zip(seen.phases) {
            let labels = self.labels([("phase", phase.as_str())]);
            gauge!(ACTIVE, labels).set(as_f64(live));
        }
        let limit = seen.limit.map_or(f64::INFINITY, as_f64);
        gauge!(LIMIT, self.labels([])).set(limit);
        if let Some(length) = seen.accept_queue {
            set(QUEUE, length);
        }
        set(DRAIN, seen.drain_remaining);
        let Totals {
            bytes_read,
            bytes_written,
            requests,
        } = seen.moved;
        for (direction, bytes) in [("read", bytes_read), ("write", bytes_written)] {
            counter!(IO, self.labels([("direction", direction)])).increment(bytes);
        }
        counter!(REQUESTS, self.labels([])).increment(requests);
    }
}

/// The values that are reported each time a server's metrics are collected.
pub(crate) struct Collected {
    /// The number of connections in each phase, in the order of [`ConnectionPhase::ALL`].
    pub(crate) phases: [usize; ConnectionPhase::ALL.len()],
    pub(crate) limit: Option<usize>,
    pub(crate) accept_queue: Option<usize>,
    pub(crate) drain_remaining: usize,
    /// The bytes and requests since the last collection.
    pub(crate) moved: Totals,
}

/// The bytes and requests of several connections, added up.
#[derive(Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
    pub(crate) requests: u64,
}

#[cfg(feature = "tls")]
pub(super) fn handshake(field: &'static str, word: &'static str, time: std::time::Duration) {
    histogram!(HANDSHAKE, field => word).record(time);
}

fn is_rejection(reason: EndReason) -> bool {
    matches!(
        reason,
        EndReason::Rejected
            | EndReason::LimitExceeded
            | EndReason::Denied
            | EndReason::ClientLimitExceeded
            | EndReason::ClientRateExceeded
            | EndReason::PreConnectTimeout
            | EndReason::PreConnectEvicted
    )
}

#[expect(clippy::cast_precision_loss, reason = "nobody has 2^53 connections")]
fn as_f64(n: usize) -> f64 {
    n as f64
}

/// Measures requests: the number in progress, and the duration of each.
///
/// Install the recorder before you create the layer, because the layer uses the recorder that is
/// installed at that time. A request costs two clock reads, two updates of a gauge and one
/// histogram entry, so add the layer only around services that you want to measure. Clones share
/// their instruments.
///
/// ```
/// use bytes::Bytes;
/// use tower::ServiceBuilder;
/// use tower_tcp::BoxError;
/// use tower_tcp::observe::RequestMetricsLayer;
///
/// let measured = RequestMetricsLayer::with_attributes([("server.name", "echo")]);
/// let service = ServiceBuilder::new()
///     .layer(measured)
///     .service_fn(|line: Bytes| async move { Ok::<_, BoxError>(line) });
/// # drop(service);
/// ```
#[derive(Clone)]
pub struct RequestMetricsLayer(Arc<Instruments>);

struct Instruments {
    active: Gauge,
    done: Histogram,
    failed: Histogram,
    canceled: Histogram,
}

impl Default for RequestMetricsLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl RequestMetricsLayer {
    /// Creates the layer without attributes.
    pub fn new() -> Self {
        Self::with_attributes([])
    }

    /// Creates the layer with attributes for all its metrics, such as the server's name or the name
    /// of a backend.
    ///
    /// Each combination of values is a time series in the recorder. So use only attributes with few
    /// different values, and never a value that a peer chooses.
    pub fn with_attributes<const N: usize>(attributes: [(&'static str, &'static str); N]) -> Self {
        let labels = labels(None, attributes);
        let failed = |why| {
            let error = Label::from_static_parts("error.type", why);
            histogram!(REQUEST, [&labels[..], &[error]].concat())
        };
        Self(Arc::new(Instruments {
            active: gauge!(REQUESTS_ACTIVE, labels.clone()),
            done: histogram!(REQUEST, labels.clone()),
            failed: failed(EndReason::ServiceError.as_str()),
            canceled: failed("canceled"),
        }))
    }
}

impl std::fmt::Debug for RequestMetricsLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RequestMetricsLayer")
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for RequestMetricsLayer {
    type Service = RequestMetrics<S>;

    fn layer(&self, inner: S) -> RequestMetrics<S> {
        RequestMetrics {
            inner,
            layer: self.clone(),
        }
    }
}

/// A service whose requests are measured. See [`RequestMetricsLayer`].
#[derive(Clone, Debug)]
pub struct RequestMetrics<S> {
    inner: S,
    layer: RequestMetricsLayer,
}

impl<R, S: Service<R>> Service<R> for RequestMetrics<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = RequestMetricsFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let active = Active::begin(Arc::clone(&self.layer.0));
        RequestMetricsFuture {
            inner: self.inner.call(request),
            active: Some(active),
        }
    }
}

/// The future of [`RequestMetrics`].
#[pin_project]
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct RequestMetricsFuture<F> {
    #[pin]
    inner: F,
    active: Option<Active>,
}

/// One request in progress. When dropped, it records the end of the request, whether the request
/// has completed or not.
struct Active {
    instruments: Arc<Instruments>,
    begun: Instant,
    answered: Option<Result<(), ()>>,
}

impl Active {
    fn begin(instruments: Arc<Instruments>) -> Self {
        instruments.active.increment(1);
        Self {
            instruments,
            begun: Instant::now(),
            answered: None,
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let Instruments {
            active,
            done,
            failed,
            canceled,
        } = &*self.instruments;
        active.decrement(1);
        let duration = match self.answered {
            Some(Ok(())) => done,
            Some(Err(())) => failed,
            None => canceled,
        };
        duration.record(self.begun.elapsed());
    }
}

impl std::fmt::Debug for Active {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Active")
            .field("begun", &self.begun)
            .finish_non_exhaustive()
    }
}

impl<F, R, E> Future for RequestMetricsFuture<F>
where
    F: Future<Output = Result<R, E>>,
{
    type Output = Result<R, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = ready!(this.inner.poll(cx));
        if let Some(mut active) = this.active.take() {
            active.answered = Some(answer.as_ref().map(drop).map_err(drop));
        }
        Poll::Ready(answer)
    }
}
