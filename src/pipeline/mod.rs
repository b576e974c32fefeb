//! Requests and replies over one connection.
//!
//! A [`Pipeline`] is the connection service for framed protocols. For each connection it makes a
//! codec and a service for requests. It runs the service's calls in one of three ways
//! ([`OneAtATime`], [`InFlight`], [`Multiplexed`]) until there are no more requests, and then
//! closes the connection.
//!
//! # Order
//!
//! The service gets requests in the order in which they arrived. `poll_ready` is called only when a
//! request or a message has arrived. Replies are sent in the order of the requests, or, with
//! [`Multiplexed`], as they finish. If decoding fails, the requests that were decoded before the
//! failure are still answered, within the deadline
//! [`last_calls`](crate::deadline::Deadlines::last_calls). If a failed call, a failed encoding or a
//! closing reply closes the connection, finished replies to earlier requests are still sent. With
//! [`Multiplexed`], all finished replies are still sent. Calls that still run are dropped.
//!
//! # Errors
//!
//! If a call of the service fails, the connection closes gracefully, with the reason
//! [`ServiceError`](crate::EndReason::ServiceError). Earlier replies are still sent. If
//! [`Pipeline::shutdown_on_error`] is off, the error is logged instead, the failed request gets no
//! reply, and the connection continues. Even then, an error from inside a [`ShutdownOnErrorLayer`]
//! closes the connection. An error of `poll_ready`, of the codec or of the make-service always ends
//! the connection, and so does a panic in one of these or in a call. None of these failures affects
//! other connections.
//!
//! An error of a call or of the make-service chooses another reason if it is a
//! [`ConnectionEnded`](crate::ConnectionEnded), or has one among its causes. Such an error ends the
//! connection even if `shutdown_on_error` is off. For a request that breaks the protocol, return a
//! `ConnectionEnded` with the reason [`CodecError`](crate::EndReason::CodecError). This reason is
//! counted as the peer's fault. It is not logged as a warning, because otherwise any client could
//! fill the log with warnings.
//!
//! ```
//! use bytes::Bytes;
//! use tower::service_fn;
//! use tower_tcp::frame::Lines;
//! use tower_tcp::{BoxError, ConnectionEnded, EndReason, Pipeline};
//!
//! let greeted = service_fn(|line: Bytes| async move {
//!     if !line.starts_with(b"HELO ") {
//!         let ended = ConnectionEnded::new(EndReason::CodecError, "a line before HELO");
//!         return Err(BoxError::from(ended));
//!     }
//!     Ok(line)
//! });
//! let pipeline = Pipeline::new(Lines::default).service(greeted);
//! # fn infer<F, K>(_: Pipeline<F, K, Bytes>) {}
//! # infer(pipeline);
//! ```
//!
//! If the protocol answers bad input, let the decoder return bad input as an item, for example as
//! the `Err` of a `Result<Request, ProtocolError>`, as in the `redis` example. If the decoder fails
//! instead, no further input is decoded.
//!
//! To turn a service's error into a reply, put tower's `map_result` or `then` around the service.
//!
//! ```
//! use bytes::Bytes;
//! use tower::{ServiceBuilder, service_fn};
//! use tower_tcp::frame::Lines;
//! use tower_tcp::{BoxError, Pipeline};
//!
//! let parse = service_fn(|line: Bytes| async move {
//!     let number: i64 = std::str::from_utf8(&line)?.parse()?;
//!     Ok::<_, BoxError>(Bytes::from((number + 1).to_string()))
//! });
//! let apologise = ServiceBuilder::new()
//!     .map_result(|result: Result<Bytes, BoxError>| {
//!         result.or_else(|err| Ok::<_, BoxError>(format!("500 {err}").into()))
//!     })
//!     .service(parse);
//! let pipeline = Pipeline::new(Lines::default).service(apologise);
//! # fn infer<F, K>(_: Pipeline<F, K, Bytes>) {}
//! # infer(pipeline);
//! ```
//!
//! # More than requests and replies
//!
//! A make-service receives a [`Peer`], a handle through which any part of the program can use the
//! connection. With this handle the program can send frames at any time (limited by
//! [`Watermarks`]), pause input, and await the connection's end. It can also send messages to the
//! service and set timers. Messages and requests take turns ([`Event`]). An [`OnConnectLayer`]
//! greets peers or rejects them, and a [`Pipeline::farewell`] is the last frame of a connection
//! that the server ends. All of this works with each of the three ways to run calls, over any
//! stream.
//!
//! Two features need requests to run one at a time, because otherwise later requests may already be
//! decoded when a reply is sent:
//!
//! - A codec can change its mode when it encodes a frame. Buffered input is then decoded in the new
//!   mode (for example after the command `DATA` in the `smtp` example).
//! - Another service can take over the stream, together with the input that is already buffered:
//!   [`Pipeline::on_upgrade`].
//!
//! # Sessions
//!
//! To keep state between the requests of a connection, implement [`Session`]. Its calls run one
//! after the other and take `&mut self`, so the state needs no lock. A make-service wraps the
//! session in a [`SessionService`] and returns that service, alone or within layers.
//!
//! # Layers
//!
//! [`PipelineBuilder::service`] clones its service for each request, so an idle connection holds no
//! shared resource, such as a permit. [`PipelineBuilder::make_service`] makes one service for each
//! connection and keeps it. That service need not be `Clone`; only the make-service is cloned. If
//! connections share a part of the service, put [`PerCall`] around that part, so that an idle
//! connection reserves none of the part's capacity. [`layers`](crate::layers) describes how each of
//! tower's layers behaves in a pipeline.

mod bounds;
mod buffer;
mod builder;
mod calls;
mod clock;
mod dispatch;
mod engine;
mod event;
mod farewell;
mod limits;
mod maker;
mod on_connect;
mod peer;
mod per_call;
mod reject;
mod reply;
mod requests_only;
mod serve;
mod session;
mod shutdown_on_error;
mod tokio_tower;
mod upgrade;
mod watermarks;

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::close::Linger;
use crate::connection::ConnectionInfo;
use crate::deadline::Deadlines;
use crate::end::EndReason;
use bounds::MakeCodec;
use dispatch::OneRequest;
use engine::{ErrorPolicy, Order, Settings};
use farewell::Farewell;
use upgrade::WithoutUpgrade;

pub use builder::PipelineBuilder;
pub use dispatch::{InFlight, Multiplexed, OneAtATime};
pub use event::Event;
pub use limits::Limits;
pub use on_connect::{OnConnect, OnConnectFuture, OnConnectLayer};
pub use peer::{Buffered, Closed, Crossing, Crossings, Peer, Timer, TrySendError};
pub(crate) use peer::{Merge, Run, TooLate};
pub use per_call::PerCall;
pub use reject::Reject;
pub use reply::{Reply, Upgrade};
pub use requests_only::{Beneath, RequestsOnly, RequestsOnlyFuture, RequestsOnlyLayer};
pub use serve::PipelineFuture;
pub use session::{Session, SessionFuture, SessionService};
pub use shutdown_on_error::{
    Shutdown, ShutdownOnError, ShutdownOnErrorFuture, ShutdownOnErrorLayer,
};
pub use upgrade::{NoUpgrade, OnUpgrade};
pub use watermarks::{InvalidWatermarks, Watermarks};

/// The connection service for framed protocols. See the [module docs](self), and
/// [`layers`](crate::layers) for the use of tower's layers.
///
/// `F` makes codecs, and `K` makes services. `T` is the type of outgoing frames, `D` the way to run
/// requests, and `N` the service that may take over the stream.
pub struct Pipeline<F, K, T, D = OneAtATime, N = NoUpgrade> {
    codec: F,
    maker: K,
    next: N,
    settings: Arc<Settings<Farewell<T>>>,
    types: PhantomData<fn() -> (T, D)>,
}

impl<F> Pipeline<F, (), (), OneAtATime> {
    /// Creates a builder for a pipeline.
    ///
    /// `codec` is a function without arguments, such as `Lines::default`. It is called once for
    /// each connection, and returns the connection's codec, a
    /// [`Decoder`](tokio_util::codec::Decoder).
    #[expect(
        clippy::new_ret_no_self,
        reason = "the builder has no service yet, and so no frame type"
    )]
    pub fn new<M>(codec: M) -> PipelineBuilder<F>
    where
        M: MakeCodec<Make = F>, // a function that returns a codec: `Fn() -> C`
    {
        PipelineBuilder::new(codec.into_make())
    }
}

impl<F, K, T, D, N> Pipeline<F, K, T, D, N> {
    /// Sets the size limits and queue lengths of each connection. [`Limits`] states the defaults.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        Arc::make_mut(&mut self.settings).limits = limits;
        self
    }

    /// Sets the deadlines of each connection. [`Deadlines`] states the defaults.
    #[must_use]
    pub fn deadlines(mut self, deadlines: Deadlines) -> Self {
        let settings = Arc::make_mut(&mut self.settings);
        settings.deadlines = deadlines;
        settings.linger = settings.linger.with_deadlines(&deadlines);
        self
    }

    /// Sets the limits of the graceful close at the end of each connection. [`Linger`] states the
    /// defaults.
    #[must_use]
    pub fn linger(mut self, linger: Linger) -> Self {
        let settings = Arc::make_mut(&mut self.settings);
        settings.linger = linger.with_deadlines(&settings.deadlines);
        self
    }

    /// Sets whether a failed call of the service ends the connection.
    ///
    /// Default: `true`. Why: a failed service may have left its connection in an unexpected state,
    /// and the close tells a waiting peer that there will be no reply.
    ///
    /// A panic, a [`ConnectionEnded`](crate::ConnectionEnded), and an error from inside a
    /// [`ShutdownOnErrorLayer`] end the connection in any case.
    #[must_use]
    pub fn shutdown_on_error(mut self, shutdown: bool) -> Self {
        Arc::make_mut(&mut self.settings).policy = if shutdown {
            ErrorPolicy::Shutdown
        } else {
            ErrorPolicy::Continue
        };
        self
    }

    /// Sets the farewell: the last frame to a peer whose connection the server ends without an
    /// error. In SMTP it is the reply 421, and in MQTT a `DISCONNECT`.
    ///
    /// `make` takes information about the connection and the reason for its end. It returns a
    /// frame, or `None` to close without a frame. It is called once for a connection that ends
    ///
    /// - in a drain ([`Drained`](EndReason::Drained)),
    /// - at its [maximum age](Deadlines::max_age) ([`MaxAge`](EndReason::MaxAge)),
    /// - because the peer was silent or sent too slowly ([`IdleTimeout`](EndReason::IdleTimeout),
    ///   [`FirstByteTimeout`](EndReason::FirstByteTimeout),
    ///   [`FrameTimeout`](EndReason::FrameTimeout), [`SlowSender`](EndReason::SlowSender)),
    /// - because its service was not made in time
    ///   ([`MakeServiceError`](EndReason::MakeServiceError)),
    /// - by [`LiveConnection::close`](crate::LiveConnection::close)
    ///   ([`ServiceClosed`](EndReason::ServiceClosed)),
    /// - before it is served, by [`reject`](Self::reject).
    ///
    /// The farewell is sent after all replies and all pushed frames, and nothing is sent after it.
    /// So the peer cannot mistake the farewell for the reply to a request that the service has
    /// begun to handle. If the peer does not take the farewell, the connection is cut off at the
    /// [write deadline](Deadlines::write).
    ///
    /// There is no farewell after a [closing reply](Reply::close) or [`Peer::close`], because the
    /// code that closes can send a last frame itself. There is also none after an error of the peer
    /// or of the service, or after an upgrade. Lastly, there is none if the peer has finished
    /// sending, if pending requests are dropped at the [`last_calls`](Deadlines::last_calls)
    /// deadline, or if the connection is aborted, for example at the shutdown deadline.
    ///
    /// A panic in `make` ends only its own connection.
    ///
    /// Default: no frame. Why: only the protocol defines such a frame.
    ///
    /// ```
    /// use std::convert::Infallible;
    /// use bytes::Bytes;
    /// use tower::service_fn;
    /// use tower_tcp::frame::Lines;
    /// use tower_tcp::{EndReason, Pipeline};
    ///
    /// let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    /// let pipeline = Pipeline::new(Lines::crlf)
    ///     .service(echo)
    ///     .farewell(|_info, reason| match reason {
    ///         EndReason::IdleTimeout => Bytes::from("421 Timeout, closing"),
    ///         _ => Bytes::from("421 Service not available, closing"),
    ///     });
    /// # drop(pipeline);
    /// ```
    #[must_use]
    #[doc(alias = "goodbye")]
    #[doc(alias = "disconnect")]
    #[doc(alias = "last_word")]
    pub fn farewell<W: Into<Option<T>>>(
        mut self,
        make: impl Fn(&ConnectionInfo, EndReason) -> W + Send + Sync + 'static,
    ) -> Self {
        Arc::make_mut(&mut self.settings).farewell = Farewell::new(make);
        self
    }

    /// Returns a connection service that serves no requests: it sends each peer the
    /// [farewell](Self::farewell), and closes the connection.
    ///
    /// Use it as the `overflow` service of a
    /// [`ConnectionLimit`](crate::admit::ConnectionLimitLayer::overflow), of an
    /// [`AddressFilter`](crate::admit::AddressFilter::overflow), or of `PerClient`. The farewell's
    /// function then gets the reason for the rejection, such as
    /// [`LimitExceeded`](EndReason::LimitExceeded). Elsewhere the reason is
    /// [`Rejected`](EndReason::Rejected), unless [another one](crate::Connection::set_end_reason)
    /// is set.
    ///
    /// ```
    /// use std::convert::Infallible;
    /// use bytes::Bytes;
    /// use tower::{ServiceBuilder, service_fn};
    /// use tower_tcp::admit::ConnectionLimit;
    /// use tower_tcp::frame::Lines;
    /// use tower_tcp::{EndReason, Pipeline};
    ///
    /// let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    /// let pipeline = Pipeline::new(Lines::crlf)
    ///     .service(echo)
    ///     .farewell(|_info, reason| match reason {
    ///         EndReason::LimitExceeded => Bytes::from("421 Too many connections"),
    ///         _ => Bytes::from("421 Service not available, closing"),
    ///     });
    /// let limit = ConnectionLimit::new(1000);
    /// let stack = ServiceBuilder::new()
    ///     .layer(limit.layer().overflow(pipeline.reject()))
    ///     .service(pipeline);
    /// # drop(stack);
    /// ```
    pub fn reject(&self) -> Reject<F, T>
    where
        F: Clone,
    {
        Reject::new(self.codec.clone(), Arc::clone(&self.settings))
    }
}

impl<F, K, T, D> Pipeline<F, K, T, D> {
    /// Sets the service that takes over the stream after a [`Reply::upgrade`]. It can be any
    /// service of a `Connection<Rewind<Io>>`, such as a raw service (one that reads and writes the
    /// stream itself), or another pipeline behind a TLS hook (STARTTLS). The stream first yields
    /// the input that the pipeline has not decoded.
    ///
    /// The connection keeps its permit and its span, and can still be drained, closed and aborted.
    /// Its end is reported once, when the next service is done. Earlier replies and pushed frames
    /// are written before the upgrade. Messages that wait for the pipeline's service are dropped.
    /// The pipeline's [`Peer`] handles can still close the connection and await its end, but can no
    /// longer send.
    ///
    /// Requests must run one at a time, because otherwise later requests may already be decoded
    /// when the reply is sent. The response of the pipeline's service is an [`Upgrade`], or a type
    /// that converts into one: a [`Reply`], a frame, an `Option` or a `Vec` of frames. A service
    /// whose response is an `Upgrade` does not compile in a pipeline without `on_upgrade`.
    ///
    /// `next` is cloned for each connection. The clone is polled for readiness at the upgrade. The
    /// deadline of a make-service, [10 s](Deadlines::make_service) by default, applies to this
    /// wait, too.
    ///
    /// The reply to a message can upgrade, too. A decoded request may then still wait, because of a
    /// [pause](Peer::pause_input) or because the service was not ready for it. The upgrade drops
    /// that request.
    ///
    /// ```
    /// use bytes::Bytes;
    /// use tokio::io::{AsyncReadExt, AsyncWriteExt};
    /// use tower::service_fn;
    /// use tower_tcp::bind::Socket;
    /// use tower_tcp::frame::Lines;
    /// use tower_tcp::pipeline::Upgrade;
    /// use tower_tcp::{BoxError, Connection, Pipeline, Reply, Rewind, Server};
    ///
    /// # async fn run() -> Result<(), tower_tcp::Error> {
    /// let lines = service_fn(|line: Bytes| async move {
    ///     Ok::<Upgrade<Bytes>, BoxError>(match &*line {
    ///         b"RAW" => Reply::from(Bytes::from("go ahead")).upgrade(),
    ///         _ => line.into(),
    ///     })
    /// });
    /// let raw = service_fn(|mut conn: Connection<Rewind<Socket>>| async move {
    ///     let first = conn.read_u8().await?;
    ///     conn.write_u8(first).await?;
    ///     Ok::<_, BoxError>(())
    /// });
    /// let pipeline = Pipeline::new(Lines::default).service(lines).on_upgrade(raw);
    /// Server::bind("127.0.0.1:7000").await?.serve(pipeline).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// ```compile_fail,E0277
    /// # use bytes::Bytes;
    /// # use tower::service_fn;
    /// # use tower_tcp::frame::Lines;
    /// # use tower_tcp::pipeline::Upgrade;
    /// # use tower_tcp::{BoxError, Pipeline, Reply, Server};
    /// # async fn run() -> Result<(), tower_tcp::Error> {
    /// let lines = service_fn(|line: Bytes| async move {
    ///     Ok::<Upgrade<Bytes>, BoxError>(Reply::from(line).upgrade())
    /// });
    /// let pipeline = Pipeline::new(Lines::default).service(lines).in_flight(8);
    /// Server::bind("127.0.0.1:7000").await?.serve(pipeline).await?; // not a `Reply`
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    #[doc(alias = "takeover")]
    #[doc(alias = "on_takeover")]
    pub fn on_upgrade<S, E>(self, next: S) -> Pipeline<F, K, T, E, OnUpgrade<S>>
    where
        D: OneRequest<Dispatch = E>,
    {
        let Self {
            codec,
            maker,
            next: _,
            settings,
            types: _,
        } = self;
        Pipeline {
            codec,
            maker,
            next: OnUpgrade(next),
            settings,
            types: PhantomData,
        }
    }
}

impl<F, K, T, N> Pipeline<F, K, T, OneAtATime, N> {
    /// Runs up to `n` requests of a connection at the same time. Replies are sent in the order of
    /// the requests. `0` counts as 1.
    #[must_use]
    #[doc(alias = "pipelining")]
    #[doc(alias = "concurrency")]
    pub fn in_flight<E>(self, n: usize) -> Pipeline<F, K, T, InFlight, E>
    where
        N: WithoutUpgrade<Next = E>,
    {
        self.dispatched(n, Order::AsRequested)
    }

    /// Runs up to `n` requests of a connection at the same time. Replies are sent as they finish,
    /// so the protocol must tag each reply with its request. `0` counts as 1.
    #[must_use]
    pub fn multiplexed<E>(self, n: usize) -> Pipeline<F, K, T, Multiplexed, E>
    where
        N: WithoutUpgrade<Next = E>,
    {
        self.dispatched(n, Order::AsFinished)
    }

    fn dispatched<D>(mut self, n: usize, order: Order) -> Pipeline<F, K, T, D, N::Next>
    where
        N: WithoutUpgrade,
    {
        let changed = Arc::make_mut(&mut self.settings);
        changed.in_flight = n.max(1);
        changed.order = order;
        Pipeline {
            codec: self.codec,
            maker: self.maker,
            next: self.next.into_next(),
            settings: self.settings,
            types: PhantomData,
        }
    }
}

impl<F: Clone, K: Clone, T, D, N: Clone> Clone for Pipeline<F, K, T, D, N> {
    fn clone(&self) -> Self {
        Self {
            codec: self.codec.clone(),
            maker: self.maker.clone(),
            next: self.next.clone(),
            settings: Arc::clone(&self.settings),
            types: PhantomData,
        }
    }
}

impl<F, K, T, D, N> fmt::Debug for Pipeline<F, K, T, D, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipeline")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
