//! The server's only accept loop. For each connection it waits until a listener is readable and the
//! stack is ready, accepts the connection, and calls the stack with it. It never waits for a peer.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tower_service::Service;

use super::connection::{Leaving, Outcome, Task};
use super::workers::{Seat, Workers};
use crate::accept::{AcceptErrorAction, Stall, classify, error_type};
use crate::admit::{AddressFilter, Limited, Verdict};
use crate::bind::{Incoming, Listener};
use crate::connection::{Address, Connection, ConnectionService};
use crate::error::{BoxError, Error, Panicked, caught};
use crate::handle::{Phase, ServerState};
use crate::observe::denied;
use crate::signals::poll_looked;

/// The maximum number of connections accepted before the loop's task yields.
const TURN: usize = 16;

/// The maximum number of connections accepted from the backlog before the listener is closed or
/// suspended. Systems seldom allow a longer backlog, and so many connections are accepted within
/// about a second. Without a maximum, clients that connect meanwhile could delay the close or the
/// suspension forever.
const BACKLOG: usize = 65_536;

pub(super) type AcceptErrorPolicy = Arc<dyn Fn(&io::Error) -> AcceptErrorAction + Send + Sync>;

/// The server's accept-error policy and address filters.
pub(super) struct Door {
    pub(super) policy: AcceptErrorPolicy,
    pub(super) filters: Vec<AddressFilter>,
}

pub(super) struct AcceptLoop<'a, L, S> {
    listener: L,
    stack: Limited<S>,
    server: Arc<ServerState>,
    door: Door,
    workers: &'a mut Workers,
    stall: Stall,
    live: usize,
    /// The listener is suspended.
    suspended: bool,
    /// A panic in the stack's `poll_ready`, with which the next accepted connection ends, or in an
    /// address filter, with which the accepted connection ends.
    panicked: Option<Panicked>,
}

/// Determines when the loop returns.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// As soon as the server is no longer in this phase, or is suspended.
    PhaseEnds(Phase),
    /// When this many connections have been accepted, when the server aborts, or when the next
    /// accept would have to wait for a client, the connection limit, the stack or the back-off.
    Empty(usize),
}

impl<'a, L, S> AcceptLoop<'a, L, S>
where
    L: Listener,
    S: ConnectionService<L::Io>,
{
    pub(super) fn new(
        listener: L,
        stack: Limited<S>,
        server: Arc<ServerState>,
        door: Door,
        workers: &'a mut Workers,
    ) -> Self {
        Self {
            listener,
            stack,
            server,
            door,
            workers,
            stall: Stall::default(),
            live: 0,
            suspended: false,
            panicked: None,
        }
    }

    /// Accepts connections until `phase` ends. Suspends and resumes the listener when requested.
    pub(super) async fn run(&mut self, phase: Phase) -> Result<(), Error> {
        let server = Arc::clone(&self.server);
        loop {
            self.accept(Until::PhaseEnds(phase)).await?;
            if server.phase() != phase {
                return Ok(());
            }
            server.sockets().for_each(|socket| socket.release_if_kept());
            self.empty().await?;
            self.listener.suspend();
            self.suspended = true;
            server
                .until(|| !server.is_suspended() || server.phase() != phase)
                .await;
        }
    }

    /// Accepts the connections in the backlog, because they are already established for their
    /// clients. Returns as soon as the next accept would have to wait, for example for the
    /// connection limit or the stack.
    pub(super) async fn empty(&mut self) -> Result<(), Error> {
        // A suspended listener must not be polled, and usually has no backlog.
        if self.suspended {
            return Ok(());
        }
        self.accept(Until::Empty(BACKLOG)).await
    }

    /// Accepts connections and spawns their tasks.
    async fn accept(&mut self, until: Until) -> Result<(), Error> {
        let mut accepted = 0;
        loop {
            match until {
                Until::Empty(most) if accepted >= most => return Ok(()),
                _ => {}
            }
            match std::future::poll_fn(|cx| self.poll_step(until, cx)).await? {
                Step::Accepted(incoming, seat) => self.serve(incoming, seat),
                Step::Denied => {}
                Step::Over => return Ok(()),
            }
            accepted += 1;
            if accepted % TURN == 0 {
                tokio::task::yield_now().await;
            }
        }
    }

    fn poll_step(
        &mut self,
        until: Until,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Step<L::Io>, Error>> {
        self.server.register_server(cx.waker());
        match until {
            Until::PhaseEnds(phase)
                if self.server.phase() != phase || self.server.is_suspended() =>
            {
                return Poll::Ready(Ok(Step::Over));
            }
            Until::Empty(_) if self.server.phase() == Phase::Aborting => {
                return Poll::Ready(Ok(Step::Over));
            }
            // Only `PhaseEnds` respects a pause. With `Empty` the clients in the backlog are
            // accepted, because their connections are already established. A stack that has
            // returned `Pending` may be in a queue, such as the queue of a limit that several
            // servers share. Only a call removes it from the queue, so the pause begins after that
            // call.
            Until::PhaseEnds(_) if self.server.is_paused() && !self.stack.is_queued() => {
                return Poll::Pending;
            }
            _ => {}
        }
        match (self.poll_accept(cx)?, until) {
            (Poll::Ready(step), _) => Poll::Ready(Ok(step)),
            (Poll::Pending, Until::Empty(_)) => poll_looked(cx).map(|()| Ok(Step::Over)),
            (Poll::Pending, Until::PhaseEnds(_)) => Poll::Pending,
        }
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Result<Poll<Step<L::Io>>, Error> {
        loop {
            // A connection that has ended has released its descriptor, so an accept that failed for
            // lack of descriptors may now succeed.
            let live = self.server.live();
            if live < self.live && self.stall.is_waiting() {
                self.stall.hurry();
            }
            self.live = live;
            match self.poll_once(cx) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(Ok(step)) => {
                    if self.stall.clear() {
                        self.server.watch_ends(false);
                        tracing::info!(target: "tower_tcp", "accept.resumed");
                    }
                    return Ok(Poll::Ready(step));
                }
                Poll::Ready(Err(Failure::Service(err))) => return Err(Error::Service(err)),
                Poll::Ready(Err(Failure::NoWorker)) => {
                    let err = io::Error::other("all their runtimes were shut down");
                    return Err(Error::Workers(err));
                }
                Poll::Ready(Err(Failure::Accept(err))) => self.failed(err)?,
            }
        }
    }

    fn poll_once(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step<L::Io>, Failure>> {
        ready!(self.stall.poll(cx));
        if self.suspended {
            self.listener.resume().map_err(Failure::Accept)?;
            self.server.listens_on(&self.listener.listening_sockets());
            self.suspended = false;
        }
        ready!(self.listener.poll_readable(cx)).map_err(Failure::Accept)?;
        if self.panicked.is_none() {
            match caught(|| self.stack.poll_ready(cx)) {
                Ok(polled) => ready!(polled).map_err(|err| Failure::Service(err.into()))?,
                Err(panicked) => self.panicked = Some(panicked),
            }
        }
        let seat = self.workers.seat().ok_or(Failure::NoWorker)?;
        // A stream belongs to the runtime in whose context it is created.
        let mut panicked = None;
        let accepted = {
            let _entered = seat.runtime.enter();
            let mut admits = |peer: &Address| {
                match caught(|| self.door.verdict(peer)) {
                    Ok(Verdict::Allow) => {}
                    Ok(Verdict::Deny) => {
                        // A denied connection appears only in this count and this event.
                        #[cfg(feature = "metrics")]
                        self.server.count_denied();
                        denied(peer);
                        return false;
                    }
                    Err(err) => panicked = Some(err),
                }
                true
            };
            self.listener.poll_accept_if(cx, &mut admits)
        };
        if matches!(accepted, Poll::Ready(Ok(Some(_)))) {
            self.panicked = self.panicked.take().or(panicked);
        } else {
            // There is no connection to serve: the client was denied, another process has accepted
            // the connection, or the accept failed. Return the permit of the server's limit,
            // instead of holding it until the next connection.
            self.stack.give_back();
        }
        accepted
            .map_ok(|incoming| match incoming {
                Some(incoming) => Step::Accepted(incoming, seat),
                None => Step::Denied,
            })
            .map_err(Failure::Accept)
    }

    fn failed(&mut self, err: io::Error) -> Result<(), Error> {
        // If the user's policy panics, the default policy decides.
        let action = caught(|| (self.door.policy)(&err));
        let action = match action.unwrap_or_else(|_panicked| classify(&err)) {
            AcceptErrorAction::Retry if self.stall.retry() => AcceptErrorAction::BackOff,
            action => action,
        };
        let error_type = error_type(&err);
        #[cfg(feature = "metrics")]
        self.server.count_accept_error(error_type, action);
        match action {
            AcceptErrorAction::Retry => {
                tracing::debug!(
                    target: "tower_tcp",
                    { error = %err, error.type = error_type },
                    "accept.error"
                );
            }
            AcceptErrorAction::BackOff => {
                self.server.watch_ends(true);
                if self.stall.back_off() {
                    tracing::warn!(
                        target: "tower_tcp",
                        { error = %err, error.type = error_type },
                        "accept.stalled"
                    );
                }
            }
            AcceptErrorAction::Stop => return Err(Error::Accept(err)),
        }
        Ok(())
    }

    /// Creates a connection, calls the stack with it, and spawns a task for the returned future.
    fn serve(&mut self, incoming: Incoming<L::Io>, seat: Seat) {
        self.workers.took(&seat);
        let Incoming {
            io,
            peer_addr,
            local_addr,
            probe,
        } = incoming;
        let Seat {
            runtime, counted, ..
        } = seat;
        // Timers and tasks that the call creates belong to the runtime whose context is entered
        // here, as the stream does.
        let _entered = runtime.enter();
        let conn = Connection::new(io, peer_addr, local_addr, probe);
        let leaving = Leaving::enter(Arc::clone(conn.life()), Arc::clone(&self.server));
        if let Some(panicked) = self.panicked.take() {
            drop(conn);
            // The stack is not called, so return the permit that it may have reserved.
            self.stack.give_back();
            leaving.settle(Outcome::Panicked(panicked));
            return;
        }
        match caught(|| self.stack.call(conn)) {
            // The handle of the task is not needed: the server's table contains the connection, and
            // the connection's signals end the task.
            Ok(service) => drop(runtime.spawn(Task::new(service, leaving, counted))),
            Err(panicked) => leaving.settle(Outcome::Panicked(panicked)),
        }
    }
}

impl Door {
    fn verdict(&self, address: &Address) -> Verdict {
        let mut verdicts = self.filters.iter().map(|filter| filter.verdict(address));
        if verdicts.any(|verdict| verdict == Verdict::Deny) {
            Verdict::Deny
        } else {
            Verdict::Allow
        }
    }
}

/// The result of one step of the loop.
enum Step<Io> {
    /// A connection was accepted. The seat contains the runtime chosen for it.
    Accepted(Incoming<Io>, Seat),
    /// A connection from a denied address was accepted, reported and closed.
    Denied,
    /// The loop must return.
    Over,
}

enum Failure {
    Accept(io::Error),
    Service(BoxError),
    NoWorker,
}
