//! A test that plays the service of a whole server by hand: a mock receives the requests, and the
//! test answers them.
//!
//! Use it as a model. [`tower_test::mock`] replaces your service and [`testkit::serve`] your
//! sockets, and time is paused. So nothing here waits, and nothing depends on the machine.

use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::io::DuplexStream;
use tokio::time::sleep;
use tokio_util::codec::Framed;
use tower_tcp::frame::Lines;
use tower_tcp::testkit::{self, Served};
use tower_tcp::{EndReason, Pipeline};
use tower_test::{assert_request_eq, mock};

/// A peer. It speaks the server's own codec.
type Client = Framed<DuplexStream, Lines>;

/// The requests that reach the service. The test answers them.
type Requests = mock::Handle<Bytes, Bytes>;

/// Serves the mock to one client, two requests at a time.
async fn serve_mock() -> (Client, Requests, Served) {
    let (service, requests) = mock::pair();
    let served = testkit::serve(Pipeline::new(Lines::default).service(service).in_flight(2));
    let stream = served.connect().await.expect("the server listens");
    (Framed::new(stream, Lines::default()), requests, served)
}

/// Waits until no task can run. Only then does paused time advance.
async fn settled() {
    sleep(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_reaches_the_service_and_its_reply_the_peer() {
    let (mut client, mut requests, _served) = serve_mock().await;

    client.send("hello".into()).await.unwrap();
    assert_request_eq!(requests, "hello").send_response("hi".into());

    assert_eq!(client.next().await.unwrap().unwrap(), "hi");
}

#[tokio::test(start_paused = true)]
async fn no_request_is_taken_before_the_service_is_ready() {
    let (mut client, mut requests, _served) = serve_mock().await;
    requests.allow(0);
    client.send("too early".into()).await.unwrap();
    settled().await;
    assert!(requests.poll_request().is_pending());

    requests.allow(1);

    assert_request_eq!(requests, "too early").send_response("in time".into());
    assert_eq!(client.next().await.unwrap().unwrap(), "in time");
}

#[tokio::test(start_paused = true)]
async fn replies_keep_the_order_of_the_requests() {
    let (mut client, mut requests, _served) = serve_mock().await;
    client.send("first".into()).await.unwrap();
    client.send("second".into()).await.unwrap();
    let first = assert_request_eq!(requests, "first");
    let second = assert_request_eq!(requests, "second");

    second.send_response("2".into());
    settled().await;
    first.send_response("1".into());

    assert_eq!(client.next().await.unwrap().unwrap(), "1");
    assert_eq!(client.next().await.unwrap().unwrap(), "2");
}

#[tokio::test(start_paused = true)]
async fn an_error_ends_the_connection_behind_the_replies_before_it() {
    let (mut client, mut requests, _served) = serve_mock().await;
    client.send("first".into()).await.unwrap();
    client.send("second".into()).await.unwrap();
    let first = assert_request_eq!(requests, "first");
    let second = assert_request_eq!(requests, "second");

    second.send_error("out of paper");
    settled().await;
    first.send_response("1".into());

    assert_eq!(client.next().await.unwrap().unwrap(), "1");
    assert!(client.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_of_a_call_that_was_cut_off() {
    let (mut client, mut requests, mut served) = serve_mock().await;
    client.send("never answered".into()).await.unwrap();
    let _call = assert_request_eq!(requests, "never answered");
    assert_eq!(served.handle().live(), 1);

    served.handle().abort();
    served.closed().await.unwrap();

    assert_eq!(served.reasons(), [EndReason::Killed]);
    assert!(client.next().await.is_none());
    // All clones of the service are dropped, so no further request can come.
    assert!(matches!(requests.poll_request(), Poll::Ready(None)));
}
