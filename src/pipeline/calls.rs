//! The calls of a connection's service, and their results.
//!
//! All waiting happens in [`Calls::poll_event`]: it writes, limits the calls in flight, decodes,
//! and makes the service ready once an event is available. So the three ways to run calls only keep
//! their order.

use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::{Context, Poll, ready};

use tokio_util::codec::Decoder;

use super::bounds::{Codec, Events, Stream};
use super::engine::{Engine, Leaves};
use super::event::Event;
use super::reply::Answer;
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked};

/// The number of requests begun in one turn of the connection's task, so that a fast peer does not
/// delay other connections.
const TURN: u32 = 256;

/// The calls of one connection's service.
///
/// `A` is the type of the service's answers: a reply, or an upgrade.
pub(super) struct Calls<'a, Io, C: Decoder, T, M, S, A> {
    engine: &'a mut Engine<Io, C, T, M>,
    service: S,
    /// Held back until the service is ready.
    message: Option<M>,
    /// Held back until the service is ready, and while input is paused.
    request: Option<C::Item>,
    /// If both are waiting, a request is next. Set when a message begins; cleared when a request
    /// begins, or was looked for.
    was_message: bool,
    in_flight: usize,
    turn: u32,
    answer: PhantomData<fn(A)>,
}

impl<Io, C: Decoder, T, M, S, A> Unpin for Calls<'_, Io, C, T, M, S, A> {}

impl<Io, C: Decoder, T, M, S, A> Drop for Calls<'_, Io, C, T, M, S, A> {
    fn drop(&mut self) {
        if self.message.is_some() {
            self.engine.count_dropped_message();
        }
    }
}

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
            message: None,
            request: None,
            was_message: false,
            in_flight: 0,
            turn: 0,
            answer: PhantomData,
        }
    }

    /// Takes the next event, with the service ready for it. Ready with `None` when there will be no
    /// more.
    ///
    /// All waiting is here. Before this returns pending, everything is written and flushed.
    #[inline]
    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event<C::Item, M>>> {
        loop {
            // The common case: one more request in the buffer, and nothing else to check.
            let is_plain = self.is_plain();
            let event = if is_plain {
                self.engine.decode().map(Event::Request)
            } else if ready!(self.poll_may_begin(cx)) {
                self.take_at_hand()
            } else {
                return Poll::Ready(None);
            };
            let Some(event) = event else {
                if self.engine.is_ending() {
                    return Poll::Ready(None);
                }
                ready!(self.poll_more(cx));
                continue;
            };
            if self.turn >= TURN {
                self.hold(event);
                self.turn = 0;
                cx.waker().wake_by_ref();
                return self.poll_io_beside(cx).map(|()| None);
            }
            match self.poll_service(cx) {
                Poll::Ready(true) => {}
                Poll::Ready(false) => {
                    self.hold(event);
                    return Poll::Ready(None);
                }
                Poll::Pending => {
                    self.hold(event);
                    return self.poll_io_beside(cx).map(|()| None);
                }
            }
            // Input may have been paused while the service became ready.
            if !is_plain && matches!(event, Event::Request(_)) && self.engine.is_paused() {
                self.hold(event);
                continue;
            }
            self.was_message = matches!(event, Event::Message(_));
            self.engine.begin(&event, self.in_flight);
            self.in_flight += 1;
            self.turn += 1;
            return Poll::Ready(Some(event));
        }
    }

    /// Returns whether a request may be decoded and begun without checking anything else.
    #[inline]
    fn is_plain(&self) -> bool {
        self.message.is_none()
            && self.request.is_none()
            && self.turn < TURN
            && self.engine.is_plain(self.in_flight)
    }

    /// Waits until one more event may begin. Ready with `false` when none may begin any more.
    #[inline]
    fn poll_may_begin(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        loop {
            if !self.engine.may_begin() {
                return Poll::Ready(false);
            }
            if !self.engine.is_full(self.in_flight) {
                break;
            }
            if self.engine.poll_io_beside(cx).is_ready() {
                return Poll::Ready(false);
            }
            if self.engine.is_full(self.in_flight) {
                return Poll::Pending;
            }
        }
        Poll::Ready(true)
    }

    /// Takes an event that was held back, a message, or a buffered request.
    #[inline]
    fn take_at_hand(&mut self) -> Option<Event<C::Item, M>> {
        if let Some(message) = self.message.take() {
            return Some(Event::Message(message));
        }
        let is_paused = self.engine.is_paused();
        if let Some(request) = self.request.take_if(|_| !is_paused) {
            return Some(Event::Request(request));
        }
        if !self.engine.may_take() {
            return None;
        }
        if !self.was_message
            && let Some(message) = self.engine.take_message()
        {
            return Some(Event::Message(message));
        }
        self.was_message = false;
        if !is_paused {
            return self.engine.decode().map(Event::Request);
        }
        if self.request.is_none() && self.engine.is_at_end_of_input() {
            self.request = self.engine.decode();
        }
        None
    }

    /// Holds an event back until it may be begun.
    fn hold(&mut self, event: Event<C::Item, M>) {
        match event {
            Event::Message(message) => self.message = Some(message),
            Event::Request(request) => self.request = Some(request),
        }
    }

    /// Writes, and waits until another event may be available.
    #[inline]
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let undelivered = self.request.is_some();
        let polled = self.engine.poll_more(self.in_flight, undelivered, cx);
        if polled.is_pending() {
            self.turn = 0;
        }
        polled
    }

    /// Makes the service ready. Ready with `false` if that failed and the connection ends.
    #[inline]
    fn poll_service(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        // Caught here, because earlier requests may be in flight, and are still answered.
        let polled = catch_unwind(AssertUnwindSafe(|| self.service.poll_ready(cx)));
        let ended = match polled {
            Ok(Poll::Ready(Ok(()))) => return Poll::Ready(true),
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(Err(err))) => ConnectionEnded::caused(EndReason::ServiceNotReady, err),
            Err(payload) => ConnectionEnded::caused(EndReason::Panic, Panicked::new(&*payload)),
        };
        self.engine.end(ended, Leaves::Requests);
        Poll::Ready(false)
    }

    /// Calls the service.
    #[inline]
    pub(super) fn call(&mut self, event: Event<C::Item, M>) -> S::Future {
        self.service.call(event)
    }

    /// Drives I/O while the service is not ready. Ready when the held event must not begin any
    /// more.
    fn poll_io_beside(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let cut_off = self.engine.poll_io_beside(cx).is_ready();
        if cut_off || self.engine.leaves(Leaves::Requests) {
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// Ready when the connection must end without the calls that still run.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.engine.leaves(Leaves::Calls) {
            return Poll::Ready(());
        }
        if self.engine.is_ending() {
            return self.engine.poll_io_beside(cx);
        }
        Poll::Pending
    }

    /// Drives I/O while a call runs. Ready when the connection must end without it.
    pub(super) fn poll_io_beside_call(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.engine.poll_io_beside(cx)
    }

    /// Makes the last call that was begun the head, if it may be. If replies keep their order,
    /// later replies wait for it.
    pub(super) fn begin_head(&mut self) -> bool {
        self.engine.hold_replies(self.in_flight)
    }

    /// Takes the result of the head, and releases the replies that wait for it.
    #[inline]
    pub(super) fn finish_head(&mut self, result: Result<S::Response, BoxError>) {
        self.in_flight -= 1;
        let result = result.map(|response| response.into().into_reply());
        self.engine.reply_first(result);
    }

    /// Reports a panic in user code outside of a call.
    pub(super) fn panicked(&mut self, panicked: Panicked) {
        self.engine.panicked(panicked);
    }

    /// Takes the result of a call.
    #[inline]
    pub(super) fn finish_call(&mut self, result: Result<S::Response, BoxError>) {
        self.in_flight -= 1;
        let result = result.map(|response| response.into().into_reply());
        self.engine.reply(result);
    }
}
