//! The deadlines of a connection, on one lazy timer.
//!
//! hyper has a timer for HTTP/1 heads, which counts the rest between two requests as part of the head, costs a timer a request, and
//! does not see a connection before its first byte, one of HTTP/2, or a peer that takes nothing. So it is asked only when it begins to wait
//! for a head ([`AwaitHead`]), and the deadlines are kept here.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::rt::{Sleep, Timer};
use tokio::task::coop::unconstrained;
use tokio::time::Instant;

use super::requests::Progress;
use crate::connection::STOOD_STILL;
use crate::deadline::Deadlines;
use crate::end::EndReason;

/// How long after it was taken in a connection that has not been heard from stays on at a drain. What its peer has sent may have
/// arrived with it, and the runtime does not know yet; it is a turn of the driver away.
const TAKEN_IN: Duration = Duration::from_millis(50);

/// How long an HTTP/2 peer has to acknowledge that an idle connection closes, behind the last that was written to it: some round trips.
const GOODBYE: Duration = Duration::from_secs(5);

/// What a connection is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// For its service, for the body of a request or of a response: for nothing that has a deadline here.
    Busy,
    FirstByte,
    Head,
    NextRequest,
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The connection is to leave in HTTP's way.
    Leave(EndReason),
    /// It ends, without a word to hyper.
    End(EndReason),
}

/// It was told to leave in HTTP's way.
#[derive(Clone, Copy)]
struct Left {
    told: Instant,
    /// How much was written, and since when it was no more.
    written: (u64, Instant),
}

pub(super) struct Clock {
    timer: Option<Pin<Box<tokio::time::Sleep>>>,
    /// The timer will wake the task as it is: polling it again would change nothing.
    armed: bool,
    started: Instant,
    /// What it waits for, behind how many requests, and since when.
    waiting: (Waiting, u64, Instant),
    /// How much was written when the peer took no more, and since when.
    blocked: Option<(u64, Instant)>,
    draining: Option<Instant>,
    left: Option<Left>,
    put_off: Option<Instant>,
}

impl Clock {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            timer: None,
            armed: false,
            started: now,
            waiting: (Waiting::FirstByte, 0, now),
            blocked: None,
            draining: None,
            left: None,
            put_off: None,
        }
    }

    /// Before a wait: ready with what is due, else wakes the task when it is.
    pub(super) fn poll(
        &mut self,
        progress: &Progress,
        deadlines: &Deadlines,
        cx: &mut Context<'_>,
    ) -> Poll<Due> {
        self.note(progress);
        loop {
            let Some((at, due)) = self.next(progress, deadlines) else {
                return Poll::Pending;
            };
            let at = self.put_off.map_or(at, |until| at.max(until));
            let timer = match &mut self.timer {
                Some(timer) => {
                    if timer.is_elapsed() {
                        if timer.deadline() < at {
                            timer.as_mut().reset(at);
                        }
                    } else if timer.deadline() > at {
                        timer.as_mut().reset(at);
                    } else if self.armed {
                        return Poll::Pending;
                    }
                    timer
                }
                none => none.insert(Box::pin(tokio::time::sleep_until(at))),
            };
            // Whatever this turn has cost: a timer that is not looked at for want of budget would not wake.
            let timer = pin!(unconstrained(timer.as_mut()));
            self.armed = timer.poll(cx).is_pending();
            if self.armed {
                return Poll::Pending;
            }
            // It may have fired for a deadline that has moved since.
            let now = Instant::now();
            if at <= now && !self.forgives(at, due, now) {
                if matches!(due, Due::Leave(_)) {
                    self.left = Some(Left {
                        told: now,
                        written: (progress.life().bytes_written(), now),
                    });
                }
                return Poll::Ready(due);
            }
        }
    }

    /// Has the timer learn of another waker.
    pub(super) fn disarm(&mut self) {
        self.armed = false;
    }

    /// Returns whether the connection was told to leave in HTTP's way.
    pub(super) fn has_left(&self) -> bool {
        self.left.is_some()
    }

    fn note(&mut self, progress: &Progress) {
        let life = progress.life();
        let requests = life.requests();
        let waiting = if progress.is_busy() {
            Waiting::Busy
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
            self.waiting = (waiting, requests, Instant::now());
        }
        let written = life.bytes_written();
        if !progress.blocked.load(Ordering::Relaxed) {
            self.blocked = None;
        } else if self.blocked.is_none_or(|(before, _)| before != written) {
            self.blocked = Some((written, Instant::now()));
        }
        if let Some(left) = &mut self.left
            && left.written.0 != written
        {
            left.written = (written, Instant::now());
        }
        if self.draining.is_none() && progress.is_leaving() {
            self.draining = Some(Instant::now());
        }
    }

    /// Returns what is due first.
    fn next(&self, progress: &Progress, deadlines: &Deadlines) -> Option<(Instant, Due)> {
        // A time beyond the end of the clock is no deadline.
        let after =
            |from: Instant, time: Option<Duration>, due| Some((from.checked_add(time?)?, due));
        let (waiting, _, since) = self.waiting;
        let rest = match waiting {
            Waiting::Busy => None,
            Waiting::FirstByte => {
                let due = Due::End(EndReason::FirstByteTimeout);
                after(self.started, deadlines.first_byte, due)
            }
            Waiting::Head => after(since, deadlines.frame, Due::End(EndReason::FrameTimeout)),
            Waiting::NextRequest => {
                let end = Due::End(EndReason::IdleTimeout);
                match self.left {
                    // What was answered may be on its way still. Who pings is written to as well, so not for ever.
                    Some(left) if progress.is_multiplexed() => {
                        let quiet = after(since.max(left.written.1), Some(GOODBYE), end);
                        let idle = after(since.max(left.told), deadlines.idle, end);
                        [quiet, idle]
                            .into_iter()
                            .flatten()
                            .min_by_key(|(at, _)| *at)
                    }
                    None if progress.is_multiplexed() => {
                        after(since, deadlines.idle, Due::Leave(EndReason::IdleTimeout))
                    }
                    _ => after(since, deadlines.idle, end),
                }
            }
        };
        let write = self.blocked.and_then(|(_, since)| {
            after(since, deadlines.write, Due::End(EndReason::WriteTimeout))
        });
        let drain = self
            .draining
            // A head that was begun is answered, and with that the connection closes.
            .filter(|_| !self.has_left() && waiting != Waiting::Head)
            .and_then(|since| {
                if waiting == Waiting::FirstByte {
                    return after(self.started, Some(TAKEN_IN), Due::End(EndReason::Drained));
                }
                let last = progress.life().requests() > 0 && !progress.is_multiplexed();
                let time = if last {
                    deadlines.drain.last_request
                } else {
                    Some(Duration::ZERO)
                };
                after(since, time, Due::Leave(EndReason::Drained))
            });
        [rest, write, drain]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }

    /// Puts off, once, what the peer has missed while nobody looked. Returns whether it did.
    fn forgives(&mut self, at: Instant, due: Due, now: Instant) -> bool {
        let of_the_peer = !matches!(
            due,
            Due::Leave(EndReason::Drained) | Due::End(EndReason::Drained)
        );
        let late = now.saturating_duration_since(at) > STOOD_STILL;
        let forgives = of_the_peer && late && self.put_off.is_none_or(|until| until < at);
        if forgives {
            self.put_off = Some(now + STOOD_STILL);
        }
        forgives
    }
}

/// hyper's timer for HTTP/1, which never fires: hyper asks for it when it begins to wait for the head of a request, and that is all that is
/// wanted of it.
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
impl Timer for AwaitHead {
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
