//! Enforces the deadlines of an HTTP connection. The current wait of the connection determines
//! which deadlines apply.
//!
//! hyper's own timer for the heads of HTTP/1 requests is not used. It counts the idle time between
//! two requests as part of the next head, it is created anew for each request, and it covers
//! neither HTTP/2 nor a peer that reads nothing.

use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::Instant;

use super::progress::Progress;
use super::stage::Rest;
use crate::deadline::{
    self, Blocked, Deadlines, DrainDeadlines, Moment, Pace, TAKEN_IN, Timer, between_looks, due,
    first,
};
use crate::end::EndReason;

/// The time for which hyper stays set up after an active HTTP/1 connection becomes idle. A
/// connection counts as active if the last two moments at which it became idle are less than this
/// time apart.
///
/// Parking a connection (see [`stage`](super::stage)) and setting hyper up again takes more than a
/// quarter as many instructions as a small request. So an active connection is parked only after
/// this time, or when it drains. Any other HTTP/1 connection is parked as soon as it is idle.
const KEPT: Duration = Duration::from_millis(100);

/// The current wait of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// The connection waits for the service, for the body of a request or response, or for the peer
    /// to take output. Once the peer has finished sending, `half_closed` bounds this wait. While
    /// output is pending, `write` and `min_rate` bound it instead.
    Busy,
    /// The connection waits for another task to read the rest of the body of a request that is
    /// already answered.
    Unread,
    FirstByte,
    Head,
    NextRequest,
    /// HTTP/2 only: all requests are answered, and the connection waits for data to pass through
    /// its open tunnels.
    Tunnels,
}

/// The action to take when a deadline passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Drain the connection, because it has reached its maximum age.
    Retire,
    /// Close gracefully, by hyper's graceful shutdown.
    Close(EndReason),
    /// Park the connection, because it is idle.
    Park,
    /// End immediately, without a graceful shutdown.
    End(EndReason),
    /// Compute the deadlines again, because a window of `min_rate` has ended, or because other
    /// tasks may have changed the counters on which the deadlines depend.
    Look,
}

impl deadline::Due for Due {
    fn is_kept_by_peer(&self) -> bool {
        match self {
            Self::Retire | Self::Park | Self::Look => false,
            Self::Close(reason) | Self::End(reason) => reason.is_kept_by_peer(),
        }
    }
}

/// The current wait, and six facts, in this order: output is pending; a piece of an HTTP/2 response
/// waits for the peer; the peer has finished sending; the connection drains; a graceful close has
/// begun; the HTTP/1 connection is idle but not parked.
type Waits = (Waiting, [bool; 6]);

pub(super) struct Clock {
    timer: Timer,
    /// The wait and the facts for which the timer was armed.
    armed: Option<Waits>,
    /// The current wait, the number of requests when it began, and the time at which it began.
    waiting: (Waiting, u64, Moment),
    /// HTTP/1 only: the time at which the connection last became idle without being parked at once.
    rested: Option<Moment>,
    /// HTTP/1 only: `true` if the last two moments at which the connection became idle are less
    /// than [`KEPT`] apart.
    is_quick: bool,
    /// The number of bytes that had been written at the last check.
    written: u64,
    blocked: Blocked,
    pace: Pace,
    /// HTTP/2 only: the number of bytes of responses that the peer has taken, and the time from
    /// which the write deadline counts. `None` while no piece of a response waits for the peer, or
    /// while `blocked` measures pending output.
    stalled: Option<(u64, Moment)>,
    /// The time at which the clock first saw that the peer had finished sending.
    finished: Option<Moment>,
    /// The number of bytes read and written, and the time of its last change. Used for tunnels,
    /// unread bodies, and peers that have finished sending. For unread bodies in HTTP/2, it is
    /// instead the number of bytes that services have read from bodies.
    moved: (u64, Moment),
    retire: Option<Moment>,
    /// The time at which the connection began to drain because of its age.
    retired: Option<Moment>,
    draining: Option<Moment>,
    /// The time at which a graceful close began.
    closing: Option<Moment>,
}

impl Clock {
    pub(super) fn new(accepted_at: Instant, deadlines: &Deadlines) -> Self {
        let timer = Timer::start();
        Self {
            armed: None,
            waiting: (Waiting::FirstByte, 0, Moment::START),
            rested: None,
            is_quick: false,
            written: 0,
            blocked: Blocked::default(),
            pace: Pace::default(),
            stalled: None,
            finished: None,
            moved: (0, Moment::START),
            retire: timer.age(accepted_at, deadlines.age()),
            timer,
            retired: None,
            draining: None,
            closing: None,
        }
    }

    /// Checks the deadlines before each wait. Completes with the action of a deadline that has
    /// passed, or with [`Due::Park`] if the connection is idle and can be parked now (see
    /// [`KEPT`]). Otherwise registers a wakeup for the next deadline.
    pub(super) fn poll(
        &mut self,
        progress: &Progress,
        rest: Rest,
        deadlines: &Deadlines,
        cx: &mut Context<'_>,
    ) -> Poll<Due> {
        loop {
            let at = Instant::now();
            let now = self.timer.moment(at);
            self.note(progress, rest, now);
            let is_kept = rest == Rest::Begun;
            if is_kept && (!self.is_quick || self.draining.is_some()) {
                return Poll::Ready(Due::Park);
            }
            let facts = [
                self.blocked.is_blocked(),
                self.stalled.is_some(),
                self.finished.is_some(),
                self.draining.is_some(),
                self.is_closing(),
                is_kept,
            ];
            let waits = (self.waiting.0, facts);
            if self.armed == Some(waits) && !self.timer.is_due(at) {
                return Poll::Pending;
            }
            if let Some(due) = ready!(self.poll_next(waits, is_kept, progress, deadlines, now, cx))
            {
                return Poll::Ready(due);
            }
        }
    }

    /// Registers a wakeup for the next deadline. Completes with the action of a deadline that has
    /// passed. Completes with `None` if the deadline `write` has passed, but a check has found that
    /// the peer took output meanwhile. The caller then computes the deadlines again.
    #[inline(never)] // Most polls of a busy connection return before this.
    fn poll_next(
        &mut self,
        waits: Waits,
        is_kept: bool,
        progress: &Progress,
        deadlines: &Deadlines,
        now: Moment,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Due>> {
        let (waiting, _, since) = self.waiting;
        let head = (waiting == Waiting::Head).then_some(since);
        let sending = self.blocked.begun();
        let rate = deadlines.min_rate;
        let window = match self.pace.check(rate, head, sending, progress.life(), now) {
            Ok(end) => end.map(|end| (end, Due::Look)),
            Err(reason) => return Poll::Ready(Some(Due::End(reason))),
        };
        let park = due(since, is_kept.then_some(KEPT), Due::Park);
        let next = first([park, self.next(now, progress, deadlines), window]);
        self.armed = next.map(|_| waits);
        let due = ready!(self.timer.poll(next, now, cx));
        self.armed = None;
        let later = self.timer.now();
        match due {
            Due::End(EndReason::WriteTimeout)
                if self.blocked.is_blocked()
                    && !self
                        .blocked
                        .is_over(progress.life(), deadlines.write, later) =>
            {
                return Poll::Ready(None);
            }
            Due::Retire => {
                self.retire = None;
                self.retired = (!progress.is_leaving()).then_some(now);
            }
            Due::Close(_) => {
                self.closing = Some(now);
            }
            Due::End(_) | Due::Park | Due::Look => {}
        }
        Poll::Ready(Some(due))
    }

    /// Makes the next poll register its waker with the timer, even if the wait has not changed.
    pub(super) fn disarm(&mut self) {
        self.armed = None;
    }

    /// Returns whether a graceful close has begun.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.is_some()
    }

    fn note(&mut self, progress: &Progress, rest: Rest, now: Moment) {
        let life = progress.life();
        let requests = life.requests();
        let pending = life.is_write_pending();
        let waiting = if progress.is_busy() || pending {
            Waiting::Busy
        } else if progress.has_streams() {
            Waiting::Tunnels
        } else if progress.is_multiplexed() && progress.has_unread_bodies() {
            Waiting::Unread
        } else if progress.is_multiplexed() {
            Waiting::NextRequest
        } else if rest != Rest::No && requests == 0 {
            Waiting::FirstByte
        } else if rest != Rest::No {
            Waiting::NextRequest
        } else if progress.has_unread_bodies() {
            Waiting::Unread
        } else {
            Waiting::Head
        };
        if (waiting, requests) != (self.waiting.0, self.waiting.1) {
            self.waiting = (waiting, requests, now);
            if rest == Rest::Begun {
                let until = self.rested.and_then(|at| at.checked_add(KEPT));
                self.is_quick = until.is_some_and(|until| now < until);
                self.rested = Some(now);
            }
        }
        let written = life.bytes_written();
        let wrote = std::mem::replace(&mut self.written, written) != written;
        self.blocked.note(pending, wrote, now);
        match progress.queued().filter(|_| !pending) {
            None => self.stalled = None,
            Some(taken) if self.stalled.is_some_and(|(before, _)| before == taken) => {}
            Some(taken) => self.stalled = Some((taken, now)),
        }
        if self.finished.is_none() && life.is_peer_done() {
            self.finished = Some(now);
        }
        let moved = if waiting == Waiting::Unread && progress.is_multiplexed() {
            // Not all bytes of the connection, because pings must not prolong the wait.
            progress.bodies_read()
        } else {
            life.bytes_read().wrapping_add(written)
        };
        if moved != self.moved.0 {
            self.moved = (moved, now);
        }
        if self.draining.is_none() && progress.is_leaving() {
            self.draining = Some(now);
        }
    }

    /// Returns the deadline that comes first.
    fn next(
        &self,
        now: Moment,
        progress: &Progress,
        deadlines: &Deadlines,
    ) -> Option<(Moment, Due)> {
        let Deadlines {
            write,
            // Used by `rest`.
            first_byte: _,
            frame: _,
            idle: _,
            half_closed: _,
            upgraded_idle: _,
            // Enforced through fields of `self`.
            max_age: _,
            max_age_jitter: _,
            min_rate: _,
            // Enforced by the request's body.
            body: _,
            // Enforced by hooks, pipelines and `serve`.
            pre_connect: _,
            last_calls: _,
            make_service: _,
            drain:
                DrainDeadlines {
                    frame: drain_frame,
                    stream,
                    // Used by `rest` and `close`.
                    goodbye: _,
                    last_request: _,
                    body: _,
                    // Enforced by hooks and pipelines.
                    pre_connect: _,
                    next_frame: _,
                },
        } = *deadlines;
        let (waiting, _, since) = self.waiting;
        let retire = self.retire.filter(|_| self.draining.is_none());
        let multiplexed = waiting == Waiting::Busy && progress.is_multiplexed();
        let look = write.filter(|time| multiplexed && !time.is_zero());
        first([
            self.rest(progress, deadlines),
            due(
                self.stalled.map(|(_, since)| since),
                write,
                Due::End(EndReason::WriteTimeout),
            ),
            due(now, look.map(between_looks), Due::Look),
            self.blocked
                .next(progress.life(), write)
                .map(|at| (at, Due::End(EndReason::WriteTimeout))),
            self.close(progress, deadlines),
            retire.map(|at| (at, Due::Retire)),
            due(
                self.retired.filter(|_| waiting == Waiting::Tunnels),
                stream,
                Due::End(EndReason::MaxAge),
            ),
            // For a head that begins during the drain, the time counts from its first byte.
            due(
                self.draining
                    .filter(|_| waiting == Waiting::Head)
                    .map(|draining| draining.max(since)),
                drain_frame,
                Due::End(EndReason::FrameTimeout),
            ),
        ])
    }

    /// Returns the deadline of the current wait.
    fn rest(&self, progress: &Progress, deadlines: &Deadlines) -> Option<(Moment, Due)> {
        let (waiting, _, since) = self.waiting;
        let idle = Due::End(EndReason::IdleTimeout);
        match (waiting, self.closing) {
            (Waiting::Busy, _) => {
                // Output that is pending has its own deadline.
                let finished = self.finished.filter(|_| !self.blocked.is_blocked());
                let gone = Due::End(EndReason::PeerReset);
                due(
                    finished.map(|at| at.max(self.moved.1)),
                    deadlines.half_closed,
                    gone,
                )
            }
            (Waiting::FirstByte, _) => {
                let silent = Due::End(EndReason::FirstByteTimeout);
                due(Moment::START, deadlines.first_byte, silent)
            }
            (Waiting::Head, _) => due(since, deadlines.frame, Due::End(EndReason::FrameTimeout)),
            (Waiting::Unread, None) => {
                let idle = if progress.is_multiplexed() {
                    Due::Close(EndReason::IdleTimeout)
                } else {
                    idle
                };
                due(since.max(self.moved.1), deadlines.idle, idle)
            }
            (Waiting::Unread, Some(closing)) => due(
                since.max(self.moved.1).max(closing),
                deadlines.drain.body,
                idle,
            ),
            (Waiting::Tunnels, _) => due(since.max(self.moved.1), deadlines.upgraded_idle, idle),
            (Waiting::NextRequest, _) if !progress.is_multiplexed() => {
                due(since, deadlines.idle, idle)
            }
            (Waiting::NextRequest, None) => {
                due(since, deadlines.idle, Due::Close(EndReason::IdleTimeout))
            }
            // A peer that does not acknowledge the `GOAWAY` may continue to send requests, which
            // hyper accepts. So `idle` bounds the whole time since the `GOAWAY`.
            (Waiting::NextRequest, Some(closing)) => first([
                due(since.max(closing), deadlines.drain.goodbye, idle),
                due(closing, deadlines.idle, idle),
            ]),
        }
    }

    /// Returns the deadline at which a draining connection closes.
    fn close(&self, progress: &Progress, deadlines: &Deadlines) -> Option<(Moment, Due)> {
        let draining = self.draining.filter(|_| !self.is_closing())?;
        match self.waiting.0 {
            // A request whose head has begun to arrive is answered, and the response closes the
            // connection.
            Waiting::Head => None,
            Waiting::FirstByte => due(Moment::START, TAKEN_IN, Due::End(EndReason::Drained)),
            _ => {
                let last = progress.life().requests() > 0 && !progress.is_multiplexed();
                let time = if last {
                    deadlines.drain.last_request
                } else {
                    Some(Duration::ZERO)
                };
                due(draining, time, Due::Close(EndReason::Drained))
            }
        }
    }
}
