//! A chat with names and rooms: sessions, messages to them, a farewell, and broadcasts that no slow
//! reader delays.
//!
//! | file | content |
//! | --- | --- |
//! | `session.rs` | the session of one connection: its member's commands, and messages to it |
//! | `rooms.rs` | the registries: one of all names, and one for each room |
//! | `service.rs` | the service of one connection: its codec, limits and deadlines |
//! | `main.rs` | the stack, and the server |
//!
//! ```sh
//! cargo run --example chat
//! nc 127.0.0.1 7004        # and again in another terminal
//! ```
//!
//! Give a name, `/join` a room, and talk; `/help` lists the rest. When a member leaves, the others
//! in the room are told why. Suspend one `nc`, and send a lot of text from another one. The server
//! closes the suspended one as a `slow_reader`, and nobody else is delayed.

use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tower::ServiceBuilder;
use tower_tcp::bind::SocketOptions;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::{BoxError, Server, signal};
use tracing_subscriber::EnvFilter;

use rooms::{Chat, Name};

mod rooms;
mod service;
mod session;

/// The size of the kernel's send buffer of each connection, in bytes. By default, the buffer of a
/// member that does not read grows to megabytes.
const SEND_BUFFER: usize = 64 * 1024;

/// A chat of lines: names, rooms, private messages.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7004")]
    listen: Vec<String>,

    /// Seconds after which a silent member is disconnected.
    #[arg(long, default_value_t = 600)]
    idle: u64,

    /// Seconds after which a member that reads nothing is disconnected.
    #[arg(long, default_value_t = 5)]
    patience: u64,

    /// Name of a member who may kick anybody; can be repeated. There are no passwords, so the name
    /// belongs to whoever enters it first.
    #[arg(long, value_parser = Name::new)]
    admin: Vec<Name>,
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

    let chat = Arc::new(Chat::new(args.admin, Duration::from_secs(args.patience)));
    let idle = Duration::from_secs(args.idle);
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(service::chat(chat, idle));

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
    println!("{}", server.serve(stack).await?);
    Ok(())
}
