//! Tests restarts under load: a drain, then a start on the same port, again and again.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::{Example, soon};

const RESTARTS: u32 = 20;
const CLIENTS: usize = 64;

/// The load of a test.
#[derive(Clone, Copy)]
struct Load {
    http2: bool,
    /// The time between an answer and the next request.
    rest: Duration,
    /// The number of answers between two restarts.
    answers: u32,
}

/// The client's end of a connection. It obeys `connection: close` and `GOAWAY`.
enum Sender {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(h2::client::SendRequest<Bytes>),
}

/// The reason why a request has no answer.
enum Unanswered {
    /// The connection ended before the request was sent, or a `GOAWAY` said that the server will
    /// not process it (RFC 9113 section 6.8).
    Unsent,
    Lost(String),
}

impl Sender {
    async fn connect(address: &str, http2: bool) -> Option<Self> {
        let io = TcpStream::connect(address).await.ok()?;
        if http2 {
            let (sender, conn) = h2::client::handshake(io).await.ok()?;
            tokio::spawn(conn);
            Some(Self::Http2(sender))
        } else {
            let (sender, conn) = http1::handshake(TokioIo::new(io)).await.ok()?;
            tokio::spawn(conn);
            Some(Self::Http1(sender))
        }
    }

    async fn ask(self) -> Result<Self, Unanswered> {
        let lost = |err: &dyn Debug| Unanswered::Lost(format!("{err:?}"));
        let ask = Request::get("http://localhost/").header("host", "localhost");
        match self {
            Self::Http1(mut sender) => {
                sender.ready().await.map_err(|_| Unanswered::Unsent)?;
                let ask = ask.body(Empty::new()).expect("a request");
                let sent = sender.try_send_request(ask).await;
                let answer = sent.map_err(|mut err| match err.take_message() {
                    Some(_) => Unanswered::Unsent,
                    None => lost(err.error()),
                })?;
                let body = answer.into_body().collect().await;
                assert_eq!(body.map_err(|err| lost(&err))?.to_bytes(), "hello\n");
                Ok(Self::Http1(sender))
            }
            Self::Http2(sender) => {
                let mut sender = sender.ready().await.map_err(|_| Unanswered::Unsent)?;
                let ask = ask.body(()).expect("a request");
                let sent = sender.send_request(ask, true);
                let (answer, _) = sent.map_err(|_| Unanswered::Unsent)?;
                let answer = answer.await.map_err(|err| {
                    let told = err.is_go_away() && err.is_remote();
                    if told && err.reason() == Some(h2::Reason::NO_ERROR) {
                        Unanswered::Unsent
                    } else {
                        lost(&err)
                    }
                })?;
                let mut body = answer.into_body();
                let body = body.data().await.expect("it has a body");
                assert_eq!(body.map_err(|err| lost(&err))?, "hello\n");
                Ok(Self::Http2(sender))
            }
        }
    }
}

/// The number of restarts so far, or `None` once the server will not start again.
type Starts = watch::Receiver<Option<u32>>;

/// Sends requests as long as there is a server. Returns the reasons why requests that were sent
/// completely have no answer.
async fn client(
    address: Arc<str>,
    load: Load,
    mut starts: Starts,
    answers: Arc<Semaphore>,
) -> Vec<String> {
    let mut lost = Vec::new();
    while starts.borrow_and_update().is_some() {
        let Some(mut sender) = Sender::connect(&address, load.http2).await else {
            // No server is running: the old one is gone, and the next has not started.
            _ = starts.changed().await;
            continue;
        };
        while starts.borrow().is_some() {
            match sender.ask().await {
                Ok(same) => sender = same,
                Err(Unanswered::Unsent) => break,
                Err(Unanswered::Lost(why)) => {
                    lost.push(why);
                    break;
                }
            }
            answers.add_permits(1);
            if !load.rest.is_zero() {
                sleep(load.rest).await;
            }
        }
    }
    lost
}

async fn no_request_is_lost(load: Load) {
    // The server has an address of its own, so that no outgoing connection takes the port between
    // two starts.
    let mut example = Example::start_at("127.0.0.2:0", &["--plain"]).await;
    let address: Arc<str> = example.address.as_str().into();
    let (started, starts) = watch::channel(Some(0));
    let answers = Arc::new(Semaphore::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (address, answers) = (Arc::clone(&address), Arc::clone(&answers));
        clients.spawn(client(address, load, starts.clone(), answers));
    }

    for restart in 1..=RESTARTS {
        let enough = soon("answers", answers.acquire_many(load.answers)).await;
        enough.expect("it is open").forget();
        example.terminate();
        let (status, last) = example.ended().await;
        assert!(status.success());
        assert!(last.ends_with(" 0 aborted"), "{last}");
        example = Example::start_at(&address, &["--plain"]).await;
        started.send_replace(Some(restart));
    }
    let enough = soon("answers", answers.acquire_many(load.answers)).await;
    enough.expect("it is open").forget();
    started.send_replace(None);

    let lost = soon("the clients", clients.join_all()).await.concat();
    let answered = (RESTARTS + 1) as usize * load.answers as usize + answers.available_permits();
    println!("{answered} requests were answered, {} were not", lost.len());
    assert!(lost.is_empty(), "of {answered}: {lost:?}");
}

/// Returns the load of clients that send their next request at once.
fn busy(http2: bool) -> Load {
    Load {
        http2,
        rest: Duration::ZERO,
        answers: 2000,
    }
}

/// Returns the load of clients that are idle between requests for longer than a drain takes.
fn resting(http2: bool) -> Load {
    Load {
        http2,
        rest: Duration::from_secs(5),
        answers: 64,
    }
}

#[tokio::test]
async fn no_http1_request_is_lost_over_twenty_restarts() {
    no_request_is_lost(busy(false)).await;
}

#[tokio::test]
async fn no_http2_request_is_lost_over_twenty_restarts() {
    no_request_is_lost(busy(true)).await;
}

#[tokio::test]
#[ignore = "takes two minutes"]
async fn no_http1_request_of_resting_clients_is_lost_over_twenty_restarts() {
    no_request_is_lost(resting(false)).await;
}

#[tokio::test]
#[ignore = "takes two minutes"]
async fn no_http2_request_of_resting_clients_is_lost_over_twenty_restarts() {
    no_request_is_lost(resting(true)).await;
}
