//! Deadlines of raw connection services: for peers that are silent or idle or do not read, and for
//! old connections.

#[path = "support/certificates.rs"]
mod certificates;
mod support;

use std::future::pending;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use certificates::certified;
use support::{Client, Clients, Ends};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::{Layer, ServiceBuilder, service_fn};
use tower_tcp::bind::Socket;
use tower_tcp::deadline::{DeadlineLayer, Deadlines, DrainDeadlines};
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::Upgrade;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{serve, serve_with};
use tower_tcp::tls::Tls;
use tower_tcp::{BoxError, Connection, EndReason, Pipeline, Reply, Server};

const SECOND: Duration = Duration::from_secs(1);

async fn echo<Io>(mut conn: Connection<Io>) -> Result<(), BoxError>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let mut block = [0; 1024];
    loop {
        match conn.read(&mut block).await? {
            0 => return Ok(()),
            n => conn.write_all(&block[..n]).await?,
        }
    }
}

fn layer(deadlines: Deadlines) -> DeadlineLayer {
    DeadlineLayer::new(deadlines)
}

#[tokio::test(start_paused = true)]
async fn a_silent_raw_connection_ends_after_a_minute() {
    let served = serve(layer(Deadlines::default()).layer(service_fn(echo)));
    let mut client = served.client().await;
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());

    assert_eq!(begun.elapsed(), 60 * SECOND);
    drop(client);
    assert_eq!(served.reason().await, EndReason::FirstByteTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_raw_connection_rests_for_75_seconds_after_its_last_byte() {
    let served = serve(layer(Deadlines::default()).layer(service_fn(echo)));
    let mut client = served.client().await;
    for _ in 0..3 {
        sleep(50 * SECOND).await;
        client.send("a\n").await;
        assert_eq!(client.line().await, "a");
    }
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());

    assert_eq!(begun.elapsed(), 75 * SECOND);
    drop(client);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn what_is_written_keeps_a_raw_connection() {
    let ticks = service_fn(|mut conn: Connection<DuplexStream>| async move {
        loop {
            conn.write_all(b"tick\n").await?;
            sleep(50 * SECOND).await;
            if false {
                return Ok::<_, BoxError>(());
            }
        }
    });
    let served = serve(layer(Deadlines::default()).layer(ticks));
    let mut client = served.client().await;

    for _ in 0..10 {
        assert_eq!(client.line().await, "tick");
    }
}

#[tokio::test(start_paused = true)]
async fn a_raw_connection_whose_peer_takes_nothing_is_cut_off() {
    let flood = service_fn(|mut conn: Connection<DuplexStream>| async move {
        loop {
            conn.write_all(&[b'x'; 4096]).await?;
            if false {
                return Ok::<_, BoxError>(());
            }
        }
    });
    let served = serve(layer(Deadlines::default()).layer(flood));
    let client = served.client().await;
    let begun = Instant::now();

    assert_eq!(served.reason().await, EndReason::WriteTimeout);

    assert_eq!(begun.elapsed(), 30 * SECOND);
    drop(client);
}

/// The layer is not woken by what the task does.
#[tokio::test(start_paused = true)]
async fn deadlines_of_a_stream_in_another_task_end_it_a_quarter_late_at_most() {
    let one_by_one = Deadlines::default().first_byte(None).idle(None).write(None);
    for (deadlines, reply, reason) in [
        (
            one_by_one.write(20 * SECOND),
            1 << 20,
            EndReason::WriteTimeout,
        ),
        (one_by_one.idle(20 * SECOND), 1, EndReason::IdleTimeout),
    ] {
        let in_a_task = service_fn(move |mut conn: Connection<DuplexStream>| {
            tokio::spawn(async move {
                conn.write_all(&vec![b'x'; reply]).await?;
                pending::<io::Result<()>>().await
            });
            pending::<Result<(), BoxError>>()
        });
        let served = serve(layer(deadlines).layer(in_a_task));
        let client = served.client().await;
        let begun = Instant::now();

        assert_eq!(served.reason().await, reason);

        let time = begun.elapsed();
        assert!((20 * SECOND..=25 * SECOND).contains(&time), "{time:?}");
        drop(client);
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_of_a_raw_connection_is_not_cut_off() {
    let all = service_fn(|mut conn: Connection<DuplexStream>| async move {
        conn.write_all(&vec![b'x'; 1 << 20]).await?;
        Ok::<_, BoxError>(())
    });
    let served = serve(layer(Deadlines::default()).layer(all));
    let mut client = served.client().await;
    let mut read = 0;
    while read < 1 << 20 {
        sleep(20 * SECOND).await;
        let mut block = vec![0; 64 * 1024];
        read += client.0.read(&mut block).await.expect("it is written");
    }

    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn an_old_raw_connection_is_told_to_leave_and_ended_later() {
    let polite = service_fn(|mut conn: Connection<DuplexStream>| async move {
        conn.draining().await;
        conn.write_all(b"bye\n").await?;
        Ok::<_, BoxError>(())
    });
    let deadlines = Deadlines::default()
        .max_age(20 * SECOND)
        .drain(DrainDeadlines::default().stream(7 * SECOND));
    let served = serve(layer(deadlines).layer(polite));
    let mut client = served.client().await;
    let begun = Instant::now();
    assert_eq!(client.rest().await, ["bye"]);
    assert_eq!(begun.elapsed(), 20 * SECOND);
    assert_eq!(served.reason().await, EndReason::MaxAge);

    let served = serve(layer(deadlines).layer(service_fn(echo)));
    let mut client = served.client().await;
    let begun = Instant::now();
    assert!(client.rest().await.is_empty());
    assert_eq!(begun.elapsed(), 27 * SECOND);
    assert_eq!(served.reason().await, EndReason::MaxAge);
}

#[tokio::test(start_paused = true)]
async fn a_raw_service_in_a_drain_has_as_long_as_the_server_gives_it() {
    let deadlines = Deadlines::default().first_byte(None);
    let served = serve(layer(deadlines).layer(service_fn(echo)));
    let client = served.client().await;
    support::settled().await;
    let begun = Instant::now();

    served.handle().shutdown_within(100 * SECOND);

    assert_eq!(served.reason().await, EndReason::DrainDeadline);
    assert_eq!(begun.elapsed(), 100 * SECOND);
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn what_an_upgrade_hands_over_has_deadlines_by_the_layer() {
    let lines = service_fn(|line: Bytes| async move {
        Ok::<Upgrade<Bytes>, BoxError>(Reply::from(line).upgrade())
    });
    let raw = layer(Deadlines::default()).layer(service_fn(echo));
    let pipeline = Pipeline::new(Lines::default).service(lines).on_upgrade(raw);
    let served = serve(pipeline);
    let mut client = served.client().await;
    client.send("over\nraw\n").await;
    assert_eq!(
        (client.line().await, client.line().await),
        ("over".into(), "raw".into())
    );
    let begun = Instant::now();

    assert!(client.rest().await.is_empty());

    assert_eq!(begun.elapsed(), 75 * SECOND);
    drop(client);
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

#[tokio::test]
async fn a_raw_connection_that_rests_is_closed_over_tcp_and_tls() {
    let deadlines = Deadlines::default().idle(Duration::from_millis(200));
    let (server, config) = certified();
    let tls = ServiceBuilder::new()
        .layer(PreConnectLayer::new(Tls::from(server)))
        .layer(layer(deadlines))
        .service_fn(echo);
    let plain = layer(deadlines).layer(service_fn(echo::<Socket>));

    let server = Server::bind("127.0.0.1:0").await.expect("it is bound");
    let address = server.handle().local_addrs()[0].tcp().expect("it is TCP");
    let served = serve_with(server, (), plain);
    let io = TcpStream::connect(address).await.expect("it listens");
    assert_eq!(talk(io).await, "hi\n");
    assert_eq!(served.reason().await, EndReason::IdleTimeout);

    let server = Server::bind("127.0.0.1:0").await.expect("it is bound");
    let address = server.handle().local_addrs()[0].tcp().expect("it is TCP");
    let served = serve_with(server, (), tls);
    let io = TcpStream::connect(address).await.expect("it listens");
    let name = ServerName::try_from("localhost").expect("a name");
    let io = TlsConnector::from(config).connect(name, io).await;
    assert_eq!(talk(io.expect("the handshake is made")).await, "hi\n");
    assert_eq!(served.reason().await, EndReason::IdleTimeout);
}

/// Sends a line, reads it back, and waits for the end.
async fn talk<Io: AsyncRead + AsyncWrite + Unpin>(io: Io) -> String {
    let mut client = Client::new(io);
    client.send("hi\n").await;
    let mut all = Vec::new();
    let read = client.0.read_to_end(&mut all);
    // Under TLS the end is an error: only the service would send `close_notify`, and the layer has
    // dropped it.
    let _end = timeout(Duration::from_secs(60), read)
        .await
        .expect("in time");
    String::from_utf8(all).expect("it is text")
}
