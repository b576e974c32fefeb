//! HTTP: requests reach the service, deadlines and limits hold, a drain loses no request, an
//! upgraded stream remains a connection of the server, and each connection ends once, for one
//! reason.

mod deadlines;
mod departures;
mod drain;
mod endings;
mod frames;
mod readers;
mod requests;
mod rest;
mod sockets;
mod upgrades;

#[path = "../support/certificates.rs"]
mod certificates;
#[path = "../support/http2.rs"]
mod http2;
#[path = "../support/over.rs"]
mod over;
#[path = "../support/mod.rs"]
mod support;

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use bytes::Bytes;
use h2::SendStream;
use h2::client::ResponseFuture;
use http_body_util::Full;
use hyper::{Request, Response};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, DuplexStream};
use tower::service_fn;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::make::ClonePerRequest;
use tower_tcp::testkit::Served;

use http2::{Sender, http2, text};
use support::{Client, Clients, panic_if};

/// A request with nothing special about it.
const GET: &str = "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// A response as it arrived.
#[derive(Debug)]
struct Answer {
    head: String,
    body: String,
}

impl Answer {
    fn status(&self) -> &str {
        self.head.split(' ').nth(1).expect("an answer has a status")
    }

    fn closes(&self) -> bool {
        self.head.contains("\nconnection: close")
    }
}

/// Reads a response of known length.
async fn answer<Io: AsyncRead + AsyncWrite + Unpin>(client: &mut Client<Io>) -> Answer {
    let mut head = String::new();
    loop {
        match client.line().await {
            line if line.is_empty() => break,
            line => head = head + "\n" + &line,
        }
    }
    let length = head.split("\ncontent-length: ").nth(1);
    let length = length.map_or(0, |rest| {
        let digits = rest.lines().next().unwrap_or_default();
        digits.parse().expect("a length is a number")
    });
    let mut body = vec![0; length];
    client
        .0
        .read_exact(&mut body)
        .await
        .expect("the body comes");
    Answer {
        head: head.trim_start().to_owned(),
        body: String::from_utf8(body).expect("it is text"),
    }
}

fn get(path: &str) -> Request<()> {
    let request = Request::get(format!("http://localhost{path}"));
    request.body(()).expect("a request")
}

/// Sends a request and some bytes of its body. The body ends with them unless `stalls` is `true`.
fn post(sender: &Sender, bytes: &'static str, stalls: bool) -> (ResponseFuture, SendStream<Bytes>) {
    let request = Request::post("http://localhost/").body(());
    let begun = sender.begin(request.expect("a request"), false);
    let (response, mut body) = begun.expect("it is open");
    body.send_data(bytes.into(), !stalls).expect("it is open");
    (response, body)
}

type Reply = Result<Response<Full<Bytes>>, Infallible>;

fn reply(text: impl Into<Bytes>) -> Reply {
    Ok(Response::new(Full::new(text.into())))
}

/// A service that knows some paths.
async fn paths(request: Request<RequestBody>) -> Reply {
    let path = request.uri().path().to_owned();
    match path.strip_prefix("/sleep/") {
        Some(seconds) => {
            let seconds = seconds.parse().expect("a number of seconds");
            tokio::time::sleep(Duration::from_secs(seconds)).await;
        }
        None if path == "/never" => pending().await,
        None if path == "/panic" => panic_if(true),
        None => {}
    }
    reply(path)
}

fn http() -> Http<ClonePerRequest<impl Serves>> {
    Http::new(service_fn(paths))
}

/// The bounds of a test's service.
trait Serves:
    tower::Service<
        Request<RequestBody>,
        Response = Response<Full<Bytes>>,
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
            Response = Response<Full<Bytes>>,
            Error = Infallible,
            Future: Send,
        > + Clone
        + Send
        + 'static
{
}

/// Connects, and sends nothing.
async fn connect(served: &Served) -> DuplexStream {
    served.stream().await
}
