//! One connection's stream, codec, buffers and deadlines: everything but the service.

mod backlog;
mod read;
mod state;
mod wait;
mod write;

use std::sync::Arc;
use std::task::Waker;

use super::bounds::{Codec, Stream};
use super::buffer::{Input, Output};
use super::clock::Clock;
use super::event::Event;
use super::limits::Limits;
use super::peer::{EngineSide, Mail, Peer};
use super::watermarks::Watermarks;
use crate::close::{Linger, close_by};
use crate::connection::{Connection, Rewind};
use crate::deadline::Deadlines;
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked};
use backlog::Backlog;
use read::Decoding;
use state::State;

pub(in crate::pipeline) use state::Leaves;

/// The error policy of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pipeline) enum ErrorPolicy {
    Shutdown,
    Continue,
}

/// Settings that all connections of a pipeline share.
#[derive(Clone, Debug)]
pub(in crate::pipeline) struct Settings {
    pub(in crate::pipeline) limits: Limits,
    pub(in crate::pipeline) deadlines: Deadlines,
    pub(in crate::pipeline) linger: Linger,
    pub(in crate::pipeline) policy: ErrorPolicy,
    pub(in crate::pipeline) in_flight: usize,
    pub(in crate::pipeline) order: Order,
}

/// The order of replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pipeline) enum Order {
    /// In the order of the requests. Nothing is sent after a reply that closes.
    AsAsked,
    /// As they finish. Finished replies are sent even if another one closes.
    AsFinished,
}

pub(in crate::pipeline) struct Engine<Io, C, T, M> {
    conn: Connection<Io>,
    state: State,
    /// The read side.
    input: Input,
    decoding: Decoding,
    codec: C,
    /// The write side.
    backlog: Backlog<T>,
    output: Output,
    marks: Watermarks,
    /// Output keeps requests from being taken. Set at the high mark and cleared at the low mark,
    /// both by [`look_at_marks`](Self::look_at_marks).
    above_mark: bool,
    /// Replies wait for an earlier one. Set by [`hold_replies`](Self::hold_replies), cleared by
    /// [`reply_first`](Self::reply_first) and by a reply that ends the connection, after which none
    /// is sent.
    holds_replies: bool,
    /// Deadlines and wakeups.
    clock: Clock,
    /// The task that the signals and the timer wake.
    waker: Option<Waker>,
    peer: Option<EngineSide<T, M>>,
    pub(in crate::pipeline) settings: Arc<Settings>,
}

impl<Io, C, T, M> Unpin for Engine<Io, C, T, M> {}

impl<Io, C, T, M> Engine<Io, C, T, M> {
    /// Counts a message that was taken but not delivered.
    pub(in crate::pipeline) fn count_dropped_message(&self) {
        self.conn.life().count_dropped_messages(1);
    }
}

impl<Io, C, T, M> Engine<Io, C, T, M>
where
    Io: Stream,
    C: Codec<T>,
{
    pub(in crate::pipeline) fn new(
        conn: Connection<Io>,
        codec: C,
        settings: Arc<Settings>,
    ) -> Self {
        let clock = Clock::new(conn.info().accepted_at(), &settings.deadlines);
        let marks = settings.limits.watermarks;
        Self {
            conn,
            state: State::Open,
            input: Input::default(),
            decoding: Decoding::NeedsInput,
            codec,
            backlog: Backlog::new(),
            output: Output::default(),
            marks,
            above_mark: false,
            holds_replies: false,
            clock,
            waker: None,
            peer: None,
            settings,
        }
    }

    /// Makes the handle to this connection.
    pub(in crate::pipeline) fn peer(&mut self) -> Peer<T, M> {
        let Self {
            conn,
            settings,
            peer,
            ..
        } = self;
        peer.get_or_insert_with(|| {
            EngineSide::new(
                conn.info().clone(),
                &settings.limits,
                settings.deadlines.idle,
            )
        })
        .handle()
    }

    pub(in crate::pipeline) fn is_upgraded(&self) -> bool {
        self.state == State::Upgrading
    }

    /// Returns whether the buffer may hold the next request, and nothing needs checking before it
    /// begins.
    #[inline]
    pub(in crate::pipeline) fn is_plain(&self, in_flight: usize) -> bool {
        in_flight < self.settings.in_flight
            && self.decoding.may_have_frame()
            && self.state == State::Open
            && !self.conn.life().signals.any()
            && self.waiting_replies() == 0
            && !self.above_mark
            && self.output.len() < self.marks.high()
            && self.peer.as_ref().is_none_or(EngineSide::is_quiet)
    }

    /// Returns whether the limit of calls in flight is reached, counting those whose replies are
    /// not encoded yet.
    #[inline]
    pub(in crate::pipeline) fn is_full(&self, in_flight: usize) -> bool {
        in_flight + self.waiting_replies() >= self.settings.in_flight
    }

    /// Handles signals, and returns whether available events may still begin.
    #[inline]
    pub(in crate::pipeline) fn may_begin(&mut self) -> bool {
        self.heed_signals();
        !self.leaves(Leaves::Requests)
    }

    /// Returns whether another event may be taken: not at the end, and not while output is above
    /// its marks.
    #[inline]
    pub(in crate::pipeline) fn may_take(&mut self) -> bool {
        !self.is_ending() && !self.look_at_marks()
    }

    /// Returns the stream, with the input that is not decoded.
    pub(in crate::pipeline) fn into_rewound(mut self) -> Connection<Rewind<Io>> {
        self.input.rest();
        let buffered = self.input.buf().split().freeze();
        // These bytes are read and counted again.
        self.conn.life().uncount_read(buffered.len());
        self.conn.map_io(|io| Rewind::new(buffered, io))
    }

    /// Takes the next message for the service.
    #[inline]
    pub(in crate::pipeline) fn take_message(&self) -> Option<M> {
        self.peer.as_ref().and_then(EngineSide::take_message)
    }

    /// Returns whether input is paused, so that requests are held back.
    #[inline]
    pub(in crate::pipeline) fn is_paused(&self) -> bool {
        self.peer.as_ref().is_some_and(EngineSide::is_paused)
    }

    /// Records that an event goes to the service, in addition to the calls in flight.
    #[inline]
    pub(in crate::pipeline) fn begin(&mut self, event: &Event<C::Item, M>, in_flight: usize) {
        match event {
            Event::Request(_) => {
                self.clock.asked = true;
                self.conn.life().count_request();
            }
            Event::Message(_) => self.clock.asked &= in_flight + self.waiting_replies() > 0,
        }
    }

    fn has_mail(&self) -> bool {
        let mail = self.peer.as_ref().map(EngineSide::mail);
        matches!(mail, Some(Mail::Now))
    }

    /// Stops decoding. The first reason wins, unless an error follows an orderly one; `leaves` can
    /// only get stricter.
    pub(in crate::pipeline) fn end(&mut self, ended: impl Into<ConnectionEnded>, leaves: Leaves) {
        self.input.clear();
        self.decoding = Decoding::NeedsInput;
        if leaves == Leaves::Output {
            self.output.clear();
        }
        self.conn.ended(ended.into());
        self.state.end(leaves);
    }

    /// Closes the connection after the output is written, and returns how it ended.
    pub(in crate::pipeline) async fn close(&mut self) -> Result<EndReason, BoxError> {
        // Handles learn of the end, and a lingering connection keeps no memory that it does not
        // need.
        self.peer = None;
        self.backlog = Backlog::new();
        self.input.clear();
        if !self.leaves(Leaves::Output) {
            let linger = &self.settings.linger;
            // The reason is settled; it does not matter if the peer disconnects before the close is
            // done.
            let _settled = close_by(self.clock.timer(), &mut self.conn, linger).await;
        }
        self.output.clear();
        match self.conn.life().proposed() {
            None => Ok(EndReason::ServiceClosed),
            Some(ConnectionEnded {
                reason,
                cause: None,
            }) => Ok(reason),
            Some(ended) => Err(ended.into()),
        }
    }

    /// Requests the upgrade, unless the connection is already ending.
    fn upgrade(&mut self) {
        self.heed_close();
        self.state.upgrade();
    }

    fn io_failed(&mut self, err: std::io::Error) {
        let reason = EndReason::of_io(&err).unwrap_or(EndReason::IoError);
        self.end(ConnectionEnded::caused(reason, err), Leaves::Output);
    }

    pub(in crate::pipeline) fn is_ending(&self) -> bool {
        self.state.is_ending()
    }

    /// Returns whether the connection ends and leaves at least this much behind.
    pub(in crate::pipeline) fn leaves(&self, leaves: Leaves) -> bool {
        self.state.leaves(leaves)
    }

    /// Handles a panic in user code beneath the engine: removes a torn frame; complete ones are
    /// still sent.
    pub(in crate::pipeline) fn panicked(&mut self, panicked: Panicked) {
        self.output.drop_torn();
        self.fail(ConnectionEnded::caused(EndReason::Panic, panicked));
    }
}
