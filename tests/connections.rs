//! `Handle::connections` lists the open connections: their phase, their age, and what they have
//! done.

mod support;

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, DuplexStream};
use tokio::sync::Notify;
use tokio::time::sleep;
use tower::{ServiceBuilder, service_fn};
use tower_tcp::close::Linger;
use tower_tcp::frame::Lines;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{BoxError, Connection, ConnectionPhase, LiveConnection, Pipeline};

use support::{Clients, Ends, settled};

const SECOND: Duration = Duration::from_secs(1);

/// Returns the only open connection.
fn only(served: &Served) -> LiveConnection {
    let mut all = served.handle().connections();
    let one = all.next().expect("somebody is here");
    assert!(all.next().is_none(), "nobody else is here");
    one
}

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

#[tokio::test(start_paused = true)]
async fn a_live_connection_tells_what_it_has_done_so_far() {
    let served = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    let mut client = served.client().await;
    client.ask("one").await;
    client.ask("three").await;
    sleep(5 * SECOND).await;

    let live = only(&served);

    assert_eq!(live.requests(), 2);
    assert_eq!(live.bytes_read(), "one\nthree\n".len() as u64);
    assert_eq!(live.bytes_written(), "one\nthree\n".len() as u64);
    assert_eq!(live.age(), 5 * SECOND);
    assert_eq!(live.local_addr().transport(), "pipe");
}

#[tokio::test(start_paused = true)]
async fn a_connection_goes_through_its_phases() {
    let through = Arc::new(Notify::new());
    let gate = Arc::clone(&through);
    let hook = service_fn(move |conn: Connection<DuplexStream>| {
        let gate = Arc::clone(&gate);
        async move {
            gate.notified().await;
            Ok::<_, BoxError>(conn)
        }
    });
    let raw = service_fn(|mut conn: Connection<DuplexStream>| async move {
        conn.draining().await;
        conn.read_u8().await?;
        conn.close(Linger::default()).await?;
        Ok::<_, BoxError>(())
    });
    let served = serve(
        ServiceBuilder::new()
            .layer(PreConnectLayer::new(hook))
            .service(raw),
    );
    let mut client = served.client().await;
    let mut seen = Vec::new();

    settled().await;
    seen.push(only(&served).phase());
    through.notify_one();
    settled().await;
    seen.push(only(&served).phase());
    only(&served).close();
    settled().await;
    seen.push(only(&served).phase());
    client.send("x").await;
    settled().await;
    seen.push(only(&served).phase());
    drop(client);
    served.end().await;

    assert_eq!(seen, ConnectionPhase::ALL);
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_is_seen_to_close() {
    let pipeline = Pipeline::new(|| Lines::default().max_line(4)).service(service_fn(echo));
    let served = serve(pipeline);
    let mut client = served.client().await;

    // After this error the server lingers: it reads on for a while.
    client.send("too long\n").await;
    settled().await;

    assert_eq!(only(&served).phase(), ConnectionPhase::Closing);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_ended_is_no_longer_there() {
    let served = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    let client = served.client().await;
    settled().await;
    let live = only(&served);

    drop(client);
    served.end().await;
    settled().await;

    assert_eq!(served.handle().connections().count(), 0);
    assert!(served.handle().connection(live.id()).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_hooks_is_serving_from_the_start() {
    let raw = service_fn(|conn: Connection<DuplexStream>| async move {
        let _kept = conn;
        pending::<Result<(), BoxError>>().await
    });
    let served = serve(raw);
    let _client = served.client().await;

    settled().await;

    assert_eq!(only(&served).phase(), ConnectionPhase::Serving);
}
