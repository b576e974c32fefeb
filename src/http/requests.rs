//! What hyper calls: the user's service, with what this crate does for each request around it.

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

/// The length of what an HTTP/2 connection begins with ([RFC 9113 section 3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)).
const PREFACE: u64 = 24;

/// How far a connection has come, between its requests, which may run in other tasks, and its own task.
pub(super) struct Progress {
    info: ConnectionInfo,
    /// How long a request's body may stop arriving.
    pub(super) body: Option<Duration>,
    in_flight: AtomicUsize,
    /// How many tasks run for streams of HTTP/2: also those that became a tunnel, whose request was answered.
    pub(super) streams: AtomicUsize,
    multiplexed: AtomicBool,
    /// What had been read when hyper began to wait for the head of a request, plus one; zero while it does not.
    awaiting_head: AtomicU64,
    /// The stream will go to another task.
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

    /// Returns whether a request is in hand: its service, or the body of its response.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) > 0
    }

    /// Returns whether a stream of HTTP/2 is open: with no request in hand, a tunnel.
    pub(super) fn has_streams(&self) -> bool {
        self.streams.load(Ordering::Relaxed) > 0
    }

    /// Returns whether the connection is known to be HTTP/2.
    pub(super) fn is_multiplexed(&self) -> bool {
        // With its preface read, one of HTTP/1 would wait for a head.
        let begun = || self.awaiting_head().is_none() && self.life().bytes_read() >= PREFACE;
        self.multiplexed.load(Ordering::Relaxed) || (self.life().requests() == 0 && begun())
    }

    /// Returns what had been read when the wait for the head of a request began, if there is one.
    pub(super) fn awaiting_head(&self) -> Option<u64> {
        self.awaiting_head.load(Ordering::Relaxed).checked_sub(1)
    }

    pub(super) fn await_head(&self) {
        let read = self.life().bytes_read();
        self.awaiting_head.store(read + 1, Ordering::Relaxed);
    }

    /// Returns whether the connection was told to leave.
    pub(super) fn is_leaving(&self) -> bool {
        self.life().signals.is_raised(Signal::Drain) || self.life().signals.is_raised(Signal::Close)
    }

    /// A request's body has stopped arriving. In HTTP/1 nothing can be read behind it: the connection ends with its response.
    #[cold]
    pub(super) fn body_stalled(&self) {
        if !self.is_multiplexed() {
            self.life().set_reason(EndReason::BodyTimeout, None);
            self.life().signals.raise(Signal::Close);
        }
    }

    /// Returns how far it had come, for the reason of a failure.
    pub(super) fn as_failed(&self) -> HttpProgress {
        HttpProgress {
            is_busy: self.is_busy(),
            is_peer_done: self.life().is_peer_done(),
        }
    }

    /// A panic of user code: the connection ends of it, once what else is in flight is done.
    #[cold]
    fn panicked(&self, payload: &(dyn Any + Send)) -> BoxError {
        let panicked = ConnectionEnded::caused(EndReason::Panic, Panicked::new(payload));
        self.life()
            .set_reason(panicked.reason, panicked.cause.clone());
        self.life().signals.raise(Signal::Close);
        panicked.into()
    }
}

/// A request in hand.
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

/// The user's service as hyper calls it.
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

/// One request.
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
                        // hyper closes behind it.
                        let close = HeaderValue::from_static("close");
                        response.headers_mut().insert(CONNECTION, close);
                    }
                }
                Ok(response.map(|body| ReplyBody { body, in_flight }))
            }
            Ok(Poll::Ready(Err(err))) => {
                let err = err.into();
                if *this.multiplexed {
                    // That stream is reset, and the connection goes on.
                    let id = signed(progress.info.id().get());
                    let error = ErrorChain(&*err);
                    tracing::warn!(target: "tower_tcp", { connection.id = id, %error }, "request.failed");
                }
                Err(err)
            }
            Err(payload) => Err(progress.panicked(&*payload)),
        })
    }
}

/// The body of a response, which keeps its request in flight.
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
