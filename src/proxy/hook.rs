use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};
use tower_service::Service;

use super::error::ProxyHeaderError;
use super::header::{Family, Parsed, ProxyHeader, Versions};
use super::parse::parse;
use crate::connection::{Connection, Rewind, not_a_layer};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::BoxError;
use crate::networks::Networks;

/// The maximum number of bytes to read, including data after the header. If the header itself is
/// longer, nothing after it is read. Headers of both versions are designed to fit into this size,
/// because every host must accept a TCP segment with this much data. A header with long TLVs can be
/// longer.
const FIRST_READ: usize = 536;

/// The policy of a [`ProxyProtocol`] for peers that are not trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Untrusted {
    /// Ends the connection with [`EndReason::Rejected`], without reading from it.
    #[default]
    Refuse,
    /// Serves the peer as a client that connected directly. All bytes from the peer are data, even
    /// if they look like a header.
    Direct,
}

/// A pre-connect hook that reads the PROXY header of a trusted peer. See the [module docs](super).
///
/// As a service, the hook is always ready. The future of a call reads the header. Its error is a
/// boxed [`ConnectionEnded`] with one of these reasons:
///
/// | reason | when |
/// | --- | --- |
/// | [`ProxyHeader`](EndReason::ProxyHeader) | the trusted peer sent no valid header; the cause is a [`ProxyHeaderError`] |
/// | [`Rejected`](EndReason::Rejected) | the peer is not trusted, and the policy is [`Untrusted::Refuse`]; the cause is [`ProxyHeaderError::Untrusted`] |
/// | [`PeerClosed`](EndReason::PeerClosed) | the peer closed before the first byte, as some health checks do |
/// | [`PeerReset`](EndReason::PeerReset) or another | the stream failed |
#[derive(Clone, Debug)]
pub struct ProxyProtocol {
    trusted: Arc<Networks>,
    untrusted: Untrusted,
    versions: Versions,
    max_len: usize,
}

impl ProxyProtocol {
    /// Creates the hook. Peers in these networks are trusted: they must send a header. If the
    /// header describes a TCP connection, its source address becomes the client's address.
    ///
    /// Trust only networks from which no client can connect directly. Whether the hook trusts a
    /// peer depends on [`ConnectionInfo::client_addr`](crate::ConnectionInfo::client_addr), which
    /// is the peer's address unless an earlier hook has set another address. So in a chain of two
    /// `ProxyProtocol` hooks, the second one checks the address from the first header.
    pub fn trusting(networks: Networks) -> Self {
        Self {
            trusted: Arc::new(networks),
            untrusted: Untrusted::default(),
            versions: Versions::default(),
            max_len: 4096,
        }
    }

    /// Sets the policy for peers that are not trusted.
    ///
    /// Default: [`Untrusted::Refuse`]. Why: clients should reach a server behind a proxy only
    /// through the proxy.
    #[must_use]
    pub fn untrusted(mut self, untrusted: Untrusted) -> Self {
        self.untrusted = untrusted;
        self
    }

    /// Sets the accepted versions.
    ///
    /// Default: [`Versions::Both`]. Why: a proxy may send either version, and the first byte of a
    /// header distinguishes them. A header of a version that is not accepted ends the connection.
    #[must_use]
    pub fn versions(mut self, versions: Versions) -> Self {
        self.versions = versions;
        self
    }

    /// Sets the maximum length of a version 2 header, in bytes, including its fixed part of 16
    /// bytes. The specification limits a version 1 header to 107 bytes.
    ///
    /// Default: 4,096. Why: usual headers have fewer than 536 bytes. The default leaves room for a
    /// client certificate or a proxy's own TLVs. Without a limit, a sender could announce up to
    /// 65,551 bytes. When reached: the connection ends as soon as the header's length field has
    /// arrived.
    #[must_use]
    pub fn max_len(mut self, bytes: usize) -> Self {
        self.max_len = bytes;
        self
    }

    /// Reads a header. Returns the header, and the bytes that were read past its end.
    async fn read<Io: AsyncRead + Unpin>(
        &self,
        io: &mut Io,
    ) -> Result<(ProxyHeader, Bytes), ConnectionEnded> {
        let mut read = BytesMut::new();
        loop {
            let at_least = match parse(&read, self.versions, self.max_len).map_err(invalid)? {
                Parsed::Complete(header, len) => {
                    return Ok((header, read.split_off(len).freeze()));
                }
                Parsed::Incomplete { at_least } => at_least,
            };
            let room = at_least.max(FIRST_READ) - read.len();
            read.reserve(room);
            let n = io.read_buf(&mut (&mut read).limit(room)).await;
            match n.map_err(failed)? {
                0 if read.is_empty() => return Err(EndReason::PeerClosed.into()),
                0 => return Err(invalid(ProxyHeaderError::Truncated)),
                _ => {}
            }
        }
    }
}

fn invalid(err: ProxyHeaderError) -> ConnectionEnded {
    ConnectionEnded::new(EndReason::ProxyHeader, err)
}

fn failed(err: io::Error) -> ConnectionEnded {
    let reason = EndReason::of_io(&err).unwrap_or(EndReason::IoError);
    ConnectionEnded::new(reason, err)
}

not_a_layer!(ProxyProtocol);

impl<Io> Service<Connection<Io>> for ProxyProtocol
where
    Io: AsyncRead + Unpin + Send + 'static,
{
    type Response = Connection<Rewind<Io>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut conn: Connection<Io>) -> Self::Future {
        if !self.trusted.contains(conn.info().client_addr()) {
            let passed = match self.untrusted {
                Untrusted::Direct => Ok(conn.map_io(|io| Rewind::new(Bytes::new(), io))),
                Untrusted::Refuse => {
                    let cause = ProxyHeaderError::Untrusted;
                    Err(ConnectionEnded::new(EndReason::Rejected, cause).into())
                }
            };
            return Box::pin(std::future::ready(passed));
        }
        let hook = self.clone();
        Box::pin(async move {
            // This reads from the stream directly and bypasses the connection's byte counter,
            // because the bytes of the header are not the client's. The bytes after the header are
            // counted when the service reads them.
            let (header, rest) = hook.read(conn.get_mut()).await?;
            if let (Family::Tcp4 | Family::Tcp6, Some(source)) = (header.family, header.source()) {
                conn.set_client_addr(source.clone());
            }
            conn.insert(header);
            Ok(conn.map_io(|io| Rewind::new(rest, io)))
        })
    }
}
