//! Tracks the progress of one connection, for its task and its requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use hyper::header::CONNECTION;
use hyper::{Request, Version};

use crate::connection::{ConnectionInfo, Life};
use crate::deadline::Deadlines;
use crate::end::{ConnectionEnded, EndReason, HttpProgress};
use crate::error::{BoxError, Panicked};
use crate::signals::Signal;

/// The maximum times for which a service waits for the next byte of a request's body. `usual`
/// always applies. `drain` also applies once the connection drains or closes.
#[derive(Clone, Copy, Debug)]
pub(super) struct BodyLimits {
    pub(super) usual: Option<Duration>,
    pub(super) drain: Option<Duration>,
}

impl BodyLimits {
    pub(super) fn new(deadlines: &Deadlines) -> Self {
        Self {
            usual: deadlines.body,
            drain: deadlines.drain.body,
        }
    }
}

/// The progress of a connection, shared by its task and its requests, which may run in other tasks.
pub(super) struct Progress {
    info: ConnectionInfo,
    pub(super) bodies: BodyLimits,
    /// The number of request bodies that services hold and have not read to their end.
    pub(super) unread: AtomicUsize,
    in_flight: AtomicUsize,
    /// HTTP/2 only: the number of pieces of responses that wait for the peer to take them.
    queued: AtomicUsize,
    /// HTTP/2 only: the number of bytes of responses that the peer has taken.
    taken: AtomicU64,
    /// HTTP/2 only: the number of bytes of requests' bodies that services have read.
    read: AtomicU64,
    /// HTTP/2 only: `true` if a request, or an unsent piece of its response, was dropped after the
    /// peer had finished sending.
    left: AtomicBool,
    /// The number of tasks that run HTTP/2 streams. Tunnels are included, although their requests
    /// are already answered.
    pub(super) streams: AtomicUsize,
    multiplexed: AtomicBool,
    /// `true` if hyper's last read is pending, so hyper waits for input or for its end.
    pub(super) is_reading: AtomicBool,
    /// Used for HTTP/1 only: `true` if a service has dropped a body that it had not read to its
    /// end.
    pub(super) abandoned: AtomicBool,
    /// HTTP/1 only: `true` if a request has asked for the connection to close.
    last_request: AtomicBool,
    /// HTTP/2 only: `true` if a `GOAWAY` has told the peer that too many small data frames are
    /// unread.
    refused_data: AtomicBool,
    /// `true` if a response agrees to an upgrade, so the stream is about to move to another task.
    pub(super) upgrades: AtomicBool,
}

impl Progress {
    pub(super) fn new(info: ConnectionInfo, bodies: BodyLimits) -> Arc<Self> {
        Arc::new(Self {
            info,
            bodies,
            unread: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            queued: AtomicUsize::new(0),
            taken: AtomicU64::new(0),
            read: AtomicU64::new(0),
            left: AtomicBool::new(false),
            streams: AtomicUsize::new(0),
            multiplexed: AtomicBool::new(false),
            is_reading: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            last_request: AtomicBool::new(false),
            refused_data: AtomicBool::new(false),
            upgrades: AtomicBool::new(false),
        })
    }

    pub(super) fn info(&self) -> &ConnectionInfo {
        &self.info
    }

    pub(super) fn life(&self) -> &Arc<Life> {
        &self.info.life
    }

    /// Returns whether a request is in progress. It is in progress until its response is complete,
    /// and in HTTP/2 until the peer has taken the response.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) > 0 || self.queued.load(Ordering::Acquire) > 0
    }

    /// HTTP/2 only: counts bytes that a service has read from the body of a request.
    pub(super) fn count_read(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// HTTP/2 only: returns the number of bytes that services have read from bodies.
    pub(super) fn bodies_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Returns whether an HTTP/2 peer has finished sending while a request was in progress.
    ///
    /// h2 resets all streams at the end of input, so none of these requests can be answered. The
    /// tasks of the streams may drop their requests at any time after that.
    pub(super) fn has_left_early(&self) -> bool {
        // `left` is read last, because a request that sets it does so before it stops counting as
        // in progress.
        let is_unfinished = self.is_busy() || self.left.load(Ordering::Relaxed);
        self.is_multiplexed() && self.life().is_peer_done() && is_unfinished
    }

    /// Called when a request, or an unsent piece of its response, is dropped. If an HTTP/2 peer has
    /// finished sending by then, records that the drop is due to the peer.
    fn note_dropped(&self) {
        if self.is_multiplexed() && self.life().is_peer_done() {
            self.left.store(true, Ordering::Relaxed);
        }
    }

    /// Returns the number of bytes of HTTP/2 responses that the peer has taken. Returns `None` if
    /// no piece of a response waits for the peer.
    pub(super) fn queued(&self) -> Option<u64> {
        (self.queued.load(Ordering::Acquire) > 0).then(|| self.taken.load(Ordering::Relaxed))
    }

    /// Returns whether an HTTP/1 request is in progress, and no response has agreed to an upgrade.
    pub(super) fn is_answering_http1(&self) -> bool {
        self.is_busy()
            && !self.multiplexed.load(Ordering::Relaxed)
            && !self.upgrades.load(Ordering::Relaxed)
    }

    /// Returns whether a service holds a request body that it has not read to its end.
    pub(super) fn has_unread_bodies(&self) -> bool {
        self.unread.load(Ordering::Acquire) > 0
    }

    /// Returns whether an HTTP/2 stream is open. If no request is in progress, the open streams are
    /// tunnels.
    pub(super) fn has_streams(&self) -> bool {
        self.streams.load(Ordering::Relaxed) > 0
    }

    /// Returns whether the connection is known to be HTTP/2.
    pub(super) fn is_multiplexed(&self) -> bool {
        self.multiplexed.load(Ordering::Relaxed)
    }

    /// Returns whether three conditions hold: hyper waits for input; the last response is sent, and
    /// agreed to no upgrade; no service holds a body that it has not read to its end. Usually,
    /// hyper then waits for the next request. But if a service has dropped a body before its end,
    /// hyper still has to deal with the rest of the body; see [`take_abandoned`].
    ///
    /// [`take_abandoned`]: Self::take_abandoned
    pub(super) fn is_at_rest(&self) -> bool {
        self.is_reading.load(Ordering::Relaxed)
            && !self.is_busy()
            && !self.life().is_write_pending()
            && !self.has_unread_bodies()
            && !self.upgrades.load(Ordering::Relaxed)
    }

    /// Returns the number of requests and the number of bytes read.
    pub(super) fn taken_in(&self) -> (u64, u64) {
        (self.life().requests(), self.life().bytes_read())
    }

    /// Returns whether, since the last call, a service has dropped a body that it had not read to
    /// its end. If so, the next poll of hyper reads the rest or closes the connection.
    pub(super) fn take_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed) && self.abandoned.swap(false, Ordering::Relaxed)
    }

    /// Records that the connection is HTTP/2.
    pub(super) fn set_http2(&self) {
        self.multiplexed.store(true, Ordering::Relaxed);
    }

    /// Checks output, to find out why h2 ends a connection. h2's error does not distinguish unread
    /// data from a flood of resets, but the text at the end of h2's `GOAWAY` frame does.
    #[inline]
    pub(super) fn note_write(&self, bytes: &[u8]) {
        if self.multiplexed.load(Ordering::Relaxed) && bytes.ends_with(b"too_many_data_frames") {
            self.refused_data.store(true, Ordering::Relaxed);
        }
    }

    /// Checks whether an HTTP/1 request asks for the connection to close, and records it if so.
    pub(super) fn begin_http1<B>(&self, request: &Request<B>) {
        if asks_to_close(request) {
            self.last_request.store(true, Ordering::Relaxed);
        }
    }

    /// Returns whether the peer has asked for this HTTP/1 connection to close.
    pub(super) fn peer_closes(&self) -> bool {
        self.last_request.load(Ordering::Relaxed)
    }

    /// Returns whether the connection is draining or closing.
    pub(super) fn is_leaving(&self) -> bool {
        self.life().signals.is_raised(Signal::Drain) || self.life().signals.is_raised(Signal::Close)
    }

    /// Waits until the connection drains or closes.
    pub(super) async fn leaving(&self) {
        let look = || self.is_leaving().then_some(());
        self.life().signals.users_until(look).await;
    }

    /// Ends an HTTP/1 connection after the current response, because no request after a stalled
    /// body can be read.
    #[cold]
    pub(super) fn body_stalled(&self) {
        if !self.is_multiplexed() {
            self.life().set_reason(EndReason::BodyTimeout, None);
            self.life().signals.raise(Signal::Close);
        }
    }

    /// Returns the state that `EndReason::of_hyper` needs to classify an error of hyper.
    pub(super) fn as_failed(&self) -> HttpProgress {
        HttpProgress {
            is_busy: self.is_busy(),
            has_unread_data: self.refused_data.load(Ordering::Relaxed),
            is_peer_done: self.life().is_peer_done(),
        }
    }

    /// Ends the connection because of a panic in user code, once other requests in flight are done.
    #[cold]
    pub(super) fn panicked(&self, panicked: Panicked) -> BoxError {
        let panicked = ConnectionEnded::new(EndReason::Panic, panicked);
        self.life()
            .set_reason(panicked.reason, panicked.cause.clone());
        self.life().signals.raise(Signal::Close);
        panicked.into()
    }
}

/// Returns whether an HTTP/1 client wants the connection to close after this request.
fn asks_to_close<B>(request: &Request<B>) -> bool {
    let persists = request.version() == Version::HTTP_11;
    if persists && !request.headers().contains_key(CONNECTION) {
        return false;
    }
    let asked = if persists { "close" } else { "keep-alive" };
    let values = request.headers().get_all(CONNECTION).iter();
    let mut options = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    options.any(|option| option.trim().eq_ignore_ascii_case(asked)) == persists
}

/// Counts a request as in flight until this guard is dropped.
pub(super) struct RequestGuard(pub(super) Arc<Progress>);

impl RequestGuard {
    pub(super) fn enter(progress: &Arc<Progress>) -> Self {
        progress.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(progress))
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.note_dropped();
        self.0.in_flight.fetch_sub(1, Ordering::Release);
    }
}

/// Counts a piece of an HTTP/2 response as waiting for the peer, until this value is dropped.
pub(super) struct Queued {
    progress: Arc<Progress>,
    /// The number of the piece's bytes that the peer has not taken yet.
    bytes: usize,
}

impl Queued {
    pub(super) fn enter(progress: &Arc<Progress>, bytes: usize) -> Self {
        progress.queued.fetch_add(1, Ordering::Relaxed);
        Self {
            progress: Arc::clone(progress),
            bytes,
        }
    }

    pub(super) fn taken(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.progress
            .taken
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.progress.note_dropped();
        }
        self.progress.queued.fetch_sub(1, Ordering::Release);
    }
}
