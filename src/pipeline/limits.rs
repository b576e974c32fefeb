use tokio::sync::Semaphore;

use super::watermarks::Watermarks;

/// The size and queue limits of a pipeline's connections. For time limits, see
/// [`Deadlines`](crate::deadline::Deadlines).
///
/// | limit | default | why | when reached |
/// | --- | --- | --- | --- |
/// | [`max_frame`](Self::max_frame) | 64 KiB | more than a line of most text protocols; bounds the memory that one peer can use | the connection ends with [`FrameTooLarge`] |
/// | [`high_mark`](Self::high_mark), low mark | 64 KiB, 16 KiB | the size of a socket's buffer; output is refilled before it is empty | no more requests begin, and `send` waits |
/// | [`push_queue`](Self::push_queue) | 16 frames | frames wait here only until the connection's task runs and the output is below its high mark | `send` and broadcasts wait |
/// | [`messages`](Self::messages) | 16, and as many timers | each message takes one call of the service; the sender should notice a longer backlog | `post` waits, `post_after` fails |
/// | [`read_ahead`](Self::read_ahead) | 8 KiB | a few requests, so that the next one can begin immediately | no more is read until a request can begin |
///
/// [`FrameTooLarge`]: crate::EndReason::FrameTooLarge
#[derive(Clone, Debug)]
pub struct Limits {
    pub(super) max_frame: usize,
    pub(super) watermarks: Watermarks,
    pub(super) push_queue: usize,
    pub(super) messages: usize,
    pub(super) read_ahead: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_frame: 64 * 1024,
            watermarks: Watermarks::below(64 * 1024),
            push_queue: 16,
            messages: 16,
            read_ahead: 8 * 1024,
        }
    }
}

impl Limits {
    /// Sets the maximum size of a frame from the peer in bytes, including its framing (length
    /// prefix, line ending).
    ///
    /// Default: 64 KiB. Why: more than a line of most text protocols. When reached: the connection
    /// ends with [`FrameTooLarge`](crate::EndReason::FrameTooLarge).
    ///
    /// The limit applies to any codec. A codec may have a lower limit of its own. To allow larger
    /// frames, raise both limits.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Sets the high mark of the output in bytes, and the low mark to a quarter of it. `0` counts
    /// as 1.
    ///
    /// Default: 64 KiB. Why: the size of a socket's buffer. When reached: no more requests begin,
    /// and `send` waits, until the output has fallen to the low mark. A request for which the
    /// service's `poll_ready` was already called still begins. A single frame may be larger than
    /// the mark.
    #[must_use]
    pub fn high_mark(self, bytes: usize) -> Self {
        self.watermarks(Watermarks::below(bytes))
    }

    /// Sets the high mark and the low mark of the output.
    /// [`Peer::set_watermarks`](crate::Peer::set_watermarks) changes them for one open connection.
    #[must_use]
    pub fn watermarks(mut self, marks: Watermarks) -> Self {
        self.watermarks = marks;
        self
    }

    /// Sets how many pushed frames (sent through a [`Peer`](crate::Peer) or by a broadcast) may be
    /// queued for the connection's task. `0` counts as 1.
    ///
    /// Up to 64 frames that are broadcast in a burst to all members of a
    /// [group](crate::registry::Groups) count as one frame, because they take one entry in the
    /// queue of each member. A burst ends when any member's task runs, or when any other frame is
    /// sent to a member.
    ///
    /// Default: 16. Why: frames wait only until the task runs and the output is below its high
    /// mark. When reached: `send` and broadcasts wait for the task.
    #[must_use]
    pub fn push_queue(mut self, frames: usize) -> Self {
        self.push_queue = frames.clamp(1, Semaphore::MAX_PERMITS);
        self
    }

    /// Sets how many messages may wait for the connection's service, and how many timers may be set
    /// at the same time. Messages and timers are counted separately. `0` counts as 1.
    ///
    /// Default: 16 of each. Why: each message takes one call of the service, and the sender should
    /// notice a longer backlog. When reached: `post` waits at the limit of messages, and
    /// `post_after` fails at the limit of timers.
    #[must_use]
    pub fn messages(mut self, messages: usize) -> Self {
        self.messages = messages.clamp(1, Semaphore::MAX_PERMITS);
        self
    }

    /// Sets how many undecoded bytes may be buffered while no request can begin. A request must
    /// wait while the pipeline already runs its maximum number of requests, while the service is
    /// not ready or not made yet, and while [input is paused](crate::Peer::pause_input). If a
    /// request waits only because the output has reached its [high mark](Self::high_mark), nothing
    /// is read.
    ///
    /// Default: 8 KiB. Why: this is enough for a few requests, so that the next one can begin at
    /// once. When reached: no more is read until a request can begin. Until then, a second file
    /// descriptor of the socket shows whether the peer disconnects. If there is no such descriptor,
    /// because the stream is from a custom listener or the process has no descriptor left, a
    /// disconnect is noticed only when more is read or a write fails. After the peer has finished
    /// sending, [`half_closed`](crate::deadline::Deadlines::half_closed) limits how long pending
    /// requests may take.
    #[must_use]
    pub fn read_ahead(mut self, bytes: usize) -> Self {
        self.read_ahead = bytes;
        self
    }
}
