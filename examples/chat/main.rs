//! A chat with names and rooms: messages to a connection's own service, a timer, and broadcasts that wait for nobody.
//!
//! | file | what it is |
//! | --- | --- |
//! | `session.rs` | the service of one connection: what its member says, and what it is told |
//! | `rooms.rs` | who is there, and where: the registries |
//! | `main.rs` | the stack, the limits and their reasons |
//!
//! ```sh
//! cargo run --example chat
//! nc 127.0.0.1 7004        # and again in another terminal
//! ```
//!
//! Give a name, `/join` a room, and talk; `/help` lists the rest. Whoever leaves, the room is told why. Suspend one `nc`, and have
//! another send much: the first is dropped as a `slow_reader`, and nobody has waited for it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::bind::SocketOptions;
use tower_tcp::frame::Lines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::pipeline::Limits;
use tower_tcp::{BoxError, Pipeline, Server, signal};
use tracing_subscriber::EnvFilter;

use rooms::{Chat, Name};
use session::{Peer, Session};

mod rooms;
mod session;

/// The longest line in bytes, its ending included: more than anyone types.
const MAX_LINE: usize = 1024;
/// What the system may hold for a member that does not read, in bytes; by itself it would hold megabytes.
const SEND_BUFFER: usize = 64 * 1024;

/// A chat of lines: names, rooms, private messages.
#[derive(Parser)]
struct Args {
    /// Where to listen: `host:port` or `unix:/path`; may be given several times.
    #[arg(long, default_value = "127.0.0.1:7004")]
    listen: Vec<String>,

    /// Seconds after which a silent member is sent away.
    #[arg(long, default_value_t = 600)]
    idle: u64,

    /// A name that may kick anybody; may be given several times. There are no passwords: it is whoever comes first.
    #[arg(long, value_parser = Name::new)]
    admin: Vec<Name>,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();

    let chat = Arc::new(Chat::new(args.admin));
    let idle = Duration::from_secs(args.idle);
    let make = service_fn(move |peer: Peer| {
        let chat = Arc::clone(&chat);
        async move {
            let session = Session::begin(chat, peer, idle).await?;
            Ok::<_, BoxError>(service_fn(move |event| {
                let session = Arc::clone(&session);
                async move { Ok::<_, Infallible>(session.event(event).await) }
            }))
        }
    });
    // Who is silent for too long is told so by the session itself.
    let limits = Limits::default()
        .max_frame(MAX_LINE)
        .first_byte(None)
        .idle(None);
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(
            Pipeline::new(|| Lines::default().max_line(MAX_LINE))
                .make_event_service(make)
                .limits(limits),
        );

    let server = Server::builder()
        .name("chat")
        .socket_options(SocketOptions::default().send_buffer(SEND_BUFFER))
        .listen_all(args.listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        if let Some(addr) = address.tcp() {
            println!("try: nc {} {}", addr.ip(), addr.port());
        }
    }
    let report = server.serve(stack).await?;
    println!(
        "{} connections drained, {} cut off",
        report.drained, report.aborted
    );
    Ok(())
}
