//! Performs a handshake: reads the client's hello, takes the current configuration, and completes
//! the handshake.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_rustls::rustls::AlertDescription;
use tokio_rustls::rustls::server::{Accepted, Acceptor, UnbufferedServerConnection};

use super::current::Current;
use super::error::UnknownServerName;
use super::info::TlsInfo;
use super::records::Records;
use super::stream::{TlsStream, invalid};

/// The maximum number of bytes to read at once while the hello is incomplete. A hello is usually
/// smaller than 2 KiB.
const HELLO: usize = 4 * 1024;

/// The maximum time for which input is read and discarded after a failed handshake, so that the
/// peer receives the alert.
const ALERT_LINGER: Duration = Duration::from_millis(200);
/// The maximum number of bytes to read and discard after a failed handshake.
const ALERT_LINGER_BYTES: u64 = 16 * 1024;

/// Performs the handshake with the configuration that is current when the hello is complete.
///
/// An error is returned together with the stream, so that the caller can make sure that the peer
/// receives the alert.
pub(super) async fn accept<Io>(
    current: &Current,
    mut io: Io,
) -> Result<(TlsStream<Io>, TlsInfo), (io::Error, Io)>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut input = Vec::new();
    let hello = match hello(&mut io, &mut input).await {
        Ok(hello) => hello,
        Err(err) => return Err((err, io)),
    };
    let configuration = current.get();
    if let Some(names) = configuration.names
        && let Err(unknown) = names.check(&hello.client_hello())
    {
        drop(hello);
        return Err((refuse(unknown, &mut io).await, io));
    }
    let name = hello.client_hello().server_name().map(Box::from);
    drop(hello);
    let session = match UnbufferedServerConnection::new(configuration.server) {
        Ok(session) => session,
        Err(err) => return Err((invalid(err), io)),
    };
    let mut stream = TlsStream::new(io, Records::new(session));
    // The session parses the hello again, because rustls cannot create an unbuffered session from a
    // parsed hello.
    stream.receive(&mut input);
    drop(input);
    match complete(&mut stream).await {
        Ok(()) => {
            let info = TlsInfo::new(stream.get_ref().1, name);
            Ok((stream, info))
        }
        Err(err) => Err((err, stream.into_io())),
    }
}

/// Reads the client's hello. Appends to `input` everything that was read.
async fn hello<Io>(io: &mut Io, input: &mut Vec<u8>) -> io::Result<Accepted>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut acceptor = Acceptor::default();
    loop {
        let start = input.len();
        input.reserve(HELLO);
        if (&mut *io).take(HELLO as u64).read_buf(input).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // rustls takes only as much as its buffer has room for, which may be less than all.
        let mut more = &input[start..];
        while !more.is_empty() {
            acceptor.read_tls(&mut more)?;
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(hello)) => return Ok(hello),
                Err((err, mut alert)) => {
                    let mut encoded = Vec::new();
                    alert.write_all(&mut encoded)?;
                    io.write_all(&encoded).await?;
                    return Err(invalid(err));
                }
            }
        }
    }
}

/// Completes the handshake after the hello.
///
/// A TLS 1.3 server writes session tickets at the end of the handshake. On a Unix socket or a pipe
/// this write fails if the peer has closed, although the peer's request may already have arrived.
/// So after a failed write, the handshake continues, but all output is discarded. It completes if
/// all remaining handshake messages of the peer have already arrived. Otherwise it ends with the
/// error of the write.
async fn complete<Io>(stream: &mut TlsStream<Io>) -> io::Result<()>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut failed_write = None;
    let completed = poll_fn(|cx| {
        loop {
            let mut sent = Poll::Ready(());
            if failed_write.is_none() {
                match Pin::new(&mut *stream).poll_flush(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(err)) => failed_write = Some(err),
                    Poll::Pending => sent = Poll::Pending,
                }
            }
            if failed_write.is_some() {
                stream.discard_output();
            }
            // If the handshake has failed, the flush above has sent the alert, unless a write has
            // failed or the stream could not take the alert at once.
            if let Some(err) = stream.failed() {
                return Poll::Ready(Err(err));
            }
            if !stream.get_ref().1.is_handshaking() {
                return sent.map(Ok);
            }
            // Input is read even while output is pending, because a peer may send before it reads
            // the rest of the output.
            let Poll::Ready(more) = stream.poll_receive(cx, &mut ReadBuf::new(&mut [])) else {
                // After a failed write there is no use in waiting for input: the peer cannot answer
                // messages that it did not get.
                return failed_write
                    .take()
                    .map_or(Poll::Pending, |err| Poll::Ready(Err(err)));
            };
            if !more? {
                let early = "the peer ended the stream in its handshake";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, early)));
            }
        }
    })
    .await;
    // If a write has failed, the error of that write is returned, because any later error is a
    // consequence of the failed write.
    completed.map_err(|err| failed_write.unwrap_or(err))
}

/// Sends the alert for an unknown or absent server name. Returns the error of the handshake.
///
/// This crate writes the alert itself, because rustls would send `access_denied`. At this point of
/// a handshake, alerts are not encrypted in any version of TLS.
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
    // A record of type alert, version 3.3 and length 2. Its content is the level (fatal) and the
    // description.
    let alert = [0x15, 3, 3, 0, 2, 2, u8::from(description)];
    match io.write_all(&alert).await {
        Ok(()) => io::Error::new(io::ErrorKind::InvalidData, unknown),
        Err(err) => err,
    }
}

/// Closes a stream to which an alert was written.
///
/// Closing a TCP socket with unread input sends a reset, which can destroy the alert before the
/// peer reads it. A peer that does not speak TLS has often sent more than was read. So this
/// function first shuts down writing, and then reads and discards some input.
pub(super) async fn deliver_alert<Io: AsyncRead + AsyncWrite + Unpin>(mut io: Io) {
    let ending = async {
        io.shutdown().await?;
        tokio::io::copy(&mut io.take(ALERT_LINGER_BYTES), &mut tokio::io::sink()).await
    };
    // The result does not matter: the stream is dropped next, and the error of the handshake is
    // reported.
    _ = tokio::time::timeout(ALERT_LINGER, ending).await;
}
