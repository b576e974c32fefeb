//! Serves HTTP/1 and HTTP/2 with [hyper], so that axum, tonic and any other HTTP service can run on
//! this crate's connections.
//!
//! [`Http`] is the connection service for HTTP, as [`Pipeline`](crate::Pipeline) is for framed
//! protocols. The same layers go around both, such as a connection limit, pre-connect hooks and a
//! span for each connection. An HTTP connection drains with the server's other connections.
//! [`Http`] takes any service of `Request<RequestBody>` that is `Clone`: an axum `Router`, tonic's
//! `Routes`, a stack of tower-http's layers, or a function in a `service_fn`.
//!
//! ```no_run
//! use std::convert::Infallible;
//! use tower::service_fn;
//! use tower_tcp::Server;
//! use tower_tcp::http::hyper::{Request, Response};
//! use tower_tcp::http::{Http, RequestBody};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tower_tcp::Error> {
//! let hello = service_fn(|_: Request<RequestBody>| async {
//!     Ok::<_, Infallible>(Response::new("hello\n".to_owned()))
//! });
//! Server::bind("127.0.0.1:7000").await?.serve(Http::new(hello)).await?;
//! # Ok(())
//! # }
//! ```
//!
//! With axum, `Http::new(router)` is all that is needed. `examples/axum` is a package with a
//! complete app behind TLS.
//!
//! # Protocols
//!
//! The first bytes of a client show which of the two protocols it speaks, so one port serves both,
//! encrypted or not. Behind [`Tls`](crate::tls::Tls), offer both by ALPN with
//! `.alpn(["h2", "http/1.1"])`, because clients use HTTP/2 over TLS only if ALPN selects it.
//! WebSockets work over both; over HTTP/2 they use
//! [RFC 8441](https://www.rfc-editor.org/rfc/rfc8441).
//!
//! # Connection details in a request
//!
//! Each request carries the [`ConnectionInfo`](crate::ConnectionInfo) of its connection in its
//! extensions. `ConnectionInfo` has the ID and the addresses of the connection, the values that
//! hooks have added (such as `TlsInfo`, with the protocol that ALPN selected), and whether the
//! connection drains. In axum, extract it with `Extension(info): Extension<ConnectionInfo>`.
//!
//! To provide axum's `ConnectInfo<SocketAddr>`, make a service for each connection. In this
//! example, `client_addr` returns the client's address from a proxy's header if a hook has read
//! one, and otherwise the address of the peer:
//!
//! ```text
//! Http::make_service(service_fn(move |info: ConnectionInfo| {
//!     let client = info.client_addr().tcp().map(|addr| Extension(ConnectInfo(addr)));
//!     ready(Ok::<_, Infallible>(option_layer(client).layer(router.clone())))
//! }))
//! ```
//!
//! # Requests and tasks
//!
//! The service is cloned for each request. `poll_ready` of the clone is not called before the head
//! of that request has arrived, so an idle connection holds no permit of a shared limit. HTTP/1
//! requests run in the connection's task, one at a time. Each HTTP/2 request runs in a task of its
//! own, so the requests of one connection can use all processors. These tasks are aborted when the
//! connection ends.
//!
//! By default hyper allows 200 concurrent streams per connection, so one connection can make the
//! service buffer 200 bodies: 400 MiB at the 2 MiB that axum's `Json` and `Bytes` accept by
//! default. Limit bodies (axum's `DefaultBodyLimit`, tonic's `max_decoding_message_size`,
//! tower-http's `RequestBodyLimitLayer`) to the size that the service needs, or limit streams with
//! [`Http::configure`].
//!
//! # Errors
//!
//! A service should return an error only for a request that it cannot answer, and a response in all
//! other cases. An error ends an HTTP/1 connection with
//! [`ServiceError`](crate::EndReason::ServiceError), or with the reason of a
//! [`ConnectionEnded`](crate::ConnectionEnded) in the error. If the error contains a
//! [`RequestBodyError`], the reason is [`PeerReset`](crate::EndReason::PeerReset) (the peer has
//! left), [`CodecError`](crate::EndReason::CodecError) (the body is malformed) or
//! [`BodyTimeout`](crate::EndReason::BodyTimeout). In HTTP/2 an error resets the stream of its
//! request, and is reported by the event `request.failed`. An error of a response's body has the
//! same effect. A panic ends the connection with [`Panic`](crate::EndReason::Panic), in HTTP/2
//! after its other streams are done.
//!
//! Input that is not HTTP, or that exceeds hyper's limits, is answered (400, 414, 431 or `GOAWAY`)
//! and ends the connection with [`CodecError`](crate::EndReason::CodecError) or
//! [`FrameTooLarge`](crate::EndReason::FrameTooLarge). In HTTP/2 an error of a single stream, such
//! as a head that is too large (431), ends only that stream. If a peer disconnects before it has
//! its response, the request is dropped and the connection ends with
//! [`PeerReset`](crate::EndReason::PeerReset). The exception is an HTTP/2 request that arrives
//! together with the end of input: h2 does not pass it to the service, and without a request in
//! progress the connection ends with [`PeerClosed`](crate::EndReason::PeerClosed).
//!
//! An HTTP/1 client that has finished sending may still wait for its response, as `nc -N` does, or
//! it may be gone. So the service has [10 s](Deadlines::half_closed) to respond, and each byte that
//! the client takes restarts that time. After that time, the client counts as disconnected. A reset
//! and the close of a Unix socket are noticed immediately, however much unread input follows the
//! request.
//! There are three exceptions: in-memory streams, the streams of custom listeners, and a process
//! without a free file descriptor. In these cases, a reset or the end of input is noticed only if
//! fewer than 512 unread bytes precede it, and not while a service holds the rest of a body without
//! reading it.
//!
//! If services leave too many small data frames of an HTTP/2 connection unread, the connection ends
//! with [`UnreadData`](crate::EndReason::UnreadData). [`Http::configure`] describes the limit and
//! can raise it.
//!
//! [`Http::deadlines`] sets the deadlines. If a body stops arriving, [`RequestBody`] returns an
//! error, and the service can still respond.
//!
//! At the end of a connection, its stream is closed gracefully, as by
//! [`Connection::close`](crate::Connection::close), so finished responses reach the peer. The
//! exception is a connection that is cut off
//! ([`SocketOptions::reset_cut_off`](crate::bind::SocketOptions::reset_cut_off) lists when).
//!
//! # Draining
//!
//! | state when the drain begins | result |
//! | --- | --- |
//! | no byte has arrived | closes at once, or 50 ms after `Http` began to serve it if that is later, because a request may have arrived with the connection |
//! | HTTP/1, a request has arrived or is being answered | the request is answered, with `connection: close` if the head of the response is not yet sent; a request pipelined after it is not answered, and the client should not assume that it was processed ([RFC 9112 section 9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)) |
//! | a service waits for the body of a request | reading the body fails if no byte of it arrives for [3 s](DrainDeadlines::body); the request is answered in the same way |
//! | HTTP/1, the head of a request has begun | the rest of the head has [3 s](DrainDeadlines::frame) to arrive, and the request is answered in the same way |
//! | HTTP/1, idle between two requests | one more request may arrive within [1 s](DrainDeadlines::last_request), and is answered in the same way; then the connection closes |
//! | HTTP/2 | `GOAWAY` is sent; open streams are answered; an idle connection whose peer does not acknowledge the `GOAWAY` within [3 s](DrainDeadlines::goodbye) is closed, even if the peer sends pings |
//! | upgraded, or a response without end | the service, or the task that has the upgraded stream, has to await [`ConnectionInfo::draining`](crate::ConnectionInfo::draining) and end the stream |
//!
//! A connection drains in the same way when it reaches its [`max_age`](Deadlines::max_age).
//!
//! # Upgrades
//!
//! An upgraded stream (`hyper::upgrade::on`, axum's `WebSocketUpgrade`) belongs to another task,
//! but remains a connection of the server. It counts as open until that task drops it, and is then
//! closed gracefully. At the deadline of a drain, at one of [its own
//! deadlines](#deadlines-of-upgraded-streams), or in an abort, the server takes the stream away,
//! and the task's reads and writes fail with
//! [`ConnectionAborted`](std::io::ErrorKind::ConnectionAborted). A tunnel, which is an HTTP/2
//! stream upgraded by `CONNECT`, counts as open until its task shuts down writing or drops it, or
//! the peer resets it. If its connection ends first, the tunnel's reads and writes fail with an
//! error of hyper, such as [`BrokenPipe`](std::io::ErrorKind::BrokenPipe).
//!
//! # WebSockets
//!
//! If a handler returns as soon as it receives a Close frame, it leaves the frame unanswered, and
//! its client reports an unclean end (1006). tungstenite, which axum uses, prepares the answer, but
//! sends it only with the next read, write or flush. To a slow peer that has half-closed, a read or
//! a write may send only a part of it; a flush sends all of it. So a handler should flush when it
//! receives a Close. When [`ConnectionInfo::draining`](crate::ConnectionInfo::draining) completes,
//! the handler should send a Close, and then read until the stream ends. The handler of
//! `examples/axum` does all of this.
//!
//! # Deadlines of upgraded streams
//!
//! The connection's own task enforces deadlines for an upgraded stream:
//! [`upgraded_idle`](Deadlines::upgraded_idle), [`write`](Deadlines::write), and a limit of [30
//! s](DrainDeadlines::stream) after [`max_age`](Deadlines::max_age). The task does not see each
//! byte. It checks the byte counters four times per deadline, so the connection may end late by up
//! to a quarter of that deadline. [`min_rate`](Deadlines::min_rate) applies to output only, and its
//! first window may begin late by up to a quarter of a window. The same deadlines apply to an
//! HTTP/2 connection whose streams are all tunnels. While an HTTP/2 connection has both tunnels and
//! a request in progress, `upgraded_idle` and the 30 s after `max_age` do not apply.

mod ahead;
mod body;
mod clock;
mod lent;
mod progress;
mod reply;
mod requests;
mod serve;
mod stage;
mod streams;

use std::convert::Infallible;
use std::fmt;
use std::future::ready;
use std::sync::Arc;

use hyper::Response;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};

use crate::close::Linger;
use crate::deadline::Deadlines;
#[cfg(doc)]
use crate::deadline::DrainDeadlines;
use crate::make::{ClonePerRequest, MakePerConnection};

pub use body::{RequestBody, RequestBodyError};
pub use hyper;
pub use serve::HttpFuture;
pub use streams::Streams;

/// The flow-control window of an HTTP/2 connection in bytes. It also sets h2's limit of unread
/// small data frames, as [`Http::configure`] explains.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// Serves HTTP on a connection, with a service of requests. See the [module docs](self).
#[derive(Clone)]
pub struct Http<K> {
    maker: K,
    settings: Arc<HttpSettings>,
}

/// The settings of hyper for HTTP/1 and HTTP/2. See [`Http::configure`].
#[derive(Debug)]
pub struct Hyper {
    http1: http1::Builder,
    http2: http2::Builder<Streams>,
}

impl Hyper {
    fn new(http1: http1::Builder, streams: Streams) -> Self {
        let mut http2 = http2::Builder::new(streams);
        http2
            .timer(TokioTimer::new())
            .initial_connection_window_size(CONNECTION_WINDOW)
            .enable_connect_protocol();
        Self { http1, http2 }
    }

    /// Returns the settings for HTTP/1.
    pub fn http1(&mut self) -> &mut http1::Builder {
        &mut self.http1
    }

    /// Returns the settings for HTTP/2.
    pub fn http2(&mut self) -> &mut http2::Builder<Streams> {
        &mut self.http2
    }
}

type Configure = Arc<dyn Fn(&mut Hyper) + Send + Sync>;

#[derive(Clone)]
struct HttpSettings {
    deadlines: Deadlines,
    linger: Linger,
    http1: http1::Builder,
    configure: Vec<Configure>,
}

impl Default for HttpSettings {
    fn default() -> Self {
        let mut http1 = http1::Builder::new();
        keep_own(&mut http1);
        Self {
            deadlines: Deadlines::default(),
            linger: Linger::default(),
            http1,
            configure: Vec::new(),
        }
    }
}

/// Sets the settings that [`Http::configure`] cannot change.
fn keep_own(http1: &mut http1::Builder) {
    // `Ahead` notices the peer's end of input, and `Clock` enforces the deadlines for half-closed
    // peers and for request heads. With `pipeline_flush`, hyper would keep a response while a part
    // of the next request is buffered, and `Stage::park` would lose this response.
    http1
        .half_close(true)
        .header_read_timeout(None)
        .pipeline_flush(false);
}

/// Begins an HTTP/2 connection that is never polled, so that settings that h2 rejects panic here,
/// not on each connection.
fn try_out(http2: &http2::Builder<Streams>) {
    let service = service_fn(|_request| ready(Ok::<_, Infallible>(Response::new(String::new()))));
    drop(http2.serve_connection(TokioIo::new(tokio::io::empty()), service));
}

impl HttpSettings {
    /// Returns the settings of one HTTP/2 connection. Its requests run in `streams`.
    fn http2(&self, streams: Streams) -> http2::Builder<Streams> {
        let mut hyper = Hyper::new(http1::Builder::new(), streams);
        for configure in &self.configure {
            configure(&mut hyper);
        }
        hyper.http2
    }
}

impl<S> Http<ClonePerRequest<S>> {
    /// Serves each request with a clone of `service`. The clone is not polled for readiness before
    /// the head of the request has arrived.
    pub fn new(service: S) -> Self {
        Self::with(ClonePerRequest(service))
    }
}

impl<K> Http<MakePerConnection<K>> {
    /// Serves the requests of each connection with a service that `make` makes for that connection.
    ///
    /// `make` is a service that takes a [`ConnectionInfo`](crate::ConnectionInfo) and returns the
    /// service of that connection. `make` is cloned for each connection, and called in the
    /// connection's task.
    ///
    /// axum's `into_make_service_with_connect_info::<C>()` is such a `make` for any type `C` of
    /// yours that implements `Connected<ConnectionInfo>`. If `make` fails, or exceeds its
    /// [deadline](Deadlines::make_service), the connection ends with
    /// [`MakeServiceError`](crate::EndReason::MakeServiceError), or with the reason of a
    /// [`ConnectionEnded`](crate::ConnectionEnded) in the error.
    pub fn make_service(make: K) -> Self {
        Self::with(MakePerConnection(make))
    }
}

impl<K> Http<K> {
    fn with(maker: K) -> Self {
        Self {
            maker,
            settings: Arc::default(),
        }
    }

    /// Sets the deadlines of each connection. Default: see [`Deadlines`].
    #[must_use]
    pub fn deadlines(mut self, deadlines: Deadlines) -> Self {
        let settings = Arc::make_mut(&mut self.settings);
        settings.deadlines = deadlines;
        settings.linger = settings.linger.with_deadlines(&deadlines);
        self
    }

    /// Sets the limits of the graceful close at the end of each connection. Default: see
    /// [`Linger`].
    #[must_use]
    pub fn linger(mut self, linger: Linger) -> Self {
        let settings = Arc::make_mut(&mut self.settings);
        settings.linger = linger.with_deadlines(&settings.deadlines);
        self
    }

    /// Changes hyper's own settings: sizes, windows, streams, resets, pings. A later call keeps the
    /// changes of earlier calls.
    ///
    /// hyper's defaults apply, with two exceptions for HTTP/2. Extended `CONNECT` is on, so that
    /// WebSockets work over HTTP/2. The window of a connection is 16 MiB instead of 1 MiB. The
    /// reason is a limit of h2: for each unread data frame of less than 256 bytes, h2 counts the
    /// difference to 256, and it ends the connection when the sum exceeds half of the window. With
    /// 16 MiB, about 33,000 small messages of gRPC may wait for their services. A stream's window
    /// stays 1 MiB, so one connection can make the server buffer 16 MiB only with 16 streams that
    /// are not read. To change a connection's window, set `initial_connection_window_size`.
    ///
    /// hyper's HTTP/1 settings `header_read_timeout`, `half_close` and `pipeline_flush` have no
    /// effect here. The first does not distinguish a request's head from the idle time before it,
    /// so use [`Deadlines::frame`] and [`Deadlines::idle`] in its place. In place of the second,
    /// use [`Deadlines::half_closed`]. The third would hold a response back until the rest of the
    /// next request has arrived.
    ///
    /// ```
    /// # use tower_tcp::http::{Http, RequestBody, hyper::{Request, Response}};
    /// # let service = tower::service_fn(|_: Request<RequestBody>| async {
    /// #     Ok::<_, std::convert::Infallible>(Response::new(String::new()))
    /// # });
    /// let http = Http::new(service).configure(|hyper| {
    ///     hyper.http1().max_headers(64);
    ///     hyper.http2().max_concurrent_streams(100);
    /// });
    /// ```
    ///
    /// This method calls the closure once. The closure is called again for each HTTP/2 connection,
    /// because each of those connections has its own [`Streams`].
    ///
    /// # Panics
    ///
    /// Panics if hyper rejects a setting. hyper notices some values only when it uses them: a
    /// window of 2 GiB or more, a `max_headers` that exceeds the memory, and a keep-alive time
    /// beyond the range of the clock. The connections that use such a value fail, most of them with
    /// the reason [`Panic`](crate::EndReason::Panic).
    #[must_use]
    pub fn configure(mut self, configure: impl Fn(&mut Hyper) + Send + Sync + 'static) -> Self {
        let settings = Arc::make_mut(&mut self.settings);
        let mut hyper = Hyper::new(settings.http1.clone(), Streams::default());
        configure(&mut hyper);
        try_out(&hyper.http2);
        settings.http1 = hyper.http1;
        keep_own(&mut settings.http1);
        settings.configure.push(Arc::new(configure));
        self
    }
}

impl<K: fmt::Debug> fmt::Debug for Http<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http")
            .field("maker", &self.maker)
            .field("deadlines", &self.settings.deadlines)
            .finish_non_exhaustive()
    }
}
