//! An echo server to operate: metrics, spans, and who is connected.
//!
//! ```sh
//! cd examples/observe
//! cargo run
//! printf 'hi\n' | nc -N 127.0.0.1 7000
//! curl http://127.0.0.1:7001/metrics
//! watch curl -s http://127.0.0.1:7001/connections
//! ```
//!
//! Metrics are in Prometheus' format, at an address of the same server, which chooses by it. So that address shares the server's limit and its
//! drain: where it has to answer at all times, make it a server of its own (`PROTOCOLS.md`). Spans go to standard output as OpenTelemetry
//! has them; `--sample 0.01` takes those of one connection in a hundred. In a browser the table of connections is a page that stays up to date.

mod admin;
mod telemetry;

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use clap::Parser;
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::bind::Socket;
use tower_tcp::frame::Lines;
use tower_tcp::http::Http;
use tower_tcp::observe::{ConnectionTraceLayer, RequestMetricsLayer, RequestTraceLayer};
use tower_tcp::preconnect::Either;
use tower_tcp::{BoxError, Connection, Pipeline, Server, signal};

/// An echo server to operate.
#[derive(Parser)]
struct Args {
    /// Where to listen for lines: `host:port` or `unix:/path`; may be given several times.
    #[arg(long, default_value = "127.0.0.1:7000")]
    listen: Vec<String>,

    /// Where to listen for those who operate it. The port is this one's alone.
    #[arg(long, default_value = "127.0.0.1:7001")]
    admin: SocketAddr,

    /// Of which part of the connections spans are exported, from 0 to 1.
    #[arg(long, default_value_t = 1.0)]
    sample: f64,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let spans = telemetry::export_spans("observe", args.sample);
    let metrics = telemetry::record_metrics()?;

    let server = Server::builder()
        .name("observe")
        .listen_all(args.listen)
        .listen(args.admin)
        .bind()
        .await?;
    let handle = server.handle();
    signal::install(&handle)?;
    let addresses = handle.local_addrs();
    for address in addresses {
        println!("listening on {address}");
    }
    let admin_port = addresses.last().and_then(|last| Some(last.tcp()?.port()));
    if let Some(port) = admin_port {
        println!("try: curl http://{}:{port}/metrics", args.admin.ip());
    }

    let echo = ServiceBuilder::new()
        .layer(RequestTraceLayer::new())
        .layer(RequestMetricsLayer::with_attributes([(
            "server.name",
            "observe",
        )]))
        .service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let lines = Pipeline::new(Lines::default).service(echo);
    let admin = Http::new(service_fn(move |request| {
        let answer = admin::answer(&handle, &metrics, &request);
        async move { Ok::<_, Infallible>(answer) }
    }));
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service_fn(move |conn: Connection<Socket>| {
            let port = conn.info().local_addr().tcp().map(|local| local.port());
            if port.is_some() && port == admin_port {
                Either::Left(admin.clone().oneshot(conn))
            } else {
                Either::Right(lines.clone().oneshot(conn))
            }
        });
    let report = server.serve(stack).await?;
    spans.shutdown()?;
    println!(
        "{} connections drained, {} cut off",
        report.drained, report.aborted
    );
    Ok(())
}
