//! Which runtime a connection lives on: that of the server, or one of several that have a thread each.
//!
//! A connection is given its runtime before it is accepted, so that its stream, its timers and its task all belong to that one, and
//! nothing of it crosses threads from then on.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long the threads may take to end. They have nothing left to do; one that is blocked is left behind.
const STOPPED: Duration = Duration::from_secs(1);

/// Where connections are to run, as the builder was told.
#[derive(Clone, Debug)]
pub(super) enum Runtimes {
    /// On so many threads of the server's own.
    Own(usize),
    /// On runtimes of the user's.
    Given(Vec<Handle>),
}

/// The runtimes that connections are spread over.
pub(super) struct Workers {
    all: Vec<Worker>,
    /// Whose turn it is among those with equally many connections.
    next: usize,
    /// Keeps the server's own runtime in the list where it is the only one. It ends with the server's future.
    _serving: Arc<()>,
    // Dropping it ends the threads.
    stop: DropGuard,
    /// Closed when the last thread has ended.
    running: mpsc::Receiver<Infallible>,
}

struct Worker {
    runtime: Handle,
    /// Held by each of its connections, and once by the runtime itself: nobody holds it when the runtime was shut down.
    places: Weak<()>,
}

/// A connection's place on a runtime.
pub(super) struct Seat {
    pub(super) runtime: Handle,
    /// Held as long as the connection runs there.
    pub(super) counted: Arc<()>,
    index: usize,
}

impl Workers {
    /// Starts the threads, or enlists the runtimes; with none of either, it is the runtime this is called on.
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
                for number in 0..count {
                    let name = format!("{}-{number}", name.unwrap_or("tower-tcp"));
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
                places: Arc::downgrade(&serving),
            });
        }
        Ok(workers)
    }

    /// Gives a place on the runtime with the fewest connections; of several such, in turn. `None` if all were shut down.
    pub(super) fn place(&self) -> Option<Seat> {
        let count = self.all.len();
        let in_turn = (self.next..count).chain(0..self.next);
        let (index, counted) = in_turn
            .filter_map(|index| Some((index, self.all[index].places.upgrade()?)))
            .min_by_key(|(_, counted)| Arc::strong_count(counted))?;
        Some(Seat {
            runtime: self.all[index].runtime.clone(),
            counted,
            index,
        })
    }

    /// Has the turn go on, when there is a connection for the place.
    pub(super) fn took(&mut self, place: &Seat) {
        self.next = (place.index + 1) % self.all.len();
    }

    /// Ends the threads, and waits for them.
    pub(super) async fn stop(self) {
        let Self {
            stop, mut running, ..
        } = self;
        drop(stop);
        if timeout(STOPPED, running.recv()).await.is_err() {
            tracing::warn!(target: "tower_tcp", "a worker's thread is left behind");
        }
    }
}

impl Worker {
    /// Starts a thread that runs a runtime of its own until it is told to stop.
    async fn start(
        name: String,
        stop: CancellationToken,
        running: mpsc::Sender<Infallible>,
    ) -> io::Result<Self> {
        let (started, starting) = oneshot::channel();
        let run = move || {
            // Held to the end of the thread, a panic included.
            let _running = running;
            let counted = Arc::new(());
            let places = Arc::downgrade(&counted);
            // Made and dropped here: neither may be done by a thread that runs another.
            let runtime = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                // Received, or the server was dropped.
                Err(err) => return drop(started.send(Err(err))),
            };
            let worker = Self {
                runtime: runtime.handle().clone(),
                places,
            };
            if started.send(Ok(worker)).is_ok() {
                runtime.block_on(stop.cancelled());
            }
        };
        // Joined by what it holds: it cannot be waited for without blocking in any other way.
        let _thread = thread::Builder::new().name(name).spawn(run)?;
        let ended = |_gone| io::Error::other("its thread ended");
        starting.await.map_err(ended)?
    }

    /// Has a runtime of the user's say when it is shut down.
    fn enlist(runtime: Handle, stop: CancellationToken) -> Self {
        let counted = Arc::new(());
        let places = Arc::downgrade(&counted);
        runtime.spawn(async move {
            stop.cancelled().await;
            drop(counted);
        });
        Self { runtime, places }
    }
}
