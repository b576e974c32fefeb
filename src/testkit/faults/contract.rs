//! A layer that checks Tower's contract between a service and its caller.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tower_layer::Layer;
use tower_service::Service;

/// A breach of Tower's contract by the caller of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Breach {
    /// The service was called without being ready.
    NotReady,
    /// The service was called without being ready, while another service of the same `Contract` was
    /// ready. Usually one of the two is a clone of the other.
    OtherClone,
    /// A service was ready and was neither called nor dropped. If readiness includes a permit, that
    /// permit is not returned.
    Held,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "the service was called without being ready",
            Self::OtherClone => "the service was called while another clone of it was ready",
            Self::Held => "a service was made ready, and neither called nor dropped",
        })
    }
}

/// A layer that checks whether its inner service is called as Tower's contract requires. See
/// [`Breach`] for what it can find.
///
/// Place it directly around a service, or between two layers. Clones share the record of breaches.
///
/// ```
/// use std::convert::Infallible;
/// use tower::{Layer, Service, ServiceExt, service_fn};
/// use tower_tcp::testkit::faults::{Breach, Contract};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Infallible> {
/// let contract = Contract::new();
/// let mut service = contract.layer(service_fn(|n: u32| async move { Ok::<_, Infallible>(n) }));
///
/// service.ready().await?;
/// let other = service.clone().call(7).await?; // the clone is not ready
/// assert_eq!(contract.breaches(), [Breach::OtherClone, Breach::Held]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Contract {
    record: Arc<Mutex<Record>>,
}

#[derive(Debug, Default)]
struct Record {
    ready: usize,
    /// The breaches so far except [`Breach::Held`], each kind once.
    breaches: Vec<Breach>,
}

impl Contract {
    /// Creates the layer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the breaches so far, each kind once. They include [`Breach::Held`] while a service
    /// is ready, even if it will be called later. So call this method when nothing is in progress.
    pub fn breaches(&self) -> Vec<Breach> {
        let record = self.lock();
        let mut breaches = record.breaches.clone();
        if record.ready > 0 {
            breaches.push(Breach::Held);
        }
        breaches
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> Layer<S> for Contract {
    type Service = ContractService<S>;

    fn layer(&self, inner: S) -> ContractService<S> {
        ContractService {
            inner,
            contract: self.clone(),
            ready: false,
        }
    }
}

/// A service whose callers are checked. Created by [`Contract`].
#[derive(Debug)]
pub struct ContractService<S> {
    inner: S,
    contract: Contract,
    ready: bool,
}

impl<S> ContractService<S> {
    fn take_ready(&mut self) -> bool {
        let ready = std::mem::take(&mut self.ready);
        if ready {
            self.contract.lock().ready -= 1;
        }
        ready
    }
}

/// A clone is not ready, even if the original is.
impl<S: Clone> Clone for ContractService<S> {
    fn clone(&self) -> Self {
        self.contract.layer(self.inner.clone())
    }
}

impl<S> Drop for ContractService<S> {
    fn drop(&mut self) {
        self.take_ready();
    }
}

impl<S, R> Service<R> for ContractService<S>
where
    S: Service<R>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        let polled = self.inner.poll_ready(cx);
        if !matches!(polled, Poll::Ready(Ok(()))) {
            self.take_ready();
        } else if !self.ready {
            self.ready = true;
            self.contract.lock().ready += 1;
        }
        polled
    }

    fn call(&mut self, request: R) -> S::Future {
        if !self.take_ready() {
            let mut record = self.contract.lock();
            let breach = if record.ready > 0 {
                Breach::OtherClone
            } else {
                Breach::NotReady
            };
            if !record.breaches.contains(&breach) {
                record.breaches.push(breach);
            }
        }
        self.inner.call(request)
    }
}
