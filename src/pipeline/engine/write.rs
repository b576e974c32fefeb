//! Writes replies and pushed frames to the stream.

use std::io;
use std::task::{Context, Poll};

use super::state::State;
use super::{Codec, Dropped, Engine, ErrorPolicy, Order, Stream};
use crate::end::{ConnectionEnded, EndReason, Initiator};
use crate::error::{BoxError, Panicked, caught, find_cause};
use crate::observe::{ErrorChain, signed};
use crate::pipeline::peer::{EngineSide, Taken};
use crate::pipeline::reply::{AfterReply, Frames, Reply};
use crate::pipeline::shutdown_on_error::is_shutdown;

/// The maximum number of reply frames encoded before the connection's task yields, so that a
/// streamed reply that is always ready does not delay other connections.
const TURN: usize = 1024;

impl<Io, C, T, M> Engine<Io, C, T, M>
where
    Io: Stream,
    C: Codec<T>,
{
    /// Takes the result of a call, and encodes or queues the reply. Results must be passed in the
    /// order in which their replies are to be sent. The result of the *head* (see
    /// [`hold_replies`](Self::hold_replies)) must be passed to [`reply_first`](Self::reply_first)
    /// instead.
    #[inline]
    pub(in crate::pipeline) fn reply(&mut self, result: Result<Reply<T>, BoxError>) {
        self.clock.saw_done();
        if self.drops(Dropped::Calls) && self.settings.order == Order::AsRequested {
            return;
        }
        // The reply must wait for frames that were pushed before it, and for earlier replies.
        if self.waiting_replies() > 0 || self.has_pushed() || self.holds_replies {
            self.backlog.push_back(result);
            return;
        }
        match result {
            Ok(Reply {
                frames: Frames::One(frame),
                then: AfterReply::GoOn,
            }) => self.encode(frame),
            other => self.begin_reply(other),
        }
    }

    /// Returns whether the most recently begun call can be the *head*, the one call that
    /// `Concurrent` (in `tokio_tower.rs`) polls itself. If replies keep the order of the requests,
    /// the call can be the head only if no other call is in flight and no reply is waiting. If it
    /// can, this function makes the engine hold back the replies to later requests until the head
    /// is done.
    #[inline]
    pub(in crate::pipeline) fn hold_replies(&mut self, in_flight: usize) -> bool {
        match self.settings.order {
            Order::AsFinished => true,
            Order::AsRequested => {
                let is_only = in_flight == 1 && self.waiting_replies() == 0;
                self.holds_replies |= is_only;
                is_only
            }
        }
    }

    /// Takes the result of the head, and encodes or queues the head's reply. If replies to later
    /// requests were held back for the head, its reply is queued before them.
    #[inline]
    pub(in crate::pipeline) fn reply_first(&mut self, result: Result<Reply<T>, BoxError>) {
        let held = std::mem::take(&mut self.holds_replies) && self.backlog.has_more();
        if !held {
            return self.reply(result);
        }
        self.clock.saw_done();
        self.backlog.push_front(result);
    }

    /// Returns the number of replies that are not completely encoded.
    #[inline]
    pub(super) fn waiting_replies(&self) -> usize {
        self.backlog.len()
    }

    pub(super) fn has_pushed(&self) -> bool {
        self.peer.as_ref().is_some_and(EngineSide::has_pushed)
    }

    fn begin_reply(&mut self, result: Result<Reply<T>, BoxError>) {
        let reply = match result {
            Ok(reply) => reply,
            Err(err) => return self.failed(err),
        };
        let then = reply.then;
        match reply.frames {
            Frames::None => {}
            Frames::One(frame) => self.encode(frame),
            Frames::Several(_) | Frames::Stream(_) => {
                self.backlog.begin(reply);
                return;
            }
        }
        self.go_on(then);
    }

    fn go_on(&mut self, then: AfterReply) {
        match then {
            AfterReply::GoOn => {}
            AfterReply::Close => {
                self.drop_behind();
                self.end(EndReason::ServiceClosed, Dropped::Calls);
            }
            AfterReply::Upgrade => self.upgrade(),
        }
    }

    /// Drops the replies that wait behind the one that is being encoded, if replies keep the order
    /// of the requests. Called when a closing reply or a failure ends the connection.
    fn drop_behind(&mut self) {
        if self.settings.order == Order::AsRequested {
            self.backlog.drop_behind();
            self.holds_replies = false;
        }
    }

    #[cold]
    fn failed(&mut self, err: BoxError) {
        let is_panic = find_cause::<Panicked>(&*err).is_some();
        let ends = is_panic
            || self.settings.policy == ErrorPolicy::Shutdown
            || is_shutdown(&*err)
            || find_cause::<ConnectionEnded>(&*err).is_some();
        if ends {
            let otherwise = if is_panic {
                EndReason::Panic
            } else {
                EndReason::ServiceError
            };
            self.fail(ConnectionEnded::of(err, otherwise));
        } else {
            let id = signed(self.conn.info().id().get());
            let error = ErrorChain(&*err);
            tracing::warn!(target: "tower_tcp", { connection.id = id, %error }, "request.failed");
        }
    }

    /// Ends the connection. A reply that is only partly encoded gets no more frames. Waiting
    /// replies are dropped if replies keep the order of the requests, and are otherwise sent.
    /// Encoded frames are still sent. If the end reason cuts the peer off, however, no more output
    /// is sent.
    pub(in crate::pipeline) fn fail(&mut self, ended: ConnectionEnded) {
        self.drop_behind();
        self.backlog.end_current();
        self.end(ended, Dropped::Calls);
    }

    #[inline]
    fn encode(&mut self, frame: T) {
        let Self { output, codec, .. } = self;
        if let Err(err) = output.encode(|buf| codec.encode(frame, buf)) {
            self.fail(ConnectionEnded::new(EndReason::EncodeError, err));
        }
        // Encoding can change the codec's mode, so buffered bytes that were not a frame before may
        // be one now.
        if !self.may_have_frame && !self.input.is_empty() {
            self.may_have_frame = true;
        }
    }

    /// Encodes the farewell after all other output. Returns whether the connection gets one.
    ///
    /// It gets a farewell only if the server ends it, which includes `LiveConnection::close` and
    /// `Pipeline::reject`. It gets none if the peer or the service failed, if a reply or
    /// `Peer::close` closes it, if the peer has finished sending, or if pending requests were
    /// dropped, as at the `last_calls` deadline.
    pub(super) fn encode_farewell(&mut self) -> bool {
        let farewell = &self.settings.farewell;
        let by_server = self.state == State::Ending(Dropped::Input) && !self.input.is_eof();
        if !farewell.is_set() || !by_server {
            return false;
        }
        // The state changes first, so that the farewell is made only once, even if its function
        // panics.
        self.state.end(Dropped::Requests);
        // A cause is a sign of an error only if the server did not end the connection. A filter
        // that denies an address, for example, gives a cause, too.
        let frame = self.conn.life().proposed().and_then(|ended| {
            let is_error = ended.cause.is_some() && ended.reason.initiator() != Initiator::Server;
            (!is_error).then(|| farewell.make(self.conn.info(), ended.reason))?
        });
        let is_made = frame.is_some();
        if let Some(frame) = frame {
            self.encode(frame);
        }
        is_made
    }

    /// Encodes pushed frames and waiting replies, until no more can be encoded now, the output
    /// reaches the high mark, or `left` is zero. Each pass of the loop encodes at most one frame of
    /// a reply, and reduces `left` by one. A pass that returns early leaves `left` unchanged.
    fn encode_waiting(&mut self, left: &mut usize, cx: &mut Context<'_>) {
        let mark = self.marks.high();
        while self.output.len() < mark && *left > 0 {
            let pushed = self.encode_pushed(mark);
            if self.output.len() >= mark || (!self.encode_reply(cx) && !pushed) {
                return;
            }
            *left -= 1;
        }
    }

    /// Encodes pushed frames until the output has reached `mark` bytes. Takes at most as many
    /// entries as the queue can hold, so that busy senders cannot hold up replies forever. Returns
    /// whether any frames were encoded.
    fn encode_pushed(&mut self, mark: usize) -> bool {
        if !self.has_pushed() {
            return false;
        }
        let mut pushed = false;
        for _ in 0..self.settings.limits.push_queue {
            if !self.has_pushed() || self.output.len() >= mark {
                break;
            }
            let position = self.output.position();
            match self.peer.as_ref().and_then(|peer| peer.take(position)) {
                None => break,
                Some(Taken::One(frame)) => self.encode(frame),
                Some(Taken::Several(frames)) => self.encode_run(frames, mark),
            }
            pushed = true;
        }
        if self.has_pushed()
            && let Some(peer) = &self.peer
        {
            peer.return_permits();
        }
        pushed
    }

    /// Encodes frames until the output has reached `mark` bytes, and puts the remaining frames back
    /// into the queue, also after a panic.
    fn encode_run(&mut self, frames: Vec<T>, mark: usize) {
        let mut frames = frames.into_iter();
        let encoded = caught(|| {
            while self.output.len() < mark
                && let Some(frame) = frames.next()
            {
                self.encode(frame);
            }
        });
        if let Err(panicked) = encoded {
            self.panicked(panicked);
        }
        if let Some(peer) = &self.peer {
            if frames.len() > 0 {
                peer.put_back(frames.collect());
            }
            peer.return_permits();
        }
    }

    /// Begins the next waiting reply, encodes one frame of the current reply, or finishes a reply
    /// that has no more frames. Returns `false` if none of these is possible now.
    fn encode_reply(&mut self, cx: &mut Context<'_>) -> bool {
        if let Some(current) = self.backlog.current() {
            let next = match &mut current.frames {
                Frames::Several(frames) => frames.next().map(Ok),
                Frames::Stream(stream) => match stream.as_mut().poll_next(cx) {
                    Poll::Ready(next) => next,
                    Poll::Pending => return false,
                },
                Frames::None | Frames::One(_) => None,
            };
            let then = current.then;
            match next {
                Some(Ok(frame)) => {
                    // Frames that the stream pushed before it returned this one are encoded first.
                    self.encode_pushed(usize::MAX);
                    self.encode(frame);
                }
                Some(Err(err)) => {
                    self.backlog.end_current();
                    self.failed(err);
                }
                None => {
                    self.backlog.end_current();
                    self.clock.saw_done();
                    self.go_on(then);
                }
            }
        } else if !self.holds_replies
            && let Some(result) = self.backlog.pop_front()
        {
            self.begin_reply(result);
        } else {
            return false;
        }
        true
    }

    /// Updates `above_mark` and returns it. It is set when the output reaches the high mark, and
    /// cleared when the output falls to the low mark.
    pub(super) fn update_above_mark(&mut self) -> bool {
        let above = self.marks.is_above(self.output.len(), self.above_mark);
        if above != self.above_mark {
            self.above_mark = above;
            if let Some(peer) = &self.peer {
                peer.crossed();
            }
        }
        above
    }

    /// Writes encoded output. Completes when all of it is written and flushed.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self {
            conn, output, peer, ..
        } = self;
        let awaited = peer.as_ref().is_some_and(EngineSide::awaits_flush);
        let mut progress = false;
        let written = output.poll_flush(conn, awaited, &mut progress, cx);
        self.clock.saw_write |= progress;
        self.unanswered &= !progress;
        if let Some(peer) = peer {
            peer.wrote(output.flushed(), output.len());
        }
        written
    }

    /// Encodes pushed frames and pending replies, and writes encoded output. Completes when nothing
    /// is left, or when output is dropped, for example because the stream has failed.
    #[inline]
    pub(super) fn poll_encode_then_flush(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_quiet = self.peer.as_ref().is_none_or(EngineSide::is_quiet);
        if is_quiet && self.waiting_replies() == 0 && self.output.is_flushed() && !self.above_mark {
            return Poll::Ready(());
        }
        self.poll_output(cx)
    }

    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some((marks, idle)) = self.peer.as_ref().and_then(EngineSide::tuned) {
            self.marks = marks;
            self.clock.set_idle(idle);
        }
        let mut left = TURN;
        while !self.drops(Dropped::Output) {
            // A panic must lose neither the frames encoded before it nor the frames that are still
            // to be sent.
            if let Err(panicked) = caught(|| self.encode_waiting(&mut left, cx)) {
                self.panicked(panicked);
                left = left.saturating_sub(1);
                if left > 0 {
                    continue;
                }
            }
            let above = self.update_above_mark();
            match self.poll_write(cx) {
                Poll::Ready(Ok(())) => {
                    self.update_above_mark();
                    if left == 0 {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    if !above && !self.has_pushed() {
                        // Everything that could be encoded is written, and anything newer wakes
                        // this task.
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
                    if above && !self.update_above_mark() {
                        continue;
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(())
    }
}
