//! A running server in a test. It records how its connections end.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::panic;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::DuplexStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tower::util::MapRequest;

use super::memory::{Connector, memory};
use crate::bind::Listener;
use crate::connection::{Connection, ConnectionService};
use crate::end::{End, EndReason};
use crate::error::Error;
use crate::handle::Handle;
use crate::server::Server;
use crate::signals::Report;

/// The maximum number of `End`s that are kept until the test takes them. A test with more
/// connections must take ends before this many are kept.
const ENDS: usize = 65_536;

/// The maximum time that [`Served::ended`] waits. It is longer than the deadlines in tests. On a
/// paused clock, it passes immediately if nothing else can run.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Serves a connection stack in memory, on the current runtime, with the server's default options.
///
/// See the [module docs](super) for an example.
///
/// # Panics
///
/// Panics if called outside a tokio runtime.
#[doc(alias = "TestServer")]
#[doc(alias = "harness")]
pub fn serve<S>(stack: S) -> Served
where
    S: ConnectionService<DuplexStream>, // wrap a service of requests in `Pipeline` or `Http`
{
    let (listener, connector) = memory();
    serve_with(Server::from_listener(listener), connector, stack)
}

/// Serves a connection stack with a given server, such as one with options, with a failing
/// listener, or on real sockets.
///
/// The test uses `connector`, a value of any type, to connect; [`Served::connector`] returns it. If
/// it is a [`Connector`], [`Served::connect`] works as it does after [`serve`]. If the test needs
/// no connector, pass `()`.
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use tokio::net::TcpStream;
/// use tower_tcp::{Pipeline, Server, admit::ConnectionLimit, frame::Lines, testkit};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let echo = tower::service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
/// let echo = Pipeline::new(Lines::default).service(echo);
///
/// let (listener, connector) = testkit::memory_with_buffer(16);
/// let server = Server::builder().limit(ConnectionLimit::new(1)).build(listener);
/// let in_memory = testkit::serve_with(server, connector, echo.clone());
/// let client = in_memory.connect().await?;
///
/// let over_tcp = testkit::serve_with(Server::bind("127.0.0.1:0").await?, (), echo);
/// let addr = over_tcp.handle().local_addrs()[0].tcp().ok_or("not TCP")?;
/// let client = TcpStream::connect(addr).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Panics
///
/// Panics if called outside a tokio runtime.
pub fn serve_with<L, C, S>(server: Server<L>, connector: C, stack: S) -> Served<C>
where
    L: Listener,
    S: ConnectionService<L::Io>, // wrap a service of requests in `Pipeline` or `Http`
{
    let ends = Arc::new(Ends::default());
    let queue = Arc::clone(&ends);
    let stack = MapRequest::new(stack, move |conn: Connection<L::Io>| {
        let queue = Arc::clone(&queue);
        conn.on_end(move |end| queue.push(end.clone()));
        conn
    });
    let handle = server.handle();
    let task = tokio::spawn(server.serve(stack));
    Served {
        connector,
        ends,
        task: Some(task),
        cut_off: CutOff(handle),
    }
}

/// A running server in a test. It connects clients, and reports how connections end.
///
/// Dropping this value aborts the server: the listener is closed, and open connections are aborted.
/// So keep the value for as long as the clients are used.
#[must_use = "dropping it aborts the server"]
pub struct Served<C = Connector> {
    connector: C,
    ends: Arc<Ends>,
    /// The server's task. `None` once `closed` has taken its result.
    task: Option<JoinHandle<Result<Report, Error>>>,
    cut_off: CutOff,
}

impl Served {
    /// Connects, and returns the client's side of the connection.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::ConnectionRefused`] if the server has closed its listener.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it completes, no connection is made.
    pub async fn connect(&self) -> io::Result<DuplexStream> {
        self.connector.connect().await
    }
}

impl<C> Served<C> {
    /// Returns the connector that was passed to [`serve_with`] or created by [`serve`].
    pub fn connector(&self) -> &C {
        &self.connector
    }

    /// Returns the server's handle.
    pub fn handle(&self) -> &Handle {
        &self.cut_off.0
    }

    /// Waits until a connection has ended, and returns its end. Each end is returned once. Ends are
    /// returned in the order in which they happened.
    ///
    /// A connection that is closed gracefully ends when its client has closed as well, or after the
    /// [linger time](crate::close::Linger::time), which is 2 s by default. So drop the client before
    /// this call. To test the time at which the server closes, await the end of the stream in the
    /// client instead.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::TimedOut`] if no connection has ended within 24 hours. On a paused
    /// clock, the 24 hours pass immediately if nothing else can run. Returns
    /// [`io::ErrorKind::UnexpectedEof`] if the server has ended and all ends were taken.
    ///
    /// # Panics
    ///
    /// Panics if polled outside a tokio runtime with time enabled.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses no end.
    pub async fn ended(&self) -> io::Result<End> {
        let next = async {
            tokio::select! {
                biased;
                end = self.ends.next() => Some(end),
                // The ends of all connections are reported before that of the server.
                _report = self.handle().closed() => self.ends.lock().pop_front(),
            }
        };
        match timeout(LONGEST, next).await {
            Ok(Some(end)) => Ok(end),
            Ok(None) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server has ended, and all ends were taken",
            )),
            Err(_elapsed) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "no connection ended within 24 hours",
            )),
        }
    }

    /// Returns all ends that [`ended`](Self::ended) has not returned yet, oldest first. `ended`
    /// still returns them later.
    ///
    /// At most 65,536 ends are kept. Further ends are lost until `ended` takes some.
    pub fn ends(&self) -> Vec<End> {
        self.ends.lock().iter().cloned().collect()
    }

    /// Returns the reasons of the ends that [`ends`](Self::ends) returns, so that a test can
    /// compare them in one line.
    ///
    /// ```
    /// # use std::convert::Infallible;
    /// # use tower_tcp::{Pipeline, frame::Lines, testkit};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// # use bytes::Bytes;
    /// # let echo = tower::service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    /// let served = testkit::serve(Pipeline::new(Lines::default).service(echo));
    /// assert_eq!(served.reasons(), []);
    /// # }
    /// ```
    pub fn reasons(&self) -> Vec<EndReason> {
        self.ends.lock().iter().map(End::reason).collect()
    }

    /// Shuts the server down, and waits until it has ended, as [`closed`](Self::closed) does.
    ///
    /// If a client was dropped just before this call, the server may not have seen that yet. In
    /// this case, the connection ends with `Drained` instead of `PeerClosed`. To avoid this, await
    /// [`ended`](Self::ended) first.
    ///
    /// # Errors
    ///
    /// Returns the error with which [`Server::serve`] ended.
    ///
    /// # Panics
    ///
    /// Resumes the panic if a listener or a stack has panicked outside a connection.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the shutdown continues, and [`closed`](Self::closed) returns its
    /// result.
    pub async fn shutdown(&mut self) -> Result<Report, Error> {
        self.handle().shutdown();
        self.closed().await
    }

    /// Waits until the server has ended, and returns the result of [`Server::serve`].
    ///
    /// A second call returns the report, even if the server ended with an error.
    ///
    /// # Errors
    ///
    /// Returns the error with which [`Server::serve`] ended.
    ///
    /// # Panics
    ///
    /// Resumes the panic if a listener or a stack has panicked outside a connection.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing. A later call returns the result.
    pub async fn closed(&mut self) -> Result<Report, Error> {
        if let Some(task) = &mut self.task {
            let joined = task.await;
            self.task = None;
            match joined {
                Ok(served) => return served,
                Err(err) if err.is_panic() => panic::resume_unwind(err.into_panic()),
                // The runtime of the task was shut down. The handle also completes then.
                Err(_cancelled) => {}
            }
        }
        Ok(self.handle().closed().await)
    }
}

impl<C: fmt::Debug> fmt::Debug for Served<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served")
            .field("connector", &self.connector)
            .field("handle", self.handle())
            .field("reasons", &self.reasons())
            .finish_non_exhaustive()
    }
}

/// Aborts the server when this value is dropped.
struct CutOff(Handle);

impl Drop for CutOff {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The ends that the test has not taken yet.
#[derive(Default)]
struct Ends {
    waiting: Mutex<VecDeque<End>>,
    more: Notify,
}

impl Ends {
    fn push(&self, end: End) {
        let mut waiting = self.lock();
        if waiting.len() < ENDS {
            waiting.push_back(end);
        }
        drop(waiting);
        self.more.notify_one();
    }

    async fn next(&self) -> End {
        loop {
            if let Some(end) = self.lock().pop_front() {
                return end;
            }
            // If an end is pushed just before this wait, `Notify` has stored a permit, so the wait
            // returns.
            self.more.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<End>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
