//! Sends lines back over `Framed`, tuned by hand: it flushes only when no further line has arrived.

mod accept;

use std::io;

use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_util::codec::Framed;
use tower_tcp::frame::{Lines, LinesError};

#[tokio::main]
async fn main() -> io::Result<()> {
    accept::serve(|stream| async { echo(stream).await.map_err(io::Error::other) }).await
}

async fn echo(stream: TcpStream) -> Result<(), LinesError> {
    let mut lines = Framed::new(stream, Lines::default());
    loop {
        let next = match lines.next().now_or_never() {
            Some(next) => next,
            None => {
                lines.flush().await?;
                lines.next().await
            }
        };
        let Some(line) = next else { return Ok(()) };
        lines.feed(line?).await?;
    }
}
