//! Several calls of one connection at the same time, by tokio-tower. Everything that adapts it is
//! in this file.
//!
//! **tokio-tower keeps the calls** that are in flight, polls them, and gives their results back: in
//! the order of the requests (`pipeline::Server`) or as they finish (`multiplex::Server`). It does
//! nothing else. What it reads is [`Concurrent`], a stream of calls that are *begun already*, since
//! it would make its service ready for idle connections too; so its service is [`Identity`].
//!
//! **It is kept from waiting.** All waiting is in `Calls::poll_event`, which also bounds what is
//! begun. The sink is always ready; one that is not would keep calls from being polled. Its flush
//! is the moment to leave: the error [`Stop`] ends tokio-tower exactly when the connection closes
//! without the calls that still run. Why it closes is settled in the engine.
//!
//! **It is spared most calls.** One that is the only one in flight runs here, as the *head*, and
//! most are done at once; only those that begin beside one that is not are handed over, with an
//! allocation for each. Where replies have an order, the engine holds those of later requests until
//! the head is done.
//!
//! `tests/tokio_tower_gaps.rs` shows what is mended here: by itself tokio-tower never closes its
//! transport, loses finished replies behind a failure, starts requests without bound, reserves for
//! idle connections, and does not flush while the service is not ready.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_sink::Sink;
use futures_util::FutureExt;
use pin_project::pin_project;
use tokio_util::codec::Decoder;
use tower_service::Service;

use super::bounds::{Codec, Events, Stream};
use super::calls::Calls;
use super::event::Event;
use super::reply::Answer;
use crate::error::{BoxError, Panicked};

/// Runs calls until there are no more, or the connection must close; replies go out in the order of
/// the requests.
pub(super) fn run_in_order<Io, C, T, M, S, A>(
    calls: Calls<'_, Io, C, T, M, S, A>,
) -> impl Future<Output = ()>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    // Why it ended is settled in the engine.
    ::tokio_tower::pipeline::Server::new(Concurrent::new(calls), Identity).map(drop)
}

/// As [`run_in_order`], but replies go out as they finish.
pub(super) fn run_as_finished<Io, C, T, M, S, A>(
    calls: Calls<'_, Io, C, T, M, S, A>,
) -> impl Future<Output = ()>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    // Why it ended is settled in the engine.
    ::tokio_tower::multiplex::Server::new(Concurrent::new(calls), Identity).map(drop)
}

/// Calls in flight together: what tokio-tower takes for a transport.
#[pin_project]
struct Concurrent<'a, Io, C: Decoder, T, M, S: Service<Event<C::Item, M>>, A> {
    calls: Calls<'a, Io, C, T, M, S, A>,
    /// The call that runs here. Where replies keep the order of the requests it is the oldest, and the results of others wait for it.
    #[pin]
    head: Option<S::Future>,
    /// That call is being begun or polled: it is whose a panic is.
    in_head: bool,
}

impl<'a, Io, C, T, M, S, A> Concurrent<'a, Io, C, T, M, S, A>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    fn new(calls: Calls<'a, Io, C, T, M, S, A>) -> Self {
        Self {
            calls,
            head: None,
            in_head: false,
        }
    }

    /// Runs calls here as long as each is done at once. Ready with an event that is to run beside the one here, or at the end.
    fn poll_head(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event<C::Item, M>>> {
        let mut this = self.project();
        loop {
            let mut is_busy = false;
            if let Some(head) = this.head.as_mut().as_pin_mut() {
                *this.in_head = true;
                let polled = head.poll(cx).map_err(Into::into);
                if polled.is_ready() {
                    // Dropped first: what the call held is given back before its reply is written.
                    this.head.set(None);
                }
                *this.in_head = false;
                match polled {
                    Poll::Ready(result) => this.calls.finish_head(result),
                    Poll::Pending => is_busy = true,
                }
            }
            let Some(event) = ready!(this.calls.poll_event(cx)) else {
                if is_busy {
                    // It is waited for here, as tokio-tower waits for its own. If the connection must end without it, what was held behind
                    // it is dropped already.
                    ready!(this.calls.poll_io_beside_call(cx));
                    this.head.set(None);
                }
                return Poll::Ready(None);
            };
            if is_busy || !this.calls.begin_head() {
                return Poll::Ready(Some(event));
            }
            *this.in_head = true;
            this.head.set(Some(this.calls.call(event)));
            *this.in_head = false;
        }
    }
}

/// Tells tokio-tower to stop at once: the connection closes behind what has finished, and no call that still runs may hold it open.
#[derive(Debug, thiserror::Error)]
#[error("the pipeline is closed")]
struct Stop;

impl<Io, C, T, M, S, A> futures_core::Stream for Concurrent<'_, Io, C, T, M, S, A>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    type Item = Result<Call<S::Future>, Stop>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = loop {
            // Once around all of it: around each call it would cost a request a tenth of its instructions.
            let polled = catch_unwind(AssertUnwindSafe(|| self.as_mut().poll_head(cx)));
            let mut this = self.as_mut().project();
            match polled {
                Ok(polled) => break ready!(polled),
                Err(payload) => {
                    let panicked = Panicked::new(&*payload);
                    // It may panic as it is dropped, too, and one panic is enough.
                    drop(catch_unwind(AssertUnwindSafe(|| this.head.set(None))));
                    if std::mem::take(this.in_head) {
                        this.calls.finish_head(Err(panicked.into()));
                    } else {
                        this.calls.panicked(panicked);
                        break None;
                    }
                }
            }
        };
        let calls = self.project().calls;
        Poll::Ready(event.map(|event| Ok(Call::start(|| calls.call(event)))))
    }
}

impl<Io, C, T, M, S, A> Sink<Result<S::Response, BoxError>> for Concurrent<'_, Io, C, T, M, S, A>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    type Error = Stop;

    /// Always: what may pile up is bounded by what is in flight, and a sink that is not ready would keep calls from being polled.
    fn poll_ready(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        Poll::Ready(Ok(()))
    }

    fn start_send(self: Pin<&mut Self>, result: Result<S::Response, BoxError>) -> Result<(), Stop> {
        self.project().calls.finish_call(result);
        Ok(())
    }

    /// Called in every turn, after all finished calls were taken; that is the moment to leave when the connection closes.
    /// Flushing is left to `poll_event`, until the stream has ended and only this is called.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        let is_over = self.project().calls.poll_over(cx).is_ready();
        Poll::Ready(if is_over { Err(Stop) } else { Ok(()) })
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        self.poll_flush(cx)
    }
}

/// A call in flight with others, whose panics are errors like others: they have their place in the order.
#[pin_project(project = CallProjection)]
enum Call<F> {
    Begun(#[pin] F),
    /// It panicked as it was begun, or there is nothing more to say.
    Done(Option<Panicked>),
}

impl<F> Call<F> {
    fn start(call: impl FnOnce() -> F) -> Self {
        match catch_unwind(AssertUnwindSafe(call)) {
            Ok(future) => Self::Begun(future),
            Err(payload) => Self::Done(Some(Panicked::new(&*payload))),
        }
    }
}

impl<F, R, E> Future for Call<F>
where
    F: Future<Output = Result<R, E>>,
    E: Into<BoxError>,
{
    type Output = Result<Result<R, BoxError>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = match self.as_mut().project() {
            CallProjection::Begun(future) => {
                catch_unwind(AssertUnwindSafe(|| future.poll(cx).map_err(Into::into)))
            }
            CallProjection::Done(panicked) => Ok(Poll::Ready(Err(panicked
                .take()
                .map_or_else(|| "polled after its end".into(), Into::into)))),
        };
        if matches!(polled, Ok(Poll::Pending)) {
            return Poll::Pending;
        }
        // Dropped here, where its panic is still its own.
        let dropped = catch_unwind(AssertUnwindSafe(|| self.set(Self::Done(None))));
        let done = polled.and_then(|done| dropped.map(|()| done));
        done.unwrap_or_else(|payload| Poll::Ready(Err(Panicked::new(&*payload).into())))
            .map(Ok)
    }
}

/// The service tokio-tower calls: a started call is its own future.
struct Identity;

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
