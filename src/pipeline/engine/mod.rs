//! The engine of one connection. It contains the stream, the codec, the buffers and the deadlines:
//! everything but the service.

mod backlog;
mod read;
mod state;
mod take;
mod turn;
mod wait;
mod write;

use std::io;
use std::sync::Arc;
use std::task::Waker;

use tokio_util::codec::Decoder;

use super::bounds::{Codec, Stream};
use super::buffer::{Input, Output};
use super::clock::Clock;
use super::farewell::Farewell;
use super::limits::Limits;
use super::peer::{EngineSide, Mail, Peer};
use super::watermarks::Watermarks;
use crate::bind::Departing;
use crate::close::{Linger, close_by};
use crate::connection::{Connection, Rewind};
use crate::deadline::Deadlines;
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked, caught};
use backlog::Backlog;
use state::State;
use turn::Turn;

pub(in crate::pipeline) use state::Dropped;

/// The policy for errors of calls. `Shutdown` ends the connection. `Continue` logs the error, but
/// some errors always end the connection (see `Pipeline::shutdown_on_error`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pipeline) enum ErrorPolicy {
    Shutdown,
    Continue,
}

/// The settings that all connections of a pipeline share. `W` is `Farewell<T>`, for frames of type
/// `T`. The struct is generic over `W` instead of `T`, because the derives would otherwise require
/// `T` to be `Clone` and `Debug`.
#[derive(Clone, Debug)]
pub(in crate::pipeline) struct Settings<W> {
    pub(in crate::pipeline) limits: Limits,
    pub(in crate::pipeline) deadlines: Deadlines,
    pub(in crate::pipeline) linger: Linger,
    pub(in crate::pipeline) policy: ErrorPolicy,
    pub(in crate::pipeline) in_flight: usize,
    pub(in crate::pipeline) order: Order,
    pub(in crate::pipeline) farewell: W,
}

/// The order of replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pipeline) enum Order {
    /// Replies are sent in the order of the requests. None is sent after a reply that closes the
    /// connection.
    AsRequested,
    /// Replies are sent as they finish. After a reply that closes the connection, replies that are
    /// already finished are still sent.
    AsFinished,
}

/// The signs that the peer departs, apart from the end of its input. Boxed, because few connections
/// have any.
#[derive(Default)]
struct Departure {
    /// The error of a stream that did not end properly, such as a TLS stream without
    /// `close_notify`. It takes effect when the decoder finds no more frames in the buffered input.
    cut_off: Option<io::Error>,
    /// Watches whether the peer disconnects. Created when the connection waits but must not read
    /// more, because the limit `read_ahead` is reached, or because a drain first answers the
    /// requests that had arrived. Also created when the connection waits after the end of input.
    /// Dropped when the connection waits for input again, and when decoding stops.
    watch: Option<Departing>,
}

pub(in crate::pipeline) struct Engine<Io, C: Decoder, T, M> {
    conn: Connection<Io>,
    state: State,
    // The read side.
    input: Input,
    /// The buffered input may contain a frame, so the decoder runs before more bytes are read. Set
    /// when bytes or the end of the stream have arrived, and when a frame was encoded, because that
    /// can change the decoder's mode. Cleared when the decoder returns no frame, and when decoding
    /// stops.
    may_have_frame: bool,
    departure: Option<Box<Departure>>,
    /// The system may not have acknowledged the bytes read last: since that read, no output was
    /// written and no acknowledgement was requested.
    unanswered: bool,
    codec: C,
    /// A decoded request that waits until the service is ready, or until input is resumed.
    request: Option<C::Item>,
    /// The service's `poll_ready` was called for the waiting event, but the service is not ready
    /// yet.
    reserves: bool,
    /// The last event was a message, so a waiting request is next, even if there is another
    /// message. Set when a message begins. Cleared when a request begins, and when no request can
    /// begin now.
    was_message: bool,
    turn: Turn,
    // The write side.
    backlog: Backlog<T>,
    output: Output,
    marks: Watermarks,
    /// Too much output is pending, so no more requests are decoded, and messages are taken only if
    /// `reserves` is set. A request that is already decoded is still taken. Set at the high mark
    /// and cleared at the low mark, both by [`update_above_mark`](Self::update_above_mark).
    above_mark: bool,
    /// Finished replies wait for the reply of the *head*, the oldest call (see `tokio_tower.rs`).
    /// Set by [`hold_replies`](Self::hold_replies). Cleared by [`reply_first`](Self::reply_first),
    /// and when a closing reply or a failure ends the connection, because no further reply is sent
    /// then.
    holds_replies: bool,
    // Deadlines and wakeups.
    clock: Clock,
    /// The waker that is registered with the signals and the timer.
    waker: Option<Waker>,
    peer: Option<EngineSide<T, M>>,
    pub(in crate::pipeline) settings: Arc<Settings<Farewell<T>>>,
}

impl<Io, C: Decoder, T, M> Unpin for Engine<Io, C, T, M> {}

impl<Io, C, T, M> Engine<Io, C, T, M>
where
    Io: Stream,
    C: Codec<T>,
{
    pub(in crate::pipeline) fn new(
        conn: Connection<Io>,
        codec: C,
        settings: Arc<Settings<Farewell<T>>>,
    ) -> Self {
        let clock = Clock::new(conn.info().accepted_at(), &settings.deadlines);
        let marks = settings.limits.watermarks;
        Self {
            conn,
            state: State::Open,
            input: Input::default(),
            may_have_frame: false,
            departure: None,
            unanswered: false,
            codec,
            request: None,
            reserves: false,
            was_message: false,
            turn: Turn::new(),
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

    /// Returns a handle to this connection.
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

    /// Returns the connection. Its stream first returns the input that is not decoded.
    pub(in crate::pipeline) fn into_rewound(mut self) -> Connection<Rewind<Io>> {
        self.input.shrink();
        let buffered = self.input.buf().split().freeze();
        // These bytes will be read and counted again.
        self.conn.life().uncount_read(buffered.len());
        self.conn.map_io(|io| Rewind::new(buffered, io))
    }

    fn has_mail(&self) -> bool {
        let mail = self.peer.as_ref().map(EngineSide::mail);
        matches!(mail, Some(Mail::Now))
    }

    /// Stops decoding, and proposes the reason for the end. `dropped` is the work to drop; a later
    /// call can only add to that work. If the reason cuts the peer off (`EndReason::is_cut_off`),
    /// the output is dropped, too, whether the reason comes from a deadline or from an error of the
    /// service.
    pub(in crate::pipeline) fn end(&mut self, ended: impl Into<ConnectionEnded>, dropped: Dropped) {
        let ended = ended.into();
        let dropped = if ended.reason.is_cut_off() {
            Dropped::Output
        } else {
            dropped
        };
        self.input.clear();
        self.may_have_frame = false;
        self.departure = None;
        if dropped == Dropped::Output {
            self.output.clear();
        }
        self.conn.ended(ended);
        self.state.end(dropped);
    }

    /// Refuses further frames and messages from the program. Begins to close, unless an upgrade
    /// hands over the stream.
    pub(in crate::pipeline) fn begin_closing(&self) {
        if let Some(peer) = &self.peer {
            peer.refuse();
        }
        if !self.is_upgraded() {
            self.conn.life().begin_closing();
        }
    }

    /// Closes the connection, and returns how it ended. Called once the output is written or
    /// dropped.
    pub(in crate::pipeline) async fn close(&mut self) -> Result<EndReason, BoxError> {
        // These fields are dropped so that a lingering connection keeps only the memory that it
        // needs.
        self.drop_unencoded();
        self.departure = None;
        self.input.clear();
        if !self.drops(Dropped::Output) {
            let linger = &self.settings.linger;
            let at_eof = self.input.is_eof();
            // The result is ignored. `close_by` itself stores a timeout as the reason for the end.
            // If the peer disconnects before the close is done, the earlier reason still applies.
            let _settled = close_by(self.clock.timer(), &mut self.conn, linger, at_eof).await;
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

    /// Drops a decoded request, replies, pushed frames and messages, except frames that are already
    /// encoded. Dropping the engine's side closes the channel of the handles.
    fn drop_unencoded(&mut self) {
        let peer = self.peer.take();
        let request = self.request.take();
        let backlog = std::mem::replace(&mut self.backlog, Backlog::new());
        // A panic is caught here, so that the stream is still closed gracefully.
        if let Err(panicked) = caught(|| drop((peer, request, backlog))) {
            self.panicked(panicked);
        }
    }

    /// Requests the upgrade, unless the connection is already ending.
    fn upgrade(&mut self) {
        self.handle_close();
        self.state.upgrade();
    }

    fn io_failed(&mut self, err: io::Error) {
        let reason = EndReason::of_io(&err).unwrap_or(EndReason::IoError);
        self.end(ConnectionEnded::new(reason, err), Dropped::Output);
    }

    pub(in crate::pipeline) fn is_ending(&self) -> bool {
        self.state.is_ending()
    }

    /// Returns whether at least this much work is dropped.
    pub(in crate::pipeline) fn drops(&self, dropped: Dropped) -> bool {
        self.state.drops(dropped)
    }

    /// Ends the connection after a panic in user code. Frames that are completely encoded are still
    /// sent.
    pub(in crate::pipeline) fn panicked(&mut self, panicked: Panicked) {
        self.fail(ConnectionEnded::new(EndReason::Panic, panicked));
    }
}
