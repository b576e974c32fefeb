//! Those over the limit are told before they go, within bounds.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tower::{ServiceBuilder, layer::layer_fn, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::{self, Connector};
use tower_tcp::{BoxError, Connection, EndReason, Handle, Pipeline, Server};

type Ends = mpsc::Receiver<EndReason>;

/// A server of one connection at a time that tells the others `told`, or never gets to.
fn one_at_a_time(told: Option<&'static [u8]>) -> (Connector, Handle, Ends) {
    let (listener, connector) = testkit::memory();
    let (tell, ends) = mpsc::channel(1024);
    let busy = service_fn(move |mut conn: Connection<DuplexStream>| async move {
        match told {
            Some(told) => conn.write_all(told).await?,
            None => std::future::pending().await,
        }
        conn.close(Default::default()).await?;
        Ok::<_, BoxError>(())
    });
    let echo = service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    let watch = layer_fn(move |mut inner: _| {
        let tell = tell.clone();
        service_fn(move |conn: Connection<DuplexStream>| {
            let tell = tell.clone();
            conn.on_end(move |end| tell.try_send(end.reason()).expect("room for every end"));
            tower::Service::call(&mut inner, conn)
        })
    });
    let stack = ServiceBuilder::new()
        .layer(watch)
        .layer(ConnectionLimit::new(1).layer().overflow(busy))
        .service(Pipeline::new(Lines::default).service(echo));
    let server = Server::from_listener(listener);
    let handle = server.handle();
    tokio::spawn(server.serve(stack).into_future());
    (connector, handle, ends)
}

#[tokio::test(start_paused = true)]
async fn one_over_the_limit_is_told_and_closed_while_the_other_is_served() {
    let (connector, _handle, mut ends) = one_at_a_time(Some(b"421 busy\r\n"));
    let mut inside = connector.connect().await.unwrap();
    inside.write_all(b"hi\n").await.unwrap();
    inside.read_exact(&mut [0; 3]).await.unwrap();

    let mut over = connector.connect().await.unwrap();
    let mut said = String::new();
    over.read_to_string(&mut said).await.unwrap();
    drop(over);

    assert_eq!(said, "421 busy\r\n");
    assert_eq!(ends.recv().await, Some(EndReason::LimitExceeded));
    inside.write_all(b"on\n").await.unwrap();
    inside.read_exact(&mut [0; 3]).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_word_has_a_second() {
    let (connector, _handle, mut ends) = one_at_a_time(None);
    let _inside = connector.connect().await.unwrap();
    tokio::task::yield_now().await;
    let begun = Instant::now();

    let mut over = connector.connect().await.unwrap();
    assert_eq!(over.read(&mut [0; 1]).await.unwrap(), 0);

    assert_eq!(begun.elapsed(), Duration::from_secs(1));
    assert_eq!(ends.recv().await, Some(EndReason::LimitExceeded));
}

#[tokio::test(start_paused = true)]
async fn a_flood_costs_no_more_than_its_bound() {
    let (connector, handle, _ends) = one_at_a_time(None);
    let _inside = connector.connect().await.unwrap();
    let mut over = Vec::new();

    for _ in 0..200 {
        over.push(connector.connect().await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(500)).await;

    assert_eq!(handle.live(), 1 + 64);
}
