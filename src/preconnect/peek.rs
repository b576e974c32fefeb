use std::any::Any;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use futures_util::future::{Either, select};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};
use tower_service::Service;

use super::detect::{Detection, HTTP2_PREFACE};
use super::time::Times;
use crate::connection::{Connection, Rewind, not_a_layer};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::BoxError;

/// The error of a [`Peek`] that did not detect the protocol: its detector returned `No`, or still
/// had no verdict after the [maximum number of bytes](Peek::bytes).
#[derive(Clone, Copy, Debug, Error)]
#[error("the first bytes are of no known protocol")]
pub struct UnknownProtocol;

/// The policy of a [`Peek`] for a connection whose protocol is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unknown {
    /// Ends the connection.
    #[default]
    Refuse,
    /// Passes the connection to the service, without adding a fact about its protocol. If the peer
    /// waits for the server to send first, the connection is passed on only when the
    /// [`Peek::deadline`] is over.
    Pass,
}

/// A hook that detects the peer's protocol by its first bytes. The service still reads these bytes.
///
/// The hook calls a detector, such as [`Protocol::detect`](super::Protocol::detect), with all bytes
/// received so far, until the detector returns `Yes` or `No`, or until a bound in the table below
/// is reached. A `Yes` contains a fact, such as the [`Protocol`](super::Protocol). The hook adds
/// this fact to the connection, and [`ConnectionInfo::get`](crate::ConnectionInfo::get) returns it
/// by its type. The hook works on any stream: TCP, Unix sockets, TLS, in-memory streams. The first
/// bytes are added to the connection's count of received bytes when the service reads them.
///
/// | bound | default | why |
/// | --- | --- | --- |
/// | [`bytes`](Self::bytes) | 24 | the length of the HTTP/2 preface, the longest input that `Protocol::detect` needs |
/// | [`deadline`](Self::deadline) | 5 s | half of the [`PreConnectLayer`](super::PreConnectLayer)'s deadline, leaving the other half for TLS |
///
/// With [`Unknown::Refuse`], a connection whose protocol is unknown ends. The reason is
///
/// - [`Rejected`](EndReason::Rejected), with [`UnknownProtocol`] as the error, if the detector
///   returned `No`, or if `bytes` bytes were read without a verdict;
/// - [`PreConnectTimeout`](EndReason::PreConnectTimeout) if the hook's `deadline` passed;
/// - [`PeerClosed`](EndReason::PeerClosed) if the peer closed before its first byte;
/// - [`Truncated`](EndReason::Truncated) if the peer closed later, before a verdict.
///
/// With [`Unknown::Pass`], the connection continues in all four cases. An I/O error always ends the
/// connection.
///
/// `PROTOCOLS.md` ([`protocols`](crate::protocols)) compares this hook with other ways to serve
/// several protocols.
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
    /// Creates the hook with a detector. The hook refuses connections whose protocol is unknown,
    /// unless [`unknown`](Self::unknown) changes that.
    pub fn new(detect: D) -> Self {
        Self {
            detect,
            bytes: HTTP2_PREFACE.len(),
            deadline: Some(Duration::from_secs(5)),
            unknown: Unknown::default(),
        }
    }

    /// Sets the maximum number of bytes to read before a verdict. `0` counts as 1.
    ///
    /// Default: 24. Why: `Protocol::detect` never needs more. When reached without a verdict: the
    /// protocol is unknown.
    #[must_use]
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes.max(1);
        self
    }

    /// Sets the maximum time until a verdict. With `None` only the [layer's
    /// deadline](super::PreConnectLayer::deadline) applies, which ends the connection even with
    /// [`Unknown::Pass`].
    ///
    /// Default: 5 s. Why: it leaves half of the layer's deadline for TLS. When reached: the
    /// protocol is unknown.
    ///
    /// With [`Unknown::Pass`], a peer that expects the server to send first gets its greeting only
    /// after this time. For such a peer one second is already a long wait. On a slow network,
    /// however, the first bytes of other peers may take longer than one second.
    #[must_use]
    pub fn deadline(mut self, deadline: impl Into<Option<Duration>>) -> Self {
        self.deadline = deadline.into();
        self
    }

    /// Sets the policy for connections whose protocol is unknown. Default: [`Unknown::Refuse`].
    #[must_use]
    pub fn unknown(mut self, unknown: Unknown) -> Self {
        self.unknown = unknown;
        self
    }
}

not_a_layer!(Peek<D>, D);

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
            let life = Arc::clone(conn.life());
            let found = {
                let times = Times {
                    deadline,
                    drain: None,
                };
                // This reads from the stream directly and bypasses the connection's byte counter,
                // because the bytes are counted when the service reads them.
                let reading = find(conn.get_mut(), &mut first, bytes, detect);
                let elapsed = times.elapsed(&life);
                // The read is polled first, so that a verdict in time counts even if the task was
                // polled late.
                match select(std::pin::pin!(reading), std::pin::pin!(elapsed)).await {
                    Either::Left((found, _)) => found.map_err(ended_by)?,
                    Either::Right((ended, _)) => Err(ended),
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
    ConnectionEnded::new(reason, err)
}

/// Reads until the detector decides, `bytes` bytes have arrived, or the stream ends. If the
/// protocol is not detected, the inner result is the error with which a hook that refuses unknown
/// protocols ends the connection.
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
    Ok(Err(ConnectionEnded::new(EndReason::Rejected, unknown)))
}
