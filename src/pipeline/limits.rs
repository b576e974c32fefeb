use std::time::Duration;

use super::watermarks::Watermarks;
use crate::close::Linger;

/// Every bound of a pipeline, in one value. The defaults, each with its reason:
///
/// | limit | default | why | at the limit |
/// | --- | --- | --- | --- |
/// | [`max_frame`](Self::max_frame) | 64 KiB | more than the line of any text protocol; what a peer can make the server hold | ends, [`FrameTooLarge`] |
/// | [`first_byte`](Self::first_byte) | 60 s | a peer that connects has something to say | ends, [`FirstByteTimeout`] |
/// | [`frame`](Self::frame) | 30 s | 64 KiB in 30 s are 17 kbit/s, less than any link in use has; not reset by each byte | ends, [`FrameTimeout`] |
/// | [`idle`](Self::idle) | 60 s | below the 5 min after which routers forget a connection; can be turned off | ends, [`IdleTimeout`] |
/// | [`write`](Self::write) | 30 s | a peer that takes no byte for so long is gone, or means harm | ends, [`WriteTimeout`] |
/// | [`max_age`](Self::max_age) | none | for rebalancing between servers; nothing needs it here | ends, [`MaxAge`] |
/// | [`max_age_jitter`](Self::max_age_jitter) | zero | only with `max_age`: what was connected together need not come back together | |
/// | [`make_service`](Self::make_service) | 10 s | as for all else before the first frame | ends, [`MakeServiceError`] |
/// | [`high_mark`](Self::high_mark), low mark | 64, 16 KiB | a socket's buffer; refilled before it runs dry | the peer is not read, `send` waits |
/// | [`push_queue`](Self::push_queue) | 16 frames | frames wait here for one turn of the connection's task only | `send` waits |
/// | [`messages`](Self::messages) | 16, and as many timers | they wait for the service, one call each; more is a backlog that the sender should feel | `post` waits |
/// | [`read_ahead`](Self::read_ahead) | 8 KiB | what is read while a request is in hand, to notice that the peer is gone | the peer is not read |
/// | [`linger`](Self::linger) | 30 s to shut down writing, then 2 s, 256 KiB | see [`Linger`] | the socket is closed |
///
/// [`FrameTooLarge`]: crate::EndReason::FrameTooLarge
/// [`FirstByteTimeout`]: crate::EndReason::FirstByteTimeout
/// [`FrameTimeout`]: crate::EndReason::FrameTimeout
/// [`IdleTimeout`]: crate::EndReason::IdleTimeout
/// [`WriteTimeout`]: crate::EndReason::WriteTimeout
/// [`MaxAge`]: crate::EndReason::MaxAge
/// [`MakeServiceError`]: crate::EndReason::MakeServiceError
#[derive(Clone, Debug)]
pub struct Limits {
    pub(super) max_frame: usize,
    pub(super) first_byte: Option<Duration>,
    pub(super) frame: Option<Duration>,
    pub(super) idle: Option<Duration>,
    pub(super) write: Option<Duration>,
    pub(super) max_age: Option<Duration>,
    pub(super) max_age_jitter: Duration,
    pub(super) make_service: Option<Duration>,
    pub(super) watermarks: Watermarks,
    pub(super) push_queue: usize,
    pub(super) messages: usize,
    pub(super) read_ahead: usize,
    pub(super) linger: Linger,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_frame: 64 * 1024,
            first_byte: Some(Duration::from_secs(60)),
            frame: Some(Duration::from_secs(30)),
            idle: Some(Duration::from_secs(60)),
            write: Some(Duration::from_secs(30)),
            max_age: None,
            max_age_jitter: Duration::ZERO,
            make_service: Some(Duration::from_secs(10)),
            watermarks: Watermarks::below(64 * 1024),
            push_queue: 16,
            messages: 16,
            read_ahead: 8 * 1024,
            linger: Linger::default(),
        }
    }
}

impl Limits {
    /// Sets the largest frame in bytes, its framing (length prefix, line ending) included. Default 64 KiB.
    ///
    /// It holds for any codec. A codec's own limit, if it is lower, comes first.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Sets how long a connection may be silent at first. Default 60 s; `None` for ever.
    #[must_use]
    pub fn first_byte(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.first_byte = time.into();
        self
    }

    /// Sets the time from the first byte of a frame to its last. Default 30 s; `None` for ever.
    #[must_use]
    pub fn frame(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.frame = time.into();
        self
    }

    /// Sets how long a connection may rest: nothing arrives, and nothing is in hand. Default 60 s; `None` for ever.
    ///
    /// Only what the *peer* sends counts: a connection whose other end is gone is not kept alive by what is pushed into it.
    #[must_use]
    pub fn idle(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.idle = time.into();
        self
    }

    /// Sets how long the peer may take no byte of what is waiting for it. Default 30 s; `None` for ever.
    #[must_use]
    pub fn write(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.write = time.into();
        self
    }

    /// Sets the age at which a connection is closed in good order, as by a drain. Default none.
    #[must_use]
    pub fn max_age(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.max_age = age.into();
        self
    }

    /// Sets a time of which a random part is added to [`max_age`](Self::max_age), so that connections made together do not
    /// come back together. Default zero.
    #[must_use]
    pub fn max_age_jitter(mut self, most: Duration) -> Self {
        self.max_age_jitter = most;
        self
    }

    /// Sets how long the make-service may take. Default 10 s; `None` for ever.
    #[must_use]
    pub fn make_service(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.make_service = time.into();
        self
    }

    /// Sets how many bytes of output may wait before no more requests are taken and `send` waits. Default 64 KiB.
    ///
    /// The low mark, at which it goes on, becomes a quarter of it. One frame may be larger than the mark.
    #[must_use]
    pub fn high_mark(self, bytes: usize) -> Self {
        self.watermarks(Watermarks::below(bytes))
    }

    /// Sets both marks of the output. They can be changed for each connection while it runs, by
    /// [`Peer::set_watermarks`](crate::Peer::set_watermarks).
    #[must_use]
    pub fn watermarks(mut self, marks: Watermarks) -> Self {
        self.watermarks = marks;
        self
    }

    /// Sets how many frames may be pushed ahead of the connection's task. Default 16; `0` counts as 1.
    #[must_use]
    pub fn push_queue(mut self, frames: usize) -> Self {
        self.push_queue = frames.max(1);
        self
    }

    /// Sets how many messages may wait for the connection's service, and how many timers be set. Default 16; `0` counts as 1.
    #[must_use]
    pub fn messages(mut self, messages: usize) -> Self {
        self.messages = messages.max(1);
        self
    }

    /// Sets how many undecoded bytes are taken in while requests are in hand. Default 8 KiB.
    ///
    /// It is what a reset is noticed by. One behind more than this, or behind the peer's end of input, is noticed when the request is
    /// done; a request that may take long has a stock `Timeout`.
    #[must_use]
    pub fn read_ahead(mut self, bytes: usize) -> Self {
        self.read_ahead = bytes;
        self
    }

    /// Sets how the end is bounded.
    #[must_use]
    pub fn linger(mut self, linger: Linger) -> Self {
        self.linger = linger;
        self
    }
}
