//! Runs several calls of one connection at the same time, with tokio-tower. No other file of the
//! library uses that crate.
//!
//! **tokio-tower holds the calls** that are handed over to it, polls them, and returns their
//! results, either in the order of the requests (`pipeline::Server`) or as the calls finish
//! (`multiplex::Server`). It does nothing else. Its input is [`Concurrent`], a stream of calls that
//! have *already begun*, and the service that it calls is [`Identity`], which returns the call
//! itself. If its input were requests, tokio-tower would call `poll_ready` for idle connections,
//! too.
//!
//! **tokio-tower never waits for the peer.** All such waits are in the engine, whose `poll_event`
//! also limits the calls in flight. tokio-tower polls no calls while its sink is not ready, so the
//! sink for the results is always ready. If the connection must close without waiting for the calls
//! that still run, flushing fails with [`Stop`], which ends tokio-tower's future. The engine stores
//! the reason for the end.
//!
//! **tokio-tower does not get most calls.** One call at a time runs in this file, as the *head*.
//! Most heads finish immediately. Every call that begins while the head runs is handed over to
//! tokio-tower, which allocates memory for each. If replies keep the order of the requests, a call
//! is also handed over if it begins while any other call runs or while a reply is waiting. With
//! this order, the engine holds back the replies to later requests until the head is done.
//!
//! `tests/tokio_tower_gaps.rs` shows the problems that this file works around. On its own,
//! tokio-tower never closes its transport, loses finished replies after a failure, starts requests
//! without limit, reserves capacity for idle connections, and does not notice a reset while the
//! service is not ready.

use std::convert::Infallible;
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
use crate::error::{BoxError, Panicked, caught};

/// Runs calls until there are no more events or the connection must close. Replies are sent in the
/// order of the requests.
pub(super) fn run_in_order<Io, C, T, M, S, A>(
    calls: Calls<'_, Io, C, T, M, S, A>,
) -> impl Future<Output = ()>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    // The result is dropped, because the engine stores the reason for the end.
    ::tokio_tower::pipeline::Server::new(Concurrent::new(calls), Identity).map(drop)
}

/// Runs calls as [`run_in_order`] does, but sends each reply when its call is done.
pub(super) fn run_as_finished<Io, C, T, M, S, A>(
    calls: Calls<'_, Io, C, T, M, S, A>,
) -> impl Future<Output = ()>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    // The result is dropped, because the engine stores the reason for the end.
    ::tokio_tower::multiplex::Server::new(Concurrent::new(calls), Identity).map(drop)
}

/// The calls in flight, as a transport for tokio-tower.
#[pin_project]
struct Concurrent<'a, Io, C: Decoder, T, M, S: Service<Event<C::Item, M>>, A> {
    calls: Calls<'a, Io, C, T, M, S, A>,
    /// The head: the call that this file polls itself. If replies keep the order of the requests,
    /// it is the oldest call, and the results of later calls wait for it.
    #[pin]
    head: Option<S::Future>,
    /// `true` while the head is started, polled, or dropped at its end. While this is `true`, a
    /// panic becomes the result of the head.
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

    /// Polls the head. Whenever there is no head, the call of the next event becomes the head, and
    /// is polled. Returns an event if its call cannot become the head, for example because there is
    /// a head already. Returns `None` when there are no more events.
    fn poll_head(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event<C::Item, M>>> {
        let mut this = self.project();
        loop {
            let mut is_busy = false;
            if let Some(head) = this.head.as_mut().as_pin_mut() {
                *this.in_head = true;
                let polled = head.poll(cx).map_err(Into::into);
                if polled.is_ready() {
                    // The call is dropped first, so that its resources are released before its
                    // reply is written.
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
                    // There are no more events, so wait for the head, as tokio-tower waits for its
                    // own calls. If the connection must end before the head is done, the replies
                    // that wait for the head are not sent.
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

/// An error that stops tokio-tower immediately, because a call that still runs must not keep a
/// closing connection open.
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
            // A single `caught` surrounds all calls, because a `caught` around each call would make
            // up a tenth of the instructions per request.
            let polled = caught(|| self.as_mut().poll_head(cx));
            let mut this = self.as_mut().project();
            match polled {
                Ok(polled) => break ready!(polled),
                Err(panicked) => {
                    // Dropping the head may panic, too; the first panic is enough.
                    drop(caught(|| this.head.set(None)));
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

    /// Always returns ready, because tokio-tower polls calls only while the sink is ready. The
    /// limit of calls in flight also limits the results that wait in the engine.
    fn poll_ready(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        Poll::Ready(Ok(()))
    }

    fn start_send(self: Pin<&mut Self>, result: Result<S::Response, BoxError>) -> Result<(), Stop> {
        self.project().calls.finish_call(result);
        Ok(())
    }

    /// Stops tokio-tower if the connection must close without waiting for the calls that still run.
    /// tokio-tower calls this in each iteration of its loop, after it has passed on all results.
    /// Until the stream of calls has ended, `poll_event` does the flushing. After that, tokio-tower
    /// no longer polls the stream, so `poll_over` does the flushing.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        let is_over = self.project().calls.poll_over(cx).is_ready();
        Poll::Ready(if is_over { Err(Stop) } else { Ok(()) })
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        self.poll_flush(cx)
    }
}

/// A call that runs beside others. A panic becomes its result, so the order of replies is kept.
#[pin_project(project = CallProjection)]
enum Call<F> {
    Begun(#[pin] F),
    /// `Some` if the call panicked when it began. `None` once the result has been returned.
    Done(Option<Panicked>),
}

impl<F> Call<F> {
    fn start(call: impl FnOnce() -> F) -> Self {
        match caught(call) {
            Ok(future) => Self::Begun(future),
            Err(panicked) => Self::Done(Some(panicked)),
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
            CallProjection::Begun(future) => caught(|| future.poll(cx).map_err(Into::into)),
            CallProjection::Done(panicked) => Ok(Poll::Ready(Err(panicked
                .take()
                .map_or_else(|| "polled after its end".into(), Into::into)))),
        };
        if matches!(polled, Ok(Poll::Pending)) {
            return Poll::Pending;
        }
        // The future is dropped here, so that a panic in its `Drop` becomes the result of this
        // call.
        let dropped = caught(|| self.set(Self::Done(None)));
        let done = polled.and_then(|done| dropped.map(|()| done));
        done.unwrap_or_else(|panicked| Poll::Ready(Err(panicked.into())))
            .map(Ok)
    }
}

/// The service that tokio-tower calls. Its request is a future, namely a [`Call`] that has already
/// begun. It returns this future as the response future.
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
