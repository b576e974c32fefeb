//! The pages for the operators of the server.

use std::fmt::Write;

use metrics_exporter_prometheus::PrometheusHandle;
use tower_tcp::Handle;
use tower_tcp::http::RequestBody;
use tower_tcp::http::hyper::header::{CONTENT_TYPE, REFRESH};
use tower_tcp::http::hyper::{Request, Response, StatusCode};

/// The media type that Prometheus expects.
/// (<https://prometheus.io/docs/instrumenting/exposition_formats/>)
const METRICS: &str = "text/plain; version=0.0.4";

pub(crate) fn answer(
    handle: &Handle,
    metrics: &PrometheusHandle,
    request: &Request<RequestBody>,
) -> Response<String> {
    let answer = Response::builder();
    let answer = match request.uri().path() {
        "/metrics" => {
            handle.collect_metrics();
            answer.header(CONTENT_TYPE, METRICS).body(metrics.render())
        }
        // A browser reloads this page every second.
        "/connections" => answer.header(REFRESH, 1).body(table(handle)),
        "/" => answer.body("/metrics\n/connections\n".to_owned()),
        _ => answer.status(StatusCode::NOT_FOUND).body(String::new()),
    };
    answer.expect("constants make good headers")
}

/// Lists the open connections.
fn table(handle: &Handle) -> String {
    let mut table = format!(
        "{:>8} {:<12} {:>10} {:>10} {:>12} {:>12}  peer\n",
        "id", "phase", "seconds", "requests", "read", "written"
    );
    for live in handle.connections() {
        let written = writeln!(
            table,
            "{:>8} {:<12} {:>10.1} {:>10} {:>12} {:>12}  {}",
            live.id(),
            live.phase().as_str(),
            live.age().as_secs_f64(),
            live.requests(),
            live.bytes_read(),
            live.bytes_written(),
            live.peer_addr(),
        );
        written.expect("a string takes everything");
    }
    table
}
