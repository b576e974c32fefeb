use std::convert::Infallible;
use std::task::{Context, Poll};

use tower_service::Service;

/// A request from the peer, or a message from another part of the program.
///
/// A service that takes messages in addition to requests is a service of `Event`.
/// [`Peer::post`](super::Peer::post) sends a message. The service is called for a message as for a
/// request: after `poll_ready`, and within the limit of calls in flight. The response to a message
/// is sent to the peer, too; usually it is [`Reply::none`](super::Reply::none). If requests and
/// messages are both waiting, they take turns.
///
/// ```
/// use std::convert::Infallible;
/// use std::time::Duration;
/// use bytes::Bytes;
/// use tower::service_fn;
/// use tower_tcp::frame::Lines;
/// use tower_tcp::pipeline::Event;
/// use tower_tcp::{BoxError, Peer, Pipeline, Reply};
///
/// struct Tick;
///
/// // Sends "tick" a second after each line, even if other lines arrive in between. If more than
/// // 16 lines arrive within a second, the further lines get no "tick".
/// let make = service_fn(|peer: Peer<Bytes, Tick>| async move {
///     Ok::<_, Infallible>(service_fn(move |event: Event<Bytes, Tick>| {
///         let peer = peer.clone();
///         async move {
///             Ok::<_, BoxError>(match event {
///                 Event::Request(_line) => {
///                     // `post_after` fails during a drain, and if 16 timers are set (see
///                     // `Limits::messages`). That must not fail the request.
///                     let _timer = peer.post_after(Duration::from_secs(1), Tick);
///                     Reply::none()
///                 }
///                 Event::Message(Tick) => Reply::from(Bytes::from("tick")),
///             })
///         }
///     }))
/// });
/// let pipeline = Pipeline::new(Lines::default).make_event_service(make);
/// # drop(pipeline);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "message")]
#[doc(alias = "yield")]
#[doc(alias = "post")]
pub enum Event<R, M> {
    /// A request from the peer.
    Request(R),
    /// A message from another part of the program, or from a timer.
    Message(M),
}

/// Adapts a service of requests to a service of [`Event`]s without messages (`M` is
/// [`Infallible`]).
#[derive(Clone, Debug)]
#[expect(
    unnameable_types,
    reason = "the service of a pipeline, which only the pipeline calls"
)]
pub struct Requests<S>(pub(super) S);

impl<R, S: OfRequests<R>> Service<Event<R, Infallible>> for Requests<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, event: Event<R, Infallible>) -> S::Future {
        match event {
            Event::Request(request) => self.0.call(request),
            Event::Message(none) => match none {},
        }
    }
}

#[expect(unnameable_types, reason = "sealed: an alias of bounds")]
mod sealed {
    use super::Service;

    /// A service of requests.
    #[diagnostic::on_unimplemented(
        message = "expected a service of requests, `{R}`",
        label = "the make-service makes `{Self}`, which is not a `Service<{R}>`",
        note = "wrap a `Session` in `SessionService::new`, and a function in `tower::service_fn`; \
            a service that takes messages, too, is made by `make_event_service`"
    )]
    pub trait OfRequests<R>: Service<R> {}

    #[diagnostic::do_not_recommend]
    impl<S: Service<R>, R> OfRequests<R> for S {}
}
use sealed::OfRequests;
