//! A stream of started calls, and a sink of their results that is always ready.
//!
//! All waiting happens in [`Calls::poll_start`]: it writes, bounds what is in flight, makes the service ready once a request
//! is at hand, and decodes. So the three ways to run calls need only keep their order.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_sink::Sink;
use pin_project::pin_project;
use tokio_util::codec::Decoder;
use tower_service::Service;

use super::bounds::{Codec, Events, Stream};
use super::engine::{Engine, Leaves};
use super::event::Event;
use super::takeover::Answer;
use crate::end_reason::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked};

/// How many requests are begun in one turn of the connection's task, so that a peer that sends fast takes no one else's turn.
const TURN: usize = 256;

/// The calls of one connection's service.
///
/// `A` is what the service answers with: a reply, or a takeover.
pub(super) struct Calls<'a, Io, C: Decoder, T, M, S, A> {
    engine: &'a mut Engine<Io, C, T, M>,
    service: S,
    /// What comes next. At most one of the two is chosen; a request is held back while input is paused.
    message: Option<M>,
    request: Option<C::Item>,
    /// The last was a message: when both are waiting, it is a request's turn.
    was_message: bool,
    in_flight: usize,
    most: usize,
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
            most: engine.settings.in_flight,
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

    /// Starts the next call; `None` when there will be no more. Everything is written before this is pending.
    pub(super) fn poll_start<F>(
        &mut self,
        start: impl FnOnce(&mut S, Event<C::Item, M>) -> F,
        cx: &mut Context<'_>,
    ) -> Poll<Option<F>> {
        loop {
            self.engine.heed_close();
            if self.engine.leaves(Leaves::Requests) {
                return Poll::Ready(None);
            }
            if self.is_full() {
                if self.engine.poll_beside(cx).is_ready() {
                    return Poll::Ready(None);
                }
                if self.is_full() {
                    return Poll::Pending;
                }
                continue;
            }
            if !self.has_at_hand() {
                ready!(self.poll_at_hand(cx));
                if !self.has_at_hand() {
                    if self.engine.is_ending() {
                        return Poll::Ready(None);
                    }
                    // Input was paused just now.
                    continue;
                }
            }
            match self.service.poll_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(err)) => {
                    let ended = ConnectionEnded::caused(EndReason::ServiceNotReady, err);
                    self.engine.end(ended, Leaves::Requests);
                    return Poll::Ready(None);
                }
                Poll::Pending => return self.wait_beside(cx).map(|()| None),
            }
            self.turn += 1;
            if self.turn > TURN {
                self.turn = 0;
                cx.waker().wake_by_ref();
                return self.wait_beside(cx).map(|()| None);
            }
            let Some(event) = self.take_at_hand() else {
                continue;
            };
            self.in_flight += 1;
            return Poll::Ready(Some(start(&mut self.service, event)));
        }
    }

    fn has_at_hand(&self) -> bool {
        self.message.is_some() || (self.request.is_some() && !self.engine.is_paused())
    }

    fn take_at_hand(&mut self) -> Option<Event<C::Item, M>> {
        self.was_message = self.message.is_some();
        if let Some(message) = self.message.take() {
            self.engine.begin_message(self.in_flight);
            return Some(Event::Message(message));
        }
        if self.engine.is_paused() {
            return None;
        }
        let request = self.request.take()?;
        self.engine.begin_request();
        Some(Event::Request(request))
    }

    fn is_full(&self) -> bool {
        self.in_flight + self.engine.waiting_replies() >= self.most
    }

    /// Waits for a message or a request to be at hand, or the end of input.
    fn poll_at_hand(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.engine.is_ending() {
            if self.engine.is_above_mark() {
                self.turn = 0;
                ready!(self.engine.poll_room(cx));
                continue;
            }
            if !self.was_message {
                self.message = self.engine.take_message();
                if self.message.is_some() {
                    break;
                }
            }
            let paused = self.engine.is_paused();
            if self.request.is_none() && (!paused || self.engine.is_at_end_of_input()) {
                self.request = self.engine.decode();
            }
            if self.has_at_hand() {
                break;
            }
            self.was_message = false;
            let waited = if paused {
                let undelivered = self.request.is_some();
                self.engine.poll_paused(undelivered, cx)
            } else {
                self.engine.poll_input(self.in_flight, cx)
            };
            if waited.is_pending() {
                self.turn = 0;
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// Waits for something else than the peer. Ready when what is at hand is not to be begun any more.
    fn wait_beside(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let cut_off = self.engine.poll_beside(cx).is_ready();
        if cut_off || self.engine.leaves(Leaves::Requests) {
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// Waits beside a call. Ready when the connection must end without it.
    pub(super) fn poll_beside(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.engine.poll_beside(cx)
    }

    /// Takes the result of a call.
    #[inline]
    pub(super) fn finish_call(&mut self, result: Result<S::Response, BoxError>) {
        self.in_flight -= 1;
        let result = result.map(|response| response.into().into_reply());
        self.engine.reply(result);
    }
}

/// A call in flight with others, whose panics are errors like others: they have their place in the order.
#[pin_project(project = CallProjection)]
pub(super) enum Call<F> {
    Begun(#[pin] F),
    Panicked(Option<Panicked>),
}

impl<F> Call<F> {
    fn start(call: impl FnOnce() -> F) -> Self {
        match catch_unwind(AssertUnwindSafe(call)) {
            Ok(future) => Self::Begun(future),
            Err(payload) => Self::Panicked(Some(Panicked::new(&*payload))),
        }
    }
}

impl<F, R, E> Future for Call<F>
where
    F: Future<Output = Result<R, E>>,
    E: Into<BoxError>,
{
    type Output = Result<Result<R, BoxError>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = match self.project() {
            CallProjection::Begun(future) => {
                catch_unwind(AssertUnwindSafe(|| future.poll(cx).map_err(Into::into)))
                    .unwrap_or_else(|payload| Poll::Ready(Err(Panicked::new(&*payload).into())))
            }
            CallProjection::Panicked(panicked) => Poll::Ready(Err(panicked
                .take()
                .map_or_else(|| "polled after its end".into(), Into::into))),
        };
        polled.map(Ok)
    }
}

/// The service tokio-tower calls: a started call is its own future.
pub(super) struct Identity;

impl<C: Future<Output = Result<R, Infallible>>, R> Service<C> for Identity {
    type Response = R;
    type Error = Infallible;
    type Future = C;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: C) -> C {
        call
    }
}

/// Tells tokio-tower to stop at once: the connection closes behind what has finished, and no call that still runs may hold it open.
#[derive(Debug, thiserror::Error)]
#[error("the pipeline is closed")]
pub(super) struct Closed;

impl<Io, C, T, M, S, A> futures_core::Stream for Calls<'_, Io, C, T, M, S, A>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    type Item = Result<Call<S::Future>, Closed>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let start = |service: &mut S, event| Call::start(|| service.call(event));
        self.poll_start(start, cx).map(|call| call.map(Ok))
    }
}

impl<Io, C, T, M, S, A> Sink<Result<S::Response, BoxError>> for Calls<'_, Io, C, T, M, S, A>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    type Error = Closed;

    /// Always: what may pile up is bounded by what is in flight, and a sink that is not ready would keep calls from being polled.
    fn poll_ready(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        Poll::Ready(Ok(()))
    }

    fn start_send(
        mut self: Pin<&mut Self>,
        result: Result<S::Response, BoxError>,
    ) -> Result<(), Closed> {
        self.finish_call(result);
        Ok(())
    }

    /// Called in every turn, after all finished calls were taken; that is the moment to leave when the connection closes.
    /// Flushing is left to `poll_start`, until the stream has ended and only this is called.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.engine.leaves(Leaves::Calls) {
            return Poll::Ready(Err(Closed));
        }
        if self.engine.is_ending() && self.engine.poll_beside(cx).is_ready() {
            return Poll::Ready(Err(Closed));
        }
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        self.poll_flush(cx)
    }
}
