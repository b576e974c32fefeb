//! The waits of a connection.
//!
//! Each wait except `poll_flush_all` begins by handling signals. Each wait then encodes pending
//! replies and flushes. So replies that are ready together are written together, and the connection
//! never waits while it has output that the stream would take. Each wait enforces the deadlines.
//! `poll_flush_all` reads, and handles the signal to close, only while a reply is not completely
//! encoded. This table lists the waits:
//!
//! | function | waits for | reads |
//! | --- | --- | --- |
//! | `poll_flush_then_read` | the next request | all input |
//! | `poll_flush_until_resumed` | the program to resume input | a little ahead |
//! | `poll_flush_to_low_mark` | the peer to take output | nothing |
//! | `poll_io_beside` | its own service | a little ahead |
//! | `poll_io_beside_make` | its make-service | a little ahead |
//! | `poll_flush_all` | the peer to take the remaining output, at the end | nothing, or a little ahead |

use std::io;
use std::ops::ControlFlow;
use std::task::{Context, Poll, ready};

use tokio::time::Instant;

use super::state::{Dropped, State};
use super::{Codec, Engine, Stream};
use crate::bind::Departing;
use crate::end::EndReason;
use crate::pipeline::clock::{Alarm, Waiting};
use crate::pipeline::peer::{EngineSide, Mail};
use crate::signals::{Signal, poll_looked};

/// The maximum number of bytes per read while output is pending. It is small, because these bytes
/// may take memory in addition to the output.
const READ_UNWRITTEN: usize = 8 * 1024;

impl<Io, C, T, M> Engine<Io, C, T, M>
where
    Io: Stream,
    C: Codec<T>,
{
    /// Does one step of the wait for an event: writes output, and then reads input. While input is
    /// paused, the step reads only up to the limit `read_ahead`. While `above_mark` is set, it
    /// reads nothing.
    ///
    /// Completes when anything has changed, so the caller must check again for an event.
    #[inline]
    pub(super) fn poll_more(&mut self, in_flight: usize, cx: &mut Context<'_>) -> Poll<()> {
        let polled = if self.update_above_mark() {
            self.poll_flush_to_low_mark(cx)
        } else if self.is_paused() {
            self.poll_flush_until_resumed(cx)
        } else {
            self.poll_flush_then_read(in_flight, cx)
        };
        if polled.is_pending() {
            self.turn.wait();
        }
        polled
    }

    /// Waits for input. Completes when the caller must check again for an event.
    fn poll_flush_then_read(&mut self, in_flight: usize, cx: &mut Context<'_>) -> Poll<()> {
        let message = match self.poll_flush_before_input(cx) {
            ControlFlow::Continue(message) => message,
            ControlFlow::Break(polled) => return polled,
        };
        let at_most = if self.output.is_flushed() {
            usize::MAX
        } else {
            READ_UNWRITTEN
        };
        // A frame that was encoded just now may have changed the decoder's mode, so decode before
        // reading.
        if self.may_have_frame
            || self.poll_read(at_most, cx).is_ready()
            || (self.looks_again() && self.poll_read(at_most, cx).is_ready())
        {
            return Poll::Ready(());
        }
        if matches!(self.state, State::DrainReading(_)) {
            ready!(poll_looked(cx));
            if !self.clock.has_heard() {
                return self.poll_clock(Waiting::DrainSilent, message, cx);
            }
            self.state.drain_has_read();
            if self.input.is_empty() && !self.allows_next_frame() {
                self.end(EndReason::Drained, Dropped::Input);
                return Poll::Ready(());
            }
        }
        // All input is read, so the next read notices a disconnect, and no watch is needed.
        if let Some(departure) = &mut self.departure {
            departure.watch = None;
        }
        let waiting = if !self.input.is_empty() {
            Waiting::InFrame
        } else if in_flight > 0 || self.waiting_replies() > 0 {
            Waiting::Busy
        } else {
            Waiting::Idle
        };
        // No reply is due that could carry the acknowledgement of the bytes just read, so
        // acknowledge them now.
        if waiting != Waiting::Busy && std::mem::take(&mut self.unanswered) {
            self.conn.life().probe.acknowledge();
        }
        self.poll_clock(waiting, message, cx)
    }

    /// Returns whether to read once more although the last read found no bytes. Bytes may have
    /// arrived that the runtime has not reported, so the additional read asks the system.
    ///
    /// A drain loses bytes that it does not find, because the connection then closes. So in
    /// `DrainReading` the result is `true` if the listener has provided the socket and the socket
    /// is still open. In other states, the result is `true` only if a part of a frame has arrived,
    /// and the runtime may have missed the rest because of urgent data (see `Probe::look_again`).
    fn looks_again(&self) -> bool {
        let probe = &self.conn.life().probe;
        match self.state {
            State::DrainReading(_) => probe.look(),
            _ => !self.input.is_empty() && probe.look_again(),
        }
    }

    /// Waits while input is paused. Completes when the caller must check again for an event.
    fn poll_flush_until_resumed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
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
        if self.request.is_none() {
            if self.is_at_end_of_input() {
                return Poll::Ready(());
            }
            if self.state.is_draining() && self.input.is_empty() {
                ready!(poll_looked(cx));
                if !self.clock.has_heard() {
                    return self.poll_clock(Waiting::DrainSilent, message, cx);
                }
                self.end(EndReason::Drained, Dropped::Input);
                return Poll::Ready(());
            }
        }
        self.poll_clock(Waiting::Busy, message, cx)
    }

    /// Prepares a wait for the peer's input: handles signals and flushes. Continues with the time
    /// at which the next delayed message is due, if there is one. Breaks with the result of the
    /// wait if the connection must not wait for input now.
    fn poll_flush_before_input(
        &mut self,
        cx: &mut Context<'_>,
    ) -> ControlFlow<Poll<()>, Option<Instant>> {
        self.register_waker(cx);
        self.handle_signals();
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
        // Messages are checked after the waker is registered, so that a later message wakes the
        // task.
        match self.peer.as_ref().map_or(Mail::None, EngineSide::mail) {
            Mail::None => ControlFlow::Continue(None),
            Mail::At(due) => ControlFlow::Continue(Some(due)),
            Mail::Now => ControlFlow::Break(Poll::Ready(())),
        }
    }

    /// Waits for the output to fall to its low mark. Also completes when the connection is ending,
    /// or when a deadline has passed.
    fn poll_flush_to_low_mark(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.handle_signals_and_flush(cx);
        if self.is_ending() || !self.update_above_mark() {
            return Poll::Ready(());
        }
        self.poll_clock(Waiting::Busy, None, cx)
    }

    /// Drives I/O and deadlines while the connection waits for its own service (a call or
    /// `poll_ready`). Reads a little ahead, to notice a reset. Completes when the connection must
    /// end without waiting for the service.
    pub(in crate::pipeline) fn poll_io_beside(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.handle_signals_and_flush(cx);
        self.read_ahead(cx);
        while !self.drops(Dropped::Calls) {
            if self.poll_clock(Waiting::Busy, None, cx).is_pending() {
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// Completes when the connection must end without waiting for the calls that still run. Once
    /// the connection is ending, this function also drives I/O and deadlines. Until then,
    /// `poll_event` drives them.
    pub(in crate::pipeline) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.drops(Dropped::Calls) {
            Poll::Ready(())
        } else if self.is_ending() {
            self.poll_io_beside(cx)
        } else {
            Poll::Pending
        }
    }

    /// Drives I/O and deadlines while the service is made. Completes when the connection must end
    /// without waiting for the make-service.
    pub(in crate::pipeline) fn poll_io_beside_make(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.handle_signals_and_flush(cx);
        self.read_ahead(cx);
        // Reaching the maximum age only begins a drain, so the service is still made.
        while !self.is_ending() {
            ready!(self.poll_clock(Waiting::Making, None, cx));
        }
        Poll::Ready(())
    }

    /// Waits until all output is written, or is dropped, for example because the stream failed or a
    /// deadline passed. Called at the end of a connection, and before an upgrade. A farewell is
    /// written last.
    pub(in crate::pipeline) fn poll_flush_all(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.register_waker(cx);
        loop {
            if self.poll_encode_then_flush(cx).is_ready() || self.drops(Dropped::Output) {
                if self.encode_farewell() {
                    continue;
                }
                return Poll::Ready(());
            }
            if self.waiting_replies() > 0 {
                // The request is still in progress. So it ends if the peer disconnects, and has a
                // deadline once the program closes the connection.
                self.handle_close();
                self.read_ahead(cx);
            }
            if !self.drops(Dropped::Output) {
                ready!(self.poll_clock(Waiting::Busy, None, cx));
            }
        }
    }

    fn handle_signals_and_flush(&mut self, cx: &mut Context<'_>) {
        self.register_waker(cx);
        self.handle_signals();
        let _waits_or_not = self.poll_encode_then_flush(cx);
    }

    /// Reads input that has arrived, up to the limit `read_ahead`, without waiting for more. During
    /// a drain the limit is at least one byte, because only a read shows whether a request has
    /// arrived. When the connection is ending, input is read only to notice that the peer
    /// disconnects. It is not decoded. No read notices a reset after the end of input.
    fn read_ahead(&mut self, cx: &mut Context<'_>) {
        let least = usize::from(self.state.is_draining());
        let limit = self.settings.limits.read_ahead.max(least);
        while !self.is_upgraded() && !self.drops(Dropped::Calls) {
            let room = limit.saturating_sub(self.input.len());
            // Once a drain has read the bytes that had arrived, the requests in them are answered
            // before more is read, because the next frame after them may be the last one that is
            // served.
            let has_frames = self.may_have_frame && !self.input.is_empty();
            let must_not_read = room == 0 || (self.state.drain_was_read() && has_frames);
            if must_not_read || self.input.is_eof() {
                self.notice_departure(cx);
                break;
            }
            if self.poll_read(room, cx).is_pending()
                && !(self.looks_again() && self.poll_read(room, cx).is_ready())
            {
                break;
            }
        }
    }

    /// Notices a disconnect of the peer without reading more of its input. A reset ends the
    /// connection. The end of input, or the close of a Unix socket, starts the deadline
    /// `half_closed`.
    fn notice_departure(&mut self, cx: &mut Context<'_>) {
        let probe = &self.conn.life().probe;
        if !probe.knows() {
            return;
        }
        let watch = &mut self.departure.get_or_insert_default().watch;
        if watch.is_none() {
            *watch = Departing::of(probe);
        }
        let Some(peer) = watch else {
            return;
        };
        let is_gone = peer.poll_gone(cx).is_ready();
        let is_finished = peer.poll_finished(cx).is_ready();
        if is_gone && !probe.is_unix() {
            self.io_failed(io::ErrorKind::ConnectionReset.into());
        } else if (is_gone || is_finished) && !self.clock.is_half_closed() {
            self.clock.saw_end();
        }
    }

    /// Registers the task's waker with the signals and the clock.
    pub(super) fn register_waker(&mut self, cx: &mut Context<'_>) {
        let known = self.waker.as_ref();
        if known.is_none_or(|waker| !waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
            self.conn.life().signals.wake_engine_with(cx.waker());
            self.clock.disarm();
        }
    }

    /// Returns whether a decoded request, or undecoded input, waits for the end of a pause.
    fn holds_back(&self) -> bool {
        (self.request.is_some() || !self.input.is_empty()) && self.is_paused() && !self.is_ending()
    }

    fn poll_clock(
        &mut self,
        mut waiting: Waiting,
        message: Option<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        self.input.shrink();
        self.output.shrink();
        self.register_waker(cx);
        if waiting == Waiting::Busy {
            if self.holds_back() {
                waiting = Waiting::Paused;
            }
            if !self.clock.closes() && self.last_calls_apply() {
                self.clock.close();
            }
        }
        let writing = !self.output.is_flushed();
        let Self {
            clock,
            conn,
            settings,
            ..
        } = self;
        let deadlines = &settings.deadlines;
        let alarm = clock.poll(waiting, writing, message, conn.life(), deadlines, cx);
        if self.is_paused() {
            self.clock.saw_pause();
        }
        match ready!(alarm) {
            Alarm::Message | Alarm::EndOfWindow => {}
            Alarm::MaxAge => {
                // Only this connection drains, not the server.
                self.clock.drain();
                self.conn.life().set_reason(EndReason::MaxAge, None);
                self.conn.life().signals.raise(Signal::Drain);
            }
            Alarm::LastCalls => self.fail(self.conn.life().done().into()),
            Alarm::End(EndReason::PeerReset) => self.end(EndReason::PeerReset, Dropped::Output),
            Alarm::End(reason) => self.end(reason, Dropped::Input),
        }
        Poll::Ready(())
    }
}
