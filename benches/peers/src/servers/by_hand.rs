//! The loop that the other servers are compared with.

use std::io;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Sends lines back: one read and one write per wake-up.
pub(crate) async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut input = BytesMut::with_capacity(8 * 1024);
    let mut output = Vec::with_capacity(8 * 1024);
    while stream.read_buf(&mut input).await? > 0 {
        while let Some(end) = memchr::memchr(b'\n', &input) {
            output.extend_from_slice(&input[..=end]);
            input.advance(end + 1);
        }
        stream.write_all(&output).await?;
        output.clear();
    }
    Ok(())
}
