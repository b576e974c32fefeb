//! Reads bytes from the stream and decodes requests.

use std::io;
use std::task::{Context, Poll, ready};

use super::state::{DRAIN_READ, Dropped, State};
use super::{Codec, Engine, Stream};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked, caught, find_cause};
use crate::frame::{DecoderStalled, FrameTooLarge};
use crate::signals::Signal;

impl<Io, C, T, M> Engine<Io, C, T, M>
where
    Io: Stream,
    C: Codec<T>,
{
    /// Decodes the next request from the buffered input.
    #[inline(always)]
    pub(super) fn decode(&mut self) -> Option<C::Item> {
        if !self.may_have_frame {
            return None;
        }
        let before = self.input.len();
        // A panic is caught here, so that requests already in flight are still answered.
        let decoded = caught(|| self.codec.decode(self.input.buf()));
        let decoded = match decoded {
            Ok(decoded) => decoded,
            Err(panicked) => return self.decoder_panicked(panicked),
        };
        match decoded {
            Ok(Some(frame)) => {
                if !self.accept_frame(before) {
                    return None;
                }
                self.clock.saw_frame();
                if self.state == State::DrainNextFrame {
                    self.saw_next_frame();
                }
                Some(frame)
            }
            Ok(None) if self.input.is_eof() => self.decode_eof(),
            Ok(None) => {
                self.may_have_frame = false;
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

    /// Handles a frame that arrived during a drain. Stops decoding, unless the drain allows further
    /// frames.
    #[cold]
    fn saw_next_frame(&mut self) {
        if !self.allows_next_frame() {
            self.end(EndReason::Drained, Dropped::Input);
        }
    }

    /// Records the number of bytes that the decoder consumed for a frame. `before` is the length of
    /// the input before decoding. Returns `false`, and stops decoding, if the frame must not be
    /// served.
    #[inline]
    fn accept_frame(&mut self, before: usize) -> bool {
        let len = before.wrapping_sub(self.input.len());
        // One comparison finds two cases: the decoder consumed nothing, or too much.
        if len.wrapping_sub(1) >= self.settings.limits.max_frame {
            return self.is_frame_allowed(before);
        }
        self.input.count_consumed(len);
        true
    }

    #[cold]
    fn is_frame_allowed(&mut self, before: usize) -> bool {
        let max = self.settings.limits.max_frame;
        if before.saturating_sub(self.input.len()) > max {
            self.end_of_frames(FrameTooLarge::new(max).into());
            return false;
        }
        let is_allowed = self.input.count_empty_frame(max);
        if !is_allowed {
            self.end_of_frames(DecoderStalled.into());
        }
        is_allowed
    }

    /// Returns whether the input has ended and is empty. The decoder may still return a frame that
    /// it holds.
    pub(super) fn is_at_end_of_input(&self) -> bool {
        self.input.is_eof() && self.input.is_empty()
    }

    pub(super) fn decode_eof(&mut self) -> Option<C::Item> {
        self.may_have_frame = true;
        let departure = self.departure.as_mut();
        if let Some(err) = departure.and_then(|departure| departure.cut_off.take()) {
            let ended = ConnectionEnded::new(EndReason::Truncated, err);
            self.end(ended, Dropped::Input);
            return None;
        }
        let before = self.input.len();
        let decoded = caught(|| self.codec.decode_eof(self.input.buf()));
        let decoded = match decoded {
            Ok(decoded) => decoded,
            Err(panicked) => return self.decoder_panicked(panicked),
        };
        match decoded {
            Ok(Some(frame)) => {
                if self.accept_frame(before) {
                    self.clock.saw_frame();
                    return Some(frame);
                }
            }
            Ok(None) if self.input.is_empty() => self.end(self.done(), Dropped::Input),
            Ok(None) => self.end(EndReason::Truncated, Dropped::Input),
            Err(err) => {
                let err = err.into();
                let reason = match find_cause::<DecoderStalled>(&*err) {
                    Some(_) => EndReason::CodecError,
                    None => EndReason::Truncated,
                };
                self.end(ConnectionEnded::new(reason, err), Dropped::Input);
            }
        }
        None
    }

    #[cold]
    fn decoder_panicked(&mut self, panicked: Panicked) -> Option<C::Item> {
        self.end(
            ConnectionEnded::new(EndReason::Panic, panicked),
            Dropped::Input,
        );
        None
    }

    /// Returns the end reason of a connection whose input has ended, but not within a frame.
    fn done(&self) -> EndReason {
        if self.conn.is_draining() {
            EndReason::Drained
        } else {
            EndReason::PeerClosed
        }
    }

    /// Returns whether the deadline `last_calls` applies. It applies if requests that have not
    /// begun are dropped, and also if the connection closes for any reason except a drain of the
    /// server or the end of the peer's input. For those two reasons, other deadlines apply.
    pub(super) fn last_calls_apply(&self) -> bool {
        let alone = |reason| !matches!(reason, EndReason::PeerClosed | EndReason::Drained);
        let proposed = || self.conn.life().proposed();
        self.drops(Dropped::Requests)
            || (self.state != State::Open && proposed().is_some_and(|why| alone(why.reason)))
    }

    fn end_of_frames(&mut self, err: BoxError) {
        let reason = EndReason::of_decoder(&*err);
        self.end(ConnectionEnded::new(reason, err), Dropped::Input);
    }

    pub(super) fn poll_read(&mut self, at_most: usize, cx: &mut Context<'_>) -> Poll<()> {
        let max_frame = self.settings.limits.max_frame;
        let Self { conn, input, .. } = self;
        match ready!(input.poll_fill(conn, at_most, max_frame, cx)) {
            Ok(n) => {
                self.may_have_frame = true;
                if n > 0 {
                    self.clock.saw_bytes();
                    self.unanswered = true;
                }
                self.state.saw_bytes(n);
                if matches!(self.state, State::DrainReading(_))
                    && self.conn.life().probe.has_read_later()
                {
                    self.state.drain_has_read();
                }
            }
            // The stream ended without the proper end of its protocol, such as `close_notify` of
            // TLS. Earlier requests are still answered, including those that are not decoded yet.
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {
                self.input.set_eof();
                self.may_have_frame = true;
                self.departure.get_or_insert_default().cut_off = Some(err);
            }
            Err(err) => self.io_failed(err),
        }
        if self.input.is_eof() {
            self.clock.saw_end();
        }
        Poll::Ready(())
    }

    /// Handles the signals to close and to drain, by changing the state. The signals are checked
    /// before each event, because the call for the previous event may have raised one.
    #[inline]
    pub(super) fn handle_signals(&mut self) {
        if self.conn.life().signals.any() {
            self.handle_raised();
        }
    }

    /// Begins the connection's end if the program has called [`Peer::close`](super::Peer::close).
    pub(super) fn handle_close(&mut self) {
        let closed = self.conn.life().signals.is_raised(Signal::Close);
        if closed && !self.drops(Dropped::Requests) {
            self.end(EndReason::ServiceClosed, Dropped::Requests);
        }
    }

    /// Returns whether the connection may wait for another frame when it is idle. This is `false`
    /// only in a drain, after the time for further frames is over.
    pub(super) fn allows_next_frame(&self) -> bool {
        self.clock.allows_next_frame(&self.settings.deadlines)
    }

    fn handle_raised(&mut self) {
        self.handle_close();
        if self.is_ending() || !self.conn.is_draining() {
            return;
        }
        if self.state == State::Open {
            self.state.drain();
            self.clock.drain();
            if let Err(err) = self.conn.life().probe.count_arrived(DRAIN_READ) {
                return self.io_failed(err);
            }
            if let Some(peer) = &self.peer {
                // New messages are refused, because the drain waits until no message is left.
                // Earlier messages are delivered.
                peer.refuse_messages();
            }
        }
        if self.state.drain_was_read()
            && self.request.is_none()
            && self.input.is_empty()
            && !self.has_mail()
            && !self.allows_next_frame()
        {
            self.end(EndReason::Drained, Dropped::Input);
        }
    }
}
