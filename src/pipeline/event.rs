use std::convert::Infallible;
use std::task::{Context, Poll};

use tower_service::Service;

/// What a connection's service takes, if it takes more than requests: its peer's requests, and the messages of
/// the rest of the program.
///
/// Messages are sent by [`Peer::post`](super::Peer::post). They stand in one line with the requests: one at a time, or within the bound of
/// what is in flight; after the service's `poll_ready`; and with a reply, which is mostly none. When both are waiting they take turns.
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
/// // Says "tick" a second after each line, whatever comes in between.
/// let make = service_fn(|peer: Peer<Bytes, Tick>| async move {
///     Ok::<_, Infallible>(service_fn(move |event: Event<Bytes, Tick>| {
///         let peer = peer.clone();
///         async move {
///             Ok::<_, BoxError>(match event {
///                 Event::Request(_line) => {
///                     let _timer = peer.post_after(Duration::from_secs(1), Tick)?;
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
    /// The peer asks something.
    Request(R),
    /// Another part of the program, or a timer, has something to say.
    Message(M),
}

/// Adapts a service of requests to a service of [`Event`]s without messages: `M` is [`Infallible`].
#[derive(Clone, Debug)]
#[expect(
    unnameable_types,
    reason = "the service of a pipeline, which only the pipeline calls"
)]
pub struct Requests<S>(pub(super) S);

impl<R, S: Service<R>> Service<Event<R, Infallible>> for Requests<S> {
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
