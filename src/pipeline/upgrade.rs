//! Hands over a connection's stream to another service, between two frames.

use super::reply::{Answer, Reply, Upgrade};
use crate::connection::{Connection, ConnectionService, Rewind};
use crate::error::BoxError;
use crate::make::{CloneForConnection, readied};

/// Marks a pipeline without [`on_upgrade`](super::Pipeline::on_upgrade). Its replies cannot request
/// an upgrade.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoUpgrade;

/// The service that takes over the stream at an upgrade. Created by
/// [`Pipeline::on_upgrade`](super::Pipeline::on_upgrade).
#[derive(Clone, Debug)]
pub struct OnUpgrade<N>(pub(super) N);

#[expect(unnameable_types, reason = "sealed: the next service, or none")]
mod sealed {
    use super::*;

    /// A pipeline without `on_upgrade`.
    #[diagnostic::on_unimplemented(
        message = "`in_flight` and `multiplexed` do not go with `on_upgrade`",
        label = "this pipeline has `on_upgrade`",
        note = "remove `in_flight` or `multiplexed`: with several requests in flight it is \
            unknown what follows the reply that upgrades"
    )]
    pub trait WithoutUpgrade {
        type Next;

        fn into_next(self) -> Self::Next;
    }

    /// The service that takes over the stream from a pipeline at an upgrade. `NoUpgrade` means that
    /// there is none.
    pub trait Next<Io, T>: Clone + Send + 'static {
        type Answer: Answer<T>;

        fn readied(&mut self) -> impl Future<Output = Result<(), BoxError>> + Send;

        fn upgrade(
            self,
            conn: Connection<Rewind<Io>>,
        ) -> impl Future<Output = Result<(), BoxError>> + Send;
    }
}
pub(super) use sealed::{Next, WithoutUpgrade};

impl WithoutUpgrade for NoUpgrade {
    type Next = Self;

    fn into_next(self) -> Self {
        self
    }
}

impl<Io: Send, T> Next<Io, T> for NoUpgrade {
    type Answer = Reply<T>;

    async fn readied(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// Never called, because a `Reply` cannot request an upgrade.
    async fn upgrade(self, conn: Connection<Rewind<Io>>) -> Result<(), BoxError> {
        drop(conn);
        Ok(())
    }
}

impl<Io, T, N> Next<Io, T> for OnUpgrade<N>
where
    Io: Send,
    N: ConnectionService<Rewind<Io>> + CloneForConnection,
{
    type Answer = Upgrade<T>;

    async fn readied(&mut self) -> Result<(), BoxError> {
        readied(&mut self.0).await.map_err(Into::into)
    }

    async fn upgrade(mut self, conn: Connection<Rewind<Io>>) -> Result<(), BoxError> {
        self.0.call(conn).await.map(drop).map_err(Into::into)
    }
}
