//! A whole server in a test, without sockets and under paused time.
//!
//! ```
//! use std::convert::Infallible;
//! use bytes::Bytes;
//! use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
//! use tower_tcp::{Pipeline, Server, frame::Lines, testkit};
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (listener, connector) = testkit::memory();
//! let echo = tower::service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
//! let server = Server::from_listener(listener);
//! let handle = server.handle();
//! tokio::spawn(server.serve(Pipeline::new(Lines::default).service(echo)));
//!
//! let mut client = BufReader::new(connector.connect().await?);
//! client.write_all(b"hi\n").await?;
//! let mut reply = String::new();
//! client.read_line(&mut reply).await?;
//! assert_eq!(reply, "hi\n");
//!
//! handle.shutdown();
//! drop(client);
//! assert_eq!(handle.closed().await.drained, 1);
//! # Ok(())
//! # }
//! ```

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::DuplexStream;
use tokio::sync::mpsc;

use crate::bind::{Incoming, Listener};
use crate::connection::Address;

/// How many connections wait to be accepted before `connect` waits: the backlog.
const BACKLOG: usize = 1024;

/// How many bytes each direction of a connection holds.
const BUFFER: usize = 64 * 1024;

/// Makes a listener, and the connector whose connections it accepts.
pub fn memory() -> (MemoryListener, Connector) {
    memory_with_buffer(BUFFER)
}

/// As [`memory`], with connections that hold so many bytes in each direction. A small one makes every write a short one.
pub fn memory_with_buffer(bytes: usize) -> (MemoryListener, Connector) {
    let (queue, waiting) = mpsc::channel(BACKLOG);
    let listener = MemoryListener {
        waiting,
        next: None,
    };
    (
        listener,
        Connector {
            queue,
            buffer: bytes,
            numbers: Arc::new(AtomicU64::new(1)),
        },
    )
}

/// Accepts connections that a [`Connector`] makes.
#[derive(Debug)]
pub struct MemoryListener {
    waiting: mpsc::Receiver<Incoming<DuplexStream>>,
    /// Seen when asked whether there is one.
    next: Option<Incoming<DuplexStream>>,
}

impl Listener for MemoryListener {
    type Io = DuplexStream;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.next.is_none() {
            match ready!(self.waiting.poll_recv(cx)) {
                Some(incoming) => self.next = Some(incoming),
                // All connectors are gone: nobody will come, which is not a failure.
                None => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<DuplexStream>>> {
        ready!(self.poll_readable(cx))?;
        match self.next.take() {
            Some(incoming) => Poll::Ready(Ok(incoming)),
            None => Poll::Pending,
        }
    }

    fn local_addrs(&self) -> Vec<Address> {
        vec![Address::Memory(0)]
    }
}

/// Connects to a [`MemoryListener`]. Clones connect to the same.
#[derive(Clone, Debug)]
pub struct Connector {
    queue: mpsc::Sender<Incoming<DuplexStream>>,
    buffer: usize,
    numbers: Arc<AtomicU64>,
}

impl Connector {
    /// Connects. Like a real client this is connected when the listener's backlog has it, not when it is accepted.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::ConnectionRefused`] when the listener is gone.
    ///
    /// # Cancel safety
    ///
    /// If it is dropped before it is done, there is no connection.
    pub async fn connect(&self) -> io::Result<DuplexStream> {
        let (client, io) = tokio::io::duplex(self.buffer);
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let incoming = Incoming {
            io,
            peer_addr: Address::Memory(number),
            local_addr: Address::Memory(0),
        };
        self.queue
            .send(incoming)
            .await
            .map_err(|_gone| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(client)
    }
}
