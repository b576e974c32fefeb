use std::pin::Pin;
use std::task::{Context, Poll};

use tokio_util::either::Either;
use tower_service::Service;

use crate::connection::{Connection, ConnectionInfo};
use crate::error::{BoxError, ServiceError};
use crate::make::{CloneForConnection, oneshot};

/// A hook that runs only for some connections. Created by
/// [`PreConnectExt::when`](super::PreConnectExt::when).
#[derive(Clone, Debug)]
pub struct When<H, P> {
    pub(super) hook: H,
    pub(super) predicate: P,
}

impl<A, B, H, P> Service<Connection<A>> for When<H, P>
where
    A: Send + 'static,
    B: Send + 'static,
    H: Service<Connection<A>, Response = Connection<B>> + CloneForConnection + Send + 'static,
    H::Error: ServiceError,
    H::Future: Send,
    P: Fn(&ConnectionInfo) -> bool,
{
    type Response = Connection<Either<B, A>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    /// Returns ready at once. The hook is polled for readiness only if it runs for a connection.
    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, conn: Connection<A>) -> Self::Future {
        if !(self.predicate)(conn.info()) {
            return Box::pin(std::future::ready(Ok(conn.map_io(Either::Right))));
        }
        let hook = self.hook.clone();
        Box::pin(async move {
            let conn = oneshot(hook, conn).await.map_err(Into::into)?;
            Ok(conn.map_io(Either::Left))
        })
    }
}
