use std::task::{Context, Poll};

use tower_service::Service;

use crate::make::CloneForRequest;

/// Calls a new clone of a service for each request. `poll_ready` makes the clone, and a pipeline
/// calls `poll_ready` only when a request has arrived. The clone is dropped when `call` returns.
///
/// [`PipelineBuilder::service`](super::PipelineBuilder::service) calls its service in this way.
/// Elsewhere, one clone of a shared stack serves many calls: as a part of the service that a
/// make-service makes, in a `Buffer`, or as a connection service. Put `PerCall` around such a
/// stack.
///
/// Without `PerCall`, a clone of the stack can hold a permit while no request runs. For example,
/// `LoadShed` fails a request when the limit inside it is reached, but the clone stays in the queue
/// of that limit. The clone gets the next free permit, and keeps the permit until its next call.
/// With `PerCall`, the clone is dropped when `call` returns, and so leaves the queue.
///
/// ```
/// use bytes::Bytes;
/// use tower::make::Shared;
/// use tower::{ServiceBuilder, service_fn};
/// use tower_tcp::frame::Lines;
/// use tower_tcp::pipeline::PerCall;
/// use tower_tcp::{BoxError, Pipeline};
///
/// let echo = service_fn(|line: Bytes| async move { Ok::<_, BoxError>(line) });
/// let shared = ServiceBuilder::new().load_shed().concurrency_limit(100).service(echo);
/// let make = Shared::new(PerCall::new(shared));
/// let pipeline = Pipeline::new(Lines::default).make_service(make);
/// # fn infer<F, K>(_: Pipeline<F, K, Bytes>) {}
/// # infer(pipeline);
/// ```
///
/// In a `ServiceBuilder`, write `.layer(layer_fn(PerCall::new))`. Keep the state of one connection
/// outside of `PerCall`, because changes that a clone makes to itself are lost. A `RateLimit` or a
/// [`SessionService`](super::SessionService) inside does not compile, because neither is `Clone`.
#[derive(Debug)]
pub struct PerCall<S> {
    service: S,
    readied: Option<S>,
}

impl<S> PerCall<S> {
    /// Creates a service that calls a new clone of `service` for each request.
    pub fn new(service: S) -> Self {
        Self {
            service,
            readied: None,
        }
    }
}

impl<S: Clone> Clone for PerCall<S> {
    fn clone(&self) -> Self {
        // A clone is not ready.
        Self::new(self.service.clone())
    }
}

impl<S, R> Service<R> for PerCall<S>
where
    S: Service<R> + CloneForRequest,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        let Self { service, readied } = self;
        readied
            .get_or_insert_with(|| service.clone())
            .poll_ready(cx)
    }

    fn call(&mut self, request: R) -> S::Future {
        match self.readied.take() {
            Some(mut service) => service.call(request),
            // The caller has not called `poll_ready`. The service reports that mistake in its own
            // way.
            None => self.service.clone().call(request),
        }
    }
}
