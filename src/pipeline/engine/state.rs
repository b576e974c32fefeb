//! The states of a connection.
//!
//! ```text
//!   Open --> DrainReading --> DrainRead --> DrainNextFrame
//!    |            |               |               |
//!    +------------+---------------+---------------+
//!    v                                            v
//!   Upgrading ------------------------------> Ending
//! ```
//!
//! An end has two parts. The *reason* is stored in the connection's `Life`: the first reason wins,
//! unless an error follows an orderly one. *Which work is dropped* is stored here, in
//! [`State::Ending`]. A later end can only add to this work: if a reset follows a closing reply,
//! that reply is dropped, too.

/// A drain that has read this many bytes treats all further input as if it had arrived after the
/// drain began. A socket's receive buffer seldom holds more bytes.
pub(super) const DRAIN_READ: u32 = 256 * 1024;

/// The state of an engine. Only the methods below change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Requests are read, decoded, begun and answered.
    ///
    /// The initial state.
    Open,
    /// A drain reads the bytes that arrived before it began; the requests in them are answered. The
    /// value is the number of bytes that the drain has read so far. It is limited, so that a peer
    /// that continues to send cannot keep the connection in this state.
    ///
    /// Set by [`drain`](Self::drain).
    DrainReading(u32),
    /// The drain has read the bytes that arrived before it began. If a frame is incomplete, the
    /// connection waits for the rest of it. Otherwise the connection ends, unless
    /// [`next_frame`](crate::deadline::DrainDeadlines::next_frame) lets it wait for another frame.
    ///
    /// Set by [`drain_has_read`](Self::drain_has_read) when no more bytes are available for now, or
    /// the stream has returned bytes that arrived after the drain began. Also set by
    /// [`saw_bytes`](Self::saw_bytes) when the drain has read `DRAIN_READ` bytes.
    DrainRead,
    /// More bytes, or the end of the stream, have arrived in `DrainRead`. The next frame is the
    /// last one that is served, unless [`next_frame`](crate::deadline::DrainDeadlines::next_frame)
    /// allows more.
    ///
    /// Set by [`saw_bytes`](Self::saw_bytes).
    DrainNextFrame,
    /// A reply has requested an upgrade. Nothing more is decoded or begun, and the stream is handed
    /// over once all output is written.
    ///
    /// Set by [`upgrade`](Self::upgrade).
    Upgrading,
    /// Nothing more is decoded. [`Dropped`] determines which work is dropped. The rest of the work
    /// is finished, and then the stream is closed.
    ///
    /// Set by [`end`](Self::end). The final state.
    Ending(Dropped),
}

/// The work that is dropped at an end. Each variant includes the work of the variants above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::pipeline) enum Dropped {
    /// Only undecoded input. All requests that were decoded before the end are still answered.
    Input,
    /// Requests that have not begun.
    Requests,
    /// Calls in flight. Used if the connection ends after a closing reply, after a failure, or at
    /// the deadline `last_calls`.
    Calls,
    /// Unwritten output. Used if the stream failed, if the end reason is one that cuts the peer off
    /// (`EndReason::is_cut_off`), or if the deadline `half_closed` passed.
    Output,
}

impl State {
    /// Changes `Open` to `DrainReading`. Called when the signal to drain is handled. Does not
    /// change any other state.
    pub(super) fn drain(&mut self) {
        if *self == Self::Open {
            *self = Self::DrainReading(0);
        }
    }

    /// Records a read of `n` bytes; `0` is the end of the stream. Changes `DrainReading` to
    /// `DrainRead` once the drain has read `DRAIN_READ` bytes, and `DrainRead` to `DrainNextFrame`
    /// at the next read.
    pub(super) fn saw_bytes(&mut self, n: usize) {
        *self = match *self {
            Self::DrainReading(before) => {
                let read = u32::try_from(n).map_or(DRAIN_READ, |n| before.saturating_add(n));
                if read < DRAIN_READ {
                    Self::DrainReading(read)
                } else {
                    Self::DrainRead
                }
            }
            Self::DrainRead => Self::DrainNextFrame,
            as_before => as_before,
        };
    }

    /// Changes `DrainReading` to `DrainRead`. Called when the stream has no more bytes for now, or
    /// has returned bytes that arrived after the drain began.
    pub(super) fn drain_has_read(&mut self) {
        if matches!(self, Self::DrainReading(_)) {
            *self = Self::DrainRead;
        }
    }

    /// Changes any state but `Ending` to `Upgrading`. Called after a reply that requests an
    /// upgrade. `Ending` stays, so the stream is not handed over. Later requests are dropped even
    /// then, because nothing of this protocol may follow that reply.
    pub(super) fn upgrade(&mut self) {
        *self = match *self {
            Self::Ending(dropped) => Self::Ending(dropped.max(Dropped::Requests)),
            _ => Self::Upgrading,
        };
    }

    /// Changes any state to `Ending`. A second call can only add to the work that is dropped.
    pub(super) fn end(&mut self, dropped: Dropped) {
        *self = Self::Ending(match *self {
            Self::Ending(before) => before.max(dropped),
            Self::Upgrading => dropped.max(Dropped::Requests),
            _ => dropped,
        });
    }

    /// Returns whether the connection drains and may still decode requests.
    pub(super) fn is_draining(self) -> bool {
        matches!(
            self,
            Self::DrainReading(_) | Self::DrainRead | Self::DrainNextFrame
        )
    }

    /// Returns whether a drain has read the bytes that arrived before it began.
    pub(super) fn drain_was_read(self) -> bool {
        matches!(self, Self::DrainRead | Self::DrainNextFrame)
    }

    /// Returns whether no more requests are decoded.
    pub(super) fn is_ending(self) -> bool {
        matches!(self, Self::Upgrading | Self::Ending(_))
    }

    /// Returns whether at least this much work is dropped. An upgrade counts as
    /// `Dropped::Requests`: it drops the requests that have not begun, and leaves undecoded input
    /// to the next service.
    pub(super) fn drops(self, dropped: Dropped) -> bool {
        match self {
            Self::Ending(so_far) => so_far >= dropped,
            Self::Upgrading => dropped <= Dropped::Requests,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_that_an_end_drops_only_grows() {
        let mut state = State::Open;

        state.end(Dropped::Calls);
        state.end(Dropped::Input);

        assert_eq!(state, State::Ending(Dropped::Calls));
    }

    #[test]
    fn an_end_after_an_upgrade_still_drops_requests() {
        let mut state = State::Open;

        state.upgrade();
        state.end(Dropped::Input);

        assert_eq!(state, State::Ending(Dropped::Requests));
    }

    #[test]
    fn an_upgrade_after_an_end_drops_requests() {
        let mut state = State::Ending(Dropped::Input);

        state.upgrade();

        assert_eq!(state, State::Ending(Dropped::Requests));
    }

    #[test]
    fn a_drain_does_not_undo_an_end() {
        let mut state = State::Ending(Dropped::Input);

        state.drain();
        state.saw_bytes(1);
        state.drain_has_read();

        assert_eq!(state, State::Ending(Dropped::Input));
    }

    #[test]
    fn bytes_advance_a_drain_only_at_its_limit_and_after_it() {
        let mut state = State::Open;
        state.saw_bytes(1);
        assert_eq!(state, State::Open);

        state.drain();
        state.saw_bytes(DRAIN_READ as usize - 1);
        assert_eq!(state, State::DrainReading(DRAIN_READ - 1));

        state.saw_bytes(1);
        assert_eq!(state, State::DrainRead);

        state.saw_bytes(1);
        assert_eq!(state, State::DrainNextFrame);
    }
}
