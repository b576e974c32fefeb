//! Receives mail. Shows how to write a stateful protocol with this library, with one file for each
//! idea.
//!
//! | file | content |
//! | --- | --- |
//! | `command.rs`, `answer.rs` | the commands of a client, and the answers of the server |
//! | `codec.rs` | a codec with two modes: commands and answers as lines, and the text of a mail |
//! | `session.rs` | the session of one client: which command is allowed when |
//! | `service.rs` | two pipelines, and STARTTLS between them |
//! | `store.rs`, `memory.rs`, `maildir.rs` | the stored mails; independent of connections |
//! | `main.rs` | the stack, and the shutdown |
//!
//! ```sh
//! cargo run --example smtp -- --maildir /tmp/mails
//! swaks --server 127.0.0.1:2525 --to you@example.com --tls
//! openssl s_client -quiet -starttls smtp -crlf -connect 127.0.0.1:2525
//! ```
//!
//! This is only an example: it accepts mail for everybody, and forwards none.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tempfile::TempDir;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tower::util::Either;
use tower::{Layer, ServiceExt};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::bind::Socket;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Handle, Rewind, Server};
use tracing_subscriber::EnvFilter;

use door::Door;
use maildir::Maildir;
use memory::Memory;
use session::Shared;
use store::Store;

mod answer;
mod codec;
mod command;
#[path = "../door/mod.rs"]
mod door;
mod maildir;
mod memory;
mod service;
mod session;
mod store;

/// The number of mails of the maximum size for which there is room in memory, including incoming
/// mails. New mails evict the oldest.
const LARGEST_IN_MEMORY: usize = 4;

/// The deadline for incoming mails at a shutdown.
const LEAVING: Duration = Duration::from_secs(30);

/// Receives mail, into memory or a maildir.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:2525")]
    listen: Vec<String>,

    /// Maildir to deliver to. It is created if it does not exist. Without this option, the last
    /// mails are kept in memory.
    #[arg(long)]
    maildir: Option<PathBuf>,

    /// Maximum size of a mail, in octets.
    #[arg(long, default_value_t = 25_000_000)]
    max_size: u32,

    /// Name of the server in its replies.
    #[arg(long, default_value = "localhost")]
    hostname: String,

    /// Certificate chain, in PEM. Without it, a self-signed certificate is made.
    #[arg(long, requires = "key")]
    cert: Option<PathBuf>,

    /// Private key of the certificate, in PEM.
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,

    /// Maximum number of open connections. Further ones get a 421.
    #[arg(long, default_value_t = 1_000)]
    max_connections: usize,

    #[command(flatten)]
    door: Door,
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

    let own = tempfile::tempdir()?; // removed at the end
    let (cert, key) = match args.cert.zip(args.key) {
        Some(given) => given,
        None => self_signed(&own, &args.hostname)?,
    };
    let tls = Tls::builder().pem_files(cert, key).build()?;
    let memory = Memory::new(LARGEST_IN_MEMORY * args.max_size as usize);
    let store = match &args.maildir {
        Some(dir) => Store::Maildir(Maildir::open(dir, &args.hostname)?),
        None => Store::Memory(memory.clone()),
    };
    let shared = Arc::new(Shared::new(args.hostname, args.max_size.into(), store));

    let limit = ConnectionLimit::new(args.max_connections);
    let (filter, hooks) = args.door.open()?;
    let stack = match hooks {
        Some(hooks) => {
            let smtp = service::smtp::<Rewind<Socket>>(Arc::clone(&shared), tls, &limit);
            Either::Left(hooks.layer(smtp.map_response(drop)))
        }
        None => {
            let smtp = service::smtp::<Socket>(Arc::clone(&shared), tls, &limit);
            Either::Right(smtp.map_err(Into::<BoxError>::into).map_response(drop))
        }
    };
    let stack = ConnectionTraceLayer::new().layer(stack);

    let server = Server::builder()
        .name("smtp")
        .address_filter(filter)
        .limit(ConnectionLimit::unlimited()) // the limit in the stack is enough
        .listen_all(args.listen)
        .bind()
        .await?;
    let signals = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    tokio::spawn(shut_down(signals, server.handle(), shared));
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        let how = if address.tcp().is_some() {
            "server"
        } else {
            "socket"
        };
        let at = address.to_string();
        let at = at.trim_start_matches("unix:");
        println!("try: swaks --{how} {at} --to you@example.com --tls");
    }
    let report = server.serve(stack).await?;
    if args.maildir.is_none() {
        println!("{} mails were in memory", memory.mails().len());
    }
    println!("{report}");
    Ok(())
}

/// Shuts down at the first signal: accepts no more connections and no more mails, completes
/// incoming mails, and sends every client a 421. At the second signal, aborts all connections.
///
/// A drain waits only for a frame that has begun. A mail consists of many frames, so this function
/// waits for incoming mails before the drain.
async fn shut_down(
    (mut terminate, mut interrupt): (Signal, Signal),
    handle: Handle,
    shared: Arc<Shared>,
) {
    signalled(&mut terminate, &mut interrupt).await;
    handle.pause();
    let _no_more_mails = tokio::select! {
        none = shared.finish_mails() => Some(none),
        () = tokio::time::sleep(LEAVING) => None,
        () = signalled(&mut terminate, &mut interrupt) => return handle.abort(),
    };
    handle.shutdown();
    tokio::select! {
        _ = handle.closed() => {}
        () = signalled(&mut terminate, &mut interrupt) => handle.abort(),
    }
}

async fn signalled(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Makes a self-signed certificate.
fn self_signed(dir: &TempDir, hostname: &str) -> Result<(PathBuf, PathBuf), BoxError> {
    let made = rcgen::generate_simple_self_signed([hostname.to_owned()])?;
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    Ok((cert, key))
}
