//! Connections in memory: a listener, and the connector that connects clients to it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::DuplexStream;
use tokio::sync::mpsc;

use crate::bind::{Incoming, Listener};
use crate::connection::Address;

/// The maximum number of connections in the backlog. `connect` waits while the backlog is full. The
/// connection that `poll_readable` has taken out for the next `poll_accept` does not count.
const BACKLOG: usize = 1024;

/// The number of bytes that each direction of a connection buffers.
const BUFFER: usize = 64 * 1024;

/// Creates an in-memory listener, and the connector that connects to it.
///
/// Each connection buffers 64 KiB in each direction; [`memory_with_buffer`] sets another size. The
/// backlog holds up to 1,024 connections that wait to be accepted. While it is full,
/// [`Connector::connect`] waits.
pub fn memory() -> (MemoryListener, Connector) {
    memory_with_buffer(BUFFER)
}

/// Creates an in-memory listener and its connector. Connections buffer `bytes` bytes in each
/// direction. `0` counts as 1.
///
/// With a small buffer, writes are partial and soon wait for the peer, so a test can show what
/// happens if a peer does not read.
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
            buffer: bytes.max(1),
            numbers: Arc::new(AtomicU64::new(1)),
        },
    )
}

/// A listener that accepts the connections of a [`Connector`]. Created by [`memory`] and
/// [`memory_with_buffer`].
#[derive(Debug)]
pub struct MemoryListener {
    waiting: mpsc::Receiver<Incoming<DuplexStream>>,
    /// A connection that `poll_readable` has taken from the queue, for the next `poll_accept`.
    next: Option<Incoming<DuplexStream>>,
}

impl Listener for MemoryListener {
    type Io = DuplexStream;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.next.is_none() {
            match ready!(self.waiting.poll_recv(cx)) {
                Some(incoming) => self.next = Some(incoming),
                // All connectors were dropped. No more connections will arrive, but that is not a
                // failure.
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

/// Connects to a [`MemoryListener`]. Clones connect to the same listener.
#[doc(alias = "duplex")]
#[derive(Clone, Debug)]
pub struct Connector {
    queue: mpsc::Sender<Incoming<DuplexStream>>,
    buffer: usize,
    numbers: Arc<AtomicU64>,
}

impl Connector {
    /// Connects, and returns the client's side of the connection.
    ///
    /// As with a real socket, the connection is established as soon as it is in the listener's
    /// backlog, before the server accepts it. If the backlog is full, this method waits.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::ConnectionRefused`] if the listener is closed.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it completes, no connection is made.
    pub async fn connect(&self) -> io::Result<DuplexStream> {
        let (client, io) = tokio::io::duplex(self.buffer);
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let incoming = Incoming::new(io, Address::Memory(number), Address::Memory(0));
        self.queue
            .send(incoming)
            .await
            .map_err(|_gone| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(client)
    }
}
