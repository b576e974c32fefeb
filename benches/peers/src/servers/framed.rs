//! Sends lines back over `Framed` as tokio's documentation shows it: each reply is flushed.

mod accept;

use std::io;

use futures_util::{SinkExt, StreamExt};
use tokio_util::codec::Framed;
use tower_tcp::frame::Lines;

#[tokio::main]
async fn main() -> io::Result<()> {
    accept::serve(|stream| async {
        let mut lines = Framed::new(stream, Lines::default());
        while let Some(line) = lines.next().await {
            lines
                .send(line.map_err(io::Error::other)?)
                .await
                .map_err(io::Error::other)?;
        }
        Ok(())
    })
    .await
}
