//! What an HTTP connection waits for, and until when.
//!
//! hyper has a timer for HTTP/1 heads, which counts the rest between two requests as part of the
//! head, costs a timer a request, and does not see a connection before its first byte, one of
//! HTTP/2, or a peer that takes nothing. So it is asked only when it begins to wait for a head
//! ([`AwaitHead`]), and the deadlines are kept here.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::{Sleep, Timer as HyperTimer};
use tokio::time::Instant;

use super::requests::Progress;
use crate::deadline::{self, Deadlines, Moment, TAKEN_IN, Timer, due, first};
use crate::end::EndReason;

/// What a connection is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// For its service, for the body of a request or of a response: for nothing that has a deadline
    /// here.
    Busy,
    FirstByte,
    Head,
    NextRequest,
    /// In HTTP/2, for tunnels only: their requests were answered.
    Tunnels,
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The connection drains, because it is old.
    Retire,
    /// The connection is to leave in HTTP's way.
    Leave(EndReason),
    /// It ends, without a word to hyper.
    End(EndReason),
}

impl deadline::Due for Due {
    fn is_kept_by_peer(&self) -> bool {
        match self {
            Self::Retire => false,
            Self::Leave(reason) | Self::End(reason) => reason.is_kept_by_peer(),
        }
    }
}

/// It was told to leave in HTTP's way.
#[derive(Clone, Copy)]
struct Left {
    told: Moment,
    /// How much was written, and since when it was no more.
    written: (u64, Moment),
}

pub(super) struct Clock {
    timer: Timer,
    /// How it waited when the timer was armed: for what, with output, draining, and told to leave.
    armed: Option<(Waiting, bool, bool, bool)>,
    /// What it waits for, behind how many requests, and since when.
    waiting: (Waiting, u64, Moment),
    /// How much was written when the peer took no more, and since when.
    blocked: Option<(u64, Moment)>,
    /// How much was read and written, and since when it was no more. For tunnels only.
    moved: (u64, Moment),
    retire: Option<Moment>,
    /// When it began to drain because it is old.
    retired: Option<Moment>,
    draining: Option<Moment>,
    left: Option<Left>,
}

impl Clock {
    pub(super) fn new(accepted_at: Instant, deadlines: &Deadlines) -> Self {
        let timer = Timer::start();
        Self {
            armed: None,
            waiting: (Waiting::FirstByte, 0, Moment::START),
            blocked: None,
            moved: (0, Moment::START),
            retire: timer.age(accepted_at, deadlines.age()),
            timer,
            retired: None,
            draining: None,
            left: None,
        }
    }

    /// Before a wait: ready with what is due, else wakes the task when it is.
    pub(super) fn poll(
        &mut self,
        progress: &Progress,
        deadlines: &Deadlines,
        cx: &mut Context<'_>,
    ) -> Poll<Due> {
        let now = self.timer.now();
        self.note(progress, now);
        let waits = (
            self.waiting.0,
            self.blocked.is_some(),
            self.draining.is_some(),
            self.has_left(),
        );
        if self.armed == Some(waits) && self.timer.fires_after(now) {
            return Poll::Pending;
        }
        let next = self.next(progress, deadlines);
        self.armed = next.map(|_| waits);
        let due = ready!(self.timer.poll(next, now, cx));
        self.armed = None;
        match due {
            Due::Retire => {
                self.retire = None;
                self.retired = (!progress.is_leaving()).then_some(now);
            }
            Due::Leave(_) => {
                self.left = Some(Left {
                    told: now,
                    written: (progress.life().bytes_written(), now),
                });
            }
            Due::End(_) => {}
        }
        Poll::Ready(due)
    }

    /// Has the timer learn of another waker.
    pub(super) fn disarm(&mut self) {
        self.armed = None;
    }

    /// Returns whether the connection was told to leave in HTTP's way.
    pub(super) fn has_left(&self) -> bool {
        self.left.is_some()
    }

    fn note(&mut self, progress: &Progress, now: Moment) {
        let life = progress.life();
        let requests = life.requests();
        let waiting = if progress.is_busy() {
            Waiting::Busy
        } else if progress.has_streams() {
            Waiting::Tunnels
        } else if requests == 0 && life.bytes_read() == 0 {
            Waiting::FirstByte
        } else if progress.is_multiplexed() {
            Waiting::NextRequest
        } else {
            match progress.awaiting_head() {
                Some(read) if requests > 0 && read == life.bytes_read() => Waiting::NextRequest,
                None if requests > 0 => Waiting::Busy,
                _ => Waiting::Head,
            }
        };
        if (waiting, requests) != (self.waiting.0, self.waiting.1) {
            self.waiting = (waiting, requests, now);
        }
        let written = life.bytes_written();
        if !life.is_write_pending() {
            self.blocked = None;
        } else if self.blocked.is_none_or(|(before, _)| before != written) {
            self.blocked = Some((written, now));
        }
        let moved = life.bytes_read().wrapping_add(written);
        if moved != self.moved.0 {
            self.moved = (moved, now);
        }
        if let Some(left) = &mut self.left
            && left.written.0 != written
        {
            left.written = (written, now);
        }
        if self.draining.is_none() && progress.is_leaving() {
            self.draining = Some(now);
        }
    }

    /// Returns what is due first.
    fn next(&self, progress: &Progress, deadlines: &Deadlines) -> Option<(Moment, Due)> {
        let (waiting, _, since) = self.waiting;
        let blocked = self.blocked.map(|(_, since)| since);
        let retire = self.retire.filter(|_| self.draining.is_none());
        first([
            self.rest(progress, deadlines),
            due(blocked, deadlines.write, Due::End(EndReason::WriteTimeout)),
            self.leave(progress, deadlines),
            retire.map(|at| (at, Due::Retire)),
            due(
                self.retired.filter(|_| waiting == Waiting::Tunnels),
                deadlines.drain.stream,
                Due::End(EndReason::MaxAge),
            ),
            // A head that is begun in the drain has as long, from then on.
            due(
                self.draining
                    .filter(|_| waiting == Waiting::Head)
                    .map(|draining| draining.max(since)),
                deadlines.drain.frame,
                Due::End(EndReason::FrameTimeout),
            ),
        ])
    }

    /// Returns until when the connection waits for what it waits for.
    fn rest(&self, progress: &Progress, deadlines: &Deadlines) -> Option<(Moment, Due)> {
        let (waiting, _, since) = self.waiting;
        let idle = Due::End(EndReason::IdleTimeout);
        match (waiting, self.left) {
            (Waiting::Busy, _) => None,
            (Waiting::FirstByte, _) => {
                let silent = Due::End(EndReason::FirstByteTimeout);
                due(Moment::START, deadlines.first_byte, silent)
            }
            (Waiting::Head, _) => due(since, deadlines.frame, Due::End(EndReason::FrameTimeout)),
            (Waiting::Tunnels, _) => due(since.max(self.moved.1), deadlines.upgraded_idle, idle),
            (Waiting::NextRequest, _) if !progress.is_multiplexed() => {
                due(since, deadlines.idle, idle)
            }
            (Waiting::NextRequest, None) => {
                due(since, deadlines.idle, Due::Leave(EndReason::IdleTimeout))
            }
            // A response may be on its way still. A peer that pings is written to as well, so not
            // forever.
            (Waiting::NextRequest, Some(left)) => first([
                due(since.max(left.written.1), deadlines.drain.goodbye, idle),
                due(since.max(left.told), deadlines.idle, idle),
            ]),
        }
    }

    /// Returns when a draining connection leaves.
    fn leave(&self, progress: &Progress, deadlines: &Deadlines) -> Option<(Moment, Due)> {
        let draining = self.draining.filter(|_| !self.has_left())?;
        match self.waiting.0 {
            // A head that was begun is answered, and with that the connection closes.
            Waiting::Head => None,
            Waiting::FirstByte => due(Moment::START, TAKEN_IN, Due::End(EndReason::Drained)),
            _ => {
                let last = progress.life().requests() > 0 && !progress.is_multiplexed();
                let time = if last {
                    deadlines.drain.last_request
                } else {
                    Some(Duration::ZERO)
                };
                due(draining, time, Due::Leave(EndReason::Drained))
            }
        }
    }
}

/// hyper's timer for HTTP/1, which never fires: hyper asks for it when it begins to wait for the
/// head of a request, and that is all that is wanted of it.
pub(super) struct AwaitHead {
    progress: Arc<Progress>,
    now: Instant,
}

impl AwaitHead {
    pub(super) fn new(progress: &Arc<Progress>) -> Self {
        Self {
            progress: Arc::clone(progress),
            now: Instant::now(),
        }
    }
}

#[expect(clippy::disallowed_types, reason = "hyper's trait has it so")]
impl HyperTimer for AwaitHead {
    fn sleep(&self, _: Duration) -> Pin<Box<dyn Sleep>> {
        self.progress.await_head();
        Box::pin(Never)
    }

    fn sleep_until(&self, _: std::time::Instant) -> Pin<Box<dyn Sleep>> {
        self.progress.await_head();
        Box::pin(Never)
    }

    /// Nothing is reckoned with it.
    fn now(&self) -> std::time::Instant {
        self.now.into_std()
    }
}

struct Never;

impl Future for Never {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

impl Sleep for Never {}
