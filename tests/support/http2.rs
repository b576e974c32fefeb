//! A client of HTTP/2.
#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each test binary uses its own part"
)]

use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{Error, Reason, RecvStream, SendStream};
use hyper::{Request, Response};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;

/// Starts HTTP/2 with windows of some megabytes. The task runs the connection until it ends.
pub(crate) async fn http2<Io>(io: Io) -> (Sender, JoinHandle<Result<(), Error>>)
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    http2_with(io, |_| {}).await
}

/// Like [`http2`], with other settings.
pub(crate) async fn http2_with<Io>(
    io: Io,
    set: impl FnOnce(&mut Builder),
) -> (Sender, JoinHandle<Result<(), Error>>)
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(2 << 20)
        .initial_connection_window_size(5 << 20);
    set(&mut builder);
    let (sender, connection) = builder.handshake(io).await.expect("it is agreed");
    (Sender(sender), tokio::spawn(connection))
}

/// A sender of requests. The client closes its connection once this and every response and body
/// are dropped.
pub(crate) struct Sender(SendRequest<Bytes>);

impl Sender {
    /// Sends a request without a body, before the returned future is polled.
    pub(crate) fn send_request(
        &self,
        request: Request<()>,
    ) -> impl Future<Output = Result<Response<RecvStream>, Error>> + Send + use<> {
        let sent = self.begin(request, true);
        async move { sent?.0.await }
    }

    /// Sends the head of a request. Unless the request ends with it, its body is sent through the
    /// returned stream.
    pub(crate) fn begin(
        &self,
        head: Request<()>,
        ends: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), Error> {
        // `self.0` itself would refuse a second request while the first waits to be written.
        self.0.clone().send_request(head, ends)
    }

    /// Returns whether the server has sent GOAWAY with `NO_ERROR`. A connection can also end
    /// without an error when no GOAWAY was sent.
    pub(crate) async fn got_goaway(&self) -> bool {
        let refused = self.0.clone().ready().await.err();
        refused.is_some_and(|err| err.is_go_away() && err.reason() == Some(Reason::NO_ERROR))
    }
}

/// Reads a frame of a body, and opens the windows again by its length.
pub(crate) async fn frame(body: &mut RecvStream) -> Option<Result<Bytes, Error>> {
    let frame = body.data().await?;
    Some(frame.and_then(|frame| {
        body.flow_control().release_capacity(frame.len())?;
        Ok(frame)
    }))
}

/// Reads a body, as text.
pub(crate) async fn text(response: Response<RecvStream>) -> String {
    let mut body = response.into_body();
    let mut all = Vec::new();
    while let Some(frame) = frame(&mut body).await {
        all.extend(frame.expect("the body comes"));
    }
    String::from_utf8(all).expect("it is text")
}
