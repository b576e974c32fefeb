//! Streams a growing file to every client: a server that only pushes.
//!
//! ```sh
//! cargo run --example tail -- /var/log/syslog
//! nc 127.0.0.1 7005
//! ```
//!
//! Each client reads the file at its own pace: one that is slow is waited for by nobody, and finds in the file what it missed. A file
//! that was cut short is read again from its start, and one that took the old one's name after the rest of that. (It is looked at, not
//! watched: what has grown to its old length again between two looks was never cut, and of two new files only the second is seen.)

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
use tower_tcp::deadline::Deadlines;
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::pipeline::OnConnectLayer;
use tower_tcp::{BoxError, Peer, Pipeline, Server, signal};
use tracing_subscriber::EnvFilter;

/// How much is read from the file at a time, in bytes: a client that does not read holds this, and its high mark.
const CHUNK: usize = 16 * 1024;

/// Streams a growing file to every client.
#[derive(Parser)]
struct Args {
    /// Where to listen: `host:port` or `unix:/path`; may be given several times.
    #[arg(long, default_value = "127.0.0.1:7005")]
    listen: Vec<String>,

    /// Begin with what the file holds already, instead of at its end.
    #[arg(long)]
    from_start: bool,

    /// Milliseconds between two looks at the file.
    #[arg(long, default_value = "200", value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,

    /// The file.
    file: PathBuf,
}

/// The file as it was when it was last looked at.
#[derive(Clone)]
struct Seen {
    file: Arc<File>,
    len: u64,
    /// How often it was found shorter than before.
    cuts: u64,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_unset| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();

    let file = Arc::new(File::open(&args.file)?);
    let len = file.metadata()?.len();
    let (seen, news) = watch::channel(Seen { file, len, cuts: 0 });
    let connected = OnConnectLayer::new(move |peer| {
        let news = news.clone();
        // It ends with the connection, and the connection with it.
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
                .deadlines(Deadlines::default().first_byte(None).idle(None)), // a client has nothing to say
        );

    let server = Server::builder()
        .name("tail")
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
    let report = server.serve(stack).await?;
    println!(
        "{} connections drained, {} cut off",
        report.drained, report.aborted
    );
    Ok(())
}

/// Looks at the file again and again, and wakes the clients when there is news.
async fn look(path: PathBuf, every: Duration, seen: watch::Sender<Seen>) {
    let mut ticks = tokio::time::interval(every);
    let mut trouble = None;
    loop {
        ticks.tick().await;
        let (path, before) = (path.clone(), seen.borrow().clone());
        // What was seen last stands until there is something new.
        match spawn_blocking(move || news(&path, &before)).await {
            Ok(Ok(Some(now))) => drop(seen.send_replace(now)),
            // Between the two steps of a rotation there is no file.
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
    // To open a pipe is to wait for its writer, and a directory has nothing to be read.
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

/// Sends the file to one client, from its own place in it.
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
