//! Shared by the rooms: the loop written by hand, servers over memory, and their load.

use std::convert::Infallible;
use std::io;

use bytes::Bytes;
use divan::Bencher;
use divan::counter::ItemsCount;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::runtime::{Builder, Runtime};
use tokio::task::yield_now;
use tower::Service;
use tower_tcp::testkit::{self, Connector, MemoryListener};
use tower_tcp::{BoxError, Connection, Server};

/// The number of requests that are timed together, whatever number of them is ahead of the answers.
/// A measured microsecond is thus about a nanosecond a request.
pub(crate) const REQUESTS: usize = 1024;

/// The read buffer of the loops by hand, as large as a pipeline's.
pub(crate) const BLOCK: usize = 64 * 1024;

/// The capacity of a connection in memory in each direction. It is larger than any batch, so no
/// write waits for room.
pub(crate) const WIRE: usize = 1024 * 1024;

/// Everything measured runs through here, so that a profiler can be told where to look.
#[inline(never)]
pub(crate) fn measured<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Creates a runtime with one thread, for the server and its client.
pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) fn memory() -> (MemoryListener, Connector) {
    testkit::memory_with_buffer(WIRE)
}

/// Serves in the current runtime.
pub(crate) fn serve<S>(stack: S) -> Connector
where
    S: Service<Connection<DuplexStream>, Error: Into<BoxError>> + Send + 'static,
    S::Response: 'static,
    S::Future: Send + 'static,
{
    let (listener, connector) = memory();
    tokio::spawn(Server::from_listener(listener).serve(stack));
    connector
}

/// The baseline: no library, one read and one write per wake-up. `frame` returns the length of the
/// first frame, with its framing.
pub(crate) async fn by_hand<Io>(
    mut io: Io,
    frame: impl Fn(&[u8]) -> Option<usize>,
) -> Result<(), BoxError>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let (mut input, mut output) = (vec![0; BLOCK], Vec::with_capacity(BLOCK));
    let mut held = 0;
    loop {
        let read = io.read(&mut input[held..]).await?;
        if read == 0 {
            return Ok(());
        }
        let end = held + read;
        let mut done = 0;
        while let Some(length) = frame(&input[done..end]) {
            output.extend_from_slice(&input[done..done + length]);
            done += length;
        }
        input.copy_within(done..end, 0);
        held = end - done;
        io.write_all(&output).await?;
        output.clear();
    }
}

/// Returns the length of the first line.
pub(crate) fn line(input: &[u8]) -> Option<usize> {
    memchr::memchr(b'\n', input).map(|at| at + 1)
}

/// Returns a line of `bytes` bytes, the line end included.
pub(crate) fn line_of(bytes: usize) -> Vec<u8> {
    let mut line = vec![b'x'; bytes];
    line[bytes - 1] = b'\n';
    line
}

/// Returns the length of the first frame, which has its own length in front, in four bytes.
pub(crate) fn prefixed(input: &[u8]) -> Option<usize> {
    let length = 4 + u32::from_be_bytes(*input.first_chunk()?) as usize;
    (input.len() >= length).then_some(length)
}

/// Returns a frame that has its own length in front. It has `bytes` bytes, the length included.
pub(crate) fn prefixed_of(bytes: u16) -> Vec<u8> {
    let mut frame = u32::from(bytes - 4).to_be_bytes().to_vec();
    frame.resize(usize::from(bytes), b'x');
    frame
}

pub(crate) async fn echo(frame: Bytes) -> Result<Bytes, Infallible> {
    Ok(frame)
}

/// A connection whose other end runs in the same thread.
pub(crate) struct Client {
    runtime: Runtime,
    stream: DuplexStream,
}

impl Client {
    /// Runs `serve`, which starts the server and returns a stream that is connected to it.
    pub(crate) fn start(serve: impl AsyncFnOnce() -> io::Result<DuplexStream>) -> Self {
        let runtime = runtime();
        let stream = runtime.block_on(serve()).unwrap();
        Self { runtime, stream }
    }

    /// Creates a client of a future that serves one stream.
    pub(crate) fn of<F>(serve: impl FnOnce(DuplexStream) -> F) -> Self
    where
        F: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        Self::start(async || {
            let (client, stream) = tokio::io::duplex(WIRE);
            tokio::spawn(serve(stream));
            Ok(client)
        })
    }

    /// Creates a client of a server.
    pub(crate) fn of_server(serve: impl FnOnce() -> Connector) -> Self {
        Self::start(async || serve().connect().await)
    }

    /// Times requests that are echoed.
    pub(crate) fn bench(self, bencher: Bencher, load: &Load) {
        let Self {
            runtime,
            mut stream,
        } = self;
        let mut answers = vec![0; load.batch.len()];
        bencher.counter(ItemsCount::new(REQUESTS)).bench_local(|| {
            measured(|| runtime.block_on(load.exchange(&mut stream, &mut answers)))
        });
    }
}

/// [`REQUESTS`] requests, in batches.
pub(crate) struct Load {
    batch: Vec<u8>,
    /// The number of bytes of a batch that are written at a time.
    piece: usize,
    batches: usize,
}

impl Load {
    pub(crate) fn new(request: &[u8], ahead: usize) -> Self {
        let batch = request.repeat(ahead);
        Self {
            piece: batch.len(),
            batch,
            batches: REQUESTS / ahead,
        }
    }

    /// Creates a load of one request at a time, each written in two halves. The server reads the
    /// first half before the second is written.
    pub(crate) fn halves(request: &[u8]) -> Self {
        Self {
            piece: request.len().div_ceil(2),
            ..Self::new(request, 1)
        }
    }

    async fn exchange(&self, stream: &mut DuplexStream, answers: &mut [u8]) {
        for _ in 0..self.batches {
            let mut pieces = self.batch.chunks(self.piece);
            let first = pieces.next().unwrap_or_default();
            stream.write_all(first).await.unwrap();
            for piece in pieces {
                yield_now().await;
                stream.write_all(piece).await.unwrap();
            }
            stream.read_exact(answers).await.unwrap();
        }
    }
}
