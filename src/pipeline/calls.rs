//! What goes to one connection's service, and what comes of it.
//!
//! All waiting happens in [`Calls::poll_event`]: it writes, bounds what is in flight, makes the service ready once a request
//! is at hand, and decodes. So the three ways to run calls need only keep their order.

use std::marker::PhantomData;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::{Context, Poll, ready};

use tokio_util::codec::Decoder;

use super::bounds::{Codec, Events, Stream};
use super::engine::{Engine, Leaves, Order};
use super::event::Event;
use super::reply::Answer;
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked};

/// How many requests are begun in one turn of the connection's task, so that a peer that sends fast takes no one else's turn.
const TURN: usize = 256;

/// The calls of one connection's service.
///
/// `A` is what the service answers with: a reply, or an upgrade.
pub(super) struct Calls<'a, Io, C: Decoder, T, M, S, A> {
    engine: &'a mut Engine<Io, C, T, M>,
    service: S,
    /// What comes next. At most one of the two is chosen; a request is held back while input is paused.
    message: Option<M>,
    request: Option<C::Item>,
    /// The last was a message: when both are waiting, it is a request's turn.
    was_message: bool,
    in_flight: usize,
    turn: usize,
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

    /// Takes the next event, for which the service is ready; `None` when there will be no more. Everything is written before this is
    /// pending.
    #[inline]
    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event<C::Item, M>>> {
        loop {
            // What almost all requests are: one more in the buffer, and nothing else to look at. It is never stored on its way.
            if self.is_plain()
                && let Some(request) = self.engine.decode()
            {
                let is_ready = self.poll_service(cx);
                if is_ready == Poll::Ready(true) {
                    self.was_message = false;
                    self.begin_request();
                    return Poll::Ready(Some(Event::Request(request)));
                }
                self.request = Some(request);
                return is_ready.map(|_ended| None);
            }
            if let ControlFlow::Break(event) = ready!(self.poll_any_event(cx)) {
                return Poll::Ready(event);
            }
        }
    }

    /// Returns whether a request may be decoded and begun without a look at anything else.
    #[inline]
    fn is_plain(&self) -> bool {
        self.request.is_none()
            && self.turn < TURN
            && self.in_flight < self.engine.settings.in_flight
            && self.engine.is_plain()
    }

    /// Takes the next event whatever goes on; `Continue` when something has changed and all is to be looked at again.
    #[expect(clippy::type_complexity, reason = "an event, or none, or neither yet")]
    fn poll_any_event(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ControlFlow<Option<Event<C::Item, M>>>> {
        self.engine.heed_close();
        if self.engine.leaves(Leaves::Requests) {
            return Poll::Ready(ControlFlow::Break(None));
        }
        if self.is_full() {
            if self.engine.poll_beside(cx).is_ready() {
                return Poll::Ready(ControlFlow::Break(None));
            }
            return if self.is_full() {
                Poll::Pending
            } else {
                Poll::Ready(ControlFlow::Continue(()))
            };
        }
        if !self.has_at_hand() {
            self.look();
        }
        if !self.has_at_hand() {
            return if self.engine.is_ending() {
                Poll::Ready(ControlFlow::Break(None))
            } else {
                self.poll_more(cx).map(ControlFlow::Continue)
            };
        }
        if !ready!(self.poll_service(cx)) {
            return Poll::Ready(ControlFlow::Break(None));
        }
        if self.turn >= TURN {
            self.turn = 0;
            cx.waker().wake_by_ref();
            return self.wait_beside(cx).map(|()| ControlFlow::Break(None));
        }
        self.was_message = self.message.is_some();
        let event = if let Some(message) = self.message.take() {
            self.engine.begin_message(self.in_flight);
            self.count();
            Some(Event::Message(message))
        } else {
            // Input may have been paused while the service became ready.
            let request = self.request.take_if(|_| !self.engine.is_paused());
            request.map(|request| {
                self.begin_request();
                Event::Request(request)
            })
        };
        Poll::Ready(match event {
            Some(event) => ControlFlow::Break(Some(event)),
            None => ControlFlow::Continue(()),
        })
    }

    #[inline]
    fn begin_request(&mut self) {
        self.engine.begin_request();
        self.count();
    }

    #[inline]
    fn count(&mut self) {
        self.in_flight += 1;
        self.turn += 1;
    }

    fn has_at_hand(&self) -> bool {
        self.message.is_some() || (self.request.is_some() && !self.engine.is_paused())
    }

    fn is_full(&self) -> bool {
        self.in_flight + self.engine.waiting_replies() >= self.engine.settings.in_flight
    }

    /// Looks for a message, or for a request in what is buffered.
    fn look(&mut self) {
        if self.engine.is_ending() || self.engine.is_above_mark() {
            return;
        }
        if !self.was_message {
            self.message = self.engine.take_message();
            if self.message.is_some() {
                return;
            }
        }
        self.was_message = false;
        if self.request.is_none() && (!self.engine.is_paused() || self.engine.is_at_end_of_input())
        {
            self.request = self.engine.decode();
        }
    }

    /// Waits until there may be more at hand.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let polled = if self.engine.is_above_mark() {
            self.engine.poll_room(cx)
        } else if self.engine.is_paused() {
            let undelivered = self.request.is_some();
            self.engine.poll_paused(undelivered, cx)
        } else {
            self.engine.poll_input(self.in_flight, cx)
        };
        if polled.is_pending() {
            self.turn = 0;
        }
        polled
    }

    /// Has the service become ready. Ready with `false` when what is at hand is not to be begun any more.
    #[inline]
    fn poll_service(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        // Caught here, because requests before it may be in flight, and are answered.
        let polled = catch_unwind(AssertUnwindSafe(|| self.service.poll_ready(cx)));
        let ended = match polled {
            Ok(Poll::Ready(Ok(()))) => return Poll::Ready(true),
            Ok(Poll::Pending) => return self.wait_beside(cx).map(|()| false),
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

    /// Waits for something else than the peer. Ready when what is at hand is not to be begun any more.
    fn wait_beside(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let cut_off = self.engine.poll_beside(cx).is_ready();
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
            return self.engine.poll_beside(cx);
        }
        Poll::Pending
    }

    /// Waits beside a call. Ready when the connection must end without it.
    pub(super) fn poll_beside(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.engine.poll_beside(cx)
    }

    /// Runs the call that was begun last by itself, if it may: where replies keep their order, what comes after it waits for it.
    pub(super) fn begin_head(&mut self) -> bool {
        let is_only = self.in_flight == 1 && self.engine.waiting_replies() == 0;
        let may = is_only || self.engine.settings.order == Order::AsFinished;
        if may {
            self.engine.hold_replies();
        }
        may
    }

    /// Takes the result of the call that ran by itself, and lets those behind it go.
    #[inline]
    pub(super) fn finish_head(&mut self, result: Result<S::Response, BoxError>) {
        self.in_flight -= 1;
        let result = result.map(|response| response.into().into_reply());
        self.engine.reply_first(result);
    }

    /// Something of the user's panicked in between.
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
