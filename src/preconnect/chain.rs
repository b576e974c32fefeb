use std::pin::Pin;
use std::task::{Context, Poll};

use tower_service::Service;

use super::when::When;
use crate::connection::{Connection, ConnectionInfo};
use crate::error::BoxError;

/// Combinators for pre-connect hooks.
pub trait PreConnectExt: Sized {
    /// Runs `next` on what this hook makes of a connection: first the outer protocol, then the inner one.
    ///
    /// (Stock `ServiceExt::then` is another thing, hence the name.)
    fn chain<H>(self, next: H) -> Chain<Self, H> {
        Chain { first: self, next }
    }

    /// Runs this hook for the connections that `predicate` is true of, by what is known of them; the others go by as they are.
    ///
    /// The stream is then one of two: what the hook made of it on the left, what it was on the right.
    ///
    /// ```
    /// # #[cfg(feature = "tls")]
    /// # {
    /// use tower_tcp::bind::Socket;
    /// use tower_tcp::preconnect::{Peek, PreConnectExt, PreConnectLayer, Protocol, Unknown};
    /// use tower_tcp::tls::Tls;
    /// # use tower_tcp::{BoxError, Connection};
    /// # use tower::{Layer, Service, service_fn};
    ///
    /// /// TLS for those that begin it, on the same port as without.
    /// fn optional(tls: Tls) -> PreConnectLayer<impl Service<Connection<Socket>> + Clone> {
    ///     let peek = Peek::new(Protocol::detect).unknown(Unknown::Pass);
    ///     PreConnectLayer::new(peek.chain(tls.when(|info| info.get() == Some(&Protocol::Tls))))
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

/// Two hooks, one after the other. Made by [`PreConnectExt::chain`].
#[derive(Clone, Debug)]
pub struct Chain<F, N> {
    first: F,
    next: N,
}

impl<A, B, C, F, N> Service<Connection<A>> for Chain<F, N>
where
    F: Service<Connection<A>, Response = Connection<B>>,
    F::Error: Into<BoxError>,
    F::Future: Send + 'static,
    N: Service<Connection<B>, Response = Connection<C>> + Clone + Send + 'static,
    N::Error: Into<BoxError>,
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
        // The next is made ready once it is needed: a place in it is not held while the peer works through the first.
        let mut next = self.next.clone();
        Box::pin(async move {
            let conn = first.await.map_err(Into::into)?;
            std::future::poll_fn(|cx| next.poll_ready(cx))
                .await
                .map_err(Into::into)?;
            next.call(conn).await.map_err(Into::into)
        })
    }
}
