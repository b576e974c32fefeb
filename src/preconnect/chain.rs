use std::pin::Pin;
use std::task::{Context, Poll};

use tower_service::Service;

use super::when::When;
use crate::connection::{Connection, ConnectionInfo};
use crate::error::{BoxError, ServiceError};
use crate::make::{CloneForConnection, oneshot};

/// Combinators for pre-connect hooks.
pub trait PreConnectExt: Sized {
    /// Runs `next` on the connection that this hook returns. Put the hook of the outermost protocol
    /// first: for example, the hook that reads a proxy's header, then TLS.
    ///
    /// The method is not named `then`, because `ServiceExt::then` of tower does something else.
    fn chain<H>(self, next: H) -> Chain<Self, H> {
        Chain { first: self, next }
    }

    /// Runs this hook only for connections for which `predicate` returns `true`. Others pass
    /// through unchanged.
    ///
    /// The stream of the resulting connection is an [`Either`](super::Either): `Left` is the stream
    /// that the hook returned, and `Right` the unchanged stream.
    ///
    /// ```
    /// # #[cfg(feature = "tls")]
    /// # {
    /// use tower_tcp::bind::Socket;
    /// use tower_tcp::preconnect::{Peek, PreConnectExt, PreConnectLayer, Protocol, Unknown};
    /// use tower_tcp::tls::Tls;
    /// use tower_tcp::{ConnectionService, Pipeline, frame::Lines};
    /// # use bytes::Bytes;
    /// # use std::convert::Infallible;
    ///
    /// /// Serves TLS to clients that begin a handshake, and plain text to others.
    /// fn optional(tls: Tls) -> impl ConnectionService<Socket> + Clone {
    ///     let peek = Peek::new(Protocol::detect).unknown(Unknown::Pass);
    ///     let hooks = peek.chain(tls.when(|info| info.get() == Some(&Protocol::Tls)));
    ///     let echo = tower::service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    ///     tower::ServiceBuilder::new()
    ///         .layer(PreConnectLayer::new(hooks))
    ///         .service(Pipeline::new(Lines::default).service(echo))
    /// }
    /// # }
    /// ```
    fn when<P>(self, predicate: P) -> When<Self, P>
    where
        P: Fn(&ConnectionInfo) -> bool,
    {
        When {
            hook: self,
            predicate,
        }
    }
}

impl<H> PreConnectExt for H {}

/// A hook that runs two hooks, one after the other. Created by [`PreConnectExt::chain`].
#[derive(Clone, Debug)]
pub struct Chain<F, N> {
    first: F,
    next: N,
}

impl<A, B, C, F, N> Service<Connection<A>> for Chain<F, N>
where
    F: Service<Connection<A>, Response = Connection<B>>,
    F::Error: ServiceError,
    F::Future: Send + 'static,
    N: Service<Connection<B>, Response = Connection<C>> + CloneForConnection + Send + 'static,
    N::Error: ServiceError,
    N::Future: Send,
    B: Send,
{
    type Response = Connection<C>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Connection<C>, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.first.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, conn: Connection<A>) -> Self::Future {
        let first = self.first.call(conn);
        // `next` is polled for readiness only after `first` has completed. So `next` reserves
        // nothing while `first` waits for the peer.
        let next = self.next.clone();
        Box::pin(async move {
            let conn = first.await.map_err(Into::into)?;
            oneshot(next, conn).await.map_err(Into::into)
        })
    }
}
