//! Compile-time promises of the crate: which of its types are `Send` and `Sync`, that its layers
//! combine with tower's in any order, and that plain services need no annotations.
//!
//! These tests pass when they compile.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use tokio::io::DuplexStream;
use tokio_util::codec::{BytesCodec, LengthDelimitedCodec, LinesCodec};
use tower::limit::{GlobalConcurrencyLimitLayer, RateLimitLayer};
use tower::spawn_ready::SpawnReadyLayer;
use tower::timeout::TimeoutLayer;
use tower::util::{BoxCloneService, BoxService};
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::accept::AcceptErrorAction;
use tower_tcp::admit::{
    AccessList, AccessRules, AddressDenied, AddressFilter, Bans, ClientRate, ClientRateLayer,
    ClientRateLimit, ConnectionLimit, ConnectionLimitLayer, Limited, LimitedFuture,
    OverClientLimit, Overflow, OverflowFuture, OverflowLayer, PerClient, Verdict,
};
use tower_tcp::bind::{
    Endpoint, Incoming, InvalidEndpoint, ListenerClosed, Socket, SocketOptions, Sockets,
};
use tower_tcp::close::Linger;
use tower_tcp::deadline::{Deadline, DeadlineFuture, DeadlineLayer, Deadlines, DrainDeadlines};
use tower_tcp::error::Panicked;
use tower_tcp::frame::{
    Block, BlockError, Chunks, FilterDecode, FilterEncode, FrameTooLarge, InOut, Json, Lines,
    LinesError, MapDecode, MapEncode, RecoverableSerde, Serde, SerdeError, Then, ThenError,
    TryMapDecode,
};
use tower_tcp::make::{ClonePerRequest, MakeEventsPerConnection, MakePerConnection};
use tower_tcp::networks::{InvalidNetwork, Networks};
use tower_tcp::observe::{ConnectionTrace, ConnectionTraceFuture, ConnectionTraceLayer};
use tower_tcp::pipeline::{
    Buffered, Closed, Crossing, Crossings, Event, InFlight, InvalidWatermarks, Limits, Multiplexed,
    NoUpgrade, OnConnect, OnConnectFuture, OnConnectLayer, OnUpgrade, OneAtATime, PipelineBuilder,
    PipelineFuture, Session, SessionFuture, SessionService, Shutdown, ShutdownOnError,
    ShutdownOnErrorFuture, ShutdownOnErrorLayer, Timer, TrySendError, Upgrade, Watermarks,
};
use tower_tcp::preconnect::{
    Chain, Detection, Peek, PreConnect, PreConnectElapsed, PreConnectEvicted, PreConnectExt,
    PreConnectFuture, PreConnectLayer, Protocol, Unknown, UnknownProtocol, When,
};
use tower_tcp::proxy::{
    ProxyEncodeError, ProxyHeader, ProxyHeaderError, ProxyProtocol, Ssl, Tlvs, Untrusted, Versions,
};
use tower_tcp::registry::{Broadcast, KeyTaken, Registry, SlowPeer};
use tower_tcp::testkit::{Connector, MemoryListener};
use tower_tcp::tls::{
    ClientCertificates, Identity, Tls, TlsBuilder, TlsError, TlsInfo, TlsVersion, UnknownServerName,
};
use tower_tcp::{
    Address, BoxError, Connection, ConnectionEnded, ConnectionId, ConnectionInfo, ConnectionPhase,
    End, EndReason, Error, Handle, Initiator, LiveConnection, Peer, Pipeline, Reply, Report,
    Rewind, Serve, Server, ServerBuilder,
};

/// A user's service that implements every auto trait.
type Plain = tower::util::ServiceFn<fn(Bytes) -> Ready<Result<Bytes, Infallible>>>;

/// A session that is `Send` and not `Sync`.
struct Echo(std::cell::Cell<u8>);

impl Session<Bytes> for Echo {
    type Reply = Option<Bytes>;
    type Error = Infallible;

    async fn call(&mut self, line: Bytes) -> Result<Option<Bytes>, Infallible> {
        self.0.set(self.0.get().wrapping_add(1));
        Ok(Some(line))
    }
}

/// Accepts types that can be shared between threads, moved and kept.
fn goes_anywhere<T: Send + Sync + Unpin + 'static>() {}

/// Accepts types that can be sent to another thread, moved in memory and kept.
fn can_be_sent<T: Send + Unpin + 'static>() {}

#[test]
fn what_a_user_keeps_and_passes_on_goes_anywhere() {
    goes_anywhere::<Address>();
    goes_anywhere::<ConnectionId>();
    goes_anywhere::<ConnectionPhase>();
    goes_anywhere::<ConnectionInfo>();
    goes_anywhere::<ConnectionLimit>();
    goes_anywhere::<Handle>();
    goes_anywhere::<Report>();
    // A `Peer` holds only a queue of frames and messages, so it is `Send` and `Sync` whatever their
    // types are.
    goes_anywhere::<Peer<Bytes>>();
    goes_anywhere::<Peer<Box<dyn FnOnce() + Send>, std::cell::Cell<u8>>>();
    goes_anywhere::<Registry<String, std::cell::Cell<u8>>>();
    goes_anywhere::<(Crossings<Bytes>, Timer<Bytes, std::cell::Cell<u8>>)>();
    goes_anywhere::<LiveConnection>();
    goes_anywhere::<Connection<Socket>>();
    goes_anywhere::<Connection<DuplexStream>>();
}

#[test]
fn words_for_ends_and_errors_go_anywhere() {
    goes_anywhere::<EndReason>();
    goes_anywhere::<End>();
    goes_anywhere::<ConnectionEnded>();
    goes_anywhere::<Initiator>();
    goes_anywhere::<Error>();
    goes_anywhere::<BoxError>();
    goes_anywhere::<Panicked>();
    goes_anywhere::<Closed>();
    goes_anywhere::<TrySendError<Bytes>>();
    goes_anywhere::<InvalidWatermarks>();
    goes_anywhere::<KeyTaken>();
    goes_anywhere::<Shutdown>();
    goes_anywhere::<AcceptErrorAction>();
    goes_anywhere::<InvalidEndpoint>();
    goes_anywhere::<ListenerClosed>();
    goes_anywhere::<FrameTooLarge>();
    goes_anywhere::<LinesError>();
    goes_anywhere::<BlockError>();
    goes_anywhere::<ThenError<LinesError, BlockError>>();
    goes_anywhere::<SerdeError<serde_json::Error>>();
    goes_anywhere::<(Detection<Protocol>, Unknown, UnknownProtocol)>();
    goes_anywhere::<PreConnectElapsed>();
    goes_anywhere::<PreConnectEvicted>();
    goes_anywhere::<(ProxyEncodeError, ProxyHeaderError, Untrusted, Versions)>();
    goes_anywhere::<TlsError>();
    goes_anywhere::<UnknownServerName>();
}

#[test]
fn options_and_codecs_go_anywhere() {
    goes_anywhere::<Endpoint>();
    goes_anywhere::<SocketOptions>();
    goes_anywhere::<Limits>();
    goes_anywhere::<Deadlines>();
    goes_anywhere::<DrainDeadlines>();
    goes_anywhere::<DeadlineLayer>();
    goes_anywhere::<Deadline<()>>();
    goes_anywhere::<DeadlineFuture<()>>();
    goes_anywhere::<(Watermarks, Buffered, Crossing)>();
    goes_anywhere::<(SlowPeer, Broadcast)>();
    goes_anywhere::<Linger>();
    goes_anywhere::<Lines>();
    goes_anywhere::<Block>();
    goes_anywhere::<InOut<Lines, Block>>();
    goes_anywhere::<(MapDecode<Lines, fn()>, MapEncode<Lines, fn()>)>();
    goes_anywhere::<TryMapDecode<Lines, fn()>>();
    goes_anywhere::<(FilterDecode<Lines, fn()>, FilterEncode<Lines, fn()>)>();
    goes_anywhere::<(Chunks<Lines>, Then<Lines, Block>)>();
    // The document types are only named, so they need not be `Sync`.
    goes_anywhere::<Serde<std::cell::Cell<u8>, std::cell::Cell<u8>, Json>>();
    goes_anywhere::<RecoverableSerde<std::cell::Cell<u8>, std::cell::Cell<u8>>>();
    goes_anywhere::<(OneAtATime, InFlight, Multiplexed)>();
    goes_anywhere::<ClientCertificates>();
    goes_anywhere::<(TlsBuilder, Identity, TlsVersion)>();
    goes_anywhere::<(ProxyHeader, ProxyProtocol, Ssl, Tlvs)>();
    goes_anywhere::<TlsInfo>();
    goes_anywhere::<(AddressFilter, Verdict, AddressDenied)>();
    goes_anywhere::<(AccessList, AccessRules, Bans)>();
    goes_anywhere::<(PerClient, OverClientLimit, ClientRate)>();
    goes_anywhere::<(Networks, InvalidNetwork)>();
}

#[test]
fn layers_and_their_services_go_where_what_they_wrap_goes() {
    goes_anywhere::<(ConnectionLimitLayer, Limited<Plain>)>();
    goes_anywhere::<(OverflowLayer<Plain>, Overflow<Plain, Plain>)>();
    goes_anywhere::<(
        OverflowLayer<Plain, PerClient>,
        Overflow<Plain, Plain, PerClient>,
    )>();
    goes_anywhere::<(ClientRateLayer, ClientRateLimit<Plain>)>();
    goes_anywhere::<(ConnectionTraceLayer, ConnectionTrace<Plain>)>();
    goes_anywhere::<(PreConnectLayer<Tls>, PreConnect<Tls, Plain>)>();
    goes_anywhere::<(ShutdownOnErrorLayer, ShutdownOnError<Plain>)>();
    goes_anywhere::<(OnConnectLayer<fn()>, OnConnect<fn(), Plain>)>();
    goes_anywhere::<Event<Bytes, Bytes>>();
    goes_anywhere::<(OnUpgrade<Plain>, NoUpgrade, Rewind<Socket>)>();
    goes_anywhere::<Chain<Tls, Plain>>();
    goes_anywhere::<(Peek<Plain>, When<Tls, Plain>)>();
    goes_anywhere::<Tls>();
    goes_anywhere::<PipelineBuilder<fn() -> Lines>>();
    // The frame type is only named, so it need not be `Sync`.
    goes_anywhere::<Pipeline<fn() -> Lines, ClonePerRequest<Plain>, std::cell::Cell<u8>>>();
    goes_anywhere::<Pipeline<fn() -> Lines, MakePerConnection<Plain>, Bytes, InFlight>>();
    goes_anywhere::<
        Pipeline<fn() -> Lines, MakeEventsPerConnection<Plain, std::cell::Cell<u8>>, Bytes>,
    >();
}

#[test]
fn the_futures_of_layers_go_where_those_that_they_wrap_go() {
    type Inner = Ready<Result<(), BoxError>>;
    goes_anywhere::<LimitedFuture<Inner>>();
    goes_anywhere::<ConnectionTraceFuture<Inner>>();
    goes_anywhere::<ShutdownOnErrorFuture<Inner>>();
}

/// `draining` borrows nothing from its `ConnectionInfo` or `Connection`.
#[test]
fn the_wait_for_a_drain_outlives_what_it_was_asked_of() {
    fn of_an_info(info: &ConnectionInfo) -> impl Future + Send + use<> {
        info.draining()
    }
    fn of_a_connection<Io>(conn: &Connection<Io>) -> impl Future + Send + use<Io> {
        conn.draining()
    }

    _ = (of_an_info, of_a_connection::<DuplexStream>);
}

#[test]
fn what_runs_in_one_task_can_be_sent_there() {
    can_be_sent::<PipelineFuture>();
    can_be_sent::<PreConnectFuture<PipelineFuture>>();
    can_be_sent::<OverflowFuture<PipelineFuture>>();
    can_be_sent::<OnConnectFuture<Plain>>();
    can_be_sent::<SessionService<Echo, Bytes>>();
    can_be_sent::<SessionFuture<Echo, Bytes>>();
    can_be_sent::<(Reply<Bytes>, Upgrade<Bytes>)>();
    can_be_sent::<Serve>();
}

#[test]
fn servers_and_listeners_go_anywhere() {
    goes_anywhere::<Server>();
    goes_anywhere::<Server<MemoryListener>>();
    goes_anywhere::<ServerBuilder>();
    goes_anywhere::<Sockets>();
    goes_anywhere::<Socket>();
    goes_anywhere::<Incoming<Socket>>();
    goes_anywhere::<MemoryListener>();
    goes_anywhere::<Connector>();
}

/// Accepts stacks that a server can serve, for the streams of a test or of a server.
fn is_served<S>(stack: S)
where
    S: Service<Connection<DuplexStream>> + Send + 'static,
    S::Response: 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    let (listener, _) = tower_tcp::testkit::memory();
    let serving: Serve = Server::from_listener(listener).serve(stack);
    is_spawned(serving);
}

/// Accepts futures that `tokio::spawn` and `select!` accept.
fn is_spawned(serving: impl Future<Output = Result<Report, Error>> + Send + Unpin + 'static) {
    drop(serving);
}

type RequestFuture = Pin<Box<dyn Future<Output = Result<Bytes, BoxError>> + Send>>;

fn echo(line: Bytes) -> RequestFuture {
    Box::pin(ready(Ok(line)))
}

/// A hook that lets every connection pass.
async fn anyone(conn: Connection<DuplexStream>) -> Result<Connection<DuplexStream>, BoxError> {
    Ok(conn)
}

/// Every layer of the crate and tower's own, at both levels. The order is chosen for the compiler,
/// not for a server.
#[tokio::test]
async fn every_layer_stacks_upon_every_other() {
    let second = Duration::from_secs(1);
    let limit = ConnectionLimit::new(1);
    let global = GlobalConcurrencyLimitLayer::new(1);

    // Around requests, in one service shared by all connections: a service inside is cloned for
    // each request.
    let shared = ServiceBuilder::new()
        .boxed_clone()
        .option_layer(Some(ShutdownOnErrorLayer::new()))
        .map_result(|result: Result<Bytes, BoxError>| result)
        .load_shed()
        .concurrency_limit(1)
        .layer(global.clone())
        .timeout(second)
        .buffer(1)
        .rate_limit(1, second)
        .layer(SpawnReadyLayer::new())
        .layer(ShutdownOnErrorLayer::new())
        .filter(|line: Bytes| Ok::<_, BoxError>(line))
        .filter_async(|line: Bytes| ready(Ok::<_, BoxError>(line)))
        .map_request(|line: Bytes| line)
        .map_response(|line: Bytes| line)
        .map_err(|err: BoxError| err)
        .then(|result: Result<Bytes, BoxError>| ready(result))
        .and_then(|line: Bytes| ready(Ok::<_, BoxError>(line)))
        .map_future(|future: RequestFuture| future)
        .service_fn(echo);

    // In a service made for each connection nothing needs to be `Clone`.
    let each = shared.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        let service = ServiceBuilder::new()
            .layer(ShutdownOnErrorLayer::new())
            .load_shed()
            .layer(RateLimitLayer::new(1, second))
            .layer(SpawnReadyLayer::new())
            .layer(ClientRate::new(1, second).layer(peer.info()))
            .service(each.clone());
        ready(Ok::<_, BoxError>(BoxService::new(service)))
    });

    // Around connections, inside the hooks: a service here is cloned for each connection.
    let behind = ServiceBuilder::new()
        .boxed_clone()
        .option_layer(Some(TimeoutLayer::new(second)))
        .option_layer(None::<TimeoutLayer>)
        .concurrency_limit(1)
        .layer(global.clone())
        .layer(limit.layer())
        .layer(ConnectionTraceLayer::new())
        .buffer(1)
        .filter(|conn: Connection<DuplexStream>| Ok::<_, BoxError>(conn))
        .filter_async(anyone)
        .map_request(|conn: Connection<DuplexStream>| conn)
        .map_response(|reason: EndReason| reason)
        .map_result(|result: Result<EndReason, BoxError>| result)
        .map_err(|err: BoxError| err)
        .then(|result: Result<EndReason, BoxError>| ready(result))
        .and_then(|reason: EndReason| ready(Ok::<_, BoxError>(reason)))
        .map_future(|future: PipelineFuture| future)
        .service(Pipeline::new(Lines::default).make_service(make));

    // Outside the hooks nothing needs to be `Clone`.
    let filter = AddressFilter::from(Bans::new());
    let hook = ServiceBuilder::new().timeout(second).layer(global).service(
        service_fn(anyone)
            .chain(filter.clone())
            .chain(PerClient::new(1)),
    );
    let stack = ServiceBuilder::new()
        .boxed()
        .layer(ConnectionTraceLayer::new())
        .layer(limit.layer().overflow(service_fn(anyone)))
        .layer(PerClient::new(1).overflow(service_fn(anyone)))
        .layer(filter.clone().overflow(service_fn(anyone)))
        .load_shed()
        .rate_limit(1, second)
        .layer(SpawnReadyLayer::new())
        .layer(limit.layer())
        .layer(PreConnectLayer::new(hook))
        .service(behind);

    is_served(stack);
    is_served(Pipeline::new(Lines::default).service(shared));
}

#[test]
fn a_pipeline_is_boxed_under_one_name_whatever_is_in_it() {
    type Stack = BoxCloneService<Connection<DuplexStream>, EndReason, BoxError>;
    let service = service_fn(echo);

    let stacks = [
        Stack::new(Pipeline::new(Lines::default).service(service)),
        Stack::new(Pipeline::new(Lines::crlf).service(service).in_flight(8)),
        Stack::new(
            Pipeline::new(Lines::default)
                .service(service)
                .multiplexed(8),
        ),
    ];

    stacks.into_iter().for_each(is_served);
}

mod no_annotation_is_needed_where_the_codec_encodes_one_type {
    use super::*;

    #[test]
    fn for_a_plain_value() {
        is_served(
            Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
                Ok::<_, Infallible>(line)
            })),
        );
    }

    #[test]
    fn for_a_value_or_none() {
        is_served(
            Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
                Ok::<_, Infallible>(Some(line).filter(|line| !line.is_empty()))
            })),
        );
    }

    #[test]
    fn for_several() {
        is_served(
            Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
                Ok::<_, Infallible>(vec![line.clone(), line])
            })),
        );
    }

    #[test]
    fn for_a_reply() {
        is_served(
            Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
                Ok::<_, Infallible>(match &line[..] {
                    b"quit" => Reply::from(line).close(),
                    b"hush" => Reply::none(),
                    b"twice" => vec![line.clone(), line].into(),
                    _ => line.into(),
                })
            })),
        );
    }

    #[test]
    fn for_a_stream() {
        is_served(
            Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
                Ok::<_, Infallible>(Reply::stream(stream::iter([Ok(line)])))
            })),
        );
    }

    #[test]
    fn for_a_session() {
        is_served(Pipeline::new(Lines::default).make_service(service_fn(
            |_: Peer<_>| async move {
                Ok::<_, BoxError>(SessionService::new(Echo(std::cell::Cell::new(0))))
            },
        )));
    }

    #[test]
    fn for_a_make_service() {
        is_served(Pipeline::new(Lines::default).make_service(service_fn(
            |peer: Peer<_>| async move {
                peer.send("220 ready".into()).await?;
                Ok::<_, BoxError>(service_fn(|line: Bytes| async move {
                    Ok::<_, Infallible>(Some(line))
                }))
            },
        )));
    }
}

/// tokio-util's `LinesCodec` encodes any text, and `BytesCodec` two types. There the user has to
/// name the type.
mod where_a_codec_encodes_several_types {
    use super::*;

    #[test]
    fn a_plain_value_needs_no_annotation() {
        is_served(
            Pipeline::new(LinesCodec::new).service(service_fn(|line: String| async move {
                Ok::<_, Infallible>(line)
            })),
        );
    }

    #[test]
    fn nor_does_it_if_only_one_of_the_types_is_a_reply_to_it() {
        is_served(Pipeline::new(LengthDelimitedCodec::new).service(service_fn(
            |frame: bytes::BytesMut| async move { Ok::<_, Infallible>(frame.freeze()) },
        )));
    }

    #[test]
    fn other_replies_need_the_type_of_the_frames() {
        is_served(
            Pipeline::new(LinesCodec::new).service::<String, _>(service_fn(
                |line: String| async move { Ok::<_, Infallible>(Some(line)) },
            )),
        );
        is_served(
            Pipeline::new(BytesCodec::new).service::<Bytes, _>(service_fn(
                |bytes: bytes::BytesMut| async move { Ok::<_, Infallible>(vec![bytes.freeze()]) },
            )),
        );
    }

    #[test]
    fn a_make_service_names_it_with_its_peer() {
        is_served(Pipeline::new(LinesCodec::new).make_service(service_fn(
            |_: Peer<String>| async move {
                Ok::<_, BoxError>(service_fn(|line: String| async move {
                    Ok::<_, Infallible>(Some(line))
                }))
            },
        )));
    }
}
