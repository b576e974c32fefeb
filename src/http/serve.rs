//! Serves one connection: makes its service, runs hyper, and closes the stream.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use hyper::body::Body;
use hyper::{Request, Response};
use tokio::io::{AsyncRead, AsyncWrite};
use tower_service::Service;

use super::body::{RequestBody, RequestBodyError};
use super::clock::{Clock, Due};
use super::lent::{Owner, lend};
use super::progress::{BodyLimits, Progress};
use super::requests::HyperService;
use super::stage::Stage;
use super::{Http, HttpSettings};
use crate::close::Linger;
use crate::connection::{Connection, ConnectionInfo};
use crate::deadline::{Borrower, Deadlines, Watch};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, ServiceError, find_cause};
use crate::make::{CloneForRequest, Maker};
use crate::signals::Signal;

#[expect(unnameable_types, reason = "sealed: an alias of bounds")]
mod sealed {
    use super::*;

    /// A type that can be the body of an HTTP response.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` is not the body of an HTTP response",
        label = "the service answers with a `Response<{Self}>`",
        note = "a body is an `http_body::Body` with `Send` data and an error that converts into \
            `BoxError`, such as `String` or `Full<Bytes>`"
    )]
    pub trait ResponseBody: Body<Data: Send, Error: ServiceError> + Send + 'static {}

    #[diagnostic::do_not_recommend]
    impl<B: Body<Data: Send, Error: ServiceError> + Send + 'static> ResponseBody for B {}
}
use sealed::ResponseBody;

impl<Io, K, S, B> Service<Connection<Io>> for Http<K>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    K: Maker<ConnectionInfo, Service = S>,
    S: Service<Request<RequestBody>, Response = Response<B>> + CloneForRequest + Send + 'static,
    S::Error: ServiceError,
    S::Future: Send + 'static,
    B: ResponseBody,
{
    type Response = EndReason;
    type Error = BoxError;
    type Future = HttpFuture;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, conn: Connection<Io>) -> HttpFuture {
        let make = self.maker.make(|| conn.info().clone());
        let settings = Arc::clone(&self.settings);
        // Boxed values take less room in the future of an idle connection.
        let conn = Box::new(conn);
        let limit = settings.deadlines.make_service;
        let made = Box::pin(async move {
            let failed = |err| ConnectionEnded::new(EndReason::MakeServiceError, err);
            let made = match limit {
                Some(limit) => tokio::time::timeout(limit, make).await.map_err(failed)?,
                None => make.await,
            };
            made.map_err(|err| ConnectionEnded::of(err.into(), EndReason::MakeServiceError))
        });
        HttpFuture(Box::pin(async move {
            match made.await {
                Ok(service) => serve(conn, service, &settings).await,
                Err(ended) => {
                    let ended = conn.life().ended(ended);
                    Box::pin(end(Some(conn), ended, settings.linger)).await
                }
            }
        }))
    }
}

async fn serve<Io, S, B>(
    conn: Box<Connection<Io>>,
    service: S,
    settings: &HttpSettings,
) -> Result<EndReason, BoxError>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let info = conn.info().clone();
    let progress = Progress::new(info.clone(), BodyLimits::new(&settings.deadlines));
    let (owner, lent) = lend(conn, &progress);
    let mut is_cut_short = false;
    let ended = {
        let mut stage = Stage::Parked {
            lent,
            service: HyperService::new(service, Arc::clone(&progress)),
        };
        let mut clock = Clock::new(info.accepted_at(), &settings.deadlines);
        let mut waker: Option<Waker> = None;
        let is_cut_short = &mut is_cut_short;
        let progress = &progress;
        // The closure owns its state, because a reference to each variable would take more room.
        std::future::poll_fn(move |cx| {
            let life = progress.life();
            if waker.as_ref().is_none_or(|w| !w.will_wake(cx.waker())) {
                waker = Some(cx.waker().clone());
                life.signals.wake_engine_with(cx.waker());
                clock.disarm();
            }
            loop {
                if let Poll::Ready(served) = stage.poll(settings, progress, cx) {
                    return Poll::Ready(hyper_error(served, progress, clock.is_closing()));
                }
                let rest = stage.rest(progress);
                match ready!(clock.poll(progress, rest, &settings.deadlines, cx)) {
                    Due::Retire => {
                        // Drains this connection only.
                        life.set_reason(EndReason::MaxAge, None);
                        life.signals.raise(Signal::Drain);
                    }
                    Due::Close(reason) => {
                        life.set_reason(reason, None);
                        if !stage.graceful_shutdown() {
                            return Poll::Ready(None);
                        }
                    }
                    Due::Park => stage.park(),
                    Due::Look => {}
                    Due::End(reason) => {
                        // If nothing was written, or if a graceful close has already given the
                        // output time to arrive, the close of the stream need not wait for the
                        // peer.
                        if life.bytes_written() == 0 || clock.is_closing() {
                            *is_cut_short = true;
                        }
                        return Poll::Ready(Some(reason.into()));
                    }
                }
            }
        })
        .await
    };
    let (conn, ended) = match ended {
        Some(ended) => {
            // The stage is dropped, so the stream has been returned.
            let conn = std::future::poll_fn(|cx| owner.poll_returned(cx)).await;
            (conn, Some(ended))
        }
        // Without an upgrade, the stream has already been returned. An upgraded stream stays lent
        // until its task drops it.
        None => Box::pin(returned(owner, &info, &settings.deadlines)).await,
    };
    let ended = match ended {
        Some(ended) => ended,
        // At the end of input, hyper ends an HTTP/2 connection without an error, even if requests
        // are in progress.
        None if progress.has_left_early() => EndReason::PeerReset.into(),
        // An HTTP/2 connection that neither drains nor closes ends only when its peer closes it.
        None if progress.is_multiplexed() && !progress.is_leaving() => EndReason::PeerClosed.into(),
        None if progress.peer_closes() && !progress.is_leaving() => EndReason::PeerClosed.into(),
        None => progress.life().done().into(),
    };
    let ended = progress.life().ended(ended);
    progress.life().begin_closing();
    let linger = match is_cut_short {
        true => settings.linger.time(Duration::ZERO),
        false => settings.linger,
    };
    end(conn, ended, linger).await
}

/// Closes the stream gracefully, unless it is gone or the peer is cut off. Returns the end reason.
/// If the end has a cause, returns an error that contains the reason and the cause.
async fn end<Io>(
    conn: Option<Box<Connection<Io>>>,
    ended: ConnectionEnded,
    linger: Linger,
) -> Result<EndReason, BoxError>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    if let Some(conn) = conn
        && !ended.reason.is_cut_off()
    {
        // The end reason is already recorded, so it does not matter if the peer disconnects before
        // the close is done.
        let _settled = Box::pin(conn.close(linger)).await;
    }
    match ended {
        ConnectionEnded {
            reason,
            cause: None,
        } => Ok(reason),
        ended => Err(ended.into()),
    }
}

/// Returns hyper's error, with the end reason for it. Returns `None` if hyper has not failed, or if
/// the stream failed during a graceful close with no request or tunnel in progress.
#[cold]
fn hyper_error(
    served: Result<(), BoxError>,
    progress: &Progress,
    is_closing: bool,
) -> Option<ConnectionEnded> {
    let err = served.err()?;
    if let Some(RequestBodyError::Unreadable(unread)) = find_cause(&*err) {
        let otherwise = EndReason::of_request_body(unread);
        return Some(ConnectionEnded::of(err, otherwise));
    }
    let otherwise = EndReason::of_hyper(&*err, progress.as_failed());
    let ended = ConnectionEnded::of(err, otherwise);
    // During a graceful close with no request in progress, the peer may disconnect in any way, so
    // an error of the stream is ignored.
    let is_idle_close = is_closing && !progress.is_busy() && !progress.has_streams();
    let is_ignored = is_idle_close && ended.reason.is_of_stream();
    (!is_ignored).then_some(ended)
}

/// Waits until the task of an upgrade drops the stream, and returns the stream. If a deadline
/// passes first, takes the stream away from the task, and also returns the reason to end the
/// connection.
async fn returned<Io>(
    owner: Owner<Io>,
    info: &ConnectionInfo,
    deadlines: &Deadlines,
) -> (Option<Box<Connection<Io>>>, Option<ConnectionEnded>) {
    let mut watch = None;
    std::future::poll_fn(|cx| {
        if let Poll::Ready(conn) = owner.poll_returned(cx) {
            return Poll::Ready((conn, None));
        }
        let watch = watch.get_or_insert_with(|| Watch::new(info, Borrower::Upgraded, deadlines));
        let reason = ready!(watch.poll(&info.life, deadlines, cx));
        Poll::Ready((owner.take_away(), Some(reason.into())))
    })
    .await
}

/// The future with which [`Http`] serves one connection.
#[must_use = "futures do nothing unless polled"]
pub struct HttpFuture(Pin<Box<dyn Future<Output = Result<EndReason, BoxError>> + Send>>);

impl fmt::Debug for HttpFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HttpFuture").finish_non_exhaustive()
    }
}

impl Future for HttpFuture {
    type Output = Result<EndReason, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}
