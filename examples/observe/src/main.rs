//! An echo server to operate: metrics, spans, and a list of its connections.
//!
//! ```sh
//! cd examples/observe
//! cargo run
//! printf 'hi\n' | nc -N 127.0.0.1 7000
//! curl http://127.0.0.1:7001/metrics
//! watch curl -s http://127.0.0.1:7001/connections
//! ```
//!
//! Metrics are in Prometheus' format. The admin pages are on a second address of the same server,
//! which chooses the protocol by the address. That address therefore shares the server's limit and
//! its drain. If it must answer at all times, make it a server of its own (`PROTOCOLS.md`). Spans
//! go to standard output in OpenTelemetry's form; `--sample 0.01` exports those of one connection
//! in a hundred. In a browser the list of connections reloads by itself.

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
    /// Address to listen on for lines: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7000")]
    listen: Vec<String>,

    /// Address of the admin pages. No line address may have its port.
    #[arg(long, default_value = "127.0.0.1:7001")]
    admin: SocketAddr,

    /// Fraction of the connections whose spans are exported, from 0 to 1.
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
    println!("{report}");
    Ok(())
}
