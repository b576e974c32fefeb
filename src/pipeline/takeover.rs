//! Handing a connection's stream to another service, between two frames.

use std::fmt;
use std::task::{Context, Poll};

use tower_service::Service;

use super::reply::Reply;
use crate::connection::{Connection, Rewind};
use crate::error::BoxError;

/// A reply behind which another service may take the stream over. Made by [`Reply::takeover`]; every reply is one that stays.
///
/// It is what a service answers with whose pipeline has [`on_takeover`](super::Pipeline::on_takeover). In no other pipeline does it compile.
pub struct Takeover<T>(Reply<T>);

impl<T> From<Reply<T>> for Takeover<T> {
    fn from(reply: Reply<T>) -> Self {
        Self(reply)
    }
}

impl<T> From<T> for Takeover<T> {
    fn from(frame: T) -> Self {
        Self(frame.into())
    }
}

impl<T> From<Option<T>> for Takeover<T> {
    fn from(frame: Option<T>) -> Self {
        Self(frame.into())
    }
}

impl<T> From<Vec<T>> for Takeover<T> {
    fn from(frames: Vec<T>) -> Self {
        Self(frames.into())
    }
}

impl<T> fmt::Debug for Takeover<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Takeover").field(&self.0).finish()
    }
}

/// No service takes over: the replies of such a pipeline cannot ask for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTakeover;

/// What takes over. Made by [`Pipeline::on_takeover`](super::Pipeline::on_takeover).
#[derive(Clone, Debug)]
pub struct OnTakeover<N>(pub(super) N);

mod sealed {
    use super::*;

    /// What a service may answer with.
    #[expect(unnameable_types, reason = "sealed: a reply, or a takeover")]
    pub trait Answer<T> {
        fn into_reply(self) -> Reply<T>;
    }

    /// What comes after a pipeline.
    #[expect(
        unnameable_types,
        reason = "sealed: nothing comes after it, or a service"
    )]
    pub trait Next<Io, T>: Clone + Send + 'static {
        type Answer: Answer<T>;

        fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>>;

        fn take_over(
            self,
            conn: Connection<Rewind<Io>>,
        ) -> impl Future<Output = Result<(), BoxError>> + Send;
    }
}
pub(super) use sealed::{Answer, Next};

impl<T> Answer<T> for Reply<T> {
    fn into_reply(self) -> Self {
        self
    }
}

impl<T> Answer<T> for Takeover<T> {
    fn into_reply(self) -> Reply<T> {
        self.0
    }
}

impl<Io: Send, T> Next<Io, T> for NoTakeover {
    type Answer = Reply<T>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    /// Is not called: a `Reply` does not ask for it.
    async fn take_over(self, conn: Connection<Rewind<Io>>) -> Result<(), BoxError> {
        drop(conn);
        Ok(())
    }
}

impl<Io, T, N> Next<Io, T> for OnTakeover<N>
where
    Io: Send,
    N: Service<Connection<Rewind<Io>>> + Clone + Send + 'static,
    N::Error: Into<BoxError>,
    N::Future: Send,
{
    type Answer = Takeover<T>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx).map_err(Into::into)
    }

    async fn take_over(mut self, conn: Connection<Rewind<Io>>) -> Result<(), BoxError> {
        self.0.call(conn).await.map(drop).map_err(Into::into)
    }
}
