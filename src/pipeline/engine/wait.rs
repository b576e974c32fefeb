//! The waits of a connection. Each writes what there is first, and keeps the deadlines.

use std::ops::ControlFlow;
use std::task::{Context, Poll, ready};

use tokio::time::Instant;

use super::read::Drain;
use super::{Codec, Engine, Leaves, Stream};
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
    /// Waits for input, when there is nothing to decode: writes all there is first. Ready when something has changed.
    pub(in crate::pipeline) fn poll_input(
        &mut self,
        in_hand: usize,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let message = match self.poll_before_input(cx) {
            ControlFlow::Continue(message) => message,
            ControlFlow::Break(polled) => return polled,
        };
        let at_most = if self.output.is_flushed() {
            usize::MAX
        } else {
            READ_UNWRITTEN
        };
        // What was encoded may have changed the decoder's mode.
        if self.decodable || self.poll_read(at_most, cx).is_ready() {
            return Poll::Ready(());
        }
        if self.conn.is_draining() && matches!(self.drain, Drain::Reading(_)) {
            ready!(poll_looked(cx));
            if !self.clock.has_heard() {
                return self.poll_clock(Waiting::Leaving, message, cx);
            }
            self.drain = Drain::Read;
            if self.input.is_empty() {
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

    /// Waits while input is paused; `undelivered` is whether a request is held back. Ready when something has changed.
    pub(in crate::pipeline) fn poll_paused(
        &mut self,
        undelivered: bool,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let message = match self.poll_before_input(cx) {
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

    /// What comes before each wait for the peer to send something: goes on with when the next message is due, if it is to be waited at all.
    fn poll_before_input(
        &mut self,
        cx: &mut Context<'_>,
    ) -> ControlFlow<Poll<()>, Option<Instant>> {
        self.heed_signals(cx);
        if self.is_ending() {
            return ControlFlow::Break(Poll::Ready(()));
        }
        let _waits_or_not = self.poll_output(cx);
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

    /// Waits until output is below its mark. Ready then, or when the connection ends.
    pub(in crate::pipeline) fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_signals(cx);
        let _waits_or_not = self.poll_output(cx);
        if self.is_ending() || !self.is_above_mark() {
            return Poll::Ready(());
        }
        self.poll_clock(Waiting::Busy, None, cx)
    }

    /// Waits beside something else: a call, the service's readiness, the make-service. Writes, reads ahead a little so that a
    /// reset is noticed, keeps the deadlines. Ready when the connection must end without waiting for that.
    pub(in crate::pipeline) fn poll_beside(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_signals(cx);
        let _waits_or_not = self.poll_output(cx);
        self.read_ahead(cx);
        while !self.leaves(Leaves::Calls) {
            if self.poll_clock(Waiting::Busy, None, cx).is_pending() {
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// Waits for the make-service, by itself. Ready when the connection must end without it.
    pub(in crate::pipeline) fn poll_making(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_signals(cx);
        let _waits_or_not = self.poll_output(cx);
        self.read_ahead(cx);
        // A connection that is old is told to leave, and has its service made all the same.
        while !self.is_ending() {
            ready!(self.poll_clock(Waiting::Making, None, cx));
        }
        Poll::Ready(())
    }

    /// At the end: waits until all is written, or cannot be.
    pub(in crate::pipeline) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(peer) = &self.peer {
            peer.refuse();
        }
        loop {
            if self.poll_output(cx).is_ready() || self.leaves(Leaves::Output) {
                return Poll::Ready(());
            }
            ready!(self.poll_clock(Waiting::Busy, None, cx));
            if self.leaves(Leaves::Output) {
                return Poll::Ready(());
            }
        }
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
        let writing = !self.output.is_flushed();
        let limits = &self.settings.limits;
        let fired = ready!(self.clock.poll(waiting, writing, message, limits, cx));
        let Some(reason) = fired else {
            return Poll::Ready(());
        };
        match reason {
            EndReason::WriteTimeout => self.end(reason, Leaves::Output),
            EndReason::MaxAge => {
                // A drain of this one connection.
                self.clock.retired();
                self.conn.life().set_reason(reason, None);
                self.conn.life().signals.raise(Signal::Drain);
            }
            _ => self.end(reason, Leaves::Input),
        }
        Poll::Ready(())
    }
}
