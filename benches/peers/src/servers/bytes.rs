//! Lines back by hand, with no library between them and the socket: one read and one write a wake-up. Nothing that tells
//! lines apart costs less, which is why the others are compared to it.

mod accept;

use std::io;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::main]
async fn main() -> io::Result<()> {
    accept::serve(async |mut stream| {
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
    })
    .await
}
