//! The export of spans and metrics.

use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use opentelemetry_stdout::SpanExporter;
use tower_tcp::observe::describe_metrics;
use tracing_subscriber::filter::{EnvFilter, LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// The interval of the exporter's upkeep. Without it, histograms would grow while nobody scrapes
/// the server.
const UPKEEP: Duration = Duration::from_secs(5);

/// Buckets in seconds for a request or a handshake, as OpenTelemetry recommends for HTTP.
const SHORT: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];

/// Buckets in seconds for a connection: from a probe to a day.
const LONG: [f64; 8] = [0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3_600.0, 86_400.0];

/// Exports spans to standard output, and logs warnings, or what `RUST_LOG` selects, to standard
/// error. Shut the returned provider down before exiting, because it buffers spans.
pub(crate) fn export_spans(service: &'static str, sample: f64) -> SdkTracerProvider {
    // A connection is the root of its trace, so either all of its spans are exported or none.
    let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(sample)));
    let provider = SdkTracerProvider::builder()
        .with_sampler(sampler)
        .with_resource(Resource::builder().with_service_name(service).build())
        .with_batch_exporter(SpanExporter::default())
        .build();
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("tower_tcp"))
        .with_filter(Targets::new().with_target("tower_tcp", LevelFilter::DEBUG));
    let log = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    let log = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_filter(log);
    tracing_subscriber::registry().with(spans).with(log).init();
    provider
}

/// Records metrics from now on. The returned handle renders them.
pub(crate) fn record_metrics() -> Result<PrometheusHandle, BuildError> {
    let connections = Matcher::Full("tower_tcp.connection.duration".to_owned());
    let metrics = PrometheusBuilder::new()
        .with_recommended_naming(true)
        .set_buckets(&SHORT)?
        .set_buckets_for_metric(connections, &LONG)?
        .install_recorder()?;
    describe_metrics();
    let upkeep = metrics.clone();
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(UPKEEP);
        loop {
            interval.tick().await;
            upkeep.run_upkeep();
        }
    });
    Ok(metrics)
}
