use tower_service::Service;

use super::Connection;
use crate::error::ServiceError;

/// A service of connections: the argument of [`Server::serve`](crate::Server::serve).
///
/// Every [`Service`] of a [`Connection<Io>`](Connection) implements this trait, if its error
/// converts into a [`BoxError`](crate::BoxError), its response is `'static`, and the service and
/// its futures are `Send + 'static`. Examples are [`Pipeline`](crate::Pipeline), `Http`, a function
/// in tower's `service_fn`, and any layer around these.
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use tower::service_fn;
/// use tower_tcp::bind::Socket;
/// use tower_tcp::frame::Lines;
/// use tower_tcp::{ConnectionService, Pipeline};
///
/// fn echo() -> impl ConnectionService<Socket> {
///     Pipeline::new(Lines::default)
///         .service(service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) }))
/// }
/// # drop(echo());
/// ```
#[diagnostic::on_unimplemented(
    message = "expected a service of `Connection<{Io}>`",
    label = "not a `Service<Connection<{Io}>>`",
    note = "serve requests by `Pipeline::new(codec).service(..)` or `Http::new(..)`, and wrap a \
        function of a connection in `tower::service_fn`"
)]
pub trait ConnectionService<Io>:
    Service<Connection<Io>, Response: 'static, Error: ServiceError, Future: Send + 'static>
    + Send
    + 'static
{
}

impl<S, Io> ConnectionService<Io> for S where
    S: Service<Connection<Io>, Response: 'static, Error: ServiceError, Future: Send + 'static>
        + Send
        + 'static
{
}
