//! One connection's stream, codec, buffers and deadlines: everything but the service.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{Decoder, Encoder};

use super::clock::{Clock, Waiting};
use super::limits::Limits;
use super::peer::{EngineSide, Peer};
use super::reply::{Frames, Reply};
use crate::connection::Connection;
use crate::end_reason::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked, find_cause};
use crate::frame::{FrameTooLarge, Input, Output};
use crate::shutdown::Signal;

/// How input came to its end, and so, once what is in hand is done, the connection.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) ended: ConnectionEnded,
    pub(super) leaves: Leaves,
}

/// What is left behind by an end. Each leaves what those above it leave, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Leaves {
    /// Only what was not decoded: all that was asked is answered.
    Input,
    /// Requests that were not begun.
    Requests,
    /// Calls in flight: what closes stands before their replies.
    Calls,
    /// What is not written: the stream failed, or the peer does not take it.
    Output,
}

/// What the engine has to know of the error policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    Shutdown,
    Continue,
}

/// Settings that all connections of a pipeline share.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) limits: Limits,
    pub(super) policy: Policy,
    pub(super) in_flight: usize,
    pub(super) order: Order,
}

/// How replies stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As the requests: nothing is sent behind a reply that closes.
    AsAsked,
    /// As they finish: what has finished is sent whatever else closed.
    AsFinished,
}

/// How far a drain has come with the input. (Before one, it stays as it is made.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drain {
    /// What had arrived is read and will be answered. Counts the bytes, so that a peer that sends on cannot keep it here.
    Reading(usize),
    /// All that had arrived was read. Only a frame that was begun is waited for.
    Read,
    /// Bytes have come since: the next frame is the last.
    LastFrame,
}

/// At a drain, what is still read of what has arrived: as much as fits a socket's buffer on most systems.
const DRAIN_READ: usize = 256 * 1024;

pub(super) struct Engine<Io, C, T> {
    conn: Connection<Io>,
    codec: C,
    input: Input,
    output: Output,
    pub(super) settings: Arc<Settings>,
    clock: Clock,
    peer: Option<EngineSide<T>>,
    /// Replies that wait behind a streamed one, or above the mark. As many as requests may be in flight, at most.
    replies: VecDeque<Result<Reply<T>, BoxError>>,
    /// The reply of several frames, or a stream of them, that is being encoded.
    current: Option<Reply<T>>,
    above_mark: bool,
    /// The decoder may have another frame in what is buffered.
    decodable: bool,
    drain: Drain,
    ending: Option<Ending>,
}

impl<Io, C, T> Unpin for Engine<Io, C, T> {}

impl<Io, C, T> Engine<Io, C, T>
where
    Io: AsyncRead + AsyncWrite + Unpin,
    C: Decoder + Encoder<T>,
    <C as Decoder>::Error: Into<BoxError>,
    <C as Encoder<T>>::Error: Into<BoxError>,
{
    pub(super) fn new(conn: Connection<Io>, codec: C, settings: Arc<Settings>) -> Self {
        let clock = Clock::new(conn.info().accepted_at(), &settings.limits);
        Self {
            conn,
            codec,
            input: Input::default(),
            output: Output::default(),
            settings,
            clock,
            peer: None,
            replies: VecDeque::new(),
            current: None,
            above_mark: false,
            decodable: false,
            drain: Drain::Reading(0),
            ending: None,
        }
    }

    /// Makes the handle to this connection.
    pub(super) fn peer(&mut self) -> Peer<T> {
        let Self {
            conn,
            settings,
            peer,
            ..
        } = self;
        let side = peer.get_or_insert_with(|| {
            EngineSide(Peer::new(
                Arc::clone(conn.info()),
                Arc::clone(conn.life()),
                settings.limits.push_queue,
            ))
        });
        Peer::clone(side)
    }

    pub(super) fn into_parts(self) -> (Connection<Io>, Option<Ending>) {
        (self.conn, self.ending)
    }

    pub(super) fn count_request(&self) {
        self.conn.life().count_requests(1);
    }

    // Endings. The first stands.

    /// Ends input. The first reason stands; what is left behind only grows.
    pub(super) fn end(&mut self, ended: impl Into<ConnectionEnded>, leaves: Leaves) {
        self.input.clear();
        self.decodable = false;
        if leaves == Leaves::Output {
            self.output.clear();
        }
        match &mut self.ending {
            Some(ending) => ending.leaves = ending.leaves.max(leaves),
            none => {
                let ended = self.conn.ended(ended.into());
                *none = Some(Ending { ended, leaves });
            }
        }
    }

    fn io_failed(&mut self, err: io::Error) {
        let reason = match err.kind() {
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::WriteZero => EndReason::PeerReset,
            io::ErrorKind::TimedOut => EndReason::WriteTimeout,
            _ => EndReason::IoError,
        };
        self.end(ConnectionEnded::caused(reason, err), Leaves::Output);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// Returns whether the connection ends and leaves so much behind.
    pub(super) fn leaves(&self, leaves: Leaves) -> bool {
        self.ending
            .as_ref()
            .is_some_and(|ending| ending.leaves >= leaves)
    }

    // Output.

    /// Takes the result of a call, in its place in the order.
    #[inline]
    pub(super) fn reply(&mut self, result: Result<Reply<T>, BoxError>) {
        self.clock.saw_activity = true;
        if self.leaves(Leaves::Calls) && self.settings.order == Order::AsAsked {
            return;
        }
        // Behind what was pushed before, and the replies that are still waiting.
        if self.waiting_replies() > 0 || self.has_pushed() {
            self.replies.push_back(result);
            return;
        }
        match result {
            Ok(Reply {
                frames: Frames::One(frame),
                close: false,
            }) => self.encode(frame),
            other => self.begin(other),
        }
    }

    /// Returns how many replies are waiting to be encoded.
    #[inline]
    pub(super) fn waiting_replies(&self) -> usize {
        self.replies.len() + usize::from(self.current.is_some())
    }

    fn has_pushed(&self) -> bool {
        self.peer.as_ref().is_some_and(|peer| peer.has_pushed())
    }

    fn begin(&mut self, result: Result<Reply<T>, BoxError>) {
        let reply = match result {
            Ok(reply) => reply,
            Err(err) => return self.failed(err),
        };
        let close = reply.close;
        match reply.frames {
            Frames::None => {}
            Frames::One(frame) => self.encode(frame),
            Frames::Several(_) | Frames::Stream(_) => {
                self.current = Some(reply);
                return;
            }
        }
        if close {
            self.close_behind_reply();
        }
    }

    fn close_behind_reply(&mut self) {
        self.drop_behind();
        self.end(EndReason::ServiceClosed, Leaves::Calls);
    }

    fn drop_behind(&mut self) {
        if self.settings.order == Order::AsAsked {
            self.replies.clear();
        }
    }

    fn failed(&mut self, err: BoxError) {
        let panicked = find_cause::<Panicked>(&*err).is_some();
        if panicked {
            self.fail(ConnectionEnded::caused(EndReason::Panic, err));
        } else if self.settings.policy == Policy::Shutdown || super::is_shutdown(&*err) {
            self.fail(ConnectionEnded::caused(EndReason::ServiceError, err));
        } else {
            let id = self.conn.info().id().get();
            let error: &(dyn std::error::Error + 'static) = &*err;
            tracing::warn!(target: "tower_tcp", { connection.id = id, error }, "request.failed");
        }
    }

    /// Ends behind what was answered so far; what waits behind it is dropped.
    pub(super) fn fail(&mut self, ended: ConnectionEnded) {
        self.drop_behind();
        self.current = None;
        self.end(ended, Leaves::Calls);
    }

    #[inline]
    fn encode(&mut self, frame: T) {
        let Self { output, codec, .. } = self;
        if let Err(err) = output.encode(|buf| codec.encode(frame, buf)) {
            self.fail(ConnectionEnded::caused(EndReason::EncodeError, err));
        }
    }

    /// Encodes pushes and waiting replies, up to the high mark.
    fn encode_waiting(&mut self, cx: &mut Context<'_>) {
        let mark = self.settings.limits.high_mark;
        while self.output.len() < mark {
            let pushed = self.encode_pushed();
            if self.output.len() >= mark || (!self.encode_reply(cx) && !pushed) {
                return;
            }
        }
    }

    /// Encodes what was pushed, at most one queue of it: those who push without end do not keep replies from their turn.
    fn encode_pushed(&mut self) -> bool {
        let mut pushed = false;
        for _ in 0..self.settings.limits.push_queue {
            if !self.has_pushed() {
                break;
            }
            let Some(frame) = self.peer.as_ref().and_then(|peer| peer.take()) else {
                break;
            };
            self.encode(frame);
            pushed = true;
        }
        pushed
    }

    /// Encodes one frame of the replies that wait. Returns whether there was anything to do.
    fn encode_reply(&mut self, cx: &mut Context<'_>) -> bool {
        if let Some(current) = &mut self.current {
            let next = match &mut current.frames {
                Frames::Several(frames) => frames.next().map(Ok),
                Frames::Stream(stream) => match stream.as_mut().poll_next(cx) {
                    Poll::Ready(next) => next,
                    Poll::Pending => return false,
                },
                Frames::None | Frames::One(_) => None,
            };
            let close = current.close;
            match next {
                Some(Ok(frame)) => {
                    // Behind what the stream pushed before it gave the frame, as with any other reply.
                    self.encode_pushed();
                    self.encode(frame);
                }
                Some(Err(err)) => {
                    self.current = None;
                    self.failed(err);
                }
                None => {
                    self.current = None;
                    self.clock.saw_activity = true;
                    if close {
                        self.close_behind_reply();
                    }
                }
            }
        } else if let Some(result) = self.replies.pop_front() {
            self.begin(result);
        } else {
            return false;
        }
        true
    }

    /// Returns whether output keeps requests from being taken: from the high mark until the low one.
    pub(super) fn is_above_mark(&mut self) -> bool {
        let limits = &self.settings.limits;
        let mark = if self.above_mark {
            limits.low_mark + 1
        } else {
            limits.high_mark
        };
        let above = self.output.len() >= mark;
        if above != self.above_mark {
            self.above_mark = above;
            if let Some(peer) = &self.peer {
                peer.set_above_mark(above);
            }
        }
        above
    }

    /// Encodes what waits and writes what is encoded. Ready when there is nothing left of either.
    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            self.encode_waiting(cx);
            if self.leaves(Leaves::Output) {
                return Poll::Ready(());
            }
            let above = self.is_above_mark();
            let mut progress = false;
            let flushed = self.output.poll_flush(&mut self.conn, &mut progress, cx);
            self.clock.saw_write |= progress;
            match flushed {
                Poll::Ready(Ok(())) => {
                    self.is_above_mark();
                    if !above && !self.has_pushed() {
                        // Nothing more could be encoded before, and what came since would have woken us.
                        return if self.waiting_replies() == 0 {
                            Poll::Ready(())
                        } else {
                            Poll::Pending
                        };
                    }
                }
                Poll::Ready(Err(err)) => {
                    self.io_failed(err);
                    return Poll::Ready(());
                }
                Poll::Pending => {
                    if above && !self.is_above_mark() {
                        continue;
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    // Input.

    /// Decodes the next request out of what is buffered.
    #[inline]
    pub(super) fn decode(&mut self) -> Option<C::Item> {
        if !self.decodable {
            return None;
        }
        let before = self.input.len();
        // Caught here, because requests before it may be in flight, and are answered.
        let decoded = catch_unwind(AssertUnwindSafe(|| self.codec.decode(self.input.buf())));
        let decoded = match decoded {
            Ok(decoded) => decoded,
            Err(payload) => return self.decoder_panicked(&*payload),
        };
        match decoded {
            Ok(Some(frame)) => {
                let max = self.settings.limits.max_frame;
                if before.saturating_sub(self.input.len()) > max {
                    self.end_of_frames(FrameTooLarge::new(max).into());
                    return None;
                }
                self.clock.saw_activity = true;
                if self.drain == Drain::LastFrame {
                    self.end(EndReason::Drained, Leaves::Input);
                }
                Some(frame)
            }
            Ok(None) if self.input.is_eof() => self.decode_eof(),
            Ok(None) => {
                self.decodable = false;
                let max = self.settings.limits.max_frame;
                if self.input.len() > max {
                    self.end_of_frames(FrameTooLarge::new(max).into());
                }
                None
            }
            Err(err) => {
                self.end_of_frames(err.into());
                None
            }
        }
    }

    fn decode_eof(&mut self) -> Option<C::Item> {
        let decoded = catch_unwind(AssertUnwindSafe(|| self.codec.decode_eof(self.input.buf())));
        let decoded = match decoded {
            Ok(decoded) => decoded,
            Err(payload) => return self.decoder_panicked(&*payload),
        };
        match decoded {
            Ok(Some(frame)) => {
                self.clock.saw_activity = true;
                return Some(frame);
            }
            Ok(None) if self.input.is_empty() => self.end(self.done(), Leaves::Input),
            Ok(None) => self.end(EndReason::Truncated, Leaves::Input),
            Err(err) => {
                self.end(
                    ConnectionEnded::caused(EndReason::Truncated, err),
                    Leaves::Input,
                );
            }
        }
        None
    }

    #[cold]
    fn decoder_panicked(&mut self, payload: &(dyn Any + Send)) -> Option<C::Item> {
        let panicked = Panicked::new(payload);
        self.end(
            ConnectionEnded::caused(EndReason::Panic, panicked),
            Leaves::Input,
        );
        None
    }

    /// Returns why a connection ends that has nothing left to do.
    fn done(&self) -> EndReason {
        if self.conn.is_draining() {
            EndReason::Drained
        } else {
            EndReason::PeerClosed
        }
    }

    fn end_of_frames(&mut self, err: BoxError) {
        let too_large = find_cause::<FrameTooLarge>(&*err).is_some()
            || find_cause::<tokio_util::codec::LengthDelimitedCodecError>(&*err).is_some()
            || find_cause::<tokio_util::codec::LinesCodecError>(&*err).is_some_and(|err| {
                matches!(
                    err,
                    tokio_util::codec::LinesCodecError::MaxLineLengthExceeded
                )
            });
        let reason = if too_large {
            EndReason::FrameTooLarge
        } else {
            EndReason::CodecError
        };
        self.end(ConnectionEnded::caused(reason, err), Leaves::Input);
    }

    fn poll_read(&mut self, at_most: usize, cx: &mut Context<'_>) -> Poll<()> {
        match ready!(self.input.poll_fill(&mut self.conn, at_most, cx)) {
            Ok(n) => {
                self.decodable = true;
                self.clock.saw_byte |= n > 0;
                if self.conn.is_draining() {
                    self.drain = match self.drain {
                        Drain::Reading(read) if read + n < DRAIN_READ => Drain::Reading(read + n),
                        Drain::Reading(_) => Drain::Read,
                        Drain::Read | Drain::LastFrame => Drain::LastFrame,
                    };
                }
            }
            // A stream that knows a proper end (TLS) did not see it. What was asked before is answered all the same.
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {
                self.input.clear();
                self.decodable = false;
                self.end(
                    ConnectionEnded::caused(EndReason::Truncated, err),
                    Leaves::Input,
                );
            }
            Err(err) => self.io_failed(err),
        }
        Poll::Ready(())
    }

    /// Looks at the signals from outside.
    fn heed_signals(&mut self, cx: &mut Context<'_>) {
        let life = self.conn.life();
        life.signals.register_engine(cx.waker());
        if self.is_ending() || !life.signals.any() {
            return;
        }
        if life.signals.is_raised(Signal::Close) {
            self.end(EndReason::ServiceClosed, Leaves::Requests);
        } else if life.signals.is_raised(Signal::Drain)
            && !matches!(self.drain, Drain::Reading(_))
            && self.input.is_empty()
        {
            self.end(EndReason::Drained, Leaves::Input);
        }
    }

    // Waiting.

    /// Waits for input, when there is nothing to decode: writes all there is first. Ready when something has changed.
    pub(super) fn poll_input(&mut self, in_hand: usize, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_signals(cx);
        if self.is_ending() {
            return Poll::Ready(());
        }
        let _waits_or_not = self.poll_output(cx);
        if self.is_ending() {
            return Poll::Ready(());
        }
        if self.above_mark {
            return self.poll_deadlines(in_hand, false, cx);
        }
        if self.poll_read(usize::MAX, cx).is_ready() {
            return Poll::Ready(());
        }
        if self.conn.is_draining() && matches!(self.drain, Drain::Reading(_)) {
            self.drain = Drain::Read;
            if self.input.is_empty() {
                self.end(EndReason::Drained, Leaves::Input);
                return Poll::Ready(());
            }
        }
        self.poll_deadlines(in_hand, true, cx)
    }

    /// Waits until output is below its mark. Ready then, or when the connection ends.
    pub(super) fn poll_room(&mut self, in_hand: usize, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_signals(cx);
        let _waits_or_not = self.poll_output(cx);
        if self.is_ending() || !self.is_above_mark() {
            return Poll::Ready(());
        }
        self.poll_deadlines(in_hand, false, cx)
    }

    /// Waits beside something else: a call, the service's readiness, the make-service. Writes, reads ahead a little so that a
    /// reset is noticed, keeps the deadlines. Ready when the connection must end without waiting for that.
    pub(super) fn poll_beside(&mut self, in_hand: usize, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_signals(cx);
        let _waits_or_not = self.poll_output(cx);
        while !self.leaves(Leaves::Output) && !self.is_ending() && !self.input.is_eof() {
            let room = self
                .settings
                .limits
                .read_ahead
                .saturating_sub(self.input.len());
            if room == 0 || self.poll_read(room, cx).is_pending() {
                break;
            }
        }
        while !self.leaves(Leaves::Calls) {
            if self.poll_deadlines(in_hand, false, cx).is_pending() {
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// Waits for the make-service, by itself. Ready when the connection must end without it.
    pub(super) fn poll_making(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.heed_signals(cx);
        let _waits_or_not = self.poll_output(cx);
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
        if self.is_ending() {
            return Poll::Ready(());
        }
        let waiting = Waiting {
            making: true,
            resting: false,
            in_frame: false,
            writing: !self.output.is_flushed(),
        };
        self.poll_clock(waiting, cx)
    }

    /// At the end: waits until all is written, or cannot be.
    pub(super) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(peer) = &self.peer {
            peer.refuse();
        }
        loop {
            if self.poll_output(cx).is_ready() || self.leaves(Leaves::Output) {
                return Poll::Ready(());
            }
            ready!(self.poll_deadlines(0, false, cx));
            if self.leaves(Leaves::Output) {
                return Poll::Ready(());
            }
        }
    }

    fn poll_deadlines(&mut self, in_hand: usize, reading: bool, cx: &mut Context<'_>) -> Poll<()> {
        let waiting = Waiting {
            making: false,
            resting: reading
                && in_hand == 0
                && self.waiting_replies() == 0
                && self.input.is_empty(),
            in_frame: reading && !self.input.is_empty(),
            writing: !self.output.is_flushed(),
        };
        self.poll_clock(waiting, cx)
    }

    fn poll_clock(&mut self, waiting: Waiting, cx: &mut Context<'_>) -> Poll<()> {
        self.input.rest();
        let reason = ready!(self.clock.poll(waiting, &self.settings.limits, cx));
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

    /// User code below the engine panicked: what is torn is taken away, what is whole is sent.
    pub(super) fn panicked(&mut self, panicked: Panicked) {
        self.output.drop_torn();
        self.fail(ConnectionEnded::caused(EndReason::Panic, panicked));
    }
}
