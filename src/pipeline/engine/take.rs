//! Takes the events of a connection, requests and messages, for its service.

use std::ops::ControlFlow;
use std::task::{Context, Poll, ready};

use super::state::{Leaves, State};
use super::{Codec, Engine, Stream};
use crate::pipeline::event::Event;
use crate::pipeline::peer::EngineSide;

/// The maximum number of events begun in one turn of the connection's task, so that a fast peer
/// does not delay other connections.
const TURN: u16 = 256;

/// Breaks with an event or the end. Continues if a buffered request may be next.
type Next<R, M> = ControlFlow<Option<Event<R, M>>>;

impl<Io, C, T, M> Engine<Io, C, T, M>
where
    Io: Stream,
    C: Codec<T>,
{
    /// Waits for the next event, and takes it. Ready with `None` when there will be no more.
    ///
    /// All waiting is here. Before this returns pending, everything is written and flushed.
    #[inline(always)]
    pub(in crate::pipeline) fn poll_event(
        &mut self,
        in_flight: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Event<C::Item, M>>> {
        loop {
            // The common case: nothing but the buffer to check.
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

    /// Returns whether nothing needs checking before the next request begins.
    #[inline]
    fn is_plain(&self, in_flight: usize) -> bool {
        self.request.is_none()
            && self.turn < TURN
            && in_flight < self.settings.in_flight
            && self.state == State::Open
            && !self.conn.life().signals.any()
            && self.waiting_replies() == 0
            && !self.above_mark
            && self.output.len() < self.marks.high()
            && self.peer.as_ref().is_none_or(EngineSide::is_quiet)
    }

    /// Waits until a buffered request may begin. Breaks with another event, or with `None` at the
    /// end.
    fn poll_turn(&mut self, in_flight: usize, cx: &mut Context<'_>) -> Poll<Next<C::Item, M>> {
        loop {
            if !ready!(self.poll_may_begin(in_flight, cx)) {
                return Poll::Ready(ControlFlow::Break(None));
            }
            if self.turn >= TURN {
                self.turn = 0;
                cx.waker().wake_by_ref();
                return self.poll_begin_later(cx).map(ControlFlow::Break);
            }
            if let Some(event) = self.take_at_hand() {
                return Poll::Ready(ControlFlow::Break(Some(event)));
            }
            if self.is_ending() {
                return Poll::Ready(ControlFlow::Break(None));
            }
            // If input was resumed after `take_at_hand` saw the pause, a request is still held
            // back.
            if self.request.is_none() && !self.above_mark && !self.is_paused() {
                return Poll::Ready(ControlFlow::Continue(()));
            }
            ready!(self.poll_more(in_flight, cx));
        }
    }

    /// Waits until one more event may begin. Ready with `false` when none may begin any more.
    fn poll_may_begin(&mut self, in_flight: usize, cx: &mut Context<'_>) -> Poll<bool> {
        loop {
            self.heed_signals();
            if self.leaves(Leaves::Requests) {
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

    /// Returns whether the limit of calls in flight is reached, counting those whose replies are
    /// not encoded yet.
    fn is_full(&self, in_flight: usize) -> bool {
        in_flight + self.waiting_replies() >= self.settings.in_flight
    }

    /// Takes a message, or a request that was held back.
    fn take_at_hand(&mut self) -> Option<Event<C::Item, M>> {
        let is_paused = self.is_paused();
        let may_take = self.reserves || !(self.is_ending() || self.look_at_marks());
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

    /// Holds an event back until the service is ready for it, and drives I/O. Ready with `None`
    /// when it must not begin any more.
    ///
    /// From now on neither a pause of the input nor unwritten output holds the event back, because
    /// the service may reserve resources for which other connections wait, and only a call releases
    /// them.
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
        if cut_off || self.leaves(Leaves::Requests) {
            return Poll::Ready(None);
        }
        Poll::Pending
    }

    /// Records that the call of an event begins. `in_flight` does not include it.
    #[inline]
    pub(in crate::pipeline) fn begin(&mut self, event: &Event<C::Item, M>, in_flight: usize) {
        match event {
            Event::Request(_) => {
                self.was_message = false;
                self.clock.asked = true;
                self.conn.life().count_request();
            }
            Event::Message(_) => {
                self.was_message = true;
                self.clock.asked &= in_flight + self.waiting_replies() > 0;
            }
        }
        self.reserves = false;
        self.turn += 1;
    }

    /// Returns whether input is paused, so that requests are held back.
    #[inline]
    pub(super) fn is_paused(&self) -> bool {
        self.peer.as_ref().is_some_and(EngineSide::is_paused)
    }
}
