//! A stream of started calls, and a sink of their results that is always ready.
//!
//! All waiting happens in [`Calls::poll_start`]: it writes, bounds what is in flight, makes the service ready once a request
//! is at hand, and decodes. So the three ways to run calls need only keep their order.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_sink::Sink;
use pin_project::pin_project;
use tokio_util::codec::Decoder;
use tower_service::Service;

use super::bounds::{Codec, Requests, Stream};
use super::engine::{Engine, Leaves};
use crate::end_reason::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked};

/// How many requests are begun in one turn of the connection's task, so that a peer that sends fast takes no one else's turn.
const TURN: usize = 256;

/// The calls of one connection's service.
pub(super) struct Calls<'a, Io, C: Decoder, T, S> {
    engine: &'a mut Engine<Io, C, T>,
    service: S,
    at_hand: Option<C::Item>,
    in_flight: usize,
    most: usize,
    turn: usize,
}

impl<Io, C: Decoder, T, S> Unpin for Calls<'_, Io, C, T, S> {}

impl<'a, Io, C, T, S> Calls<'a, Io, C, T, S>
where
    Io: Stream,
    C: Codec<T>,
    S: Requests<C::Item, T>,
{
    pub(super) fn new(engine: &'a mut Engine<Io, C, T>, service: S) -> Self {
        Self {
            most: engine.settings.in_flight,
            engine,
            service,
            at_hand: None,
            in_flight: 0,
            turn: 0,
        }
    }

    /// Starts the next call; `None` when there will be no more. Everything is written before this is pending.
    pub(super) fn poll_start<F>(
        &mut self,
        start: impl FnOnce(&mut S, C::Item) -> F,
        cx: &mut Context<'_>,
    ) -> Poll<Option<F>> {
        loop {
            if self.engine.leaves(Leaves::Requests) {
                self.at_hand = None;
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
            if self.at_hand.is_none() {
                ready!(self.poll_request(cx));
                if self.at_hand.is_none() {
                    return Poll::Ready(None);
                }
            }
            match self.service.poll_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(err)) => {
                    self.at_hand = None;
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
            let Some(request) = self.at_hand.take() else {
                continue;
            };
            self.engine.count_request();
            self.in_flight += 1;
            return Poll::Ready(Some(start(&mut self.service, request)));
        }
    }

    fn is_full(&self) -> bool {
        self.in_flight + self.engine.waiting_replies() >= self.most
    }

    /// Waits for a request; there is none at hand afterwards if there will be no more.
    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.engine.is_ending() {
            if self.engine.is_above_mark() {
                self.turn = 0;
                ready!(self.engine.poll_room(cx));
                continue;
            }
            self.at_hand = self.engine.decode();
            if self.at_hand.is_some() {
                break;
            }
            if self.engine.poll_input(self.in_flight, cx).is_pending() {
                self.turn = 0;
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// Waits for something else than the peer. Ready when the request at hand is not to be begun any more.
    fn wait_beside(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let cut_off = self.engine.poll_beside(cx).is_ready();
        if cut_off || self.engine.leaves(Leaves::Requests) {
            self.at_hand = None;
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
        self.engine.reply(result.map(Into::into));
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

impl<Io, C, T, S> futures_core::Stream for Calls<'_, Io, C, T, S>
where
    Io: Stream,
    C: Codec<T>,
    S: Requests<C::Item, T>,
{
    type Item = Result<Call<S::Future>, Closed>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let start = |service: &mut S, request| Call::start(|| service.call(request));
        self.poll_start(start, cx).map(|call| call.map(Ok))
    }
}

impl<Io, C, T, S> Sink<Result<S::Response, BoxError>> for Calls<'_, Io, C, T, S>
where
    Io: Stream,
    C: Codec<T>,
    S: Requests<C::Item, T>,
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
