//! One connection's stream, codec, buffers and deadlines: everything but the service.

mod backlog;
mod ending;
mod read;
mod wait;
mod write;

use std::io;
use std::sync::Arc;
use std::task::Waker;

use super::bounds::{Codec, Stream};
use super::buffer::{Input, Output};
use super::clock::Clock;
use super::limits::Limits;
use super::peer::{EngineSide, Peer};
use super::watermarks::Watermarks;
use crate::close::close_by;
use crate::connection::{Connection, Rewind};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked};
use backlog::Backlog;
use read::Drain;

pub(in crate::pipeline) use ending::{Course, Ending, Leaves};

/// What the engine has to know of the error policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pipeline) enum ErrorPolicy {
    Shutdown,
    Continue,
}

/// Settings that all connections of a pipeline share.
#[derive(Clone, Debug)]
pub(in crate::pipeline) struct Settings {
    pub(in crate::pipeline) limits: Limits,
    pub(in crate::pipeline) policy: ErrorPolicy,
    pub(in crate::pipeline) in_flight: usize,
    pub(in crate::pipeline) order: Order,
}

/// How replies stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pipeline) enum Order {
    /// As the requests: nothing is sent behind a reply that closes.
    AsAsked,
    /// As they finish: what has finished is sent whatever else closed.
    AsFinished,
}

pub(in crate::pipeline) struct Engine<Io, C, T, M> {
    conn: Connection<Io>,
    codec: C,
    input: Input,
    output: Output,
    pub(in crate::pipeline) settings: Arc<Settings>,
    clock: Clock,
    peer: Option<EngineSide<T, M>>,
    marks: Watermarks,
    /// Whom the signals wake, and the timer.
    waker: Option<Waker>,
    backlog: Backlog<T>,
    /// Replies wait for one that is to come before them.
    holds_replies: bool,
    above_mark: bool,
    /// The decoder may have another frame in what is buffered.
    decodable: bool,
    /// The stream ended without its proper end.
    cut_off: Option<io::Error>,
    drain: Drain,
    ending: Option<Ending>,
}

impl<Io, C, T, M> Unpin for Engine<Io, C, T, M> {}

impl<Io, C, T, M> Engine<Io, C, T, M> {
    /// Counts a message that was taken, and is not delivered.
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
        let clock = Clock::new(conn.info().accepted_at(), &settings.limits);
        let marks = settings.limits.watermarks;
        Self {
            conn,
            codec,
            input: Input::default(),
            output: Output::default(),
            settings,
            clock,
            peer: None,
            marks,
            waker: None,
            backlog: Backlog::new(),
            holds_replies: false,
            above_mark: false,
            decodable: false,
            cut_off: None,
            drain: Drain::Reading(0),
            ending: None,
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
        peer.get_or_insert_with(|| EngineSide::new(conn.info().clone(), &settings.limits))
            .handle()
    }

    pub(in crate::pipeline) fn is_upgraded(&self) -> bool {
        self.ending
            .is_some_and(|ending| ending.course == Course::Upgrade)
    }

    /// Returns whether nothing is to be heeded but requests, and the next may be in the buffer.
    #[inline]
    pub(in crate::pipeline) fn is_plain(&self) -> bool {
        self.decodable
            && !self.conn.life().signals.any()
            && self.ending.is_none()
            && self.waiting_replies() == 0
            && !self.above_mark
            && self.output.len() < self.marks.high()
            && self.peer.as_ref().is_none_or(EngineSide::is_quiet)
    }

    /// Hands the stream on, with what is not decoded.
    pub(in crate::pipeline) fn into_rewound(mut self) -> Connection<Rewind<Io>> {
        self.input.rest();
        let buffered = self.input.buf().split().freeze();
        // It is read once more.
        self.conn.life().uncount_read(buffered.len());
        self.conn.map_io(|io| Rewind::new(buffered, io))
    }

    /// Takes the next message for the service.
    #[inline]
    pub(in crate::pipeline) fn take_message(&self) -> Option<M> {
        self.peer.as_ref().and_then(EngineSide::take_message)
    }

    /// Returns whether requests are to be held back.
    #[inline]
    pub(in crate::pipeline) fn is_paused(&self) -> bool {
        self.peer.as_ref().is_some_and(EngineSide::is_paused)
    }

    /// A request goes to the service.
    #[inline]
    pub(in crate::pipeline) fn begin_request(&mut self) {
        self.clock.asked = true;
        self.conn.life().count_request();
    }

    /// A message goes to the service, beside what is in hand.
    pub(in crate::pipeline) fn begin_message(&mut self, in_hand: usize) {
        self.clock.asked &= in_hand + self.waiting_replies() > 0;
    }

    /// Ends input. Which reason stands the connection knows; what is left behind only grows.
    pub(in crate::pipeline) fn end(&mut self, ended: impl Into<ConnectionEnded>, leaves: Leaves) {
        self.input.clear();
        self.decodable = false;
        if leaves == Leaves::Output {
            self.output.clear();
        }
        self.conn.ended(ended.into());
        let leaves = match self.ending {
            Some(ending) => ending.leaves.max(leaves),
            None => leaves,
        };
        self.ending = Some(Ending {
            course: Course::End,
            leaves,
        });
    }

    /// Closes, when all is written, and says how it ended.
    pub(in crate::pipeline) async fn close(&mut self) -> Result<EndReason, BoxError> {
        // Those outside learn that it is over; and what lingers holds no more than it needs.
        self.peer = None;
        self.backlog = Backlog::new();
        self.input.clear();
        if !self.leaves(Leaves::Output) {
            let linger = &self.settings.limits.linger;
            // Why it ended is settled; that the peer did not stay for the end of it changes nothing.
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

    /// Has the stream handed over, unless the connection ends already.
    fn upgrade(&mut self) {
        self.heed_close();
        if self.ending.is_none() {
            self.ending = Some(Ending {
                course: Course::Upgrade,
                leaves: Leaves::Requests,
            });
        }
    }

    fn io_failed(&mut self, err: io::Error) {
        let reason = EndReason::of_io(&err).unwrap_or(EndReason::IoError);
        self.end(ConnectionEnded::caused(reason, err), Leaves::Output);
    }

    pub(in crate::pipeline) fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// Returns whether the connection ends and leaves so much behind.
    pub(in crate::pipeline) fn leaves(&self, leaves: Leaves) -> bool {
        self.ending.is_some_and(|ending| ending.leaves >= leaves)
    }

    /// User code below the engine panicked: what is torn is taken away, what is whole is sent.
    pub(in crate::pipeline) fn panicked(&mut self, panicked: Panicked) {
        self.output.drop_torn();
        self.fail(ConnectionEnded::caused(EndReason::Panic, panicked));
    }
}
