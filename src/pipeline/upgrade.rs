//! Handing a connection's stream to another service, between two frames.

use std::fmt;

use tower_service::Service;

use super::reply::Reply;
use crate::connection::{Connection, Rewind};
use crate::error::BoxError;
use crate::make::readied;

/// A reply behind which another service may take the stream over. Made by [`Reply::upgrade`]; every reply is one that stays.
///
/// It is what a service answers with whose pipeline has [`on_upgrade`](super::Pipeline::on_upgrade). In no other pipeline does it compile.
pub struct Upgrade<T>(Reply<T>);

impl<T> From<Reply<T>> for Upgrade<T> {
    fn from(reply: Reply<T>) -> Self {
        Self(reply)
    }
}

impl<T> From<T> for Upgrade<T> {
    fn from(frame: T) -> Self {
        Self(frame.into())
    }
}

impl<T> From<Option<T>> for Upgrade<T> {
    fn from(frame: Option<T>) -> Self {
        Self(frame.into())
    }
}

impl<T> From<Vec<T>> for Upgrade<T> {
    fn from(frames: Vec<T>) -> Self {
        Self(frames.into())
    }
}

impl<T> fmt::Debug for Upgrade<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Upgrade").field(&self.0).finish()
    }
}

/// No service takes over: the replies of such a pipeline cannot ask for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoUpgrade;

/// What takes over. Made by [`Pipeline::on_upgrade`](super::Pipeline::on_upgrade).
#[derive(Clone, Debug)]
pub struct OnUpgrade<N>(pub(super) N);

mod sealed {
    use super::*;

    /// What a service may answer with.
    #[expect(unnameable_types, reason = "sealed: a reply, or an upgrade")]
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

        fn readied(&mut self) -> impl Future<Output = Result<(), BoxError>> + Send;

        fn upgrade(
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

impl<T> Answer<T> for Upgrade<T> {
    fn into_reply(self) -> Reply<T> {
        self.0
    }
}

impl<Io: Send, T> Next<Io, T> for NoUpgrade {
    type Answer = Reply<T>;

    async fn readied(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// Is not called: a `Reply` does not ask for it.
    async fn upgrade(self, conn: Connection<Rewind<Io>>) -> Result<(), BoxError> {
        drop(conn);
        Ok(())
    }
}

impl<Io, T, N> Next<Io, T> for OnUpgrade<N>
where
    Io: Send,
    N: Service<Connection<Rewind<Io>>> + Clone + Send + 'static,
    N::Error: Into<BoxError>,
    N::Future: Send,
{
    type Answer = Upgrade<T>;

    async fn readied(&mut self) -> Result<(), BoxError> {
        readied(&mut self.0).await.map_err(Into::into)
    }

    async fn upgrade(mut self, conn: Connection<Rewind<Io>>) -> Result<(), BoxError> {
        self.0.call(conn).await.map(drop).map_err(Into::into)
    }
}
