//! Switches an HTTP connection between two stages: parked while it is idle, and served by hyper.
//!
//! A parked connection holds its stream and its service, and waits for input. The first bytes of a
//! request cause hyper to be set up. Once the last response is sent and hyper waits for the next
//! request, hyper is taken apart again (`into_parts`), so a parked connection holds no buffer and
//! no state of hyper. [`Clock`](super::clock::Clock) decides how soon that happens: usually at
//! once, but later if the last requests came in quick succession. While requests come so quickly,
//! the connection keeps hyper between them. An HTTP/2 connection is never parked again, because its
//! peer relies on hyper's state.

use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use hyper::Request;
use hyper::Response;
use hyper::body::Body;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tower_service::Service;

use super::HttpSettings;
use super::ahead::First;
use super::body::RequestBody;
use super::lent::Lent;
use super::progress::Progress;
use super::requests::HyperService;
use super::streams::{Streams, Tasks};
use crate::error::BoxError;

type Http1<Io, S> = http1::UpgradeableConnection<TokioIo<Lent<Io>>, HyperService<S>>;
type Http2<Io, S> = http2::Connection<TokioIo<Lent<Io>>, HyperService<S>, Streams>;

/// The idle state of a connection. An idle connection has answered all its requests, and no byte of
/// the next one is known to have arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    No,
    /// Idle, with hyper still set up. hyper may have read the beginning of the next request
    /// together with the previous one. Only parking shows whether it has.
    Begun,
    Parked,
}

/// The current stage of an HTTP connection.
pub(super) enum Stage<Io, S, B>
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
    B: Body<Error: Into<BoxError>>,
{
    /// hyper is not set up. No request is in progress, and all responses are sent.
    Parked {
        lent: Lent<Io>,
        service: HyperService<S>,
    },
    Http1 {
        hyper: Box<Http1<Io, S>>,
        /// The connection's number of requests when hyper was set up.
        before: u64,
        /// The connection's number of requests, and its number of bytes read, at the moment when it
        /// last became idle. `None` if it has not been idle since hyper was set up.
        rest: Option<(u64, u64)>,
    },
    Http2 {
        hyper: Pin<Box<Http2<Io, S>>>,
        tasks: Tasks,
    },
    /// A placeholder while the stage changes. It stays only if `park` finds that hyper has passed
    /// the stream to another task.
    Done,
}

impl<Io, S, B> Stage<Io, S, B>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    pub(super) fn rest(&self, progress: &Progress) -> Rest {
        match self {
            Self::Parked { lent, .. } if !lent.has_input() => Rest::Parked,
            Self::Http1 { rest, .. } if *rest == Some(progress.taken_in()) => Rest::Begun,
            _ => Rest::No,
        }
    }

    /// Serves requests. Completes once hyper is done or has failed.
    pub(super) fn poll(
        &mut self,
        settings: &HttpSettings,
        progress: &Arc<Progress>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), BoxError>> {
        loop {
            match self {
                Self::Parked { lent, .. } => {
                    let first = ready!(lent.poll_input(cx));
                    self.begin(first, settings, progress);
                }
                Self::Http1 {
                    hyper,
                    before,
                    rest,
                } => {
                    let served = Pin::new(&mut **hyper).poll(cx);
                    if served.is_ready() {
                        return served.map_err(Into::into);
                    }
                    if progress.life().requests() == *before || !progress.is_at_rest() {
                        return Poll::Pending;
                    }
                    if progress.take_abandoned() {
                        // The service has dropped a body, so hyper has to be polled again to read
                        // the rest.
                        continue;
                    }
                    let now = progress.taken_in();
                    if rest.is_none_or(|(requests, _)| requests != now.0) {
                        *rest = Some(now);
                    }
                    return Poll::Pending;
                }
                Self::Http2 { hyper, tasks } => {
                    let served = hyper.as_mut().poll(cx);
                    let (left, panicked) = tasks.reap(cx);
                    progress.streams.store(left, Ordering::Relaxed);
                    if let Some(panicked) = panicked {
                        drop(progress.panicked(panicked));
                    }
                    return served.map_err(Into::into);
                }
                Self::Done => return Poll::Ready(Ok(())),
            }
        }
    }

    /// Begins a graceful shutdown. Returns `false` if there is nothing to wait for.
    pub(super) fn graceful_shutdown(&mut self) -> bool {
        match self {
            Self::Http1 { hyper, .. } => Pin::new(&mut **hyper).graceful_shutdown(),
            Self::Http2 { hyper, .. } => hyper.as_mut().graceful_shutdown(),
            Self::Parked { .. } | Self::Done => return false,
        }
        true
    }

    /// Sets hyper up for the input that has arrived.
    #[inline(never)] // Otherwise each poll would reserve and probe stack space for hyper's state.
    fn begin(&mut self, first: First, settings: &HttpSettings, progress: &Arc<Progress>) {
        let Self::Parked { lent, service } = mem::replace(self, Self::Done) else {
            return;
        };
        let io = TokioIo::new(lent);
        *self = match first {
            First::Http1 => {
                progress.is_reading.store(false, Ordering::Relaxed);
                let hyper = settings.http1.serve_connection(io, service);
                Self::Http1 {
                    hyper: Box::new(hyper.with_upgrades()),
                    before: progress.life().requests(),
                    rest: None,
                }
            }
            First::Http2 => {
                progress.set_http2();
                let (tasks, streams) = Tasks::new();
                let hyper = settings.http2(streams).serve_connection(io, service);
                Self::Http2 {
                    hyper: Box::pin(hyper),
                    tasks,
                }
            }
        };
    }

    /// Takes hyper apart and parks the connection. If hyper has already read a part of the next
    /// request, the next poll sets hyper up again with that part.
    #[inline(never)] // Otherwise each poll would reserve and probe stack space for hyper's state.
    pub(super) fn park(&mut self) {
        let Self::Http1 { hyper, .. } = mem::replace(self, Self::Done) else {
            return;
        };
        // Only an upgraded connection has no parts, and such a connection is not idle.
        let Some(parts) = hyper.into_parts() else {
            return;
        };
        let mut lent = parts.io.into_inner();
        lent.put_back(&parts.read_buf);
        *self = Self::Parked {
            lent,
            service: parts.service,
        };
    }
}
