use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite};
use tower_service::Service;

use super::bounds::Codec;
use super::engine::{Dropped, Engine, Settings};
use super::farewell::Farewell;
use super::serve::{PipelineFuture, finish};
use crate::connection::Connection;
use crate::end::EndReason;
use crate::error::BoxError;

/// A connection service that sends each peer a pipeline's farewell, and closes the connection.
/// Created by [`Pipeline::reject`](super::Pipeline::reject).
pub struct Reject<F, T> {
    codec: F,
    settings: Arc<Settings<Farewell<T>>>,
}

impl<F, T> Reject<F, T> {
    pub(super) fn new(codec: F, settings: Arc<Settings<Farewell<T>>>) -> Self {
        Self { codec, settings }
    }
}

impl<Io, F, C, T> Service<Connection<Io>> for Reject<F, T>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn() -> C,
    C: Codec<T, Item: Send> + Send + 'static,
    T: Send + 'static,
{
    type Response = EndReason;
    type Error = BoxError;
    type Future = PipelineFuture;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, conn: Connection<Io>) -> PipelineFuture {
        let settings = Arc::clone(&self.settings);
        let mut engine = Engine::<Io, C, T, Infallible>::new(conn, (self.codec)(), settings);
        PipelineFuture::new(async move {
            engine.end(EndReason::Rejected, Dropped::Input);
            finish(&mut engine).await;
            engine.close().await
        })
    }
}

impl<F: Clone, T> Clone for Reject<F, T> {
    fn clone(&self) -> Self {
        Self::new(self.codec.clone(), Arc::clone(&self.settings))
    }
}

impl<F, T> fmt::Debug for Reject<F, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reject")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
