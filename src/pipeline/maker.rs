//! Adapts the makers of a connection's service, so that they make services of events.

use std::convert::Infallible;

use tower_service::Service;

use super::event::Requests;
use super::peer::Peer;
use super::per_call::PerCall;
use crate::error::ServiceError;
use crate::make::{
    CloneForConnection, CloneForRequest, ClonePerRequest, Known, MakeEventsPerConnection,
    MakePerConnection, Maker,
};

#[expect(unnameable_types, reason = "sealed: makers of services")]
mod sealed {
    use super::*;

    /// A make-service whose services take requests and messages. It converts into `Self::Maker`.
    #[diagnostic::on_unimplemented(
        message = "expected a service that makes services of events, of `Peer<{T}, {M}>`",
        label = "not a `Service<Peer<{T}, {M}>>`",
        note = "a make-service is `service_fn(|peer: Peer<Frame, Message>| ..)`; a service of \
            requests is given to `service`"
    )]
    pub trait MakeEventService<T, M> {
        type Maker;

        fn into_maker(self) -> Self::Maker;
    }

    impl<K, T, M> MakeEventService<T, M> for K
    where
        K: Service<Peer<T, M>>,
    {
        type Maker = <K::Future as Known<MakeEventsPerConnection<K, M>>>::Type;

        fn into_maker(self) -> MakeEventsPerConnection<K, M> {
            MakeEventsPerConnection::new(self)
        }
    }

    /// Makes the service of a connection's events.
    pub trait EventMaker<T> {
        type Message: Send + 'static;
        type Maker: Maker<Peer<T, Self::Message>>;
        type Service;

        /// Returns the maker of the service. The made service may take only requests and no
        /// messages, so it must be passed to [`events`](Self::events).
        fn maker(&self) -> &Self::Maker;

        /// Adapts the made service to a service of events.
        fn events(made: Made<T, Self>) -> Self::Service;
    }

    /// The service that the [`maker`](EventMaker::maker) of `K` makes, before
    /// [`events`](EventMaker::events) adapts it.
    pub(super) type Made<T, K> =
        <<K as EventMaker<T>>::Maker as Maker<Peer<T, <K as EventMaker<T>>::Message>>>::Service;
}
pub(super) use sealed::{EventMaker, MakeEventService};

impl<T, S> EventMaker<T> for ClonePerRequest<S>
where
    S: CloneForRequest + Send + 'static,
{
    type Message = Infallible;
    type Maker = Self;
    type Service = Requests<PerCall<S>>;

    fn maker(&self) -> &Self {
        self
    }

    fn events(service: S) -> Self::Service {
        Requests(PerCall::new(service))
    }
}

impl<T, K> EventMaker<T> for MakePerConnection<K>
where
    T: Send + 'static,
    K: Service<Peer<T>> + CloneForConnection + Send + 'static,
    K::Error: ServiceError,
    K::Future: Send + 'static,
{
    type Message = Infallible;
    type Maker = Self;
    type Service = Requests<K::Response>;

    fn maker(&self) -> &Self {
        self
    }

    fn events(made: K::Response) -> Self::Service {
        Requests(made)
    }
}

impl<T, M, K> EventMaker<T> for MakeEventsPerConnection<K, M>
where
    T: Send + 'static,
    M: Send + 'static,
    K: Service<Peer<T, M>> + CloneForConnection + Send + 'static,
    K::Error: ServiceError,
    K::Future: Send + 'static,
{
    type Message = M;
    type Maker = MakePerConnection<K>;
    type Service = K::Response;

    fn maker(&self) -> &MakePerConnection<K> {
        self.without_messages()
    }

    fn events(made: K::Response) -> Self::Service {
        made
    }
}
