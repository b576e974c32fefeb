//! Tracing: each connection has one span and one closing event, which agree with `on_end`, however
//! the connection ended.

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/http2.rs"]
mod http2;
mod support;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::future::{pending, ready};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::{Request, Response};
use tokio::io::DuplexStream;
use tokio::net::UnixSocket;
use tokio::time::{sleep, timeout};
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::frame::Lines;
use tower_tcp::http::{Http, RequestBody, RequestBodyError};
use tower_tcp::observe::{ConnectionTraceLayer, RequestTraceLayer};
use tower_tcp::pipeline::Limits;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve, serve_with};
use tower_tcp::tls::Tls;
use tower_tcp::{
    Address, BoxError, Connection, ConnectionEnded, EndReason, Peer, Pipeline, Reply, Server,
};
use tracing::field::{Field, Visit};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Level, Subscriber, span};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

use certificates::certified;
use http2::http2;
use support::{Client, Clients, Ends, settled};

const SECOND: Duration = Duration::from_secs(1);

/// Fields by name. Text is recorded as given, other values as formatted.
#[derive(Clone, Debug, Default)]
struct Fields(BTreeMap<&'static str, String>);

impl Fields {
    fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

#[derive(Clone, Debug)]
struct Seen {
    name: String,
    level: Level,
    fields: Fields,
    /// The names of the enclosing spans.
    within: Vec<&'static str>,
}

/// Captures all spans and events of the crate while it lives.
#[derive(Clone, Default)]
struct Capture {
    spans: Arc<Mutex<BTreeMap<u64, Seen>>>,
    closed_spans: Arc<Mutex<Vec<Seen>>>,
    events: Arc<Mutex<Vec<Seen>>>,
}

impl Capture {
    fn begin() -> (Self, DefaultGuard) {
        let capture = Self::default();
        let subscriber = tracing_subscriber::registry().with(capture.clone());
        (capture, tracing::subscriber::set_default(subscriber))
    }

    fn events(&self, name: &str) -> Vec<Seen> {
        let events = self.events.lock().expect("no test panics under it");
        events
            .iter()
            .filter(|event| event.name == name)
            .cloned()
            .collect()
    }

    /// Returns the open spans and the closed spans.
    fn spans(&self) -> (Vec<Seen>, Vec<Seen>) {
        let open = self.spans.lock().expect("no test panics under it");
        let closed = self.closed_spans.lock().expect("no test panics under it");
        (open.values().cloned().collect(), closed.clone())
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Capture {
    fn on_new_span(&self, attrs: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        if !attrs.metadata().target().starts_with("tower_tcp") {
            return;
        }
        let mut fields = Fields::default();
        attrs.record(&mut fields);
        let seen = Seen {
            name: attrs.metadata().name().to_owned(),
            level: *attrs.metadata().level(),
            fields,
            within: ctx
                .span_scope(id)
                .into_iter()
                .flatten()
                .skip(1)
                .map(|span| span.name())
                .collect(),
        };
        self.spans
            .lock()
            .expect("no test panics under it")
            .insert(id.into_u64(), seen);
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, _: Context<'_, S>) {
        let mut spans = self.spans.lock().expect("no test panics under it");
        if let Some(span) = spans.get_mut(&id.into_u64()) {
            values.record(&mut span.fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        if !event.metadata().target().starts_with("tower_tcp") {
            return;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let seen = Seen {
            name: fields.get("message").to_owned(),
            level: *event.metadata().level(),
            fields,
            within: ctx
                .event_scope(event)
                .into_iter()
                .flatten()
                .map(|span| span.name())
                .collect(),
        };
        self.events
            .lock()
            .expect("no test panics under it")
            .push(seen);
    }

    fn on_close(&self, id: span::Id, _: Context<'_, S>) {
        let span = self
            .spans
            .lock()
            .expect("no test panics under it")
            .remove(&id.into_u64());
        self.closed_spans
            .lock()
            .expect("no test panics under it")
            .extend(span);
    }
}

/// Does what the request says.
async fn act(peer: Peer<Bytes>, request: Bytes) -> Result<Reply<Bytes>, BoxError> {
    match &request[..] {
        b"close" => Ok(Reply::from(request).close()),
        b"abort" => {
            peer.abort();
            pending().await
        }
        b"fail" => Err("line one\r\nline two \x1b[2J\u{202e}".into()),
        b"bad" => Err(ConnectionEnded::new(EndReason::CodecError, "the peer's fault").into()),
        b"panic" => panic!("as asked\r\n\x1b[2J"),
        b"hang" => pending().await,
        _ => Ok(request.into()),
    }
}

/// Serves a stack that can end in many ways.
fn traced() -> Served {
    let make = service_fn(|peer: Peer<Bytes>| {
        ready(Ok::<_, BoxError>(service_fn(move |request| {
            act(peer.clone(), request)
        })))
    });
    serve(
        ServiceBuilder::new()
            .layer(ConnectionTraceLayer::new())
            .service(
                Pipeline::new(|| Lines::default().max_line(16))
                    .make_service(make)
                    .in_flight(4),
            ),
    )
}

/// The input of a client, the end reason that follows, and the level of the closing event.
const ENDS: [(&str, EndReason, Level); 12] = [
    ("", EndReason::PeerClosed, Level::DEBUG),
    ("a\n", EndReason::PeerClosed, Level::DEBUG),
    ("half", EndReason::Truncated, Level::DEBUG),
    ("0123456789abcdefg", EndReason::FrameTooLarge, Level::DEBUG),
    ("close\n", EndReason::ServiceClosed, Level::DEBUG),
    ("abort\n", EndReason::Aborted, Level::DEBUG),
    ("fail\n", EndReason::ServiceError, Level::WARN),
    ("bad\n", EndReason::CodecError, Level::DEBUG),
    ("panic\n", EndReason::Panic, Level::ERROR),
    ("silence", EndReason::FrameTimeout, Level::DEBUG),
    ("hang\n", EndReason::DrainDeadline, Level::WARN),
    ("hang\nkill", EndReason::Killed, Level::DEBUG),
];

#[tokio::test(start_paused = true)]
async fn k1_each_connection_has_one_span_and_one_closing_event_that_says_what_on_end_says() {
    for (text, reason, level) in ENDS {
        let (capture, _guard) = Capture::begin();
        let served = traced();
        let mut client = served.client().await;
        client.send(text).await;
        match text {
            "silence" => sleep(40 * SECOND).await,
            "hang\n" => {
                sleep(SECOND).await;
                served.handle().shutdown_within(SECOND);
            }
            "hang\nkill" => {
                sleep(SECOND).await;
                served.handle().abort();
            }
            "abort\n" => {}
            _ => client.finish().await,
        }

        let end = served.end().await;
        tokio::task::yield_now().await;

        let events = capture.events("connection.closed");
        let (open, closed) = capture.spans();
        assert_eq!(end.reason(), reason, "{text:?}");
        assert_eq!(events.len(), 1, "{text:?}: {events:?}");
        let event = &events[0];
        assert_eq!(event.level, level, "{text:?}");
        assert_eq!(event.within, ["tcp.connection"], "{text:?}");
        let fields = &event.fields;
        assert_eq!(fields.get("close.reason"), reason.as_str());
        assert_eq!(
            fields.get("close.initiator"),
            reason.initiator().as_str(),
            "{text:?}"
        );
        assert_eq!(fields.get("bytes_read"), end.bytes_read().to_string());
        assert_eq!(fields.get("bytes_written"), end.bytes_written().to_string());
        assert_eq!(fields.get("requests"), end.requests().to_string());
        assert_eq!(open.len(), 0, "{text:?}: {open:?}");
        assert_eq!(closed.len(), 1, "{text:?}: {closed:?}");
        let span = &closed[0].fields;
        for name in ["connection.id", "close.reason", "close.initiator"] {
            assert_eq!(span.get(name), fields.get(name), "{text:?}: {name}");
        }
        let status = if level <= Level::WARN { "ERROR" } else { "" };
        assert_eq!(span.get("otel.status_code"), status, "{text:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_turned_away_is_seen() {
    let (capture, _guard) = Capture::begin();
    let no = service_fn(|_: Connection<DuplexStream>| {
        ready(Err::<Connection<DuplexStream>, _>(BoxError::from(
            "no\r\nconnection.closed close.reason=peer_closed\x1b[2J",
        )))
    });
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .layer(PreConnectLayer::new(no))
        .service_fn(|_: Connection<DuplexStream>| ready(Ok::<_, BoxError>(())));
    let served = serve(stack);
    let client = served.client().await;

    let end = served.end().await;

    let events = capture.events("connection.closed");
    assert_eq!(end.reason(), EndReason::Rejected);
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].fields.get("close.reason"), "rejected");
    assert_eq!(
        events[0].fields.get("error"),
        "no\\r\\nconnection.closed close.reason=peer_closed\\u{1b}[2J"
    );
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn a_stock_timeout_is_seen_as_one_service_timeout() {
    let (capture, _guard) = Capture::begin();
    let pipeline = Pipeline::new(Lines::default).service(service_fn(|line: Bytes| async move {
        Ok::<_, BoxError>(line)
    }));
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .timeout(5 * SECOND)
        .service(pipeline);
    let served = serve(stack);
    let mut client = served.client().await;
    client.send("a\n").await;
    client.line().await;

    let end = served.end().await;

    let events = capture.events("connection.closed");
    assert_eq!(end.reason(), EndReason::ServiceTimeout);
    assert_eq!(end.duration(), 5 * SECOND);
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].fields.get("close.reason"), "service_timeout");
    assert_eq!(events[0].level, Level::WARN);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_stock_load_shedding_drops_is_seen() {
    let (capture, _guard) = Capture::begin();
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .load_shed()
        .layer(ConnectionLimit::new(0).layer())
        .service_fn(|_: Connection<DuplexStream>| ready(Ok::<_, BoxError>(())));
    let served = serve(stack);
    let client = served.client().await;

    let end = served.end().await;

    let events = capture.events("connection.closed");
    assert_eq!(end.reason(), EndReason::LimitExceeded);
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].fields.get("close.reason"), "limit_exceeded");
    drop(client);
}

#[tokio::test]
async fn the_span_has_the_names_of_open_telemetry() {
    let (capture, _guard) = Capture::begin();
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(|line: Bytes| ready(Ok::<_, BoxError>(line))));
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(pipeline);
    let served = serve_with(server, (), stack);
    let addr = served.handle().local_addrs()[0].tcp().unwrap();
    let client = tokio::net::TcpStream::connect(addr).await.unwrap();
    let from = client.local_addr().unwrap();
    let mut client = Client::new(client);
    client.send("a\n").await;
    client.finish().await;
    client.rest().await;
    drop(client);
    timeout(60 * SECOND, served.end()).await.unwrap();

    let (open, closed) = capture.spans();
    let span = open.first().or(closed.first()).unwrap();
    let expected = [
        ("otel.kind", "server".to_owned()),
        ("network.transport", "tcp".to_owned()),
        ("network.peer.address", "127.0.0.1".to_owned()),
        ("network.peer.port", from.port().to_string()),
        ("network.local.address", "127.0.0.1".to_owned()),
        ("network.local.port", addr.port().to_string()),
    ];
    assert_eq!(
        (&span.name[..], span.level),
        ("tcp.connection", Level::INFO)
    );
    for (name, value) in expected {
        assert_eq!(span.fields.get(name), value, "{name}");
    }
    assert!(!span.fields.get("connection.id").is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_address_that_a_hook_sets_is_seen_by_everybody() {
    let (capture, _guard) = Capture::begin();
    let hook = service_fn(|mut conn: Connection<DuplexStream>| {
        // As a server that listens on IPv6 sees a client of IPv4.
        conn.set_client_addr(SocketAddr::from((
            Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped(),
            4711,
        )));
        conn.insert("a fact");
        ready(Ok::<_, BoxError>(conn))
    });
    let make = service_fn(|peer: Peer<Bytes>| {
        let text = format!(
            "{} by {}",
            peer.info().client_addr(),
            peer.info().peer_addr()
        );
        ready(Ok::<_, BoxError>(service_fn(move |_request: Bytes| {
            ready(Ok::<_, BoxError>(Bytes::from(text.clone())))
        })))
    });
    let served = serve(
        ServiceBuilder::new()
            .layer(ConnectionTraceLayer::new())
            .layer(PreConnectLayer::new(hook))
            .service(Pipeline::new(Lines::default).make_service(make)),
    );
    let mut client = served.client().await;

    client.send("who?\n").await;
    assert_eq!(client.line().await, "192.0.2.7:4711 by memory:1");

    let live = served.handle().connections().next().unwrap();
    assert_eq!(live.client_addr().to_string(), "192.0.2.7:4711");
    assert_eq!(live.peer_addr(), &Address::Memory(1));
    assert_eq!(live.get(), Some(&"a fact"));
    let (open, _) = capture.spans();
    let span = open.iter().find(|span| span.name == "tcp.connection");
    assert_eq!(span.unwrap().fields.get("client.address"), "192.0.2.7");
    client.finish().await;
    served.end().await;
    let events = capture.events("connection.closed");
    let (_, closed) = capture.spans();
    let span = closed.iter().find(|span| span.name == "tcp.connection");
    for fields in [&events[0].fields, &span.unwrap().fields] {
        assert_eq!(fields.get("client.address"), "192.0.2.7");
        assert_eq!(fields.get("client.port"), "4711");
        assert_eq!(fields.get("network.peer.address"), "memory:1");
    }
}

#[tokio::test(start_paused = true)]
async fn the_totals_are_right() {
    let (capture, _guard) = Capture::begin();
    let served = traced();
    let mut client = served.client().await;
    client.send("one\ntwo\nclose\nbehind\n").await;
    client.rest().await;
    drop(client);

    let end = served.end().await;

    let events = capture.events("connection.closed");
    assert_eq!(end.bytes_written(), "one\ntwo\nclose\n".len() as u64);
    assert_eq!(end.bytes_read(), "one\ntwo\nclose\nbehind\n".len() as u64);
    assert_eq!(events[0].fields.get("bytes_written"), "14");
    assert_eq!(events[0].fields.get("bytes_read"), "21");
}

#[tokio::test(start_paused = true)]
async fn a_probe_is_not_shouted_about() {
    let (capture, _guard) = Capture::begin();
    let served = traced();
    drop(served.client().await);
    served.end().await;

    let loud: Vec<_> = capture
        .events
        .lock()
        .unwrap()
        .iter()
        .filter(|event| event.level < Level::DEBUG)
        .cloned()
        .collect();

    assert_eq!(capture.events("connection.closed").len(), 1);
    assert!(loud.is_empty(), "{loud:?}");
}

#[tokio::test(start_paused = true)]
async fn a_probe_of_tls_is_not_shouted_about() {
    let (capture, _guard) = Capture::begin();
    let (server, _) = certified();
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .layer(PreConnectLayer::new(Tls::from(server)))
        .service_fn(|_: Connection<_>| ready(Ok::<_, BoxError>(())));
    let served = serve(stack);
    drop(served.client().await);
    let end = served.end().await;

    let events = capture.events.lock().unwrap().clone();

    assert_eq!(end.reason(), EndReason::TlsHandshakeFailed);
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0].level, Level::DEBUG);
}

#[tokio::test(start_paused = true)]
async fn what_comes_before_the_first_frame_has_spans_in_that_of_the_connection() {
    let (capture, _guard) = Capture::begin();
    let (server, _) = certified();
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .layer(PreConnectLayer::new(Tls::from(server)))
        .service_fn(|_: Connection<_>| ready(Ok::<_, BoxError>(())));
    let served = serve(stack);
    drop(served.client().await);
    served.end().await;

    let (_, closed) = capture.spans();

    let [handshake, pre_connect, connection] = &closed[..] else {
        panic!("{closed:?}");
    };
    assert_eq!(connection.name, "tcp.connection");
    assert_eq!(
        (&pre_connect.name[..], pre_connect.level),
        ("pre_connect", Level::DEBUG)
    );
    assert_eq!(pre_connect.within, ["tcp.connection"]);
    assert_eq!(
        (&handshake.name[..], handshake.level),
        ("TLS server handshake", Level::DEBUG)
    );
    assert_eq!(handshake.within, ["pre_connect", "tcp.connection"]);
    assert_eq!(handshake.fields.get("error.type"), "truncated");
}

#[tokio::test(start_paused = true)]
async fn a_request_has_a_span_in_that_of_its_connection() {
    let (capture, _guard) = Capture::begin();
    let service = ServiceBuilder::new()
        .layer(RequestTraceLayer::new())
        .service_fn(|line: Bytes| async move {
            tokio::task::yield_now().await;
            tracing::info!(target: "tower_tcp", "in the service");
            match &line[..] {
                b"fail" => Err(BoxError::from("as asked")),
                _ => Ok(line),
            }
        });
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(Pipeline::new(Lines::default).service(service));
    let served = serve(stack);
    let mut client = served.client().await;
    client.send("a\nfail\n").await;
    served.end().await;

    let (_, closed) = capture.spans();

    let requests: Vec<_> = closed
        .iter()
        .filter(|span| span.name == "request")
        .collect();
    let status: Vec<_> = requests
        .iter()
        .map(|span| span.fields.get("otel.status_code"))
        .collect();
    assert_eq!(status, ["", "ERROR"]);
    assert_eq!(requests[0].within, ["tcp.connection"]);
    let inside = capture.events("in the service");
    assert_eq!(inside[0].within, ["request", "tcp.connection"]);
}

#[tokio::test(start_paused = true)]
async fn what_a_call_says_as_it_is_dropped_is_in_its_spans() {
    struct Says;
    impl Drop for Says {
        fn drop(&mut self) {
            tracing::info!(target: "tower_tcp", "dropped");
        }
    }
    let (capture, _guard) = Capture::begin();
    let service = ServiceBuilder::new()
        .layer(RequestTraceLayer::new())
        .service_fn(|_: Bytes| async move {
            let _says = Says;
            pending::<Result<Bytes, BoxError>>().await
        });
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(Pipeline::new(Lines::default).service(service));
    let served = serve(stack);
    let mut client = served.client().await;
    client.send("a\n").await;
    settled().await;

    served.handle().abort();
    served.end().await;

    let dropped = capture.events("dropped");
    assert_eq!(dropped[0].within, ["request", "tcp.connection"]);
}

#[tokio::test(start_paused = true)]
async fn a_span_of_ones_own_knows_the_request() {
    let (capture, _guard) = Capture::begin();
    let by_verb = |line: &Bytes| tracing::info_span!(target: "tower_tcp", "command", verb = ?line);
    let mut service = ServiceBuilder::new()
        .layer(RequestTraceLayer::new().make_span_with(by_verb))
        .service_fn(|_: Bytes| ready(Ok::<_, BoxError>(())));

    service.call(Bytes::from("HELO")).await.unwrap();

    let (_, closed) = capture.spans();
    assert_eq!(closed[0].name, "command");
    assert_eq!(closed[0].fields.get("verb"), "b\"HELO\"");
}

/// Returns whether text could break a line of a log or control a terminal.
fn is_raw(text: &str) -> bool {
    text.contains(|c: char| c.is_control() || c == '\u{202e}')
}

#[tokio::test(start_paused = true)]
async fn k4_no_span_or_event_contains_what_a_peer_sent() {
    let (capture, _guard) = Capture::begin();
    for text in ["s3cret\n", "s3cret", "s3cret and more than a line\n"] {
        let served = traced();
        let mut client = served.client().await;
        client.send(text).await;
        client.finish().await;
        client.rest().await;
        drop(client);
        served.end().await;
    }

    let events = capture.events.lock().expect("no test panics under it");
    assert!(events.len() >= 3);
    let told = format!("{events:?} {:?}", capture.spans());
    // As text, and as the numbers of its bytes.
    let numbers = format!("{:?}", b"s3cret");
    for secret in ["s3cret", numbers.trim_matches(['[', ']'])] {
        assert!(!told.contains(secret), "{told}");
    }
}

#[tokio::test(start_paused = true)]
async fn k2_what_errors_say_is_escaped_in_the_closing_event() {
    for text in ["fail\n", "panic\n"] {
        let (capture, _guard) = Capture::begin();
        let served = traced();
        let mut client = served.client().await;
        client.send(text).await;
        client.rest().await;
        drop(client);
        served.end().await;

        let events = capture.events("connection.closed");

        let error = events[0].fields.get("error");
        assert!(error.contains("\\u{1b}[2J"), "{error:?}");
        assert!(!is_raw(error), "{error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn k2_what_errors_say_is_escaped_where_they_end_no_connection() {
    let (capture, _guard) = Capture::begin();
    let fail = service_fn(|_: Bytes| {
        ready(Err::<Bytes, _>(BoxError::from(
            "one\r\ntwo \x1b[2J\u{202e}",
        )))
    });
    let pipeline = Pipeline::new(Lines::default)
        .service(fail)
        .shutdown_on_error(false);
    let served = serve(pipeline);
    let mut client = served.client().await;
    client.send("a\nb\n").await;
    client.finish().await;
    client.rest().await;
    drop(client);
    served.end().await;

    let events = capture.events("request.failed");

    assert_eq!(events.len(), 2);
    let error = events[0].fields.get("error");
    assert!(error.contains("\\u{1b}[2J"), "{error:?}");
    assert!(!is_raw(error), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn an_error_that_ends_only_its_http2_stream_is_reported_once() {
    for in_body in [false, true] {
        let (capture, _guard) = Capture::begin();
        let fail = service_fn(move |_: Request<RequestBody>| {
            let failed = BoxError::from("one\r\ntwo");
            ready(if in_body {
                let body = stream::iter([Ok(Frame::data(Bytes::from("half"))), Err(failed)]);
                Ok(Response::new(StreamBody::new(body)))
            } else {
                Err(failed)
            })
        });
        let served = serve(Http::new(fail));
        let (sender, connection) = http2(served.stream().await).await;
        let request = Request::get("http://localhost/").body(());

        let response = sender.send_request(request.unwrap()).await;

        // The reset of the stream overtakes a response that is not written yet.
        assert!(response.is_err());
        drop((sender, connection));
        assert_eq!(served.reason().await, EndReason::PeerClosed);
        let events = capture.events("request.failed");
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].fields.get("error"), "one\\r\\ntwo");
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_the_peer_breaks_off_is_no_warning_over_http2() {
    let (capture, _guard) = Capture::begin();
    let reads = service_fn(|request: Request<RequestBody>| async move {
        let body = request.into_body().collect().await?.to_bytes();
        Ok::<_, RequestBodyError>(Response::new(Full::new(body)))
    });
    let served = serve(Http::new(reads));
    let (sender, connection) = http2(served.stream().await).await;
    let request = Request::post("http://localhost/").body(());
    let (response, mut body) = sender.begin(request.unwrap(), false).unwrap();
    settled().await;

    body.send_reset(h2::Reason::CANCEL);

    assert!(response.await.is_err());
    drop((sender, body, connection));
    assert_eq!(served.reason().await, EndReason::PeerClosed);
    let events = capture.events("request.failed");
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].level, Level::DEBUG);
}

#[tokio::test]
async fn k2_the_path_of_a_unix_peer_is_escaped() {
    let (capture, _guard) = Capture::begin();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("server");
    let server = Server::bind(format!("unix:{}", path.display()).as_str())
        .await
        .unwrap();
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(|line: Bytes| ready(Ok::<_, BoxError>(line))));
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(pipeline);
    let served = serve_with(server, (), stack);
    let client = UnixSocket::new_stream().unwrap();
    client.bind(dir.path().join("a\nb\x1b[2J")).unwrap();
    drop(client.connect(&path).await.unwrap());
    timeout(60 * SECOND, served.end()).await.unwrap();

    let events = capture.events("connection.closed");

    let peer = events[0].fields.get("network.peer.address");
    assert!(peer.ends_with("a\\nb\\u{1b}[2J"), "{peer:?}");
    assert!(!is_raw(peer), "{peer:?}");
}

#[tokio::test(start_paused = true)]
async fn a_panicking_on_end_callback_costs_the_others_nothing() {
    let (capture, _guard) = Capture::begin();
    let stack = ServiceBuilder::new()
        .map_request(|conn: Connection<DuplexStream>| {
            conn.on_end(|_| panic!("in the callback"));
            conn
        })
        .layer(ConnectionTraceLayer::new())
        .service(
            Pipeline::new(Lines::default)
                .service(service_fn(|line: Bytes| ready(Ok::<_, BoxError>(line))))
                .limits(Limits::default()),
        );
    let served = serve(stack);
    drop(served.client().await);

    served.end().await;
    while served.handle().live() > 0 {
        tokio::task::yield_now().await;
    }

    assert_eq!(capture.events("connection.closed").len(), 1);
    assert_eq!(served.handle().limit().in_use(), 0);
}
