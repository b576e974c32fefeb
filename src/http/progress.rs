//! The progress of one connection, seen from its task and from its requests.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::connection::{ConnectionInfo, Life};
use crate::end::{ConnectionEnded, EndReason, HttpProgress};
use crate::error::{BoxError, Panicked};
use crate::signals::Signal;

/// The length of the preface that begins an HTTP/2 connection ([RFC 9113 section
/// 3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)).
const PREFACE: u64 = 24;

/// The progress of a connection, shared by its task and its requests, which may run in other tasks.
pub(super) struct Progress {
    info: ConnectionInfo,
    /// The longest time without a byte of a request's body.
    pub(super) body: Option<Duration>,
    in_flight: AtomicUsize,
    /// HTTP/2 only: the pieces of responses that wait for the peer to take them.
    queued: AtomicUsize,
    /// The bytes of those that it has taken.
    taken: AtomicU64,
    /// The number of tasks that run HTTP/2 streams, including tunnels, whose request is already
    /// answered.
    pub(super) streams: AtomicUsize,
    multiplexed: AtomicBool,
    /// Bytes read when hyper began to wait for a request's head, plus one; zero while it does not
    /// wait.
    awaiting_head: AtomicU64,
    /// The stream is about to move to another task.
    pub(super) upgrades: AtomicBool,
}

impl Progress {
    pub(super) fn new(info: ConnectionInfo, body: Option<Duration>) -> Arc<Self> {
        Arc::new(Self {
            info,
            body,
            in_flight: AtomicUsize::new(0),
            queued: AtomicUsize::new(0),
            taken: AtomicU64::new(0),
            streams: AtomicUsize::new(0),
            multiplexed: AtomicBool::new(false),
            awaiting_head: AtomicU64::new(0),
            upgrades: AtomicBool::new(false),
        })
    }

    pub(super) fn info(&self) -> &ConnectionInfo {
        &self.info
    }

    pub(super) fn life(&self) -> &Arc<Life> {
        &self.info.life
    }

    /// Returns whether a request is in progress: its service, or the body of its response, which in
    /// HTTP/2 lasts until the peer takes it.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) > 0 || self.queued.load(Ordering::Acquire) > 0
    }

    /// Returns the bytes of HTTP/2 responses that the peer has taken, if more of them wait for it.
    pub(super) fn queued(&self) -> Option<u64> {
        (self.queued.load(Ordering::Acquire) > 0).then(|| self.taken.load(Ordering::Relaxed))
    }

    /// Returns whether a request of HTTP/1 is in progress, and its stream will not be upgraded.
    pub(super) fn is_answering_http1(&self) -> bool {
        self.is_busy()
            && !self.multiplexed.load(Ordering::Relaxed)
            && !self.upgrades.load(Ordering::Relaxed)
    }

    /// Returns whether an HTTP/2 stream is open. Without a request in progress it is a tunnel.
    pub(super) fn has_streams(&self) -> bool {
        self.streams.load(Ordering::Relaxed) > 0
    }

    /// Returns whether the connection is known to be HTTP/2.
    pub(super) fn is_multiplexed(&self) -> bool {
        // After as many bytes, an HTTP/1 connection would wait for a head.
        let begun = || self.awaiting_head().is_none() && self.life().bytes_read() >= PREFACE;
        self.multiplexed.load(Ordering::Relaxed) || (self.life().requests() == 0 && begun())
    }

    /// Returns the bytes read when the current wait for a request's head began, or `None` outside
    /// of one.
    pub(super) fn awaiting_head(&self) -> Option<u64> {
        self.awaiting_head.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Notes that the head of a request was read.
    pub(super) fn take_head(&self) {
        self.awaiting_head.store(0, Ordering::Relaxed);
    }

    /// Notes that the connection is HTTP/2.
    pub(super) fn set_http2(&self) {
        self.multiplexed.store(true, Ordering::Relaxed);
    }

    pub(super) fn await_head(&self) {
        let read = self.life().bytes_read();
        self.awaiting_head.store(read + 1, Ordering::Relaxed);
    }

    /// Returns whether the connection is draining or closing.
    pub(super) fn is_leaving(&self) -> bool {
        self.life().signals.is_raised(Signal::Drain) || self.life().signals.is_raised(Signal::Close)
    }

    /// Ends an HTTP/1 connection after its response, because nothing after a stalled body can be
    /// read.
    #[cold]
    pub(super) fn body_stalled(&self) {
        if !self.is_multiplexed() {
            self.life().set_reason(EndReason::BodyTimeout, None);
            self.life().signals.raise(Signal::Close);
        }
    }

    /// Returns the state that classifies a failure.
    pub(super) fn as_failed(&self) -> HttpProgress {
        HttpProgress {
            is_busy: self.is_busy(),
            is_peer_done: self.life().is_peer_done(),
        }
    }

    /// Ends the connection because of a panic in user code, once other requests in flight are done.
    #[cold]
    pub(super) fn panicked(&self, payload: &(dyn Any + Send)) -> BoxError {
        let panicked = ConnectionEnded::caused(EndReason::Panic, Panicked::new(payload));
        self.life()
            .set_reason(panicked.reason, panicked.cause.clone());
        self.life().signals.raise(Signal::Close);
        panicked.into()
    }
}

/// Counts a request as in flight until dropped.
pub(super) struct RequestGuard(pub(super) Arc<Progress>);

impl RequestGuard {
    pub(super) fn enter(progress: &Arc<Progress>) -> Self {
        progress.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(progress))
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Release);
    }
}

/// Counts a piece of an HTTP/2 response as waiting for the peer until dropped.
pub(super) struct Queued(Arc<Progress>);

impl Queued {
    pub(super) fn enter(progress: &Arc<Progress>) -> Self {
        progress.queued.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(progress))
    }

    pub(super) fn taken(&self, bytes: usize) {
        self.0.taken.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(1, Ordering::Release);
    }
}
