//! The harness that serves a stack in memory keeps its promises.

mod support;

use std::convert::Infallible;
use std::future::pending;
use std::io::ErrorKind;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::poll;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tower::{Service, service_fn};
use tower_tcp::admit::ConnectionLimit;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::{self, serve, serve_with};
use tower_tcp::{Connection, EndReason, Error, Pipeline, Server};

use support::{Clients, settled};

async fn echo(line: Bytes) -> Result<Bytes, Infallible> {
    Ok(line)
}

/// A connection service that holds each connection until an abort.
async fn hold<Io>(conn: Connection<Io>) -> Result<(), Infallible> {
    let _held = conn;
    pending().await
}

#[tokio::test(start_paused = true)]
async fn ends_are_taken_in_the_order_they_happened_in() {
    let served = serve(Pipeline::new(|| Lines::default().max_line(8)).service(service_fn(echo)));
    let (good, mut bad) = (served.stream().await, served.stream().await);
    assert!(served.ends().is_empty());
    drop(good);
    settled().await;
    bad.write_all(b"much too long\n").await.unwrap();
    drop(bad);
    settled().await;

    let both = [EndReason::PeerClosed, EndReason::FrameTooLarge];
    assert_eq!(served.reasons(), both);
    assert_eq!(served.ends().len(), 2);
    assert_eq!(served.ended().await.unwrap().reason(), both[0]);
    assert_eq!(served.reasons(), both[1..]);
    assert_eq!(served.ended().await.unwrap().reason(), both[1]);
    assert!(served.ends().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_an_end_that_is_dropped_takes_none() {
    let served = serve(service_fn(hold));
    let client = served.stream().await;
    settled().await;
    {
        let mut wait = pin!(served.ended());
        assert!(poll!(&mut wait).is_pending());
        served.handle().connections().for_each(|live| live.abort());
        settled().await;
        assert_eq!(served.ends().len(), 1);
    }

    assert_eq!(served.ended().await.unwrap().reason(), EndReason::Aborted);
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn two_that_wait_have_an_end_each() {
    let served = serve(service_fn(hold));
    let _clients = [served.stream().await, served.stream().await];
    settled().await;

    let aborts = async {
        settled().await;
        served.handle().connections().for_each(|live| live.abort());
    };
    let (one, other, ()) = tokio::join!(served.ended(), served.ended(), aborts);

    assert!(one.is_ok() && other.is_ok());
    assert!(served.ends().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_an_end_that_never_comes_ends_a_day_later() {
    let served = serve(service_fn(hold));
    let _client = served.stream().await;
    let begun = Instant::now();

    let err = served.ended().await.unwrap_err();

    assert_eq!(err.kind(), ErrorKind::TimedOut);
    assert_eq!(begun.elapsed(), Duration::from_secs(24 * 3600));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_has_ended_has_no_further_ends() {
    let mut served = serve(service_fn(hold));
    let _client = served.stream().await;
    settled().await;

    assert_eq!(served.shutdown().await.unwrap().aborted, 1);

    assert_eq!(
        served.ended().await.unwrap().reason(),
        EndReason::DrainDeadline
    );
    assert_eq!(
        served.ended().await.unwrap_err().kind(),
        ErrorKind::UnexpectedEof
    );
    let refused = served.connect().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[tokio::test(start_paused = true)]
async fn dropping_it_closes_the_listener_and_cuts_connections_off() {
    let served = serve(service_fn(hold));
    let handle = served.handle().clone();
    let connector = served.connector().clone();
    let mut client = served.stream().await;
    settled().await;
    assert_eq!(handle.live(), 1);

    drop(served);

    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(handle.closed().await.aborted, 1);
    assert!(connector.connect().await.is_err());
}

/// Fails in `poll_ready`.
#[derive(Clone)]
struct Dead;

impl<Request> Service<Request> for Dead {
    type Response = ();
    type Error = &'static str;
    type Future = std::future::Ready<Result<(), Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Err("as asked"))
    }

    fn call(&mut self, _: Request) -> Self::Future {
        std::future::ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_server_is_returned_once_and_its_report_always() {
    let mut served = serve(Dead);
    // The server calls `poll_ready` only once a client is there.
    let _client = served.stream().await;

    assert!(matches!(served.closed().await, Err(Error::Service(_))));
    assert_eq!(
        served.closed().await.unwrap(),
        served.handle().closed().await
    );
    assert_eq!(
        served.ended().await.unwrap_err().kind(),
        ErrorKind::UnexpectedEof
    );
}

#[tokio::test(start_paused = true)]
async fn a_server_with_options_keeps_them_and_its_connector() {
    let (listener, connector) = testkit::memory_with_buffer(1);
    let limit = ConnectionLimit::new(1);
    let server = Server::builder()
        .name("one")
        .limit(limit.clone())
        .build(listener);
    let served = serve_with(server, connector, service_fn(hold));
    let mut client = served.stream().await;
    let _waiting = served.stream().await;
    settled().await;

    assert_eq!(served.handle().name(), Some("one"));
    assert_eq!((served.handle().live(), limit.in_use()), (1, 1));
    // The buffer has room for one of the two bytes.
    assert_eq!(client.write(b"ab").await.unwrap(), 1);
}

#[tokio::test]
async fn a_server_on_a_real_socket_reports_its_ends_too() {
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let mut served = serve_with(
        server,
        (),
        Pipeline::new(Lines::default).service(service_fn(echo)),
    );
    let addr = served.handle().local_addrs()[0].tcp().unwrap();
    drop(TcpStream::connect(addr).await.unwrap());

    let end = tokio::time::timeout(Duration::from_secs(60), served.ended())
        .await
        .unwrap();

    assert_eq!(end.unwrap().reason(), EndReason::PeerClosed);
    assert_eq!(served.shutdown().await.unwrap().drained, 0);
}

#[tokio::test(start_paused = true)]
async fn a_buffer_of_no_bytes_counts_as_one_of_one_byte() {
    let (listener, connector) = testkit::memory_with_buffer(0);
    let echo = Pipeline::new(Lines::default).service(service_fn(echo));
    let served = serve_with(Server::from_listener(listener), connector, echo);
    let mut client = served.connect().await.unwrap();
    let mut reply = [0; 3];

    client.write_all(b"hi\n").await.unwrap();
    client.read_exact(&mut reply).await.unwrap();

    assert_eq!(&reply, b"hi\n");
}
