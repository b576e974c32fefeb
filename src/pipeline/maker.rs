//! Makers of a connection's service, as makers of services of events.

use std::convert::Infallible;

use tower_service::Service;

use super::event::Requests;
use super::peer::Peer;
use super::per_call::PerCall;
use crate::error::BoxError;
use crate::make::{ClonePerRequest, MakeEventsPerConnection, MakePerConnection, Maker};

mod sealed {
    use super::*;

    /// Makes the service of a connection's events.
    #[expect(
        unnameable_types,
        reason = "sealed: a service for all, or one for each"
    )]
    pub trait EventMaker<T> {
        type Message: Send + 'static;
        type Maker: Maker<Peer<T, Self::Message>>;
        type Service;

        /// Returns the maker, whose service may be one of requests alone.
        fn maker(&self) -> &Self::Maker;

        /// Turns what was made into a service of events.
        fn events(made: Made<T, Self>) -> Self::Service;
    }

    /// The service that the maker of an [`EventMaker`] makes.
    pub(super) type Made<T, K> =
        <<K as EventMaker<T>>::Maker as Maker<Peer<T, <K as EventMaker<T>>::Message>>>::Service;
}
pub(super) use sealed::EventMaker;

impl<T, S> EventMaker<T> for ClonePerRequest<S>
where
    S: Clone + Send + 'static,
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
    K: Service<Peer<T>> + Clone + Send + 'static,
    K::Error: Into<BoxError>,
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
    K: Service<Peer<T, M>> + Clone + Send + 'static,
    K::Error: Into<BoxError>,
    K::Future: Send + 'static,
{
    type Message = M;
    type Maker = MakePerConnection<K>;
    type Service = K::Response;

    fn maker(&self) -> &MakePerConnection<K> {
        self.of_any_target()
    }

    fn events(made: K::Response) -> Self::Service {
        made
    }
}
