//! Serves one connection: makes its service, runs the calls, and closes the stream or hands it
//! over.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::io::{AsyncRead, AsyncWrite};
use tower_service::Service;

use super::Pipeline;
use super::bounds::{Codec, Events, Stream};
use super::calls::Calls;
use super::dispatch::{CatchPanic, Dispatch};
use super::engine::Engine;
use super::maker::EventMaker;
use super::upgrade::Next;
use crate::connection::{Connection, Rewind};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::BoxError;
use crate::make::Maker;
use crate::signals::Signal;

impl<Io, F, C, K, S, T, D, N> Service<Connection<Io>> for Pipeline<F, K, T, D, N>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn() -> C,
    C: Codec<T, Item: Send> + Send + 'static,
    T: Send + 'static,
    K: EventMaker<T, Service = S>,
    S: Events<C::Item, K::Message, N::Answer, Response: Send, Future: Send> + Send + 'static,
    D: Dispatch<Io, C, T, K::Message, S, N::Answer>,
    N: Next<Io, T>,
{
    type Response = EndReason;
    type Error = BoxError;
    type Future = PipelineFuture;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, conn: Connection<Io>) -> PipelineFuture {
        let mut engine = Engine::new(conn, (self.codec)(), Arc::clone(&self.settings));
        let make = self.maker.maker().make(|| engine.peer());
        let next = self.next.clone();
        PipelineFuture::new(async move {
            let made = match CatchPanic::new(made(&mut engine, make, K::events)).await {
                Ok(made) => made,
                Err(panicked) => {
                    engine.panicked(panicked);
                    None
                }
            };
            if let Some(service) = made {
                let calls = Calls::new(&mut engine, service);
                if let Err(panicked) = CatchPanic::new(D::run(calls)).await {
                    engine.panicked(panicked);
                }
            }
            finish(&mut engine).await;
            if engine.is_upgraded() {
                let limit = engine.settings.deadlines.make_service;
                // Boxed, so that a connection uses memory for the next service only after an
                // upgrade.
                return Box::pin(upgrade(engine.into_rewound(), next, limit)).await;
            }
            engine.close().await
        })
    }
}

/// Makes the connection's service, and writes pushed frames meanwhile. Returns `None` if the
/// make-service fails, or if the connection must end before the service is made.
async fn made<Io, C, T, M, K, S, E>(
    engine: &mut Engine<Io, C, T, M>,
    make: impl Future<Output = Result<K, E>>,
    events: fn(K) -> S,
) -> Option<S>
where
    Io: Stream,
    C: Codec<T>,
    E: Into<BoxError>,
{
    let make = std::pin::pin!(make);
    let ended = std::future::poll_fn(|cx| engine.poll_io_beside_make(cx));
    let made = match select(make, ended).await {
        Either::Left((made, _)) => made,
        Either::Right(((), _)) => return None,
    };
    match made {
        Ok(made) => Some(events(made)),
        Err(err) => {
            engine.fail(ConnectionEnded::of(err.into(), EndReason::MakeServiceError));
            None
        }
    }
}

/// Begins to close, and writes the remaining output.
pub(super) async fn finish<Io, C, T, M>(engine: &mut Engine<Io, C, T, M>)
where
    Io: Stream,
    C: Codec<T>,
{
    engine.begin_closing();
    let finished = CatchPanic::new(std::future::poll_fn(|cx| engine.poll_flush_all(cx))).await;
    if let Err(panicked) = finished {
        // For example, the farewell's function may have panicked. Frames that are completely
        // encoded are still written.
        engine.panicked(panicked);
        std::future::poll_fn(|cx| engine.poll_flush_all(cx)).await;
    }
}

/// Waits until `next` is ready, for at most `limit`, and calls it with the stream. Returns how the
/// connection ended.
async fn upgrade<Io, T, N>(
    conn: Connection<Rewind<Io>>,
    mut next: N,
    limit: Option<Duration>,
) -> Result<EndReason, BoxError>
where
    N: Next<Io, T>,
{
    let life = Arc::clone(conn.life());
    if life.signals.is_raised(Signal::Close) {
        // The program closed the connection too late for the pipeline to handle the signal. A raw
        // service does not notice the signal to close, but it notices a drain.
        life.close_gracefully();
    }
    let ready = next.readied();
    match limit {
        Some(limit) => tokio::time::timeout(limit, ready)
            .await
            .map_err(|late| ConnectionEnded::new(EndReason::MakeServiceError, late))?,
        None => ready.await,
    }?;
    next.upgrade(conn).await?;
    Ok(life.done())
}

/// The future of [`Pipeline`]: serves one connection and closes it. Boxed once per connection.
#[must_use = "futures do nothing unless polled"]
pub struct PipelineFuture(Pin<Box<dyn Future<Output = Result<EndReason, BoxError>> + Send>>);

impl PipelineFuture {
    pub(super) fn new(
        served: impl Future<Output = Result<EndReason, BoxError>> + Send + 'static,
    ) -> Self {
        Self(Box::pin(served))
    }
}

impl fmt::Debug for PipelineFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PipelineFuture").finish_non_exhaustive()
    }
}

impl Future for PipelineFuture {
    type Output = Result<EndReason, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}
