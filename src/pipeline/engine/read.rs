//! Bytes from the stream, and requests out of them.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::{Context, Poll, ready};

use super::{Codec, Engine, Leaves, Stream};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::{BoxError, Panicked};
use crate::frame::FrameTooLarge;
use crate::pipeline::peer::Mail;
use crate::signals::Signal;

/// How far a drain has come with the input. (Before one, it stays as it is made.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drain {
    /// What had arrived is read and will be answered. Counts the bytes, so that a peer that sends on cannot keep it here.
    Reading(usize),
    /// All that had arrived was read. Only a frame that was begun is waited for.
    Read,
    /// Bytes have come since: the next frame is the last.
    LastFrame,
}

/// At a drain, what is still read of what has arrived: as much as fits a socket's buffer on most systems.
const DRAIN_READ: usize = 256 * 1024;

impl<Io, C, T, M> Engine<Io, C, T, M>
where
    Io: Stream,
    C: Codec<T>,
{
    /// Decodes the next request out of what is buffered.
    #[inline]
    pub(in crate::pipeline) fn decode(&mut self) -> Option<C::Item> {
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
                let len = before.saturating_sub(self.input.len());
                if len > max {
                    self.end_of_frames(FrameTooLarge::new(max).into());
                    return None;
                }
                self.input.gave(len);
                self.clock.saw_frame();
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

    /// Returns whether nothing more comes, and nothing is left but what the decoder may hold back.
    pub(in crate::pipeline) fn is_at_end_of_input(&self) -> bool {
        self.input.is_eof() && self.input.is_empty()
    }

    fn decode_eof(&mut self) -> Option<C::Item> {
        if let Some(err) = self.cut_off.take() {
            let ended = ConnectionEnded::caused(EndReason::Truncated, err);
            self.end(ended, Leaves::Input);
            return None;
        }
        let before = self.input.len();
        let decoded = catch_unwind(AssertUnwindSafe(|| self.codec.decode_eof(self.input.buf())));
        let decoded = match decoded {
            Ok(decoded) => decoded,
            Err(payload) => return self.decoder_panicked(&*payload),
        };
        match decoded {
            Ok(Some(frame)) => {
                let max = self.settings.limits.max_frame;
                if before.saturating_sub(self.input.len()) <= max {
                    self.clock.saw_frame();
                    return Some(frame);
                }
                self.end_of_frames(FrameTooLarge::new(max).into());
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
        let reason = EndReason::of_decoder(&*err);
        self.end(ConnectionEnded::caused(reason, err), Leaves::Input);
    }

    pub(super) fn poll_read(&mut self, at_most: usize, cx: &mut Context<'_>) -> Poll<()> {
        let max_frame = self.settings.limits.max_frame;
        let Self { conn, input, .. } = self;
        match ready!(input.poll_fill(conn, at_most, max_frame, cx)) {
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
            // A stream that knows a proper end (TLS) did not see it. What was asked before is answered all the same, also what was
            // read ahead and is not decoded yet.
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {
                self.input.set_eof();
                self.cut_off = Some(err);
                self.decodable = true;
            }
            Err(err) => self.io_failed(err),
        }
        Poll::Ready(())
    }

    /// Looks whether the program has closed the connection, which it may have done within the call before.
    #[inline]
    pub(in crate::pipeline) fn heed_close(&mut self) {
        let closed = self.conn.life().signals.is_raised(Signal::Close);
        if closed && !self.leaves(Leaves::Requests) {
            self.end(EndReason::ServiceClosed, Leaves::Requests);
        }
    }

    /// Looks at the signals from outside.
    pub(super) fn heed_signals(&mut self, cx: &mut Context<'_>) {
        self.stand_by(cx);
        if !self.conn.life().signals.any() {
            return;
        }
        self.heed_close();
        if self.is_ending() || !self.conn.is_draining() {
            return;
        }
        // So that they have an end, too: what was sent by now is delivered.
        let message = self.peer.as_ref().map_or(Mail::None, |peer| {
            peer.refuse_messages();
            peer.mail()
        });
        if !matches!(message, Mail::Now)
            && !matches!(self.drain, Drain::Reading(_))
            && self.input.is_empty()
        {
            self.end(EndReason::Drained, Leaves::Input);
        }
    }
}
