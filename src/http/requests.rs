//! Adapts the user's service to hyper. The adapter counts each request as in flight until its
//! response is complete, catches panics, and recognizes upgrades.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};

use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::http::Extensions;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::service::{TowerToHyperService, TowerToHyperServiceFuture};
use pin_project::pin_project;
use tower_service::Service;

use super::body::RequestBody;
use super::progress::{Progress, RequestGuard};
use super::reply::{ReplyBody, request_failed};
use crate::error::{BoxError, caught};

/// An empty map with space for seven extensions. Its clones have the same space. `Extensions` has
/// no `with_capacity`, and the first allocation of a new map has space for three. axum inserts up
/// to three, so with `ConnectionInfo` a new map would allocate twice for each request.
static EMPTY_WITH_SPACE: LazyLock<Extensions> = LazyLock::new(|| {
    let mut extensions = Extensions::new();
    extensions.insert([(); 1]);
    extensions.insert([(); 2]);
    extensions.insert([(); 3]);
    extensions.insert([(); 4]);
    extensions.clear();
    extensions
});

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
        let multiplexed = progress.is_multiplexed();
        if !multiplexed {
            progress.begin_http1(&request);
        }
        let extensions = request.extensions_mut();
        if extensions.is_empty() {
            extensions.clone_from(&EMPTY_WITH_SPACE);
        }
        extensions.insert(progress.info().clone());
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
        let polled = caught(|| inner.poll(cx));
        let in_flight = match &polled {
            Ok(Poll::Pending) => return Poll::Pending,
            _ => this.in_flight.take(),
        };
        let Some(in_flight) = in_flight else {
            return Poll::Pending; // The future has already completed.
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
                        // With this header, hyper closes the connection after the response.
                        let close = HeaderValue::from_static("close");
                        response.headers_mut().insert(CONNECTION, close);
                    }
                }
                let multiplexed = *this.multiplexed;
                Ok(response.map(|body| ReplyBody::new(body, in_flight, multiplexed)))
            }
            Ok(Poll::Ready(Err(err))) => {
                let err = err.into();
                if *this.multiplexed {
                    request_failed(progress, &err);
                }
                Err(err)
            }
            Err(panicked) => Err(progress.panicked(panicked)),
        })
    }
}
