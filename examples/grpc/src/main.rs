//! Serves gRPC: tonic's health service, and a service with a method of each kind (unary, and with
//! streams in one or both directions).
//!
//! ```sh
//! cd examples/grpc
//! cargo run
//! grpcurl -plaintext -proto proto/tally.proto -d '{"value": 2}' 127.0.0.1:7050 tally.Tally/Add
//! grpcurl -plaintext -proto proto/tally.proto 127.0.0.1:7050 tally.Tally/Watch
//! printf '\0\0\0\0\2\10\2' | curl -s --http2-prior-knowledge -H 'content-type: application/grpc' \
//!     --data-binary @- http://127.0.0.1:7050/tally.Tally/Add | xxd
//! ```
//!
//! The last command spells out the bytes of the request that the first `grpcurl` sends: an
//! uncompressed message of two bytes, which sets the first field to 2.
//!
//! `build.rs` compiles `proto/tally.proto` without protoc. With `--cert` and `--key` everything is
//! behind TLS. On ctrl-c the health service reports `NOT_SERVING` at once, also to its watchers.
//! For the time of `--lame-duck`, the server still accepts and serves, so that a load balancer can
//! notice. Then clients get a `GOAWAY`. Calls in progress complete, and the server ends streams
//! that have no end of their own.
//!
//! A client may stream many small messages to a service that reads slowly. About 33,000 messages of
//! less than 256 bytes may wait on a connection. If there are more, h2 ends the connection. To
//! allow more, raise `initial_connection_window_size` with `Http::configure`.

mod pb {
    #![allow(
        clippy::allow_attributes,
        clippy::allow_attributes_without_reason,
        clippy::doc_markdown,
        clippy::return_self_not_must_use,
        unreachable_pub,
        reason = "the code is generated"
    )]

    tonic::include_proto!("tally");
}
mod tally;

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};
use tower::ServiceBuilder;
use tower_tcp::http::Http;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Handle, Server, ServerPhase};
use tracing_subscriber::EnvFilter;

use pb::tally_server::TallyServer;
use tally::Counter;

/// The largest message, in bytes. A connection may have 200 concurrent calls (hyper's default),
/// each with a message in memory: 800 MiB with tonic's default of 4 MiB.
const LARGEST_MESSAGE: usize = 4096;

/// Serves gRPC.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7050")]
    listen: Vec<String>,

    /// Certificate chain, in PEM. Without it there is no TLS.
    #[arg(long, requires = "key")]
    cert: Option<PathBuf>,

    /// Private key of the certificate, in PEM.
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,

    /// Seconds for which the server still accepts and serves after a signal.
    #[arg(long, default_value_t = 0)]
    lame_duck: u64,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    tracing_subscriber::fmt()
        .log_internal_errors(false) // printing them panics if stderr fails
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();

    let (health, health_service) = health_reporter();
    health.set_serving::<TallyServer<Counter>>().await;
    let tally = TallyServer::new(Counter::default());
    let services = Routes::new(health_service.max_decoding_message_size(LARGEST_MESSAGE))
        .add_service(tally.max_decoding_message_size(LARGEST_MESSAGE))
        .prepare();
    let tls = match args.cert.zip(args.key) {
        Some((cert, key)) => Some(Tls::builder().pem_files(cert, key).alpn(["h2"]).build()?),
        None => None,
    };
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .option_layer(tls.map(PreConnectLayer::new))
        .service(Http::new(services));

    let server = Server::builder()
        .name("grpc")
        .lame_duck(Duration::from_secs(args.lame_duck))
        .listen_all(args.listen)
        .bind()
        .await?;
    tower_tcp::signal::install(&server.handle())?;
    tokio::spawn(say_not_serving(health, server.handle()));
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
    }
    println!("{}", server.serve(stack).await?);
    Ok(())
}

/// Reports `NOT_SERVING` once a shutdown has begun, and ends the health watches when the drain
/// begins.
async fn say_not_serving(mut health: HealthReporter, handle: Handle) {
    let services = ["", TallyServer::<Counter>::NAME];
    handle.reached(ServerPhase::LameDuck).await;
    for service in services {
        let status = ServingStatus::NotServing;
        health.set_service_status(service, status).await;
    }
    handle.reached(ServerPhase::Draining).await;
    for service in services {
        // Ends the watchers' streams after their last status. Otherwise they would last until the
        // shutdown deadline.
        health.clear_service_status(service).await;
    }
}
