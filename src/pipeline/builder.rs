use std::marker::PhantomData;
use std::sync::Arc;

use tokio_util::codec::Decoder;

use super::Pipeline;
use super::bounds::MakeCodec;
use super::engine::{ErrorPolicy, Order, Settings};
use super::farewell::Farewell;
use super::limits::Limits;
use super::maker::MakeEventService;
use super::peer::Peer;
use super::upgrade::NoUpgrade;
use crate::close::Linger;
use crate::deadline::Deadlines;
use crate::make::{MakeService, SharedService};

/// The items of the codecs that `F` makes.
type Request<F> = <<F as MakeCodec>::Codec as Decoder>::Item;

/// A pipeline that has no service yet. Created by [`Pipeline::new`].
///
/// Deadlines, limits and the farewell are set by methods of [`Pipeline`], so add a service first.
#[derive(Clone, Debug)]
#[must_use = "a pipeline needs a service"]
pub struct PipelineBuilder<F> {
    codec: F,
}

impl<F> PipelineBuilder<F> {
    pub(super) fn new(codec: F) -> Self {
        Self { codec }
    }

    /// Serves the requests of all connections with clones of one service, one clone for each
    /// request.
    ///
    /// `service` is `Clone`, and a [`Service`](tower_service::Service) of the codec's items. Its
    /// response converts into a [`Reply<T>`](super::Reply), and its error into a
    /// [`BoxError`](crate::BoxError).
    ///
    /// The clone's `poll_ready` is called only when its request has arrived, so idle connections
    /// hold no shared resource.
    ///
    /// If the codec encodes several types, as `LengthDelimitedCodec` and `BytesCodec` do, name the
    /// type of the replies, as in `.service::<Bytes, _>(service)`.
    pub fn service<T, K>(
        self,
        service: impl SharedService<Request<F>, Maker = K>, // takes requests; or use `make_service`
    ) -> Pipeline<F, K, T>
    where
        F: MakeCodec,
    {
        Pipeline::with(self.codec, service.into_maker())
    }

    /// Serves the requests of each connection with a service made for that connection. `make` is a
    /// service that takes the [`Peer`] and returns the connection's service.
    ///
    /// `make` runs in the connection's task. Output is written while `make` runs, so `make` can
    /// send a greeting of any length. If `make` fails, the connection closes. By default `make`
    /// must finish within [10 s](Deadlines::make_service).
    ///
    /// The connection's service is kept from one request to the next. If connections share a part
    /// of this service, such as `LoadShed` with a concurrency limit inside, put
    /// [`PerCall`](super::PerCall) around that whole part, so that an idle connection holds no
    /// permit that other connections need.
    #[doc(alias = "into_make_service")]
    #[doc(alias = "make_service_fn")]
    pub fn make_service<T, K>(
        self,
        make: impl MakeService<Peer<T>, Maker = K>, // or use `service` or `make_event_service`
    ) -> Pipeline<F, K, T> {
        Pipeline::with(self.codec, make.into_maker())
    }

    /// Serves each connection with a service that takes requests and messages. Otherwise this is
    /// like [`make_service`](Self::make_service). See [`Event`](super::Event).
    pub fn make_event_service<T, M, K>(
        self,
        make: impl MakeEventService<T, M, Maker = K>, // takes a `Peer<T, M>`
    ) -> Pipeline<F, K, T> {
        Pipeline::with(self.codec, make.into_maker())
    }
}

impl<F, K, T> Pipeline<F, K, T> {
    fn with(codec: F, maker: K) -> Self {
        let settings = Settings {
            limits: Limits::default(),
            deadlines: Deadlines::default(),
            linger: Linger::default(),
            policy: ErrorPolicy::Shutdown,
            in_flight: 1,
            order: Order::AsRequested,
            farewell: Farewell::none(),
        };
        Self {
            codec,
            maker,
            next: NoUpgrade,
            settings: Arc::new(settings),
            types: PhantomData,
        }
    }
}
