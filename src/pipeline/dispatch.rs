//! The three ways to run the calls of one connection.
//!
//! Each way is a type, not a value. So a connection contains the future of only one way, and a
//! feature that needs requests to run one at a time can require this at compile time.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use tokio_util::codec::Decoder;
use tower_service::Service;

use super::bounds::{Codec, Events, Stream};
use super::calls::Calls;
use super::event::Event;
use super::reply::Answer;
use super::tokio_tower::{run_as_finished, run_in_order};
use crate::error::{Panicked, caught};

/// Runs one request at a time. This is the default. The next request begins when the previous reply
/// is encoded.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneAtATime;

/// Runs several requests at the same time. Replies are sent in the order of the requests. Selected
/// by [`Pipeline::in_flight`](super::Pipeline::in_flight).
#[derive(Clone, Copy, Debug, Default)]
pub struct InFlight;

/// Runs several requests at the same time. Replies are sent in the order in which the calls finish.
/// Selected by [`Pipeline::multiplexed`](super::Pipeline::multiplexed).
#[derive(Clone, Copy, Debug, Default)]
pub struct Multiplexed;

#[expect(
    unnameable_types,
    reason = "sealed: the ways of dispatch are these three"
)]
mod sealed {
    use super::*;

    /// A way to run calls one at a time.
    #[diagnostic::on_unimplemented(
        message = "`on_upgrade` needs a pipeline that runs one request at a time",
        label = "several requests run at the same time",
        note = "remove `in_flight` or `multiplexed`: with several requests in flight it is \
            unknown what follows the reply that upgrades"
    )]
    pub trait OneRequest {
        type Dispatch;
    }

    /// Runs calls until there are no more events, or the connection must close.
    pub trait Dispatch<Io, C: Decoder, T, M, S, A>: Send + Sync + 'static {
        #[expect(private_interfaces, reason = "sealed: nobody else names it")]
        fn run(calls: Calls<'_, Io, C, T, M, S, A>) -> impl Future<Output = ()> + Send;
    }
}
pub(super) use sealed::{Dispatch, OneRequest};

impl OneRequest for OneAtATime {
    type Dispatch = Self;
}

macro_rules! dispatch {
    ($name:ty, |$calls:ident| $run:expr) => {
        impl<Io, C, T, M, S, A> Dispatch<Io, C, T, M, S, A> for $name
        where
            Io: Stream + Send,
            C: Codec<T, Item: Send> + Send,
            T: Send,
            M: Send,
            S: Events<C::Item, M, A, Response: Send, Future: Send> + Send,
            A: Answer<T>,
        {
            #[expect(private_interfaces, reason = "sealed: nobody else names it")]
            fn run($calls: Calls<'_, Io, C, T, M, S, A>) -> impl Future<Output = ()> + Send {
                $run
            }
        }
    };
}

dispatch!(OneAtATime, |calls| Direct { calls, call: None });

dispatch!(InFlight, |calls| run_in_order(calls));
dispatch!(Multiplexed, |calls| run_as_finished(calls));

/// Runs one call after the other in a loop. No queue is needed, because only one call runs at a
/// time.
#[pin_project]
struct Direct<'a, Io, C: Decoder, T, M, S: Service<Event<C::Item, M>>, A> {
    calls: Calls<'a, Io, C, T, M, S, A>,
    #[pin]
    call: Option<S::Future>,
}

impl<Io, C, T, M, S, A> Future for Direct<'_, Io, C, T, M, S, A>
where
    Io: Stream,
    C: Codec<T>,
    S: Events<C::Item, M, A>,
    A: Answer<T>,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        loop {
            if let Some(call) = this.call.as_mut().as_pin_mut() {
                match call.poll(cx) {
                    Poll::Ready(result) => {
                        // The call is dropped first, so that its resources are released before its
                        // reply is written.
                        this.call.set(None);
                        this.calls.finish_call(result.map_err(Into::into));
                    }
                    Poll::Pending => {
                        ready!(this.calls.poll_io_beside_call(cx));
                        this.call.set(None);
                        return Poll::Ready(());
                    }
                }
            }
            match ready!(this.calls.poll_event(cx)) {
                Some(event) => this.call.set(Some(this.calls.call(event))),
                None => return Poll::Ready(()),
            }
        }
    }
}

/// Catches a panic of the inner future while that future is polled. Once the inner future has
/// completed or panicked, it is dropped and not polled again. A panic during this drop is caught,
/// too.
#[pin_project]
pub(super) struct CatchPanic<F>(#[pin] Option<F>);

impl<F> CatchPanic<F> {
    pub(super) fn new(future: F) -> Self {
        Self(Some(future))
    }
}

impl<F: Future> Future for CatchPanic<F> {
    type Output = Result<F::Output, Panicked>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut future = self.project().0;
        let polled = caught(|| {
            let future = future.as_mut().as_pin_mut();
            future.map_or(Poll::Pending, |future| future.poll(cx))
        });
        if matches!(polled, Ok(Poll::Pending)) {
            return Poll::Pending;
        }
        let dropped = caught(|| future.set(None));
        match polled.and_then(|done| dropped.map(|()| done)) {
            Ok(done) => done.map(Ok),
            Err(panicked) => Poll::Ready(Err(panicked)),
        }
    }
}
