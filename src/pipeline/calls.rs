//! The calls of a connection's service, and their results.
//!
//! [`Calls::poll_event`] takes the next event and waits until the service is ready for it. The
//! engine drives I/O during every wait, so the three ways to run calls (see
//! [`dispatch`](super::dispatch)) differ only in how many calls run at the same time and in the
//! order of replies.

use std::marker::PhantomData;
use std::task::{Context, Poll, ready};

use tokio_util::codec::Decoder;

use super::bounds::{Codec, Events, Stream};
use super::engine::{Dropped, Engine};
use super::event::Event;
use super::reply::Answer;
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked, caught};

/// The calls of one connection's service.
///
/// `A` is the type into which the service's responses convert: `Reply<T>` or `Upgrade<T>`.
pub(super) struct Calls<'a, Io, C: Decoder, T, M, S, A> {
    engine: &'a mut Engine<Io, C, T, M>,
    service: S,
    in_flight: usize,
    answer: PhantomData<fn(A)>,
}

impl<Io, C: Decoder, T, M, S, A> Unpin for Calls<'_, Io, C, T, M, S, A> {}

impl<'a, Io, C, T, M, S, A> Calls<'a, Io, C, T, M, S, A>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    pub(super) fn new(engine: &'a mut Engine<Io, C, T, M>, service: S) -> Self {
        Self {
            engine,
            service,
            in_flight: 0,
            answer: PhantomData,
        }
    }

    /// Takes the next event once the service is ready for it. Returns `None` when there will be no
    /// more.
    ///
    /// This function and those that it calls, down to the decoder, are inlined into the loop that
    /// runs the calls. Otherwise each function would move the event once more. For a request of 16
    /// bytes, these moves cost a tenth of the instructions.
    #[inline(always)]
    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event<C::Item, M>>> {
        let Some(event) = ready!(self.engine.poll_event(self.in_flight, cx)) else {
            return Poll::Ready(None);
        };
        if !self.is_service_ready(cx) {
            return self.engine.poll_reserve(event, cx);
        }
        self.engine.begin(&event, self.in_flight);
        self.in_flight += 1;
        Poll::Ready(Some(event))
    }

    /// Polls the service, and returns whether it is ready. If `poll_ready` fails or panics, the
    /// connection ends.
    #[inline]
    fn is_service_ready(&mut self, cx: &mut Context<'_>) -> bool {
        // A panic is caught here, so that requests already in flight are still answered.
        let polled = caught(|| self.service.poll_ready(cx));
        match polled {
            Ok(Poll::Ready(Ok(()))) => return true,
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(Err(err))) => self.not_ready(EndReason::ServiceNotReady, err.into()),
            Err(panicked) => self.not_ready(EndReason::Panic, panicked.into()),
        }
        false
    }

    /// Ends the connection with `reason`, after `poll_ready` has failed or panicked. A
    /// `ConnectionEnded` in `err` does not set the reason, because `poll_ready` is not called for a
    /// particular peer: a shared `Buffer`, for example, returns the same error to all connections.
    /// In the error of a call, a `ConnectionEnded` does set the reason.
    #[cold]
    fn not_ready(&mut self, reason: EndReason, err: BoxError) {
        let ended = ConnectionEnded::new(reason, err);
        self.engine.end(ended, Dropped::Requests);
    }

    /// Calls the service.
    #[inline]
    pub(super) fn call(&mut self, event: Event<C::Item, M>) -> S::Future {
        self.service.call(event)
    }

    /// Completes when the connection must end without waiting for the calls that still run.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.engine.poll_over(cx)
    }

    /// Drives I/O while a call runs. Completes when the connection must end without waiting for the
    /// call.
    pub(super) fn poll_io_beside_call(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.engine.poll_io_beside(cx)
    }

    /// Tries to make the most recently begun call the *head*, the one call that `Concurrent` (in
    /// `tokio_tower.rs`) polls itself. Returns whether the call became the head. If replies keep
    /// the order of the requests, the replies to later requests wait for the reply of the head.
    pub(super) fn begin_head(&mut self) -> bool {
        self.engine.hold_replies(self.in_flight)
    }

    /// Passes the result of the head to the engine, and releases the replies that wait for the
    /// head.
    #[inline]
    pub(super) fn finish_head(&mut self, result: Result<S::Response, BoxError>) {
        self.in_flight -= 1;
        let result = result.map(|response| response.into().into_reply());
        self.engine.reply_first(result);
    }

    /// Ends the connection after a panic in user code outside of a call.
    pub(super) fn panicked(&mut self, panicked: Panicked) {
        self.engine.panicked(panicked);
    }

    /// Passes the result of a call to the engine.
    #[inline]
    pub(super) fn finish_call(&mut self, result: Result<S::Response, BoxError>) {
        self.in_flight -= 1;
        let result = result.map(|response| response.into().into_reply());
        self.engine.reply(result);
    }
}
