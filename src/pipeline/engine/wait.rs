//! The waits of a connection.
//!
//! Each first encodes pending replies and flushes, so replies that are ready together go out in one
//! write, and nothing is kept back while the connection waits. All but the last heed signals before
//! that. Each keeps the deadlines. They differ in what they wait for:
//!
//! | wait | for | reads |
//! | --- | --- | --- |
//! | `poll_flush_then_read` | the next request | as much as comes |
//! | `poll_flush_until_resumed` | the program to resume input | a little ahead |
//! | `poll_flush_to_low_mark` | the peer to take output | nothing |
//! | `poll_io_beside` | its own service | a little ahead |
//! | `poll_io_beside_make` | its make-service | a little ahead |
//! | `poll_flush_all` | the peer to take the rest, at the end | nothing |

use std::ops::ControlFlow;
use std::task::{Context, Poll, ready};

use tokio::time::Instant;

use super::state::{Leaves, State};
use super::{Codec, Engine, Stream};
use crate::end::EndReason;
use crate::pipeline::clock::Waiting;
use crate::pipeline::peer::{EngineSide, Mail};
use crate::signals::{Signal, poll_looked};

/// How much is read at once while there is output that the peer does not take: what it sends may have to be held beside that.
const READ_UNWRITTEN: usize = 8 * 1024;

impl<Io, C, T, M> Engine<Io, C, T, M>
where
    Io: Stream,
    C: Codec<T>,
{
    /// Waits until there may be another event: writes first, then reads, unless the peer takes no
    /// output or input is paused.
    ///
    /// `in_hand` counts the calls in flight; `undelivered` is whether a request is held back. Ready
    /// when something has changed.
    #[inline]
    pub(in crate::pipeline) fn poll_more(
        &mut self,
        in_hand: usize,
        undelivered: bool,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        if self.look_at_marks() {
            self.poll_flush_to_low_mark(cx)
        } else if self.is_paused() {
            self.poll_flush_until_resumed(undelivered, cx)
        } else {
            self.poll_flush_then_read(in_hand, cx)
        }
    }

    /// Waits for input. Ready when something has changed.
    fn poll_flush_then_read(&mut self, in_hand: usize, cx: &mut Context<'_>) -> Poll<()> {
        let message = match self.poll_flush_before_input(cx) {
            ControlFlow::Continue(message) => message,
            ControlFlow::Break(polled) => return polled,
        };
        let at_most = if self.output.is_flushed() {
            usize::MAX
        } else {
            READ_UNWRITTEN
        };
        // What was encoded may have changed the decoder's mode.
        if self.decoding.may_have_frame() || self.poll_read(at_most, cx).is_ready() {
            return Poll::Ready(());
        }
        if matches!(self.state, State::DrainReading(_)) {
            ready!(poll_looked(cx));
            if !self.clock.has_heard() {
                return self.poll_clock(Waiting::Leaving, message, cx);
            }
            self.state.drain_has_read();
            if self.input.is_empty() && !self.awaits_last_frame() {
                self.end(EndReason::Drained, Leaves::Input);
                return Poll::Ready(());
            }
        }
        let waiting = if !self.input.is_empty() {
            Waiting::InFrame
        } else if in_hand > 0 || self.waiting_replies() > 0 {
            Waiting::Busy
        } else {
            Waiting::Resting
        };
        self.poll_clock(waiting, message, cx)
    }

    /// Waits while input is paused. Ready when something has changed.
    fn poll_flush_until_resumed(&mut self, undelivered: bool, cx: &mut Context<'_>) -> Poll<()> {
        let message = match self.poll_flush_before_input(cx) {
            ControlFlow::Continue(message) => message,
            ControlFlow::Break(polled) => return polled,
        };
        if !self.is_paused() {
            return Poll::Ready(());
        }
        self.read_ahead(cx);
        if self.is_ending() {
            return Poll::Ready(());
        }
        if !undelivered {
            if self.is_at_end_of_input() {
                return Poll::Ready(());
            }
            if self.conn.is_draining() && self.input.is_empty() {
                ready!(poll_looked(cx));
                self.end(EndReason::Drained, Leaves::Input);
                return Poll::Ready(());
            }
        }
        self.poll_clock(Waiting::Busy, message, cx)
    }

    /// Flushes before each wait for the peer to send something. Goes on with when the next message
    /// is due, if it is to be waited at all.
    fn poll_flush_before_input(
        &mut self,
        cx: &mut Context<'_>,
    ) -> ControlFlow<Poll<()>, Option<Instant>> {
        self.stand_by(cx);
        self.heed_signals();
        if self.is_ending() {
            return ControlFlow::Break(Poll::Ready(()));
        }
        let _waits_or_not = self.poll_encode_then_flush(cx);
        if self.is_ending() {
            return ControlFlow::Break(Poll::Ready(()));
        }
        if self.above_mark {
            return ControlFlow::Break(self.poll_clock(Waiting::Busy, None, cx));
        }
        // After the waker was left with the signals: a message that comes now wakes.
        match self.peer.as_ref().map_or(Mail::None, EngineSide::mail) {
            Mail::None => ControlFlow::Continue(None),
            Mail::At(due) => ControlFlow::Continue(Some(due)),
            Mail::Now => ControlFlow::Break(Poll::Ready(())),
        }
    }

    /// Waits until output is down at its low mark. Ready then, or when the connection ends.
    fn poll_flush_to_low_mark(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_and_flush(cx);
        if self.is_ending() || !self.look_at_marks() {
            return Poll::Ready(());
        }
        self.poll_clock(Waiting::Busy, None, cx)
    }

    /// Drives I/O and deadlines while the connection waits for its own service: a call, or
    /// `poll_ready`. Reads ahead a little, so that a reset is noticed. Ready when the connection
    /// must end without the service.
    pub(in crate::pipeline) fn poll_io_beside(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_and_flush(cx);
        self.read_ahead(cx);
        while !self.leaves(Leaves::Calls) {
            if self.poll_clock(Waiting::Busy, None, cx).is_pending() {
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// Drives I/O and deadlines while the service is made. Ready when the connection must end
    /// without it.
    pub(in crate::pipeline) fn poll_io_beside_make(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_and_flush(cx);
        self.read_ahead(cx);
        // A connection that is old is told to leave, and has its service made all the same.
        while !self.is_ending() {
            ready!(self.poll_clock(Waiting::Making, None, cx));
        }
        Poll::Ready(())
    }

    /// Waits, at the end, until all is written, or cannot be.
    pub(in crate::pipeline) fn poll_flush_all(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(peer) = &self.peer {
            peer.refuse();
        }
        loop {
            if self.poll_encode_then_flush(cx).is_ready() || self.leaves(Leaves::Output) {
                return Poll::Ready(());
            }
            ready!(self.poll_clock(Waiting::Busy, None, cx));
            if self.leaves(Leaves::Output) {
                return Poll::Ready(());
            }
        }
    }

    fn heed_and_flush(&mut self, cx: &mut Context<'_>) {
        self.stand_by(cx);
        self.heed_signals();
        let _waits_or_not = self.poll_encode_then_flush(cx);
    }

    /// Takes in a little of what has come, without waiting for more.
    fn read_ahead(&mut self, cx: &mut Context<'_>) {
        while !self.is_ending() && !self.input.is_eof() {
            let room = self
                .settings
                .limits
                .read_ahead
                .saturating_sub(self.input.len());
            if room == 0 || self.poll_read(room, cx).is_pending() {
                break;
            }
        }
    }

    /// Sees to it that signals wake this task.
    pub(super) fn stand_by(&mut self, cx: &mut Context<'_>) {
        let known = self.waker.as_ref();
        if known.is_none_or(|waker| !waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
            self.conn.life().signals.wake_engine_with(cx.waker());
            self.clock.disarm();
        }
    }

    fn poll_clock(
        &mut self,
        waiting: Waiting,
        message: Option<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        self.input.rest();
        self.output.rest();
        self.stand_by(cx);
        if self.conn.is_draining() {
            self.clock.drain();
        }
        let writing = !self.output.is_flushed();
        let deadlines = &self.settings.deadlines;
        let fired = ready!(self.clock.poll(waiting, writing, message, deadlines, cx));
        let Some(reason) = fired else {
            return Poll::Ready(());
        };
        match reason {
            EndReason::WriteTimeout => self.end(reason, Leaves::Output),
            EndReason::MaxAge => {
                // A drain of this one connection.
                self.conn.life().set_reason(reason, None);
                self.conn.life().signals.raise(Signal::Drain);
            }
            _ => self.end(reason, Leaves::Input),
        }
        Poll::Ready(())
    }
}
