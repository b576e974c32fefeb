//! The service: a sum that clients add to and watch.

use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status, Streaming};
use tower_tcp::ConnectionInfo;

use crate::pb::tally_server::Tally;
use crate::pb::{Amount, Total, WatchRequest};

#[derive(Default)]
pub(crate) struct Counter {
    sum: watch::Sender<i64>,
}

impl Counter {
    fn count(&self, amount: i64) -> Result<Response<Total>, Status> {
        let mut answer = Err(too_large());
        self.sum.send_if_modified(|sum| {
            let Some(value) = sum.checked_add(amount) else {
                return false;
            };
            answer = Ok(Response::new(Total { value }));
            std::mem::replace(sum, value) != value
        });
        answer
    }
}

#[tonic::async_trait]
impl Tally for Counter {
    async fn add(&self, request: Request<Amount>) -> Result<Response<Total>, Status> {
        self.count(request.into_inner().value)
    }

    async fn add_all(
        &self,
        request: Request<Streaming<Amount>>,
    ) -> Result<Response<Total>, Status> {
        let amounts = request.into_inner();
        let amount = amounts.try_fold(0_i64, |all, amount| {
            let added = all.checked_add(amount.value);
            std::future::ready(added.ok_or_else(too_large))
        });
        self.count(amount.await?)
    }

    type WatchStream = BoxStream<'static, Result<Total, Status>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let info = request.extensions().get::<ConnectionInfo>();
        let info = info.ok_or_else(|| Status::internal("served by something else"))?;
        let totals = WatchStream::new(self.sum.subscribe())
            .map(|value| Ok(Total { value }))
            .take_until(info.draining()); // otherwise it would last until the shutdown deadline
        Ok(Response::new(totals.boxed()))
    }

    type SumStream = BoxStream<'static, Result<Total, Status>>;

    async fn sum(
        &self,
        request: Request<Streaming<Amount>>,
    ) -> Result<Response<Self::SumStream>, Status> {
        let mut sum = 0_i64;
        let totals = request.into_inner().and_then(move |amount| {
            let added = sum.checked_add(amount.value).ok_or_else(too_large);
            std::future::ready(added.map(|value| {
                sum = value;
                Total { value }
            }))
        });
        Ok(Response::new(totals.boxed()))
    }
}

fn too_large() -> Status {
    Status::out_of_range("the sum would not fit into 64 bits")
}
