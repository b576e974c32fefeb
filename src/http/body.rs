//! The body of a request, with a deadline for a body that stops arriving.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use thiserror::Error;

use super::progress::Progress;
use crate::deadline::{Due, Moment, Timer, due, first};

/// The error of a request body that could not be read to its end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RequestBodyError {
    /// The peer disconnected, reset the HTTP/2 stream or sent a malformed body, or the server ended
    /// the connection.
    #[error("the request body could not be read")]
    Unreadable(#[source] hyper::Error),
    /// No byte of the body arrived within the [usual deadline](crate::deadline::Deadlines::body),
    /// or within the [deadline of a drain](crate::deadline::DrainDeadlines::body). The value is the
    /// length of that deadline.
    #[error("no byte of the request body arrived within {0:?}")]
    Elapsed(Duration),
}

/// The body of a request: hyper's [`Incoming`], with a deadline for a peer that stops sending it.
///
/// The [deadline](crate::deadline::Deadlines::body) runs only while the service waits for more of
/// the body, so a slow service cannot cause a timeout. When the deadline passes, reading the body
/// fails with [`RequestBodyError::Elapsed`]. In HTTP/1 the connection then closes after the
/// response, with [`BodyTimeout`](crate::EndReason::BodyTimeout). In HTTP/2 the other streams
/// continue.
pub struct RequestBody {
    /// `None` once the deadline has passed. Dropping the `Incoming` tells hyper that nobody will
    /// read the rest.
    incoming: Option<Incoming>,
    /// `None` if there is no body to wait for.
    progress: Option<Arc<Progress>>,
    /// `true` while the body is counted in `progress.unread`.
    is_unread: bool,
    /// Allocated when the service first waits for the body.
    wait: Option<Box<Wait>>,
}

struct Wait {
    timer: Timer,
    since: Option<Moment>,
    /// Completes when the connection begins to drain or close. `None` once that has happened, or if
    /// a drain has no deadline for bodies.
    leaving: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
    draining: Option<Moment>,
}

/// The length of a deadline. The timer returns it when that deadline passes. `None` if the deadline
/// is not set, so it never passes.
#[derive(Clone, Copy)]
struct Elapsed(Option<Duration>);

impl Due for Elapsed {
    fn is_kept_by_peer(&self) -> bool {
        true
    }
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming, progress: &Arc<Progress>) -> Self {
        let progress = (!incoming.is_end_stream()).then(|| {
            progress.unread.fetch_add(1, Ordering::Relaxed);
            Arc::clone(progress)
        });
        Self {
            incoming: Some(incoming),
            is_unread: progress.is_some(),
            progress,
            wait: None,
        }
    }

    /// Completes with the deadline's length once no byte has arrived for that long.
    fn poll_elapsed(&mut self, cx: &mut Context<'_>) -> Poll<Duration> {
        let Some(progress) = &self.progress else {
            return Poll::Pending;
        };
        let limits = &progress.bodies;
        let wait = self.wait.get_or_insert_with(|| {
            let progress = Arc::clone(progress);
            let leaving = || Box::pin(async move { progress.leaving().await }) as Pin<Box<_>>;
            Box::new(Wait {
                timer: Timer::start(),
                since: None,
                leaving: limits.drain.map(|_| leaving()),
                draining: None,
            })
        });
        let now = wait.timer.now();
        let since = *wait.since.get_or_insert(now);
        if let Some(leaving) = &mut wait.leaving
            && leaving.as_mut().poll(cx).is_ready()
        {
            wait.leaving = None;
            wait.draining = Some(now);
        }
        let next = first([
            due(since, limits.usual, Elapsed(limits.usual)),
            due(
                wait.draining.map(|at| at.max(since)),
                limits.drain,
                Elapsed(limits.drain),
            ),
        ]);
        let Elapsed(time) = ready!(wait.timer.poll(next, now, cx));
        progress.body_stalled();
        Poll::Ready(time.unwrap_or_default())
    }
}

impl RequestBody {
    /// Records that the service will read nothing more of the body.
    fn note_read(&mut self) {
        if let Some(progress) = self.progress.as_ref().filter(|_| self.is_unread) {
            self.is_unread = false;
            progress.unread.fetch_sub(1, Ordering::Release);
        }
    }

    /// Drops the rest of the body, so that hyper stops waiting for the service to read it.
    fn abandon(&mut self) {
        self.incoming = None;
        if let Some(progress) = self.progress.as_ref().filter(|_| self.is_unread) {
            progress.abandoned.store(true, Ordering::Relaxed);
        }
        self.note_read();
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        let Some(incoming) = &mut self.incoming else {
            return Poll::Ready(None);
        };
        if let Poll::Ready(frame) = Pin::new(&mut *incoming).poll_frame(cx) {
            // This does not call `is_end_stream`, because that takes a lock in HTTP/2.
            let is_last = match &frame {
                Some(Ok(frame)) => frame.is_trailers() || incoming.size_hint().exact() == Some(0),
                Some(Err(_)) | None => true,
            };
            // An empty data frame of HTTP/2 does not restart the deadline.
            let data = frame
                .as_ref()
                .and_then(|frame| frame.as_ref().ok()?.data_ref());
            let is_empty = data.is_some_and(Bytes::is_empty);
            if let (Some(data), Some(progress)) = (data, &self.progress)
                && progress.is_multiplexed()
            {
                progress.count_read(data.len());
            }
            if let Some(wait) = &mut self.wait
                && !is_empty
            {
                wait.since = None;
            }
            if is_last {
                self.note_read();
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(RequestBodyError::Unreadable)));
        }
        let time = ready!(self.poll_elapsed(cx));
        self.abandon();
        Poll::Ready(Some(Err(RequestBodyError::Elapsed(time))))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl fmt::Debug for RequestBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RequestBody").field(&self.incoming).finish()
    }
}
