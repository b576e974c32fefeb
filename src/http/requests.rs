//! The service that hyper calls: the user's service, wrapped in the work of this crate for each
//! request.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONNECTION, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::service::{TowerToHyperService, TowerToHyperServiceFuture};
use pin_project::pin_project;
use tower_service::Service;

use super::body::RequestBody;
use crate::connection::{ConnectionInfo, Life};
use crate::end::{ConnectionEnded, EndReason, HttpProgress};
use crate::error::{BoxError, Panicked};
use crate::observe::{ErrorChain, signed};
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
            streams: AtomicUsize::new(0),
            multiplexed: AtomicBool::new(false),
            awaiting_head: AtomicU64::new(0),
            upgrades: AtomicBool::new(false),
        })
    }

    pub(super) fn life(&self) -> &Arc<Life> {
        &self.info.life
    }

    /// Returns whether a request is in progress: its service, or the body of its response.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) > 0
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
    fn panicked(&self, payload: &(dyn Any + Send)) -> BoxError {
        let panicked = ConnectionEnded::caused(EndReason::Panic, Panicked::new(payload));
        self.life()
            .set_reason(panicked.reason, panicked.cause.clone());
        self.life().signals.raise(Signal::Close);
        panicked.into()
    }
}

/// Counts a request as in flight until dropped.
struct RequestGuard(Arc<Progress>);

impl RequestGuard {
    fn enter(progress: &Arc<Progress>) -> Self {
        progress.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(progress))
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Release);
    }
}

/// Adapts the user's service to hyper.
pub(super) struct HyperService<S> {
    service: TowerToHyperService<S>,
    progress: Arc<Progress>,
}

impl<S> HyperService<S> {
    pub(super) fn new(service: S, progress: Arc<Progress>) -> Self {
        Self {
            service: TowerToHyperService::new(service),
            progress,
        }
    }
}

impl<S, B> hyper::service::Service<Request<Incoming>> for HyperService<S>
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
{
    type Response = Response<ReplyBody<B>>;
    type Error = BoxError;
    type Future = RequestFuture<S>;

    fn call(&self, mut request: Request<Incoming>) -> RequestFuture<S> {
        let progress = &self.progress;
        progress.life().count_request();
        progress.awaiting_head.store(0, Ordering::Relaxed);
        let multiplexed = request.version() == Version::HTTP_2;
        if multiplexed {
            progress.multiplexed.store(true, Ordering::Relaxed);
        }
        request.extensions_mut().insert(progress.info.clone());
        RequestFuture {
            in_flight: Some(RequestGuard::enter(progress)),
            multiplexed,
            connect: request.method() == Method::CONNECT,
            inner: self
                .service
                .call(request.map(|body| RequestBody::new(body, progress))),
        }
    }
}

/// The future of one request.
#[pin_project]
pub(super) struct RequestFuture<S: Service<Request<RequestBody>>> {
    #[pin]
    inner: TowerToHyperServiceFuture<S, Request<RequestBody>>,
    in_flight: Option<RequestGuard>,
    multiplexed: bool,
    connect: bool,
}

impl<S, B> Future for RequestFuture<S>
where
    S: Service<Request<RequestBody>, Response = Response<B>>,
    S::Error: Into<BoxError>,
{
    type Output = Result<Response<ReplyBody<B>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let inner = this.inner;
        let polled = catch_unwind(AssertUnwindSafe(|| inner.poll(cx)));
        let in_flight = match &polled {
            Ok(Poll::Pending) => return Poll::Pending,
            _ => this.in_flight.take(),
        };
        let Some(in_flight) = in_flight else {
            return Poll::Pending; // It was done before.
        };
        let progress = &in_flight.0;
        Poll::Ready(match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(Ok(mut response))) => {
                if !*this.multiplexed {
                    let status = response.status();
                    if status == StatusCode::SWITCHING_PROTOCOLS
                        || (*this.connect && status.is_success())
                    {
                        progress.upgrades.store(true, Ordering::Release);
                    } else if progress.is_leaving() {
                        // hyper closes after this response.
                        let close = HeaderValue::from_static("close");
                        response.headers_mut().insert(CONNECTION, close);
                    }
                }
                Ok(response.map(|body| ReplyBody { body, in_flight }))
            }
            Ok(Poll::Ready(Err(err))) => {
                let err = err.into();
                if *this.multiplexed {
                    // Only that stream is reset; the connection goes on.
                    let id = signed(progress.info.id().get());
                    let error = ErrorChain(&*err);
                    tracing::warn!(
                        target: "tower_tcp",
                        { connection.id = id, %error },
                        "request.failed",
                    );
                }
                Err(err)
            }
            Err(payload) => Err(progress.panicked(&*payload)),
        })
    }
}

/// The body of a response. It keeps its request in flight.
#[pin_project]
pub(super) struct ReplyBody<B> {
    #[pin]
    body: B,
    in_flight: RequestGuard,
}

impl<B> Body for ReplyBody<B>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    type Data = B::Data;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, BoxError>>> {
        let this = self.project();
        let body = this.body;
        let polled = catch_unwind(AssertUnwindSafe(|| body.poll_frame(cx)));
        let frame = match polled {
            Ok(polled) => ready!(polled),
            Err(payload) => return Poll::Ready(Some(Err(this.in_flight.0.panicked(&*payload)))),
        };
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
