/// How input came to its end, and so, once what is in hand is done, the connection. Why, the connection knows.
#[derive(Clone, Copy, Debug)]
pub(in crate::pipeline) struct Ending {
    pub(in crate::pipeline) course: Course,
    pub(in crate::pipeline) leaves: Leaves,
}

/// What comes behind what is in hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pipeline) enum Course {
    /// The end of the connection.
    End,
    /// Another service, which takes the stream over, with what is not decoded.
    Upgrade,
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
