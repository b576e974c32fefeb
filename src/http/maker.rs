//! Where the request service of a connection comes from.

use std::future::{Ready, ready};
use std::pin::Pin;

use tower_service::Service;

use crate::connection::ConnectionInfo;
use crate::error::BoxError;

/// One service for all connections. Made by [`Http::new`](super::Http::new).
#[derive(Clone, Debug)]
pub struct Shared<S>(pub(super) S);

/// A service made for each connection. Made by [`Http::make_service`](super::Http::make_service).
#[derive(Clone, Debug)]
pub struct Made<K>(pub(super) K);

mod sealed {
    use super::*;

    /// Makes the services of connections.
    #[expect(
        unnameable_types,
        reason = "sealed: a service for all, or one for each"
    )]
    pub trait Maker {
        type Service;
        type Future: Future<Output = Result<Self::Service, BoxError>> + Send;

        fn make(&self, info: &ConnectionInfo) -> Self::Future;
    }
}
pub(super) use sealed::Maker;

impl<S: Clone + Send> Maker for Shared<S> {
    type Service = S;
    type Future = Ready<Result<S, BoxError>>;

    fn make(&self, _info: &ConnectionInfo) -> Self::Future {
        ready(Ok(self.0.clone()))
    }
}

impl<K> Maker for Made<K>
where
    K: Service<ConnectionInfo> + Clone + Send + 'static,
    K::Error: Into<BoxError>,
    K::Future: Send,
{
    type Service = K::Response;
    type Future = Pin<Box<dyn Future<Output = Result<K::Response, BoxError>> + Send>>;

    fn make(&self, info: &ConnectionInfo) -> Self::Future {
        let (mut make, info) = (self.0.clone(), info.clone());
        Box::pin(async move {
            std::future::poll_fn(|cx| make.poll_ready(cx))
                .await
                .map_err(Into::into)?;
            make.call(info).await.map_err(Into::into)
        })
    }
}
