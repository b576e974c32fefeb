//! A server that answers tagged requests in the order in which they finish, and a client for it.
//!
//! ```sh
//! cargo run --example multiplexed &
//! cargo run --example multiplexed -- --client 127.0.0.1:7003
//! ```
//!
//! The client sends `slow`, `medium` and `fast` in this order; the answers arrive in the opposite
//! order.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut, TryGetError};
use clap::Parser;
use futures_util::stream::{FuturesUnordered, StreamExt, TryStreamExt};
use tokio::net::TcpStream;
use tokio_tower::multiplex::{Client, MultiplexTransport, TagStore};
use tokio_util::codec::{Decoder, Encoder, Framed, LengthDelimitedCodec};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_tcp::frame::{CodecExt, InOut};
use tower_tcp::observe::ConnectionTraceLayer;
use tower_tcp::{BoxError, Pipeline, Server, signal};
use tracing_subscriber::EnvFilter;

/// Answers `MS TEXT` with `TEXT` after MS milliseconds.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:7003")]
    listen: Vec<String>,

    /// Run as a client of the server at this address instead.
    #[arg(long)]
    client: Option<SocketAddr>,
}

/// A request or a reply. A reply has the tag of its request.
#[derive(Debug)]
struct Tagged {
    tag: u32,
    payload: Bytes,
}

/// Makes a codec. A frame is four bytes of length, four bytes of tag, and the payload.
fn codec() -> impl Decoder<Item = Tagged, Error = BoxError> + Encoder<Tagged, Error = io::Error> {
    // `LengthDelimitedCodec` reserves the announced length, so this limit also bounds the memory
    // that a peer can make the server reserve.
    let mut frames = LengthDelimitedCodec::builder();
    frames.max_frame_length(16 * 1024);
    let encoder = frames.new_codec();
    // The decoder keeps the length in front of the frame. By default it takes the length out of the
    // buffer before the frame is complete. Then a peer that leaves right after the length would
    // count as one that leaves between two frames.
    let decoder = frames.num_skip(0).length_adjustment(4).new_codec();
    InOut::new(decoder, encoder)
        .try_map_decode(|mut frame| {
            frame.advance(4);
            let tag = frame.try_get_u32()?;
            let payload = frame.freeze();
            Ok::<_, TryGetError>(Tagged { tag, payload })
        })
        .map_encode(|Tagged { tag, payload }| {
            let mut frame = BytesMut::with_capacity(4 + payload.len());
            frame.put_u32(tag);
            frame.put(payload);
            frame.freeze()
        })
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
    match args.client {
        Some(addr) => ask(addr).await,
        None => serve(args.listen).await,
    }
}

async fn serve(listen: Vec<String>) -> Result<(), BoxError> {
    let stack = ServiceBuilder::new()
        .layer(ConnectionTraceLayer::new())
        .service(
            Pipeline::new(codec)
                .service(service_fn(later))
                .multiplexed(64),
        );
    let server = Server::builder()
        .name("multiplexed")
        .listen_all(listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
        println!("try: cargo run --example multiplexed -- --client {address}");
    }
    println!("{}", server.serve(stack).await?);
    Ok(())
}

/// The service. It gives the reply the tag of the request. The pipeline does not know about tags.
async fn later(Tagged { tag, mut payload }: Tagged) -> Result<Tagged, BoxError> {
    let space = payload
        .iter()
        .position(|&byte| byte == b' ')
        .ok_or("not `MS TEXT`")?;
    let wait = std::str::from_utf8(&payload.split_to(space))?.parse()?;
    payload.advance(1);
    tokio::time::sleep(Duration::from_millis(wait)).await;
    Ok(Tagged { tag, payload })
}

/// Assigns tags, by which tokio-tower's client finds the request of an answer.
#[derive(Default)]
struct Counter(u32);

impl TagStore<Tagged, Tagged> for Counter {
    type Tag = u32;

    fn assign_tag(mut self: Pin<&mut Self>, request: &mut Tagged) -> u32 {
        self.0 += 1;
        request.tag = self.0;
        request.tag
    }

    fn finish_tag(self: Pin<&mut Self>, reply: &Tagged) -> u32 {
        reply.tag
    }
}

async fn ask(addr: SocketAddr) -> Result<(), BoxError> {
    let stream = TcpStream::connect(addr).await?;
    // tokio-tower requires an error type that implements `Error`.
    let framed = Framed::new(stream, codec()).map_err(io::Error::other);
    let transport = MultiplexTransport::new(framed, Counter::default());
    let mut client = Client::<_, BoxError, _>::new(transport);
    let mut answers = FuturesUnordered::new();
    for text in ["600 slow", "300 medium", "0 fast"] {
        println!("asked: {text}");
        let request = Tagged {
            tag: 0,
            payload: text.into(),
        };
        answers.push(client.ready().await?.call(request));
    }
    while let Some(answer) = answers.next().await {
        println!("answer: {}", String::from_utf8_lossy(&answer?.payload));
    }
    Ok(())
}
