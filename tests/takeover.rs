//! A stream is handed to another service between two frames, with what is buffered, its permit, its signals and its one end.

#[path = "support/running.rs"]
mod running;

use bytes::Bytes;
use running::{exchange, start};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::service_fn;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{Rewind, Takeover};
use tower_tcp::{BoxError, Connection, EndReason, Pipeline, Reply};

async fn line_or_raw(line: Bytes) -> Result<Takeover<Bytes>, BoxError> {
    Ok(match &*line {
        b"raw" => Reply::from(Bytes::from("go")).takeover(),
        _ => line.into(),
    })
}

#[tokio::test(start_paused = true)]
async fn what_is_behind_the_takeover_is_read_by_the_next_service() {
    let raw = service_fn(|mut conn: Connection<Rewind<running::Io>>| async move {
        let mut rest = Vec::new();
        conn.read_to_end(&mut rest).await?;
        rest.reverse();
        conn.write_all(&rest).await?;
        Ok::<_, BoxError>(())
    });
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(line_or_raw))
        .on_takeover(raw);
    let server = start(pipeline);

    let replies = exchange(server.connect().await, "a\nraw\nb\nc").await;

    assert_eq!(replies, "a\ngo\nc\nb");
    server.all_gone().await;
    assert_eq!(server.ends(), [EndReason::PeerClosed]);
}
