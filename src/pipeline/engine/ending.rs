use crate::end_reason::ConnectionEnded;

/// How input came to its end, and so, once what is in hand is done, the connection.
#[derive(Debug)]
pub(in crate::pipeline) struct Ending {
    pub(in crate::pipeline) ended: ConnectionEnded,
    pub(in crate::pipeline) leaves: Leaves,
}

/// What is left behind by an end. Each leaves what those above it leave, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::pipeline) enum Leaves {
    /// Only what was not decoded: all that was asked is answered.
    Input,
    /// Requests that were not begun.
    Requests,
    /// Calls in flight: what closes stands before their replies.
    Calls,
    /// What is not written: the stream failed, or the peer does not take it.
    Output,
}
