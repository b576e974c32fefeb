//! Faulty peers cause no warnings of the crate, and the documented filter silences those of its
//! dependencies.

mod support;

use std::future::{pending, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use hyper::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::{Layer, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::observe::{ConnectionTraceLayer, RequestTraceLayer};
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{BoxError, Pipeline};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{self, Context, SubscriberExt};

use support::{Clients, Ends};

/// The number of peers with each fault.
const PEERS: usize = 50;

/// Counts warnings and errors: those of the crate, and others.
#[derive(Clone, Default)]
struct Warnings(Arc<[AtomicUsize; 2]>);

impl Warnings {
    fn taken(&self) -> [usize; 2] {
        [0, 1].map(|n| self.0[n].swap(0, Ordering::Relaxed))
    }
}

impl<S: Subscriber> layer::Layer<S> for Warnings {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let of_others = !event.metadata().target().starts_with("tower_tcp");
        if *event.metadata().level() <= Level::WARN {
            self.0[usize::from(of_others)].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Has peers send these bytes and read to the end.
async fn send(served: &Served, bytes: &[u8]) {
    for _ in 0..PEERS {
        let mut client = served.stream().await;
        // The server may have ended the connection before it has read everything.
        let _ended = client.write_all(bytes).await;
        let _ended = client.shutdown().await;
        let _ended = client.read_to_end(&mut Vec::new()).await;
        served.end().await;
    }
}

/// HTTP/2 with streams that are reset as soon as they have begun.
fn resets() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    for stream in (1..1_000_u32).step_by(2) {
        bytes.extend(b"\0\0\x06\x01\x05");
        bytes.extend(stream.to_be_bytes());
        bytes.extend(b"\x82\x86\x41\x01a\x84\0\0\x04\x03\0");
        bytes.extend(stream.to_be_bytes());
        bytes.extend(8_u32.to_be_bytes());
    }
    bytes
}

async fn faulty_peers() {
    let echo = service_fn(|line: Bytes| ready(Ok::<_, BoxError>(line)));
    let codec = || Lines::default().max_line(10);
    let pipeline = Pipeline::new(codec).service(RequestTraceLayer::new().layer(echo));
    let served = serve(ConnectionTraceLayer::new().layer(pipeline));
    for bytes in [&b"half"[..], b"much too long\n"] {
        send(&served, bytes).await;
    }
    let never =
        service_fn(|_: Request<RequestBody>| pending::<Result<Response<String>, BoxError>>());
    let served = serve(ConnectionTraceLayer::new().layer(Http::new(never)));
    for bytes in [&b"GET"[..], b"\x16no HTTP\r\n\r\n", &resets()] {
        send(&served, bytes).await;
    }
}

#[tokio::test(start_paused = true)]
async fn faulty_peers_cause_no_warnings_but_those_that_the_documented_filter_silences() {
    let warnings = Warnings::default();
    let all = tracing_subscriber::registry().with(warnings.clone());
    {
        let _guard = tracing::subscriber::set_default(all);
        faulty_peers().await;
    }
    let [own, others] = warnings.taken();
    assert_eq!(own, 0);
    assert!(others >= PEERS, "h2 warns of resets: {others}");

    let filter = EnvFilter::new("info,rustls=error,h2=error");
    let filtered = tracing_subscriber::registry()
        .with(filter)
        .with(warnings.clone());
    {
        let _guard = tracing::subscriber::set_default(filtered);
        faulty_peers().await;
    }
    assert_eq!(warnings.taken(), [0, 0]);
}
