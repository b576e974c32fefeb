//! Faults in a layer that breaks Tower's contract with the service inside it.

use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio_test::{assert_pending, task};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_tcp::Pipeline;
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::faults::{Breach, Contract, Plan, Promise};

use super::{Table, check_echo, echo};

#[derive(Clone, Copy, Debug)]
enum Flaw {
    CallsWithoutReady,
    CallsAClone,
    KeepsAReadyClone,
    Nothing,
}

#[derive(Clone)]
struct Planted<S> {
    inner: S,
    flaw: Flaw,
    kept: Arc<Mutex<Vec<S>>>,
}

impl<S: Service<Bytes> + Clone> Service<Bytes> for Planted<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        match self.flaw {
            Flaw::CallsWithoutReady => Poll::Ready(Ok(())),
            Flaw::CallsAClone | Flaw::Nothing => self.inner.poll_ready(cx),
            Flaw::KeepsAReadyClone => {
                let mut spare = self.inner.clone();
                if spare.poll_ready(cx).is_ready() {
                    self.kept.lock().expect("no holder panics").push(spare);
                }
                self.inner.poll_ready(cx)
            }
        }
    }

    fn call(&mut self, line: Bytes) -> S::Future {
        match self.flaw {
            Flaw::CallsAClone => self.inner.clone().call(line),
            _ => self.inner.call(line),
        }
    }
}

pub(crate) async fn find_all(table: &mut Table) {
    for flaw in [
        Flaw::CallsWithoutReady,
        Flaw::CallsAClone,
        Flaw::KeepsAReadyClone,
    ] {
        let contract = Contract::new();
        let layer = contract.clone();
        let kept = Arc::default();
        let stack = move || {
            let inner = layer.layer(service_fn(echo));
            let kept = Arc::clone(&kept);
            Pipeline::new(Lines::default).service(Planted { inner, flaw, kept })
        };
        let found = check_echo(stack).contract(&contract).await;
        table.found(&format!("layer: {flaw:?}"), Promise::Contract, found);
    }
}

#[tokio::test]
async fn a_service_that_lost_its_readiness_is_not_held_and_not_ready() {
    let contract = Contract::new();
    let limit = ConnectionLimit::new(1);
    let mut service = contract.layer(limit.layer().layer(service_fn(echo)));
    service.ready().await.expect("there is room");

    limit.set(0);
    assert_pending!(task::spawn(()).enter(|cx, _| service.poll_ready(cx)));
    assert_eq!(contract.breaches(), []);
    _ = service.call(Bytes::new()).await;

    assert_eq!(contract.breaches(), [Breach::NotReady]);
}

#[tokio::test(start_paused = true)]
async fn a_breach_in_the_run_with_failed_accepts_is_found_in_that_run() {
    const WITH_FAILED_ACCEPTS: usize = 2;
    let contract = Contract::new();
    let layer = contract.clone();
    let mut runs = 0;
    let stack = move || {
        runs += 1;
        let flaw = match runs {
            WITH_FAILED_ACCEPTS => Flaw::CallsWithoutReady,
            _ => Flaw::Nothing,
        };
        let inner = layer.layer(service_fn(echo));
        let kept = Arc::default();
        Pipeline::new(Lines::default).service(Planted { inner, flaw, kept })
    };

    let broken = check_echo(stack).contract(&contract).await;

    let broken = broken.expect_err("a breach");
    assert_eq!(broken.promise(), Promise::Contract);
    assert_eq!(*broken.plan(), Plan::new());
}
