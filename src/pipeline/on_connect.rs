use std::pin::Pin;
use std::task::{Context, Poll};

use tower_layer::Layer;
use tower_service::Service;

use super::peer::Peer;
use crate::error::{BoxError, ServiceError};
use crate::make::{CloneForConnection, Known};

/// Runs a function for each connection before the connection's service is made.
///
/// The function can greet the peer, reject it by returning an error, or add it to a
/// [`Registry`](crate::registry::Registry). It can also register a callback for the moment when
/// closing begins ([`Peer::on_closing`]) or for the connection's end ([`Peer::on_end`]).
///
/// The layer wraps a make-service. The function runs in the connection's task, within the
/// make-service's deadline ([10 s](crate::deadline::Deadlines::make_service) by default). To serve
/// all connections with clones of one service, use tower's `tower::make::Shared` as the
/// make-service:
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use tower::{ServiceBuilder, make::Shared, service_fn};
/// use tower_tcp::frame::Lines;
/// use tower_tcp::pipeline::OnConnectLayer;
/// use tower_tcp::{Peer, Pipeline};
///
/// let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
/// let greet = OnConnectLayer::new(|peer: Peer<Bytes>| async move {
///     peer.on_end(|end| println!("left: {}", end.reason()));
///     peer.send("220 ready".into()).await
/// });
/// let pipeline = Pipeline::new(Lines::default)
///     .make_service(ServiceBuilder::new().layer(greet).service(Shared::new(echo)));
/// # drop(pipeline);
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "ClientConnected")]
#[doc(alias = "banner")]
#[doc(alias = "greeting")]
pub struct OnConnectLayer<F> {
    f: F,
}

impl<F> OnConnectLayer<F> {
    /// Creates the layer from a function that takes a [`Peer`] and returns a future of a
    /// `Result<(), E>`. An error rejects the peer: its connection ends with
    /// [`MakeServiceError`](crate::EndReason::MakeServiceError), or with the reason of a
    /// [`ConnectionEnded`](crate::ConnectionEnded) in the error.
    pub fn new(f: F) -> Self {
        Self { f }
    }
}

impl<F: Clone, K> Layer<K> for OnConnectLayer<F> {
    type Service = OnConnect<F, K>;

    fn layer(&self, inner: K) -> OnConnect<F, K> {
        OnConnect {
            f: self.f.clone(),
            inner,
        }
    }
}

/// Runs a function before it calls a make-service. Created by [`OnConnectLayer`].
#[derive(Clone, Debug)]
pub struct OnConnect<F, K> {
    f: F,
    inner: K,
}

impl<T, M, F, Connected, E, K> Service<Peer<T, M>> for OnConnect<F, K>
where
    T: Send + 'static,
    M: Send + 'static,
    F: FnMut(Peer<T, M>) -> Connected,
    Connected: Future<Output = Result<(), E>> + Send + 'static,
    E: ServiceError,
    K: Service<Peer<T, M>> + CloneForConnection + Send + 'static,
    K::Error: ServiceError,
    K::Future: Send,
{
    type Response = K::Response;
    type Error = BoxError;
    // If `Connected` does not return a `Result<(), E>`, the compiler cannot resolve this type. So
    // it reports no second error where the type is used.
    type Future = <E as Known<OnConnectFuture<K::Response>>>::Type;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, peer: Peer<T, M>) -> Self::Future {
        let connected = (self.f)(peer.clone());
        // The instance that is ready is called. Its clone is kept for the next call.
        let behind = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, behind);
        OnConnectFuture(Box::pin(async move {
            connected.await.map_err(Into::into)?;
            inner.call(peer).await.map_err(Into::into)
        }))
    }
}

/// The future of [`OnConnect`]. Boxed once per connection.
#[must_use = "futures do nothing unless polled"]
pub struct OnConnectFuture<S>(Pin<Box<dyn Future<Output = Result<S, BoxError>> + Send>>);

impl<S> std::fmt::Debug for OnConnectFuture<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OnConnectFuture").finish_non_exhaustive()
    }
}

impl<S> Future for OnConnectFuture<S> {
    type Output = Result<S, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}
