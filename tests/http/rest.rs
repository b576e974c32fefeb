//! A connection at rest frees hyper's state, and serves later requests as if it had kept the state.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONNECTION, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tower::{Layer, service_fn};
use tower_tcp::EndReason;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::make::ClonePerRequest;
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve};
use tower_tcp::tls::Tls;

use crate::certificates::certified;
use crate::support::{Client, Clients, Ends, settled};
use crate::{GET, Reply, answer, connect, reply};

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Answers with the path and the body. `/echo` is upgraded, and `/later` leaves its body to another
/// task, which drops it after a while.
async fn service(mut request: Request<RequestBody>) -> Reply {
    let path = request.uri().path().to_owned();
    match &*path {
        "/echo" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let io = TokioIo::new(upgrade.await.expect("it is agreed"));
                let (mut read, mut write) = tokio::io::split(io);
                // The peer may be gone.
                let _copied = tokio::io::copy(&mut read, &mut write).await;
            });
            let response = Response::builder()
                .status(StatusCode::SWITCHING_PROTOCOLS)
                .header(CONNECTION, "upgrade")
                .header(UPGRADE, "echo");
            Ok(response.body(Full::default()).expect("a response"))
        }
        "/later" => {
            tokio::spawn(async move {
                sleep(Duration::from_millis(10)).await;
                drop(request);
            });
            reply(path)
        }
        "/unread" => reply(path),
        _ => {
            let body = request.into_body().collect().await;
            let body = body.expect("the body arrives").to_bytes();
            reply([path.as_bytes(), &body].concat())
        }
    }
}

fn http() -> Http<ClonePerRequest<impl crate::Serves>> {
    Http::new(service_fn(service))
}

/// Serves in memory, plain or over TLS, with a client.
async fn over(tls: bool) -> (Served, Client<Box<dyn Io>>) {
    if !tls {
        let served = serve(http());
        let io: Box<dyn Io> = Box::new(connect(&served).await);
        return (served, Client::new(io));
    }
    let (config, trusting) = certified();
    let served = serve(PreConnectLayer::new(Tls::from(config)).layer(http()));
    let name = ServerName::try_from("localhost").expect("a name");
    let shaken = TlsConnector::from(trusting).connect(name, connect(&served).await);
    let io: Box<dyn Io> = Box::new(shaken.await.expect("the handshake is made"));
    (served, Client::new(io))
}

/// Requests of several kinds, with the bodies of their answers.
const KINDS: [(&str, &str); 7] = [
    ("GET /a HTTP/1.1\r\nhost: a\r\n\r\n", "/a"),
    ("GET /b HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", "/b"),
    (
        "POST /c HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody",
        "/cbody",
    ),
    (
        "POST /d HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
        "/dbody",
    ),
    (
        "POST /unread HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody",
        "/unread",
    ),
    (
        "POST /later HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody",
        "/later",
    ),
    ("PRI /e HTTP/1.1\r\nhost: a\r\n\r\n", "/e"),
];

#[tokio::test(start_paused = true)]
async fn requests_of_any_kind_are_answered_between_rests() {
    for tls in [false, true] {
        let (served, mut client) = over(tls).await;
        for (request, body) in KINDS.iter().chain(KINDS.iter().rev()) {
            client.send(request).await;
            assert_eq!(answer(&mut client).await.body, *body, "{request}");
            sleep(Duration::from_secs(60)).await;
        }
        let live = served.handle().connections().next().expect("it is there");
        assert_eq!(live.requests(), 14);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_in_two_pieces_is_answered_wherever_it_is_cut() {
    for tls in [false, true] {
        let (_served, mut client) = over(tls).await;
        for (request, body) in KINDS {
            for cut in 1..request.len() {
                // hyper closes a connection with half a body that nobody reads.
                if matches!(body, "/unread" | "/later") && request[..cut].contains("\r\n\r\n") {
                    continue;
                }
                client.send(&request[..cut]).await;
                sleep(Duration::from_secs(5)).await;
                client.send(&request[cut..]).await;
                let answer = answer(&mut client).await;
                assert_eq!(answer.body, body, "{request} cut at {cut}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_request_in_single_bytes_is_answered() {
    for (request, body) in KINDS {
        let served = serve(http());
        let mut client = served.client().await;
        // A body that is not read must arrive with the end of its head.
        let head = request.find("\r\n\r\n").expect("it has an end") + 3;
        for byte in request[..head].bytes() {
            client.send([byte]).await;
            settled().await;
        }
        client.send(&request[head..]).await;

        assert_eq!(answer(&mut client).await.body, body, "{request}");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_sent_ahead_are_answered_with_a_rest_before_and_within_the_last() {
    for tls in [false, true] {
        let (_served, mut client) = over(tls).await;
        for n in [1, 2, 15, 16, 17, 100] {
            let (begin, end) = GET.split_at(20);
            client.send(format!("{}{begin}", GET.repeat(n))).await;
            for _ in 0..n {
                assert_eq!(answer(&mut client).await.body, "/");
            }
            sleep(Duration::from_secs(20)).await;
            client.send(end).await;
            assert_eq!(answer(&mut client).await.body, "/");
            sleep(Duration::from_secs(70)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_a_client_holds_back_until_it_is_told_is_read_behind_a_rest() {
    for tls in [false, true] {
        let (_served, mut client) = over(tls).await;
        for _ in 0..2 {
            let head = "POST /c HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\n";
            client
                .send(format!("{head}content-length: 4\r\n\r\n"))
                .await;
            assert_eq!(client.line().await, "HTTP/1.1 100 Continue");
            assert_eq!(client.line().await, "");
            client.send("body").await;
            assert_eq!(answer(&mut client).await.body, "/cbody");
            sleep(Duration::from_secs(60)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_upgraded_behind_a_rest() {
    for tls in [false, true] {
        let (served, mut client) = over(tls).await;
        client.send(GET).await;
        answer(&mut client).await;
        sleep(Duration::from_secs(60)).await;

        let upgrade = "GET /echo HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n";
        client.send(format!("{upgrade}\r\nearly\n")).await;

        assert_eq!(answer(&mut client).await.status(), "101");
        assert_eq!(client.line().await, "early");
        sleep(Duration::from_secs(600)).await;
        assert_eq!(client.ask("late").await, "late");
        client.finish().await;
        assert!(client.rest().await.is_empty());
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn empty_lines_behind_a_request_are_no_head_that_has_begun() {
    for (request, body) in [KINDS[0], KINDS[2]] {
        let served = serve(http());
        let mut client = served.client().await;
        client.send(format!("{request}\r\n\r\n")).await;
        assert_eq!(answer(&mut client).await.body, body);
        let begun = Instant::now();

        assert!(client.rest().await.is_empty());

        assert_eq!(begun.elapsed().as_secs(), 75);
        drop(client);
        assert_eq!(served.reason().await, EndReason::IdleTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn empty_lines_during_a_rest_are_no_head_that_has_begun() {
    for tls in [false, true] {
        let (served, mut client) = over(tls).await;
        client.send(GET).await;
        answer(&mut client).await;
        let begun = Instant::now();
        for lines in ["\r\n", "\n", "\r\n\r\n"] {
            sleep(Duration::from_secs(1)).await;
            client.send(lines).await;
        }

        assert!(client.rest().await.is_empty());

        // `idle`, not `frame`, and the lines do not restart it.
        assert_eq!(begun.elapsed().as_secs(), 75);
        drop(client);
        assert_eq!(served.reason().await, EndReason::IdleTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn half_a_head_behind_a_busy_request_has_its_own_deadline() {
    for tls in [false, true] {
        let (_served, mut client) = over(tls).await;
        for _ in 0..3 {
            client.send(GET).await;
            answer(&mut client).await;
        }
        client.send(format!("{GET}{}", &GET[..20])).await;
        answer(&mut client).await;
        let begun = Instant::now();

        client.rest().await;

        // The deadline `frame`, not `idle`.
        assert_eq!(begun.elapsed().as_secs(), 30);
    }
}

#[tokio::test(start_paused = true)]
async fn half_a_head_behind_a_request_does_not_hold_its_answer_back() {
    // With this setting, hyper itself would hold the answer back.
    let http = http().configure(|hyper| {
        hyper.http1().pipeline_flush(true);
    });
    let served = serve(http);
    let mut client = served.client().await;
    let (half, rest) = KINDS[0].0.split_at(20);

    client.send(format!("{GET}{half}")).await;

    assert_eq!(answer(&mut client).await.body, "/");
    client.send(rest).await;
    assert_eq!(answer(&mut client).await.body, "/a");
}

#[tokio::test(start_paused = true)]
async fn a_busy_connection_is_drained_like_one_at_rest() {
    for tls in [false, true] {
        for more in ["", &GET[..20]] {
            let (served, mut client) = over(tls).await;
            for _ in 0..3 {
                client.send(GET).await;
                answer(&mut client).await;
            }
            client.send(format!("{GET}{more}")).await;
            answer(&mut client).await;
            for live in served.handle().connections() {
                live.close();
            }
            sleep(Duration::from_millis(500)).await;

            client.send(&GET[more.len()..]).await;

            assert!(answer(&mut client).await.closes());
            assert!(client.rest().await.is_empty());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_another_thread_drops_is_not_taken_for_the_next_request() {
    let service = service_fn(|request: Request<RequestBody>| async move {
        let path = request.uri().path().to_owned();
        std::thread::spawn(move || drop(request));
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(path)))
    });
    let served = serve(Http::new(service));
    for n in 0..500 {
        let mut client = served.client().await;
        let post = format!(
            "POST /{n} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n",
            GET.len()
        );
        client.send(&post[..post.len() - n % 3]).await;
        client.send(&post[post.len() - n % 3..]).await;
        assert_eq!(answer(&mut client).await.body, format!("/{n}"));
        // The service drops the body early. hyper then closes the connection or reads the body.
        drop(client.0.write_all(GET.as_bytes()).await);

        drop(client.0.shutdown().await);
        let mut rest = String::new();
        drop(client.0.read_to_string(&mut rest).await);

        assert_eq!(rest, "", "a body was served as a request");
        assert_eq!(served.end().await.requests(), 1);
    }
}

/// Pseudo-random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    async fn rest(&mut self, seconds: usize) {
        match self.below(3) {
            0 => {}
            1 => settled().await,
            _ => sleep(Duration::from_millis(self.below(seconds * 1000) as u64)).await,
        }
    }

    /// Sends in pieces. The pauses within a head are shorter than its deadline.
    async fn send(&mut self, client: &mut Client<impl Io>, text: &str) {
        let mut rest = text;
        for _ in 0..self.below(3) {
            let (piece, more) = rest.split_at(self.below(rest.len() + 1));
            client.send(piece).await;
            self.rest(8).await;
            rest = more;
        }
        client.send(rest).await;
    }
}

/// Runs random operations of a peer, and checks that each request is answered. Returns the number
/// of requests that the peer sent, and the number that the server counted.
async fn operations(random: &mut Random, served: &Served) -> (u64, u64) {
    // A body that is not read must arrive with its head.
    let kinds: Vec<_> = [0, 1, 2, 3, 6].map(|kind| KINDS[kind]).into();
    let mut client = served.client().await;
    let (mut requests, mut counted) = (0, 0);
    for _ in 0..1 + random.below(20) {
        random.rest(50).await;
        match random.below(10) {
            0 => {
                // A few at once, and a part of another.
                let many: Vec<_> = (0..1 + random.below(20))
                    .map(|_| kinds[random.below(kinds.len())])
                    .collect();
                let (request, body) = kinds[random.below(kinds.len())];
                let cut = random.below(request.len());
                let text: String = many.iter().map(|(request, _)| *request).collect();
                client.send(text + &request[..cut]).await;
                for (request, body) in &many {
                    assert_eq!(answer(&mut client).await.body, *body, "{request}");
                }
                random.rest(20).await;
                client.send(&request[cut..]).await;
                assert_eq!(answer(&mut client).await.body, body, "{request}");
                requests += many.len() as u64 + 1;
            }
            1 => {
                // Finishes sending first, or is gone at once.
                if random.below(2) == 0 {
                    client.finish().await;
                    assert!(client.rest().await.is_empty());
                }
                drop(client);
                let end = served.end().await;
                assert_eq!(end.reason(), EndReason::PeerClosed);
                counted += end.requests();
                client = served.client().await;
            }
            2 if requests > 0 => {
                client.send(GET).await;
                answer(&mut client).await;
                random.rest(70).await;
                for live in served.handle().connections() {
                    live.close();
                }
                random.rest(1).await;
                client.send(GET).await;
                let answer = answer(&mut client).await;
                assert!(answer.closes(), "{}", answer.head);
                assert!(client.rest().await.is_empty());
                drop(client);
                let end = served.end().await;
                assert_eq!(end.reason(), EndReason::ServiceClosed);
                counted += end.requests();
                requests += 2;
                client = served.client().await;
            }
            3 => {
                let head =
                    "GET /echo HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
                random.send(&mut client, head).await;
                assert_eq!(answer(&mut client).await.status(), "101");
                random.rest(600).await;
                assert_eq!(client.ask("echo").await, "echo");
                client.finish().await;
                assert!(client.rest().await.is_empty());
                drop(client);
                counted += served.end().await.requests();
                requests += 1;
                client = served.client().await;
            }
            4 => {
                let (request, body) = KINDS[4 + random.below(2)];
                client.send(request).await;
                assert_eq!(answer(&mut client).await.body, body);
                requests += 1;
            }
            _ => {
                let (request, body) = kinds[random.below(kinds.len())];
                random.send(&mut client, request).await;
                assert_eq!(answer(&mut client).await.body, body, "{request}");
                requests += 1;
            }
        }
    }
    drop(client);
    counted += served.end().await.requests();
    (requests, counted)
}

#[tokio::test(start_paused = true)]
async fn no_request_is_lost_in_thousands_of_random_operations() {
    run_seeds(300).await;
}

#[tokio::test(start_paused = true)]
#[ignore = "takes a minute: the same, with more seeds"]
async fn no_request_is_lost_in_100_000_random_operations() {
    run_seeds(10_000).await;
}

async fn run_seeds(seeds: u64) {
    for seed in 0..seeds {
        let served = serve(http());
        let mut random = Random(seed);
        println!("seed {seed}");

        let (requests, counted) = operations(&mut random, &served).await;

        assert_eq!(counted, requests, "seed {seed}");
    }
}
