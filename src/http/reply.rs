//! Wraps the body of a response and its data, to know when the peer has taken the data.

use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, SizeHint};
use pin_project::pin_project;

use super::body::RequestBodyError;
use super::progress::{Progress, Queued, RequestGuard};
use crate::error::{BoxError, caught, find_cause};
use crate::observe::{ErrorChain, signed};

/// Reports an error of an HTTP/2 request or of the body of its response. hyper resets only the
/// stream of this request, and the connection continues.
#[cold]
pub(super) fn request_failed(progress: &Progress, err: &BoxError) {
    let id = signed(progress.info().id().get());
    let error = ErrorChain(&**err);
    // A service that passes on the error of a request's body has not failed itself.
    if find_cause::<RequestBodyError>(&**err).is_some() {
        tracing::debug!(target: "tower_tcp", { connection.id = id, %error }, "request.failed");
    } else {
        tracing::warn!(target: "tower_tcp", { connection.id = id, %error }, "request.failed");
    }
}

/// The body of a response. Its request counts as in flight until this body is dropped.
#[pin_project]
pub(super) struct ReplyBody<B> {
    #[pin]
    body: B,
    in_flight: RequestGuard,
    multiplexed: bool,
}

impl<B> ReplyBody<B> {
    pub(super) fn new(body: B, in_flight: RequestGuard, multiplexed: bool) -> Self {
        Self {
            body,
            in_flight,
            multiplexed,
        }
    }
}

impl<B> Body for ReplyBody<B>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    type Data = ReplyData<B::Data>;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, BoxError>>> {
        let this = self.project();
        let progress = &this.in_flight.0;
        let body = this.body;
        let polled = caught(|| body.poll_frame(cx));
        let frame = match polled {
            Ok(polled) => ready!(polled),
            Err(panicked) => return Poll::Ready(Some(Err(progress.panicked(panicked)))),
        };
        let multiplexed = *this.multiplexed;
        let queued = |data: B::Data| ReplyData {
            queued: multiplexed.then(|| Queued::enter(progress, data.remaining())),
            data,
        };
        Poll::Ready(frame.map(|frame| match frame {
            Ok(frame) => Ok(frame.map_data(queued)),
            Err(err) => {
                let err = err.into();
                if multiplexed {
                    request_failed(progress, &err);
                }
                Err(err)
            }
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Data of a response.
///
/// In HTTP/2 the data may wait for the peer to open the stream's window, long after the end of the
/// body. The connection counts as busy until the peer has taken the data.
pub(super) struct ReplyData<D> {
    data: D,
    queued: Option<Queued>,
}

impl<D: Buf> Buf for ReplyData<D> {
    fn remaining(&self) -> usize {
        self.data.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.data.chunk()
    }

    fn chunks_vectored<'a>(&'a self, dst: &mut [IoSlice<'a>]) -> usize {
        self.data.chunks_vectored(dst)
    }

    fn advance(&mut self, n: usize) {
        self.data.advance(n);
        if let Some(queued) = &mut self.queued {
            queued.taken(n);
        }
    }

    fn copy_to_bytes(&mut self, len: usize) -> Bytes {
        let bytes = self.data.copy_to_bytes(len);
        if let Some(queued) = &mut self.queued {
            queued.taken(len);
        }
        bytes
    }
}
