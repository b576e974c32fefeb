use super::watermarks::Watermarks;

/// The sizes and queues of a pipeline, in one value. Its times are [`Deadlines`](crate::deadline::Deadlines).
///
/// | limit | default | why | at the limit |
/// | --- | --- | --- | --- |
/// | [`max_frame`](Self::max_frame) | 64 KiB | more than the line of any text protocol; what a peer can make the server hold | ends, [`FrameTooLarge`] |
/// | [`high_mark`](Self::high_mark), low mark | 64, 16 KiB | a socket's buffer; refilled before it runs dry | the peer is not read, `send` waits |
/// | [`push_queue`](Self::push_queue) | 16 frames | frames wait here for one turn of the connection's task only | `send` waits |
/// | [`messages`](Self::messages) | 16, and as many timers | they wait for the service, one call each; more is a backlog that the sender should feel | `post` waits |
/// | [`read_ahead`](Self::read_ahead) | 8 KiB | what is read while a request is in hand, to notice that the peer is gone | the peer is not read |
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
    /// Sets the largest frame in bytes, its framing (length prefix, line ending) included. Default 64 KiB.
    ///
    /// It holds for any codec. A codec's own limit, if it is lower, comes first.
    #[must_use]
    pub fn max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = bytes;
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
}
