//! Sessions: the state of one connection, with an async method that answers requests.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio_util::sync::ReusableBoxFuture;
use tower_service::Service;

/// The state of one connection, with a method that answers requests. The method takes `&mut self`,
/// so the state needs no lock.
///
/// [`SessionService`] makes a Tower service from a session. `E` is a request, or an
/// [`Event`](super::Event) if the session also takes messages.
///
/// Write [`call`](Self::call) as an `async fn`; its future must be `Send`. The session is dropped
/// when its connection begins to close or is upgraded, so put work for that moment into the
/// session's `Drop`. A task spawned in `Drop` gets the reason from
/// [`Peer::closing`](super::Peer::closing), as the `chat` example shows.
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use tower::service_fn;
/// use tower_tcp::frame::Lines;
/// use tower_tcp::pipeline::{Session, SessionService};
/// use tower_tcp::{BoxError, Peer, Pipeline};
///
/// struct Counter {
///     peer: Peer<Bytes>,
///     lines: u32,
/// }
///
/// impl Session<Bytes> for Counter {
///     type Reply = Bytes;
///     type Error = BoxError;
///
///     async fn call(&mut self, _line: Bytes) -> Result<Bytes, BoxError> {
///         self.lines += 1;
///         if self.lines % 10 == 0 {
///             self.peer.send("ten more".into()).await?;
///         }
///         Ok(self.lines.to_string().into())
///     }
/// }
///
/// let make = service_fn(|peer: Peer<Bytes>| async move {
///     Ok::<_, Infallible>(SessionService::new(Counter { peer, lines: 0 }))
/// });
/// let pipeline = Pipeline::new(Lines::default).make_service(make);
/// # drop(pipeline);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no session of `{E}`",
    label = "implement `Session<{E}>` for it",
    note = "a service that takes messages, too, is a `Session<Event<R, M>>`"
)]
pub trait Session<E>: Send + 'static {
    /// The reply to a request or message. In a pipeline it is any type that is `Into<Reply<T>>`, or
    /// `Into<Upgrade<T>>` if the pipeline has [`on_upgrade`](super::Pipeline::on_upgrade).
    type Reply;
    /// The error of a call that failed.
    type Error;

    /// Answers one request or message. The next call begins when this one is done or dropped.
    ///
    /// # Cancel safety
    ///
    /// A layer may drop the call before it is done, as tower's `Timeout` does. The call then ends
    /// at its current `.await`. The next call begins with the session as it was at that point. So
    /// put no `.await` between changes that belong together.
    fn call(&mut self, event: E) -> impl Future<Output = Result<Self::Reply, Self::Error>> + Send;
}

/// Adapts a [`Session`] to a Tower service of requests, or of [`Event`](super::Event)s.
///
/// A make-service returns it, either as it is or wrapped in layers for requests:
///
/// ```
/// # use std::{convert::Infallible, time::Duration};
/// # use bytes::Bytes;
/// # use tower::{ServiceBuilder, service_fn};
/// # use tower_tcp::{Peer, Pipeline, frame::Lines, pipeline::{Session, SessionService}};
/// # struct Counter(u32);
/// # impl Session<Bytes> for Counter {
/// #     type Reply = Bytes;
/// #     type Error = Infallible;
/// #     async fn call(&mut self, line: Bytes) -> Result<Bytes, Infallible> { Ok(line) }
/// # }
/// let make = service_fn(|_: Peer<Bytes>| async move {
///     Ok::<_, Infallible>(
///         ServiceBuilder::new()
///             .timeout(Duration::from_secs(5))
///             .service(SessionService::new(Counter(0))),
///     )
/// });
/// # drop(Pipeline::new(Lines::default).make_service(make));
/// ```
///
/// A `SessionService` is ready when no call runs, so its calls never overlap. Even
/// [`in_flight`](super::Pipeline::in_flight) and [`multiplexed`](super::Pipeline::multiplexed) run
/// them one after the other, in the order of the requests. A `SessionService` is not `Clone`, so it
/// cannot be used with code that clones services, such as `Retry` or
/// [`PipelineBuilder::service`](super::PipelineBuilder::service).
///
/// If a call is dropped midway, the next call begins with the session in its state at that point
/// (see [`Session::call`]). A panic in a call ends the connection, unless a layer catches the
/// panic. After a caught panic, the next call begins with the session in its state at the panic.
///
/// The first call allocates memory, and so does a call after one that was dropped or that panicked.
/// If the pipeline runs several requests at the same time, `poll_ready` also allocates when it must
/// wait for a running call. All other calls reuse the memory of the previous call, and cost about
/// 370 instructions (measured with callgrind on x86-64, in an optimized build). For comparison, a
/// call of a closure that locks a `tokio::sync::Mutex` in an `Arc` costs about 290. A service that
/// never waits needs neither a session nor a lock: implement `Service` with a `Ready` future.
pub struct SessionService<S: Session<E>, E> {
    state: Arc<Mutex<State<S, E>>>,
    /// The guard of the state. `poll_ready` stores it here for the next call.
    ready: Option<Guard<S, E>>,
    /// The future with which `poll_ready` waits for a running call to end.
    waiting: Option<ReusableBoxFuture<'static, Guard<S, E>>>,
}

struct State<S: Session<E>, E> {
    session: S,
    /// The last call, once it is done. Its memory is reused for the next one.
    done: Option<Call<S, E>>,
}

type Guard<S, E> = OwnedMutexGuard<State<S, E>>;
type Answer<S, E> = Result<<S as Session<E>>::Reply, <S as Session<E>>::Error>;
/// The future of a call, in memory that later calls reuse. Its output is the result, and the guard
/// through which [`SessionFuture`] stores that memory in the state.
type Call<S, E> = ReusableBoxFuture<'static, (Answer<S, E>, Guard<S, E>)>;

impl<S: Session<E>, E> SessionService<S, E> {
    /// Creates the service.
    pub fn new(session: S) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                session,
                done: None,
            })),
            ready: None,
            waiting: None,
        }
    }
}

impl<S, E> Service<E> for SessionService<S, E>
where
    S: Session<E>,
    E: Send + 'static,
{
    type Response = S::Reply;
    type Error = S::Error;
    type Future = SessionFuture<S, E>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        if self.ready.is_none() {
            let free = match self.waiting {
                None => Arc::clone(&self.state).try_lock_owned().ok(),
                Some(_) => None,
            };
            let guard = match free {
                Some(guard) => guard,
                None => {
                    let state = &self.state;
                    let wait = || ReusableBoxFuture::new(Arc::clone(state).lock_owned());
                    ready!(self.waiting.get_or_insert_with(wait).poll(cx))
                }
            };
            self.waiting = None;
            self.ready = Some(guard);
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, event: E) -> SessionFuture<S, E> {
        let mut ready = self.ready.take();
        let done = ready.as_mut().and_then(|state| state.done.take());
        // If the caller has not called `poll_ready`, the call itself waits until the session is
        // free.
        let ready = ready.ok_or_else(|| Arc::clone(&self.state));
        let call = async move {
            let mut state = match ready {
                Ok(state) => state,
                Err(state) => state.lock_owned().await,
            };
            let answer = state.session.call(event).await;
            (answer, state)
        };
        let call = match done {
            Some(mut done) => {
                done.set(call);
                done
            }
            None => ReusableBoxFuture::new(call),
        };
        SessionFuture { call: Some(call) }
    }
}

impl<S: Session<E>, E> fmt::Debug for SessionService<S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionService").finish_non_exhaustive()
    }
}

/// The future of [`SessionService`]: one call. Dropping it ends the call, so the next call can
/// begin.
#[must_use = "futures do nothing unless polled"]
pub struct SessionFuture<S: Session<E>, E> {
    /// The call, until it is done.
    call: Option<Call<S, E>>,
}

impl<S: Session<E>, E> Future for SessionFuture<S, E> {
    type Output = Result<S::Reply, S::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(call) = &mut self.call else {
            return Poll::Pending;
        };
        let (answer, mut state) = ready!(call.poll(cx));
        state.done = self.call.take();
        Poll::Ready(answer)
    }
}

impl<S: Session<E>, E> fmt::Debug for SessionFuture<S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionFuture").finish_non_exhaustive()
    }
}
