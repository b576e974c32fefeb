use std::any::Any;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use futures_util::future::{Either, select};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};
use tower_service::Service;

use super::detect::{Detection, HTTP2_PREFACE};
use super::{PreConnectElapsed, elapsed};
use crate::connection::{Connection, Rewind};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::BoxError;

/// A connection's first bytes were of no protocol that its [`Peek`] knows.
#[derive(Clone, Copy, Debug, Error)]
#[error("the first bytes are of no known protocol")]
pub struct UnknownProtocol;

/// What becomes of a connection whose protocol a [`Peek`] does not find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unknown {
    /// It ends.
    #[default]
    Refuse,
    /// It goes on without a fact, as what none of the known ones is: also a peer that waits for the server to speak first.
    Pass,
}

/// A hook that finds out which protocol the peer speaks by its first bytes, and leaves them to be read.
///
/// The detector, such as [`Protocol::detect`](super::Protocol::detect), is given all bytes so far until it says yes or no. What it finds is in
/// [`ConnectionInfo::get`](crate::ConnectionInfo::get), under its type; the stream is one from which the bytes are read again,
/// and nothing is counted as read before. This works on any stream: TCP, Unix sockets, inside of TLS, in memory.
///
/// | bound | default | why | reached, [refusing](Unknown::Refuse) |
/// | --- | --- | --- | --- |
/// | [`bytes`](Self::bytes) | 24 | the longest that `Protocol::detect` has to see: the preface of HTTP/2 | [`Rejected`](EndReason::Rejected), with [`UnknownProtocol`] |
/// | [`deadline`](Self::deadline) | 5 s | half of [the layer's](super::PreConnectLayer::deadline): who is let pass has as long again for TLS | [`PreConnectTimeout`](EndReason::PreConnectTimeout) |
///
/// `PROTOCOLS.md` ([`protocols`](crate::protocols)) says when this is the way to tell protocols apart, and what goes with it.
///
/// A peer that leaves without a byte has ended with [`PeerClosed`](EndReason::PeerClosed), one that leaves undecided with
/// [`Truncated`](EndReason::Truncated).
///
/// ```
/// use std::convert::Infallible;
/// use bytes::Bytes;
/// use tokio::net::TcpStream;
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
/// use tower_tcp::bind::Socket;
/// use tower_tcp::preconnect::{Peek, PreConnectLayer, Protocol, Unknown};
/// use tower_tcp::{BoxError, Connection, Pipeline, Rewind, frame::Lines};
///
/// let echo = Pipeline::new(Lines::default)
///     .service(service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) }));
/// let web = service_fn(|conn: Connection<Rewind<Socket>>| async move {
///     Ok::<_, BoxError>(drop(conn)) // yours
/// });
/// let stack = ServiceBuilder::new()
///     .layer(PreConnectLayer::new(Peek::new(Protocol::detect).unknown(Unknown::Pass)))
///     .service_fn(move |conn: Connection<Rewind<Socket>>| {
///         let (echo, web) = (echo.clone(), web.clone());
///         async move {
///             match conn.info().get::<Protocol>() {
///                 Some(Protocol::Http1 | Protocol::Http2) => web.oneshot(conn).await,
///                 _ => echo.oneshot(conn).await.map(drop),
///             }
///         }
///     });
/// # drop(stack);
/// ```
#[derive(Clone)]
pub struct Peek<D> {
    detect: D,
    bytes: usize,
    deadline: Option<Duration>,
    unknown: Unknown,
}

impl<D> Peek<D> {
    /// Makes the hook. It refuses what `detect` does not know.
    pub fn new(detect: D) -> Self {
        Self {
            detect,
            bytes: HTTP2_PREFACE.len(),
            deadline: Some(Duration::from_secs(5)),
            unknown: Unknown::default(),
        }
    }

    /// Sets how many bytes are read at most before the detector has decided. Default 24. `0` counts as 1.
    ///
    /// With that many undecided, the protocol is unknown.
    #[must_use]
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes.max(1);
        self
    }

    /// Sets how long the peer may take until the detector has decided. Default 5 s. `None` leaves it to the
    /// [layer's deadline](super::PreConnectLayer::deadline), which refuses.
    ///
    /// After that time the protocol is unknown. Where silent peers pass, because they wait for the server to speak first, it is how long
    /// all of these wait for their greeting: a second is much, and little for a slow network.
    #[must_use]
    pub fn deadline(mut self, deadline: impl Into<Option<Duration>>) -> Self {
        self.deadline = deadline.into();
        self
    }

    /// Sets what becomes of a connection whose protocol is not found. Default [`Unknown::Refuse`].
    #[must_use]
    pub fn unknown(mut self, unknown: Unknown) -> Self {
        self.unknown = unknown;
        self
    }
}

impl<D> fmt::Debug for Peek<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peek")
            .field("bytes", &self.bytes)
            .field("deadline", &self.deadline)
            .field("unknown", &self.unknown)
            .finish_non_exhaustive()
    }
}

impl<Io, D, F> Service<Connection<Io>> for Peek<D>
where
    Io: AsyncRead + Unpin + Send + 'static,
    D: Fn(&[u8]) -> Detection<F> + Clone + Send + 'static,
    F: Any + Send + Sync,
{
    type Response = Connection<Rewind<Io>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut conn: Connection<Io>) -> Self::Future {
        let Self {
            detect,
            bytes,
            deadline,
            unknown,
        } = self.clone();
        Box::pin(async move {
            let mut first = BytesMut::new();
            let found = {
                // From the bare stream: what is read again is counted then.
                let reading = find(conn.get_mut(), &mut first, bytes, detect);
                // What was decided in time is not failed because the task was polled late.
                match select(std::pin::pin!(reading), std::pin::pin!(elapsed(deadline))).await {
                    Either::Left((found, _)) => found.map_err(ended_by)?,
                    Either::Right((limit, _)) => Err(PreConnectElapsed(limit).ended()),
                }
            };
            match found {
                Ok(fact) => conn.insert(fact),
                Err(ended) if unknown == Unknown::Refuse => return Err(ended.into()),
                Err(_passes) => {}
            }
            Ok(conn.map_io(|io| Rewind::new(first.freeze(), io)))
        })
    }
}

fn ended_by(err: io::Error) -> ConnectionEnded {
    let reason = EndReason::of_io(&err).unwrap_or(EndReason::IoError);
    ConnectionEnded::caused(reason, err)
}

/// Reads until the detector has decided. The inner error is what a connection ends with that is not let pass.
async fn find<Io: AsyncRead + Unpin, F>(
    io: &mut Io,
    first: &mut BytesMut,
    bytes: usize,
    detect: impl Fn(&[u8]) -> Detection<F>,
) -> io::Result<Result<F, ConnectionEnded>> {
    while first.len() < bytes {
        let room = bytes - first.len();
        match io.read_buf(&mut first.limit(room)).await? {
            0 if first.is_empty() => return Ok(Err(EndReason::PeerClosed.into())),
            0 => return Ok(Err(EndReason::Truncated.into())),
            _ => {}
        }
        match detect(first) {
            Detection::Yes(fact) => return Ok(Ok(fact)),
            Detection::NotYet => {}
            Detection::No => break,
        }
    }
    let unknown = BoxError::from(UnknownProtocol);
    Ok(Err(ConnectionEnded::caused(EndReason::Rejected, unknown)))
}
