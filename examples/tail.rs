//! Streams a growing file to every client: a server that only pushes.
//!
//! ```sh
//! cargo run --example tail -- /var/log/syslog
//! nc 127.0.0.1 7005
//! ```
//!
//! Each client reads the file at its own pace. A slow client delays nobody, and catches up later. A
//! truncated file is read again from its start. If the file is replaced by another one, the new
//! file is read after the rest of the old one. The file is polled, not watched. So the server does
//! not notice that a file is truncated and grows back to its old length between two polls. Of two
//! replacements between two polls, it sees only the second.

use std::convert::Infallible;
use std::fs::{File, Metadata};
use std::future::ready;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use clap::Parser;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio_util::codec::BytesCodec;
use tower::Layer;
use tower::make::Shared;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::bind::SocketOptions;
use tower_tcp::deadline::Deadlines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::pipeline::OnConnectLayer;
use tower_tcp::{BoxError, Peer, Pipeline, Server, signal};
use tracing_subscriber::EnvFilter;

/// The number of bytes that are read from the file at a time. For a client that does not read, the
/// server buffers this many bytes in addition to the output up to the high mark.
const CHUNK: usize = 16 * 1024;

/// The time after which the system probes a client to which nothing is sent. Without these probes,
/// the connections of a machine that has vanished would stay open as long as the file is unchanged.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Streams a growing file to every client.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7005")]
    listen: Vec<String>,

    /// Begin at the start of the file, not at its end.
    #[arg(long)]
    from_start: bool,

    /// Milliseconds between two polls of the file.
    #[arg(long, default_value = "200", value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,

    /// The file to stream.
    file: PathBuf,
}

/// The file at the last poll.
#[derive(Clone)]
struct Seen {
    file: Arc<File>,
    len: u64,
    /// The number of times that the file was shorter than before.
    cuts: u64,
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

    let file = Arc::new(File::open(&args.file)?);
    let len = file.metadata()?.len();
    let (seen, news) = watch::channel(Seen { file, len, cuts: 0 });
    let connected = OnConnectLayer::new(move |peer| {
        let news = news.clone();
        // This task ends with the connection, and an error of the task ends the connection.
        tokio::spawn(async move {
            if let Err(err) = follow(&peer, news, args.from_start).await {
                peer.close_because(err);
            }
        });
        ready(Ok::<_, Infallible>(()))
    });
    let ignore = service_fn(|_: BytesMut| ready(Ok::<_, Infallible>(None::<Bytes>)));
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(
            Pipeline::new(BytesCodec::new)
                .make_service(connected.layer(Shared::new(ignore)))
                // Clients send nothing, so their silence must not end the connection.
                .deadlines(Deadlines::default().first_byte(None).idle(None)),
        );

    let server = Server::builder()
        .name("tail")
        .socket_options(SocketOptions::default().keepalive(KEEPALIVE))
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
    tokio::spawn(look(args.file, Duration::from_millis(args.every), seen));
    println!("{}", server.serve(stack).await?);
    Ok(())
}

/// Polls the file, and wakes the clients when it has changed.
async fn look(path: PathBuf, every: Duration, seen: watch::Sender<Seen>) {
    let mut ticks = tokio::time::interval(every);
    let mut trouble = None;
    loop {
        ticks.tick().await;
        let (path, before) = (path.clone(), seen.borrow().clone());
        // The last state stays in place until there is a new one.
        match spawn_blocking(move || news(&path, &before)).await {
            Ok(Ok(Some(now))) => drop(seen.send_replace(now)),
            // During a log rotation, the file is missing for a moment.
            Ok(Err(err)) if err.kind() != io::ErrorKind::NotFound => {
                let err = err.to_string();
                if trouble.as_ref() != Some(&err) {
                    tracing::warn!("no news of the file: {err}");
                    trouble = Some(err);
                }
            }
            _ => trouble = None,
        }
    }
}

fn news(path: &Path, before: &Seen) -> io::Result<Option<Seen>> {
    let same = |a: &Metadata, b: &Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    let mut now = before.clone();
    let there = path.metadata()?;
    // Opening a pipe would wait for its writer, and a directory cannot be read.
    if !there.is_file() {
        return Err(io::Error::other("it is something else by now"));
    }
    if !same(&there, &now.file.metadata()?) {
        now.file = Arc::new(File::open(path)?);
        now.len = now.file.metadata()?.len();
        return Ok(Some(now));
    }
    now.len = now.file.metadata()?.len();
    now.cuts += u64::from(now.len < before.len);
    Ok((now.len != before.len).then_some(now))
}

/// Sends the file to one client, from the client's own position.
async fn follow(
    peer: &Peer<Bytes>,
    mut news: watch::Receiver<Seen>,
    from_start: bool,
) -> Result<(), BoxError> {
    let mut here = news.borrow().clone();
    let mut at = if from_start {
        0
    } else {
        here.file.metadata()?.len()
    };
    loop {
        let now = news.borrow_and_update().clone();
        if now.cuts != here.cuts {
            (here, at) = (now.clone(), 0);
        }
        let file = Arc::clone(&here.file);
        let chunk = spawn_blocking(move || read(&file, at)).await??;
        if !chunk.is_empty() {
            at += chunk.len() as u64;
            peer.send(chunk).await?;
        } else if !Arc::ptr_eq(&now.file, &here.file) {
            (here, at) = (now, 0);
        } else {
            tokio::select! {
                changed = news.changed() => changed?,
                _end = peer.closed() => return Ok(()),
            }
        }
    }
}

fn read(file: &File, at: u64) -> io::Result<Bytes> {
    let mut chunk = vec![0; CHUNK];
    let len = file.read_at(&mut chunk, at)?;
    chunk.truncate(len);
    chunk.shrink_to_fit();
    Ok(chunk.into())
}
