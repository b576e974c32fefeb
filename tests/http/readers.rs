//! A slow reader gets all of its response, and the connection of a peer that reads nothing is
//! closed.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use h2::RecvStream;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::make::ClonePerRequest;
use tower_tcp::testkit::{Served, memory, serve, serve_with};
use tower_tcp::{EndReason, Server};

use crate::http2::{frame, http2_with};
use crate::support::{Clients, Ends};
use crate::{GET, get};

const SECOND: Duration = Duration::from_secs(1);
const LENGTH: usize = 4 << 20;
/// The smallest windows of HTTP/2.
const WINDOW: u32 = 65_535;

/// The ways in which a service hands over the same response.
#[derive(Clone, Copy, Debug)]
enum Response4M {
    Whole,
    Pieces,
}

const RESPONSES: [Response4M; 2] = [Response4M::Whole, Response4M::Pieces];

fn responding(with: Response4M) -> Http<ClonePerRequest<impl Serves>> {
    Http::new(service_fn(move |_: Request<RequestBody>| async move {
        let pieces = match with {
            Response4M::Whole => 1,
            Response4M::Pieces => 64,
        };
        let body = (0..pieces).map(move |_| {
            let piece = Bytes::from(vec![b'x'; LENGTH / pieces]);
            Ok::<_, Infallible>(Frame::data(piece))
        });
        let response = match with {
            Response4M::Whole => Full::new(Bytes::from(vec![b'x'; LENGTH])).boxed(),
            Response4M::Pieces => StreamBody::new(stream::iter(body)).boxed(),
        };
        Ok::<_, Infallible>(Response::new(response))
    }))
}

type Boxed = http_body_util::combinators::BoxBody<Bytes, Infallible>;

/// The bounds of a test's service.
trait Serves:
    tower::Service<
        Request<RequestBody>,
        Response = Response<Boxed>,
        Error = Infallible,
        Future: Send,
    > + Clone
    + Send
    + 'static
{
}

impl<S> Serves for S where
    S: tower::Service<
            Request<RequestBody>,
            Response = Response<Boxed>,
            Error = Infallible,
            Future: Send,
        > + Clone
        + Send
        + 'static
{
}

/// Requests the response over HTTP/2, with small windows.
async fn request(served: &Served) -> RecvStream {
    let (sender, _connection) = http2_with(served.stream().await, |builder| {
        builder
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
    })
    .await;
    let response = sender.send_request(get("/")).await;
    response.expect("a response").into_body()
}

/// Reads a frame a second. Returns the bytes that arrived.
async fn slowly(mut body: RecvStream) -> usize {
    let mut read = 0;
    while let Some(Ok(frame)) = frame(&mut body).await {
        read += frame.len();
        sleep(SECOND).await;
    }
    read
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_of_http2_gets_all_of_a_response() {
    for with in RESPONSES {
        let served = serve(responding(with));
        let begun = Instant::now();

        let read = slowly(request(&served).await).await;

        assert_eq!(read, LENGTH, "{with:?}: {:?}", served.reasons());
        assert!(begun.elapsed() > Duration::from_secs(200));
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_of_http2_gets_all_of_a_response_past_the_maximum_age() {
    for with in RESPONSES {
        let deadlines = Deadlines::default().max_age(5 * SECOND);
        let served = serve(responding(with).deadlines(deadlines));

        let read = slowly(request(&served).await).await;

        assert_eq!(read, LENGTH, "{with:?}: {:?}", served.reasons());
        assert_eq!(served.reason().await, EndReason::MaxAge);
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_of_http2_gets_all_of_a_response_in_a_drain() {
    for with in RESPONSES {
        let (listener, connector) = memory();
        let server = Server::builder().shutdown_deadline(10_000 * SECOND);
        let served = serve_with(server.build(listener), connector, responding(with));
        let body = request(&served).await;
        served.handle().shutdown();

        assert_eq!(
            slowly(body).await,
            LENGTH,
            "{with:?}: {:?}",
            served.reasons()
        );

        assert_eq!(served.reason().await, EndReason::Drained);
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_of_http1_gets_all_of_a_response() {
    for with in RESPONSES {
        let served = serve(responding(with));
        let mut client = served.stream().await;
        client.write_all(GET.as_bytes()).await.expect("it is open");
        let begun = Instant::now();

        let mut read = 0;
        while read < LENGTH {
            let mut block = vec![0; 16 * 1024];
            match client.read(&mut block).await.expect("it is open") {
                0 => break,
                n => read += n,
            }
            sleep(SECOND).await;
        }

        assert!(read >= LENGTH, "{with:?}: {read}, {:?}", served.reasons());
        assert!(begun.elapsed() > Duration::from_secs(200));
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_keeps_the_window_of_its_only_response_shut_is_ended() {
    for with in RESPONSES {
        for requests in [1, 2] {
            let served = serve(responding(with));
            let begun = Instant::now();
            let (sender, _connection) = http2_with(served.stream().await, |builder| {
                builder.initial_window_size(WINDOW);
            })
            .await;
            let mut unread = Vec::new();
            for _ in 0..requests {
                unread.push(sender.send_request(get("/")).await.expect("a response"));
            }

            let ended = timeout(3600 * SECOND, served.reason()).await;

            assert_eq!(ended.expect("in time"), EndReason::WriteTimeout, "{with:?}");
            let took = begun.elapsed().as_secs();
            // The counters are checked four times.
            assert!((30..=38).contains(&took), "{with:?}: {took}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_that_its_service_delays_is_no_stalled_one() {
    let service = service_fn(|_: Request<RequestBody>| async {
        let body = futures_util::StreamExt::then(stream::iter(0..3), |n| async move {
            sleep(300 * SECOND).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from(n.to_string())))
        });
        Ok::<_, Infallible>(Response::new(StreamBody::new(body)))
    });
    let served = serve(Http::new(service));

    assert_eq!(slowly(request(&served).await).await, 3);

    assert!(served.reasons().is_empty());
}
