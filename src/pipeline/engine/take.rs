//! Takes a connection's events (requests and messages) for its service.

use std::ops::ControlFlow;
use std::task::{Context, Poll, ready};

use super::state::{Dropped, State};
use super::{Codec, Engine, Stream};
use crate::pipeline::event::Event;
use crate::pipeline::peer::EngineSide;

/// Breaks with the next event, or with `None` if there will be no more. Continues if the next event
/// may be a buffered request.
type Next<R, M> = ControlFlow<Option<Event<R, M>>>;

impl<Io, C, T, M> Engine<Io, C, T, M>
where
    Io: Stream,
    C: Codec<T>,
{
    /// Waits for the next event, and takes it. Returns `None` when there will be no more.
    ///
    /// The engine waits for events only here. Before this function returns `Pending`, it writes and
    /// flushes as much as the stream takes.
    #[inline(always)]
    pub(in crate::pipeline) fn poll_event(
        &mut self,
        in_flight: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Event<C::Item, M>>> {
        loop {
            // In the common case only the buffered input needs checking.
            if !self.is_plain(in_flight)
                && let ControlFlow::Break(event) = ready!(self.poll_turn(in_flight, cx))
            {
                return Poll::Ready(event);
            }
            if let Some(request) = self.decode() {
                return Poll::Ready(Some(Event::Request(request)));
            }
            self.was_message = false;
            ready!(self.poll_more(in_flight, cx));
        }
    }

    /// Returns whether a buffered request can begin without further checks.
    #[inline]
    fn is_plain(&self, in_flight: usize) -> bool {
        self.request.is_none()
            && !self.turn.is_spent()
            // With no call in flight, the limit of calls is not reached, so it need not be loaded.
            && (in_flight == 0 || in_flight < self.settings.in_flight)
            && self.state == State::Open
            && !self.conn.life().signals.any()
            && self.waiting_replies() == 0
            && !self.above_mark
            && self.output.len() < self.marks.high()
            && self.peer.as_ref().is_none_or(EngineSide::is_quiet)
    }

    /// Waits until a request may be decoded from the buffered input, and continues. Breaks with a
    /// message or an already decoded request if one comes first, and with `None` if no event may
    /// begin any more.
    fn poll_turn(&mut self, in_flight: usize, cx: &mut Context<'_>) -> Poll<Next<C::Item, M>> {
        loop {
            if !ready!(self.poll_may_begin(in_flight, cx)) {
                return Poll::Ready(ControlFlow::Break(None));
            }
            if self.turn.is_spent() && !self.turn.renew(self.clock.now()) {
                cx.waker().wake_by_ref();
                return self.poll_begin_later(cx).map(ControlFlow::Break);
            }
            if let Some(event) = self.take_waiting() {
                return Poll::Ready(ControlFlow::Break(Some(event)));
            }
            if self.is_ending() {
                return Poll::Ready(ControlFlow::Break(None));
            }
            // Input may have been resumed after `take_waiting` saw the pause. Then the request that
            // still waits comes before the buffered input.
            if self.request.is_none() && !self.above_mark && !self.is_paused() {
                return Poll::Ready(ControlFlow::Continue(()));
            }
            ready!(self.poll_more(in_flight, cx));
        }
    }

    /// Waits until the next event may begin. Returns `false` if no further event may begin.
    fn poll_may_begin(&mut self, in_flight: usize, cx: &mut Context<'_>) -> Poll<bool> {
        loop {
            self.handle_signals();
            if self.drops(Dropped::Requests) {
                return Poll::Ready(false);
            }
            if !self.is_full(in_flight) {
                return Poll::Ready(true);
            }
            if self.poll_io_beside(cx).is_ready() {
                return Poll::Ready(false);
            }
            if self.is_full(in_flight) {
                return Poll::Pending;
            }
        }
    }

    /// Returns whether the limit of calls in flight is reached. A finished call counts until its
    /// reply is encoded.
    fn is_full(&self, in_flight: usize) -> bool {
        in_flight + self.waiting_replies() >= self.settings.in_flight
    }

    /// Takes a waiting message, or a decoded request that waits.
    fn take_waiting(&mut self) -> Option<Event<C::Item, M>> {
        let is_paused = self.is_paused();
        let may_take = self.reserves || !(self.is_ending() || self.update_above_mark());
        if may_take
            && !self.was_message
            && let Some(message) = self.peer.as_ref().and_then(EngineSide::take_message)
        {
            return Some(Event::Message(message));
        }
        let reserves = self.reserves;
        if let Some(request) = self.request.take_if(|_| reserves || !is_paused) {
            return Some(Event::Request(request));
        }
        if may_take {
            self.was_message = false;
            if is_paused && self.request.is_none() && self.is_at_end_of_input() {
                self.request = self.decode_eof();
            }
        }
        None
    }

    /// Stores an event until the service is ready for it, and drives I/O. Returns `None` if the
    /// event must not begin any more.
    ///
    /// After this call, the next event (the stored one, or a message that arrives meanwhile) begins
    /// as soon as the service is ready, even if input is paused or too much output is pending. The
    /// service may have reserved resources for which other connections wait, and only a call of the
    /// service releases them.
    pub(in crate::pipeline) fn poll_reserve(
        &mut self,
        event: Event<C::Item, M>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Event<C::Item, M>>> {
        self.reserves = true;
        match (event, &self.peer) {
            (Event::Request(request), _) => self.request = Some(request),
            (Event::Message(message), Some(peer)) => peer.hold(message),
            (Event::Message(_), None) => {}
        }
        self.poll_begin_later(cx)
    }

    fn poll_begin_later<E>(&mut self, cx: &mut Context<'_>) -> Poll<Option<E>> {
        let cut_off = self.poll_io_beside(cx).is_ready();
        if cut_off || self.drops(Dropped::Requests) {
            return Poll::Ready(None);
        }
        Poll::Pending
    }

    /// Records that the call for an event begins. `in_flight` does not include this call.
    #[inline]
    pub(in crate::pipeline) fn begin(&mut self, event: &Event<C::Item, M>, in_flight: usize) {
        match event {
            Event::Request(_) => {
                self.was_message = false;
                self.clock.has_request = true;
                self.conn.life().count_request();
            }
            Event::Message(_) => {
                self.was_message = true;
                let has_work = in_flight + self.waiting_replies() > 0;
                self.clock.has_request &= has_work || !self.output.is_flushed();
            }
        }
        self.reserves = false;
        self.turn.begin();
    }

    /// Returns whether the program has paused input.
    #[inline]
    pub(super) fn is_paused(&self) -> bool {
        self.peer.as_ref().is_some_and(EngineSide::is_paused)
    }
}
