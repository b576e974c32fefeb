//! Tests layers of other crates around the requests of one server.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use axum::routing::get;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, sleep};
use tower::ServiceBuilder;
use tower::limit::ConcurrencyLimitLayer;
use tower_governor::governor::GovernorConfigBuilder;
use tower_governor::key_extractor::KeyExtractor;
use tower_governor::{GovernorError, GovernorLayer};
use tower_http::compression::CompressionLayer;
use tower_http::cors::CorsLayer;
use tower_http::timeout::TimeoutLayer;
use tower_http::trace::TraceLayer;
use tower_tcp::http::Http;
use tower_tcp::testkit::{Connector, memory};
use tower_tcp::{ConnectionInfo, Server};

/// The maximum number of requests that a connection may send at once before it has to wait for a
/// minute.
const BURST: u32 = 4;

/// The key of the rate limit: each connection has its own limit.
#[derive(Clone)]
struct ByConnection;

impl KeyExtractor for ByConnection {
    type Key = u64;

    fn extract<T>(&self, request: &Request<T>) -> Result<u64, GovernorError> {
        let info = request.extensions().get::<ConnectionInfo>();
        let info = info.ok_or(GovernorError::UnableToExtractKey)?;
        Ok(info.id().get())
    }
}

async fn second() -> String {
    sleep(Duration::from_secs(1)).await;
    "x".repeat(1000)
}

/// Serves with layers of tower, tower-http and `tower_governor` together. Also returns the counter
/// of requests that were traced until their answer.
fn serve() -> (Connector, Arc<AtomicUsize>) {
    let traced = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&traced);
    let per_connection = GovernorConfigBuilder::default()
        .period(Duration::from_secs(60))
        .burst_size(BURST)
        .key_extractor(ByConnection)
        .finish()
        .expect("neither is zero");
    let app = Router::new()
        .route("/second", get(second))
        .route("/never", get(std::future::pending::<String>));
    let requests = ServiceBuilder::new()
        .layer(
            TraceLayer::new_for_http().on_response(move |_: &Response<_>, _, _: &_| {
                counter.fetch_add(1, Ordering::Relaxed);
            }),
        )
        .layer(CorsLayer::permissive())
        .layer(CompressionLayer::new())
        .layer(GovernorLayer::new(per_connection))
        .layer(ConcurrencyLimitLayer::new(1))
        .layer(TimeoutLayer::with_status_code(
            StatusCode::REQUEST_TIMEOUT,
            Duration::from_secs(10),
        ))
        .service(app);
    let (listener, connector) = memory();
    let server = Server::from_listener(listener);
    tokio::spawn(server.serve(Http::new(requests)));
    (connector, traced)
}

async fn connect(connector: &Connector) -> SendRequest<Body> {
    let io = connector.connect().await.expect("it listens");
    let (sender, conn) = handshake(TokioIo::new(io)).await.expect("it is open");
    tokio::spawn(conn);
    sender
}

async fn ask(client: &mut SendRequest<Body>, path: &str) -> Response<hyper::body::Incoming> {
    client.ready().await.expect("it is open");
    let request = Request::get(path)
        .header("host", "localhost")
        .header("origin", "http://elsewhere")
        .header("accept-encoding", "gzip");
    let request = request.body(Body::empty()).expect("a request");
    client.send_request(request).await.expect("an answer")
}

#[tokio::test(start_paused = true)]
async fn trace_cors_compression_rate_concurrency_and_timeout_all_do_their_work() {
    let (connector, traced) = serve();
    let (mut one, mut other) = (connect(&connector).await, connect(&connector).await);
    let begun = Instant::now();

    let (first, second) = tokio::join!(ask(&mut one, "/second"), ask(&mut other, "/second"));

    // The requests ran one after the other, although they arrived together.
    assert_eq!(begun.elapsed().as_secs(), 2);
    for answer in [&first, &second] {
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["access-control-allow-origin"], "*");
        assert_eq!(answer.headers()["content-encoding"], "gzip");
    }
    drop((first, second));
    assert_eq!(traced.load(Ordering::Relaxed), 2);

    let late = ask(&mut one, "/never").await;

    assert_eq!(late.status(), StatusCode::REQUEST_TIMEOUT);
    assert_eq!(begun.elapsed().as_secs(), 12);

    for _ in 2..BURST {
        assert_eq!(ask(&mut one, "/").await.status(), StatusCode::NOT_FOUND);
    }
    let beyond = ask(&mut one, "/").await;
    assert_eq!(beyond.status(), StatusCode::TOO_MANY_REQUESTS);
    // Another connection has its own count.
    assert_eq!(ask(&mut other, "/").await.status(), StatusCode::NOT_FOUND);
}
