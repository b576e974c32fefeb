//! Chooses the runtime of each connection: the runtime that runs the server, or one of several
//! worker runtimes.
//!
//! The runtime is chosen before the connection is accepted. So the connection's stream, timers and
//! task belong to the same runtime, and never move to another one.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

/// The maximum time to wait for the threads to end. Before a thread ends, it drops its remaining
/// tasks. That is fast, so only a blocked thread takes longer.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// The runtimes for connections, as set in the builder.
#[derive(Clone, Debug)]
pub(super) enum Runtimes {
    /// Starts this many threads, each with its own runtime. Zero means the runtime that runs the
    /// server.
    Own(usize),
    /// Uses the runtimes passed to `ServerBuilder::runtimes`.
    Given(Vec<Handle>),
}

/// The runtimes to which connections are distributed.
pub(super) struct Workers {
    all: Vec<Worker>,
    /// The index at which the search for the runtime with the fewest connections starts.
    next: usize,
    /// The strong reference that stands for the runtime on which `serve` is awaited (see
    /// [`Worker::seats`]). Used only if there are no other runtimes. Dropped with the server's
    /// future.
    _serving: Arc<()>,
    // Dropping this guard stops the threads.
    stop: DropGuard,
    /// Closes when the last thread has ended.
    running: mpsc::Receiver<Infallible>,
}

struct Worker {
    runtime: Handle,
    /// The strong count shows how many connections the runtime has: each connection holds a
    /// reference, and the runtime itself holds one more. The count is zero once the runtime is shut
    /// down.
    seats: Weak<()>,
}

/// The place of one connection on the runtime that was chosen for it.
pub(super) struct Seat {
    pub(super) runtime: Handle,
    /// Held while the connection runs, so that it is counted on its runtime.
    pub(super) counted: Arc<()>,
    index: usize,
}

impl Workers {
    /// Starts the threads, or registers the given runtimes. Without either, uses the current
    /// runtime.
    pub(super) async fn start(runtimes: Runtimes, name: Option<&str>) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let (running, ended) = mpsc::channel(1);
        let serving = Arc::new(());
        let mut workers = Self {
            all: Vec::new(),
            next: 0,
            _serving: Arc::clone(&serving),
            stop: stop.clone().drop_guard(),
            running: ended,
        };
        match runtimes {
            Runtimes::Own(count) => {
                // The standard library panics at a thread's name with a NUL byte.
                let name = name.unwrap_or("tower-tcp").replace('\0', "");
                for number in 0..count {
                    let name = format!("{name}-{number}");
                    let worker = Worker::start(name, stop.clone(), running.clone()).await?;
                    workers.all.push(worker);
                }
            }
            Runtimes::Given(runtimes) => workers.all.extend(
                runtimes
                    .into_iter()
                    .map(|runtime| Worker::enlist(runtime, stop.clone())),
            ),
        }
        if workers.all.is_empty() {
            workers.all.push(Worker {
                runtime: Handle::current(),
                seats: Arc::downgrade(&serving),
            });
        }
        Ok(workers)
    }

    /// Returns a seat on the runtime with the fewest connections. Runtimes with equally few
    /// connections take turns. Returns `None` if all runtimes were shut down.
    pub(super) fn seat(&self) -> Option<Seat> {
        let count = self.all.len();
        let in_turn = (self.next..count).chain(0..self.next);
        let (index, counted) = in_turn
            .filter_map(|index| Some((index, self.all[index].seats.upgrade()?)))
            .min_by_key(|(_, counted)| Arc::strong_count(counted))?;
        Some(Seat {
            runtime: self.all[index].runtime.clone(),
            counted,
            index,
        })
    }

    /// Records that a connection took this seat, so that the next search begins at the next
    /// runtime.
    pub(super) fn took(&mut self, seat: &Seat) {
        self.next = (seat.index + 1) % self.all.len();
    }

    /// Stops the threads and waits for them.
    pub(super) async fn stop(self) {
        let Self {
            stop, mut running, ..
        } = self;
        drop(stop);
        if timeout(STOP_WAIT, running.recv()).await.is_err() {
            tracing::warn!(target: "tower_tcp", "a worker thread did not stop");
        }
    }
}

impl Worker {
    /// Starts a thread with its own runtime, which runs until `stop` is cancelled.
    async fn start(
        name: String,
        stop: CancellationToken,
        running: mpsc::Sender<Infallible>,
    ) -> io::Result<Self> {
        let (started, starting) = oneshot::channel();
        let run = move || {
            // Held to the end of the thread, even if the thread panics.
            let _running = running;
            let counted = Arc::new(());
            let seats = Arc::downgrade(&counted);
            // The runtime is created and dropped on this thread, because tokio panics if a runtime
            // is dropped in asynchronous code, such as the server's.
            let runtime = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                // If the send fails, the server was dropped, and nobody needs the error.
                Err(err) => return drop(started.send(Err(err))),
            };
            let worker = Self {
                runtime: runtime.handle().clone(),
                seats,
            };
            if started.send(Ok(worker)).is_ok() {
                runtime.block_on(stop.cancelled());
            }
        };
        // The thread is not joined, because joining blocks. Instead, `Workers::stop` waits until
        // each thread has dropped its sender, `running`.
        let _thread = thread::Builder::new().name(name).spawn(run)?;
        let ended = |_gone| io::Error::other("its thread ended");
        starting.await.map_err(ended)?
    }

    /// Registers a runtime of the user. A task on the runtime holds the strong reference that
    /// stands for the runtime (see [`Worker::seats`]). The reference is dropped when the runtime
    /// shuts down or the server stops.
    fn enlist(runtime: Handle, stop: CancellationToken) -> Self {
        let counted = Arc::new(());
        let seats = Arc::downgrade(&counted);
        runtime.spawn(async move {
            stop.cancelled().await;
            drop(counted);
        });
        Self { runtime, seats }
    }
}
