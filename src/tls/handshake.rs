//! Performs a handshake: reads the client's hello, chooses the configuration, and completes it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::rustls::server::Acceptor;
use tokio_rustls::rustls::{AlertDescription, ServerConfig};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{Accept, LazyConfigAcceptor, StartHandshake, TlsAcceptor};

use super::current::{Configuration, Current};
use super::error::UnknownServerName;
use super::reads_on::ReadsOn;

/// The time to read from a peer after its handshake failed, so that it receives the alert.
const ALERT_LINGER: Duration = Duration::from_millis(200);
/// The maximum number of bytes to read from such a peer.
const ALERT_LINGER_BYTES: u64 = 16 * 1024;

/// The error of a handshake, and the stream, unless tokio-rustls has lost it.
type Failed<Io> = (io::Error, Option<Io>);

/// Performs the handshake with the configuration of the moment at which the hello is complete.
pub(super) async fn accept<Io>(current: &Current, io: Io) -> Result<TlsStream<Io>, Failed<Io>>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let hello = hello(io).await?;
    let (server, begun) = match begin(current.get(), hello) {
        Ok(begun) => begun,
        Err((unknown, mut io)) => return Err((refuse(unknown, &mut io).await, Some(io))),
    };
    let shaken = begun.into_fallible().await;
    let (io, session) = shaken
        .map_err(|(err, stream)| failed(err, Some(stream)))?
        .into_inner();
    // The session continues over the bare stream. This does not wait, because the session is
    // established and has nothing to write.
    let established = TlsAcceptor::from(server).accept_with(io.io, |new| *new = session);
    let established = established.into_fallible().await;
    established.map_err(|(err, io)| (err, Some(io)))
}

fn failed<Io>(err: io::Error, stream: Option<ReadsOn<Io>>) -> Failed<Io> {
    match stream {
        Some(stream) => {
            let (err, io) = stream.failed(err);
            (err, Some(io))
        }
        None => (err, None),
    }
}

async fn hello<Io>(io: Io) -> Result<StartHandshake<ReadsOn<Io>>, Failed<Io>>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut acceptor = LazyConfigAcceptor::new(Acceptor::default(), ReadsOn::new(io));
    let hello = (&mut acceptor).await;
    hello.map_err(|err| failed(err, acceptor.take_io()))
}

/// Begins the handshake, unless the configuration has no certificate for the name.
///
/// Not async, so that the hello and the handshake share their place in the future.
#[expect(clippy::type_complexity, reason = "used once")]
fn begin<Io>(
    configuration: Configuration,
    hello: StartHandshake<ReadsOn<Io>>,
) -> Result<(Arc<ServerConfig>, Accept<ReadsOn<Io>>), (UnknownServerName, Io)>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let Configuration { server, names } = configuration;
    let known = names.map_or(Ok(()), |names| names.check(&hello.client_hello()));
    match known {
        Ok(()) => Ok((Arc::clone(&server), hello.into_stream(server))),
        Err(unknown) => Err((unknown, hello.io.io)),
    }
}

/// Sends the alert for a refused name.
///
/// rustls would send `access_denied`, and has no way to choose another. A hello is answered in
/// plain text, whatever the version.
async fn refuse<Io>(unknown: UnknownServerName, io: &mut Io) -> io::Error
where
    Io: AsyncWrite + Unpin,
{
    let description = match unknown {
        // RFC 6066, section 3
        UnknownServerName::Unknown(_) => AlertDescription::UnrecognisedName,
        // RFC 8446, section 9.2
        UnknownServerName::Absent => AlertDescription::MissingExtension,
    };
    // A record of type alert, version 3.3 and length 2: fatal, and the description.
    let alert = [0x15, 3, 3, 0, 2, 2, u8::from(description)];
    match io.write_all(&alert).await {
        Ok(()) => io::Error::new(io::ErrorKind::InvalidData, unknown),
        Err(err) => err,
    }
}

/// Closes a stream to which an alert was just written.
///
/// Closing a TCP socket with unread input resets it, and a reset can overtake the alert. A peer
/// that does not speak TLS has often sent more than was read. So this shuts down writing first and
/// then reads a little.
pub(super) async fn deliver_alert<Io: AsyncRead + AsyncWrite + Unpin>(mut io: Io) {
    let ending = async {
        io.shutdown().await?;
        tokio::io::copy(&mut io.take(ALERT_LINGER_BYTES), &mut tokio::io::sink()).await
    };
    // However this ends, the stream is dropped next, and the handshake's own error is reported.
    _ = tokio::time::timeout(ALERT_LINGER, ending).await;
}
