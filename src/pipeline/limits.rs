use super::watermarks::Watermarks;

/// The size and queue limits of a pipeline's connections. For time limits, see
/// [`Deadlines`](crate::deadline::Deadlines).
///
/// | limit | default | why | when reached |
/// | --- | --- | --- | --- |
/// | [`max_frame`](Self::max_frame) | 64 KiB | more than a line of most text protocols; bounds the memory that one peer can use | the connection ends with [`FrameTooLarge`] |
/// | [`high_mark`](Self::high_mark), low mark | 64 KiB, 16 KiB | the size of a socket's buffer; output is refilled before it is empty | no more requests begin, and `send` waits |
/// | [`push_queue`](Self::push_queue) | 16 frames | frames wait here only until the connection's task runs | `send` and broadcasts wait |
/// | [`messages`](Self::messages) | 16, and as many timers | each message takes one call of the service; the sender should notice a longer backlog | `post` waits, `post_after` fails |
/// | [`read_ahead`](Self::read_ahead) | 8 KiB | a few requests, so that the next one can begin at once | no more is read until a request can begin |
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
    /// Sets the maximum size of a frame in bytes, including its framing (length prefix, line
    /// ending).
    ///
    /// Default: 64 KiB. Why: more than a line of most text protocols. When reached: the connection
    /// ends with [`FrameTooLarge`](crate::EndReason::FrameTooLarge).
    ///
    /// The limit applies to any codec. A codec may have a lower limit of its own. To allow larger
    /// frames, raise both.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Sets the high mark of the output in bytes, and the low mark to a quarter of it. `0` counts
    /// as 1.
    ///
    /// Default: 64 KiB. Why: the size of a socket's buffer. When reached: no more requests begin,
    /// and `send` waits, until the output has fallen to the low mark. A single frame may be larger
    /// than the mark.
    #[must_use]
    pub fn high_mark(self, bytes: usize) -> Self {
        self.watermarks(Watermarks::below(bytes))
    }

    /// Sets both marks of the output. [`Peer::set_watermarks`](crate::Peer::set_watermarks) changes
    /// them for one open connection.
    #[must_use]
    pub fn watermarks(mut self, marks: Watermarks) -> Self {
        self.watermarks = marks;
        self
    }

    /// Sets how many pushed frames (sent through a [`Peer`](crate::Peer) or by a broadcast) may be
    /// queued for the connection's task. `0` counts as 1. A burst of up to 64 frames that is
    /// broadcast to all members of a [group](crate::registry::Groups) counts as one frame, because
    /// it takes one entry in the queue of each member.
    ///
    /// Default: 16. Why: frames wait only until the task runs. When reached: `send` and broadcasts
    /// wait for the task.
    #[must_use]
    pub fn push_queue(mut self, frames: usize) -> Self {
        self.push_queue = frames.max(1);
        self
    }

    /// Sets how many messages may wait for the connection's service, and how many timers may be
    /// set. `0` counts as 1.
    ///
    /// Default: 16. Why: each message takes one call of the service, and the sender should notice a
    /// longer backlog. When reached: `post` waits, and `post_after` fails.
    #[must_use]
    pub fn messages(mut self, messages: usize) -> Self {
        self.messages = messages.max(1);
        self
    }

    /// Sets how many undecoded bytes may be buffered while no request can begin. No request can
    /// begin while the connection has as many requests in progress as the pipeline runs at the same
    /// time, while the service is not ready or not made yet, or while [input is
    /// paused](crate::Peer::pause_input). While only the [high mark](Self::high_mark) keeps a
    /// request from beginning, nothing is read.
    ///
    /// Default: 8 KiB. Why: a few requests, so that the next one can begin at once. When reached:
    /// no more is read until a request can begin. Until then, a second file descriptor of the
    /// socket shows whether the peer disconnects. Streams of a custom listener have no such
    /// descriptor, and the process may have none left. Then a disconnect is noticed only when more
    /// is read or a write fails. After the peer has finished sending,
    /// [`half_closed`](crate::deadline::Deadlines::half_closed) limits pending requests.
    #[must_use]
    pub fn read_ahead(mut self, bytes: usize) -> Self {
        self.read_ahead = bytes;
        self
    }
}
