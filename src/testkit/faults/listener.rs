//! A listener whose accepts fail.

use std::collections::VecDeque;
use std::io;
use std::task::{Context, Poll, ready};

use rustix::io::Errno;

use crate::bind::{Incoming, Listener, ListeningSocket};
use crate::connection::Address;

/// Errors with which accept(2) can fail on Linux although the listening socket works.
const ERRORS: [Errno; 13] = [
    Errno::CONNABORTED,
    Errno::INTR,
    Errno::MFILE,
    Errno::NFILE,
    Errno::NOBUFS,
    Errno::NOMEM,
    Errno::PERM,
    Errno::PROTO,
    Errno::NETDOWN,
    Errno::NOPROTOOPT,
    Errno::HOSTDOWN,
    Errno::HOSTUNREACH,
    Errno::NETUNREACH,
];

/// Returns 13 errors with which accept(2) can fail on Linux although the listening socket works.
/// For example, accept(2) fails if the peer is gone, the process has no free descriptors, or the
/// network is down.
pub fn accept_errors() -> Vec<io::Error> {
    ERRORS.into_iter().map(io::Error::from).collect()
}

/// A listener whose first accepts fail with given errors.
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use tower_tcp::testkit::{self, faults};
/// use tower_tcp::{Pipeline, Server, frame::Lines};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> std::io::Result<()> {
/// let (listener, connector) = testkit::memory();
/// let listener = faults::FailingListener::new(listener, faults::accept_errors());
/// let echo = tower::service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
/// let echo = Pipeline::new(Lines::default).service(echo);
/// let served = testkit::serve_with(Server::from_listener(listener), connector, echo);
///
/// let mut client = served.connect().await?;
/// client.write_all(b"hi\n").await?;
/// client.shutdown().await?;
/// let mut reply = String::new();
/// client.read_to_string(&mut reply).await?;
/// assert_eq!(reply, "hi\n");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct FailingListener<L> {
    listener: L,
    errors: VecDeque<io::Error>,
}

impl<L> FailingListener<L> {
    /// Wraps a listener. The first accepts fail with these errors, each once and in this order.
    /// After that, connections are accepted.
    pub fn new(listener: L, errors: impl IntoIterator<Item = io::Error>) -> Self {
        Self {
            listener,
            errors: errors.into_iter().collect(),
        }
    }
}

impl<L: Listener> Listener for FailingListener<L> {
    type Io = L::Io;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.listener.poll_readable(cx)
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming<L::Io>>> {
        ready!(self.listener.poll_readable(cx))?;
        match self.errors.pop_front() {
            Some(err) => Poll::Ready(Err(err)),
            None => self.listener.poll_accept(cx),
        }
    }

    fn poll_accept_if(
        &mut self,
        cx: &mut Context<'_>,
        admits: &mut dyn FnMut(&Address) -> bool,
    ) -> Poll<io::Result<Option<Incoming<L::Io>>>> {
        ready!(self.listener.poll_readable(cx))?;
        match self.errors.pop_front() {
            Some(err) => Poll::Ready(Err(err)),
            None => self.listener.poll_accept_if(cx, admits),
        }
    }

    fn local_addrs(&self) -> Vec<Address> {
        self.listener.local_addrs()
    }

    fn listening_sockets(&self) -> Vec<ListeningSocket> {
        self.listener.listening_sockets()
    }

    fn suspend(&mut self) {
        self.listener.suspend();
    }

    fn resume(&mut self) -> io::Result<()> {
        self.listener.resume()
    }
}
