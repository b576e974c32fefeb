//! HTTP/1 and HTTP/2, by [hyper]: axum, tonic, and any other service of HTTP requests, on this crate's connections.
//!
//! [`Http`] is the connection service for them, as [`Pipeline`](crate::Pipeline) is for framed protocols: under the server's limit, behind its
//! hooks, in its spans, drained with everything else it serves. It takes any service of `Request<RequestBody>` that is `Clone`: an axum
//! `Router`, tonic's `Routes`, a stack of tower-http's layers, a function.
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
//! With axum the whole of it is `Http::new(router)`; `examples/axum` is a package with a real app behind TLS.
//!
//! # Protocols
//!
//! Which of the two a client speaks is told by its first bytes, so both are served on one port, encrypted or not. Behind
//! [`Tls`](crate::tls::Tls), name both for ALPN, or clients will not know: `.alpn(["h2", "http/1.1"])`. A WebSocket works over both
//! ([RFC 8441](https://www.rfc-editor.org/rfc/rfc8441) over HTTP/2).
//!
//! # What a request knows
//!
//! Each carries the [`ConnectionInfo`](crate::ConnectionInfo) of its connection in its extensions: number, addresses, what hooks have learned
//! (such as `TlsInfo`, with the protocol that ALPN agreed on), and whether it should end. In axum: `Extension(info): Extension<ConnectionInfo>`.
//!
//! axum's `ConnectInfo<SocketAddr>` is fed without this crate knowing axum, by a service made for each connection:
//!
//! ```text
//! Http::make_service(service_fn(move |info: ConnectionInfo| {
//!     let peer = info.peer_addr().tcp().map(|addr| Extension(ConnectInfo(addr)));
//!     ready(Ok::<_, Infallible>(option_layer(peer).layer(router.clone())))
//! }))
//! ```
//!
//! # Requests and tasks
//!
//! The service is cloned for each request and made ready when that is at hand, so that an idle connection holds nothing of a shared
//! limit. Requests of HTTP/1 run in the connection's task, one at a time; each of HTTP/2 in a task of its own, so that those of one
//! connection can use all processors. These end with the connection, in whatever way that ends.
//!
//! So what a service holds of one request's body, a connection can have it hold 200 times, which is how many streams hyper allows: 400 MiB of
//! the 2 MiB that axum's `Json` and `Bytes` take. Bound bodies (axum's `DefaultBodyLimit`, tonic's `max_decoding_message_size`, tower-http's
//! `RequestBodyLimitLayer`) to what the service needs, or streams, by [`Http::configure`].
//!
//! # Errors
//!
//! An error of the service is for what cannot be answered; everything else is a response. In HTTP/1 it ends the connection
//! ([`ServiceError`](crate::EndReason::ServiceError)), in HTTP/2 it resets its stream, and is reported (`request.failed`). A panic ends its
//! connection ([`Panic`](crate::EndReason::Panic)), once the other streams on it are done. What is not HTTP, or beyond hyper's limits, is
//! answered (400, 431, `GOAWAY`) and ends it ([`CodecError`](crate::EndReason::CodecError), [`FrameTooLarge`](crate::EndReason::FrameTooLarge)). A peer that
//! leaves before its answer is noticed, and its request dropped ([`PeerReset`](crate::EndReason::PeerReset)); hyper takes the end of its input for
//! that, too. For clients that half-close and wait, such as `nc -N`: `.configure(|hyper| { hyper.http1().half_close(true); })`.
//!
//! Deadlines are in [`Deadlines`]. A body that stops arriving is an error of [`RequestBody`], which the service can
//! still answer. In any ending, what was answered arrives: the stream is closed as by [`Connection::close`](crate::Connection::close).
//!
//! # Draining
//!
//! | what a connection does when the drain begins | what comes of it |
//! | --- | --- |
//! | it never sent a byte | closes at once |
//! | a request has arrived, or is being answered | is answered, with `connection: close` if its head is not out yet; one that was pipelined behind it is not answered ([RFC 9112 section 9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6): no client may take it that it was) |
//! | a request's head was begun | has [5 s](DrainDeadlines::frame) to become whole, and is answered so |
//! | HTTP/1 rests between two requests | one more may come, for [a second](DrainDeadlines::last_request), and is answered so; else closes |
//! | HTTP/2 | `GOAWAY`; streams that were begun are answered; one that rests and does not acknowledge it within [5 s](DrainDeadlines::goodbye) is closed |
//! | it was upgraded, or streams without end | whoever serves it awaits [`ConnectionInfo::draining`](crate::ConnectionInfo::draining), and ends it |
//!
//! A connection drains in the same way when it reaches its [`max_age`](Deadlines::max_age).
//!
//! # Upgrades
//!
//! A stream that was upgraded (`hyper::upgrade::on`, axum's `WebSocketUpgrade`) belongs to another task, but is still a connection here: it
//! counts, until that task drops it. It is then closed in good order. At the deadline of a drain, or by an abort, it is taken away: the task
//! that has it reads and writes [`ConnectionAborted`](std::io::ErrorKind::ConnectionAborted). So it is with a tunnel
//! in a stream of HTTP/2, up to when its task has shut down writing.
//!
//! The connection's own task keeps deadlines for an upgraded stream: [`upgraded_idle`](Deadlines::upgraded_idle),
//! [`write`](Deadlines::write), and [30 s](DrainDeadlines::stream) behind [`max_age`](Deadlines::max_age). It does not
//! see each byte, so it looks at the counters four times before a deadline, which may be late by a quarter. An HTTP/2
//! connection with nothing but tunnels has the same deadlines; one with requests besides is busy.

mod body;
mod clock;
mod lent;
mod requests;
mod serve;
mod streams;

use std::fmt;
use std::sync::Arc;

use hyper_util::rt::TokioTimer;
use hyper_util::server::conn::auto::Builder;

use crate::close::Linger;
use crate::deadline::Deadlines;
#[cfg(doc)]
use crate::deadline::DrainDeadlines;
use crate::make::{ClonePerRequest, MakePerConnection};

pub use body::{RequestBody, RequestBodyError};
pub use hyper;
pub use serve::HttpFuture;
pub use streams::Streams;

/// The connection service for HTTP. See the [module docs](self).
#[derive(Clone)]
pub struct Http<K> {
    maker: K,
    settings: Arc<HttpSettings>,
}

type Configure = Arc<dyn Fn(&mut Builder<Streams>) + Send + Sync>;

#[derive(Clone, Default)]
struct HttpSettings {
    deadlines: Deadlines,
    linger: Linger,
    configure: Vec<Configure>,
}

impl HttpSettings {
    fn configure(&self, hyper: &mut Builder<Streams>) {
        hyper
            .http2()
            .timer(TokioTimer::new())
            .enable_connect_protocol();
        for configure in &self.configure {
            configure(hyper);
        }
    }
}

impl<S> Http<ClonePerRequest<S>> {
    /// Serves requests with clones of `service`, one for each request, made ready when the request is at hand.
    pub fn new(service: S) -> Self {
        Self::with(ClonePerRequest(service))
    }
}

impl<K> Http<MakePerConnection<K>> {
    /// Serves the requests of each connection with a service of its own: `make` is a service that takes the
    /// [`ConnectionInfo`](crate::ConnectionInfo) and answers with it. It is cloned for each connection, and called in its task.
    ///
    /// axum's `into_make_service_with_connect_info::<C>()` is such a `make` for any `C` of yours that is
    /// `Connected<ConnectionInfo>`. If it fails, or takes longer than its [time](Deadlines::make_service), the connection ends with
    /// [`MakeServiceError`](crate::EndReason::MakeServiceError).
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
        Arc::make_mut(&mut self.settings).deadlines = deadlines;
        self
    }

    /// Sets the bounds of the orderly close at the end of each connection. Default: see [`Linger`].
    #[must_use]
    pub fn linger(mut self, linger: Linger) -> Self {
        Arc::make_mut(&mut self.settings).linger = linger;
        self
    }

    /// Changes hyper's own settings: sizes, windows, streams, resets, pings. It has its defaults for them, but for extended `CONNECT`, which
    /// is on, so that a WebSocket runs over HTTP/2. Several calls add up.
    ///
    /// Not its timer and its `header_read_timeout` for HTTP/1: [`Deadlines::frame`] and [`Deadlines::idle`] stand for that, which it does not tell apart.
    ///
    /// ```
    /// # use tower_tcp::http::{Http, RequestBody, hyper::{Request, Response}};
    /// # let service = tower::service_fn(|_: Request<RequestBody>| async { Ok::<_, std::convert::Infallible>(Response::new(String::new())) });
    /// let http = Http::new(service).configure(|hyper| {
    ///     hyper.http1().max_headers(64);
    ///     hyper.http2().max_concurrent_streams(100);
    /// });
    /// ```
    ///
    /// `configure` is called once for each connection, since each has tasks of its own, and once here.
    ///
    /// # Panics
    ///
    /// When hyper refuses a setting.
    #[must_use]
    pub fn configure(
        mut self,
        configure: impl Fn(&mut Builder<Streams>) + Send + Sync + 'static,
    ) -> Self {
        configure(&mut Builder::new(Streams::default()));
        Arc::make_mut(&mut self.settings)
            .configure
            .push(Arc::new(configure));
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
