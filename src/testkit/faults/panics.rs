//! A layer whose service panics at a chosen call.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use tower_layer::Layer;
use tower_service::Service;

/// A layer whose service panics at one call. The calls of all clones are counted together.
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use tokio::io::AsyncWriteExt;
/// use tower::ServiceBuilder;
/// use tower_tcp::testkit::{self, faults::PanicLayer};
/// use tower_tcp::{EndReason, Pipeline, frame::Lines};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> std::io::Result<()> {
/// let echo = ServiceBuilder::new()
///     .layer(PanicLayer::at_call(2))
///     .service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
/// let served = testkit::serve(Pipeline::new(Lines::default).service(echo));
///
/// served.connect().await?.write_all(b"one\ntwo\n").await?;
/// assert_eq!(served.ended().await?.reason(), EndReason::Panic);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct PanicLayer {
    at: u64,
    calls: Arc<AtomicU64>,
}

impl PanicLayer {
    /// Creates a layer whose service panics in the call with this number. The first call has the
    /// number 1.
    #[must_use]
    pub fn at_call(number: u64) -> Self {
        Self {
            at: number,
            calls: Arc::default(),
        }
    }
}

impl<S> Layer<S> for PanicLayer {
    type Service = PanicService<S>;

    fn layer(&self, inner: S) -> PanicService<S> {
        PanicService {
            inner,
            layer: self.clone(),
        }
    }
}

/// A service that panics at one call. Created by [`PanicLayer`].
#[derive(Clone, Debug)]
pub struct PanicService<S> {
    inner: S,
    layer: PanicLayer,
}

impl<S, R> Service<R> for PanicService<S>
where
    S: Service<R>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    /// # Panics
    ///
    /// Panics at the chosen call.
    fn call(&mut self, request: R) -> S::Future {
        let number = self.layer.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if number == self.layer.at {
            // `resume_unwind` does not run the panic hook, whose output would hide that of the
            // test.
            resume_unwind(Box::new("a planted panic"));
        }
        self.inner.call(request)
    }
}
