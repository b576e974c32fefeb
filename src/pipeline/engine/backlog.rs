use std::collections::VecDeque;

use crate::error::BoxError;
use crate::pipeline::reply::Reply;

/// The replies that are not completely encoded. The current reply, if there is one, has several
/// frames or a stream. Each other reply waits for an earlier reply or pushed frames to be encoded,
/// or for the output to fall below its high mark. The limit of requests in flight also limits the
/// number of these replies. Memory is allocated when a connection first has such a reply.
pub(super) struct Backlog<T>(Option<Box<Replies<T>>>);

struct Replies<T> {
    /// The reply that is being encoded, if it has several frames or a stream.
    current: Option<Reply<T>>,
    behind: VecDeque<Result<Reply<T>, BoxError>>,
}

impl<T> Backlog<T> {
    pub(super) const fn new() -> Self {
        Self(None)
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |replies| {
            replies.behind.len() + usize::from(replies.current.is_some())
        })
    }

    /// Returns the reply that is being encoded.
    pub(super) fn current(&mut self) -> Option<&mut Reply<T>> {
        self.0.as_mut()?.current.as_mut()
    }

    pub(super) fn begin(&mut self, reply: Reply<T>) {
        self.replies().current = Some(reply);
    }

    pub(super) fn end_current(&mut self) {
        if let Some(replies) = &mut self.0 {
            replies.current = None;
        }
    }

    /// Returns whether any reply waits, not counting the one that is being encoded.
    pub(super) fn has_more(&self) -> bool {
        let replies = self.0.as_ref();
        replies.is_some_and(|replies| !replies.behind.is_empty())
    }

    pub(super) fn push_back(&mut self, result: Result<Reply<T>, BoxError>) {
        self.replies().behind.push_back(result);
    }

    pub(super) fn push_front(&mut self, result: Result<Reply<T>, BoxError>) {
        self.replies().behind.push_front(result);
    }

    pub(super) fn pop_front(&mut self) -> Option<Result<Reply<T>, BoxError>> {
        self.0.as_mut()?.behind.pop_front()
    }

    /// Drops all replies except the one that is being encoded.
    pub(super) fn drop_behind(&mut self) {
        if let Some(replies) = &mut self.0 {
            replies.behind.clear();
        }
    }

    fn replies(&mut self) -> &mut Replies<T> {
        self.0.get_or_insert_with(|| {
            Box::new(Replies {
                current: None,
                behind: VecDeque::new(),
            })
        })
    }
}
