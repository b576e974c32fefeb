use std::task::{Context, Poll};

use tower_service::Service;

use crate::make::CloneForRequest;

/// Calls a clone of the service for each request, made ready when the request has arrived.
///
/// So an idle connection holds no shared resource: no permit of a shared limit, and no place in the
/// queue for one.
#[derive(Clone, Debug)]
#[expect(
    unnameable_types,
    reason = "the service of a pipeline, which only the pipeline calls"
)]
pub struct PerCall<S> {
    service: S,
    readied: Option<S>,
}

impl<S> PerCall<S> {
    pub(super) fn new(service: S) -> Self {
        Self {
            service,
            readied: None,
        }
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
            // The caller did not make it ready. The service reports that mistake in its own way.
            None => self.service.clone().call(request),
        }
    }
}
