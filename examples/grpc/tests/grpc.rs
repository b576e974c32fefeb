//! Tests the example with tonic's client: calls of each kind, the health service, and how each ends
//! at a signal.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use pb::tally_client::TallyClient;
use pb::{Amount, Total, WatchRequest};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use tonic::{Code, Request, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_prost::ProstCodec;

mod pb {
    #![allow(
        clippy::allow_attributes,
        clippy::allow_attributes_without_reason,
        clippy::doc_markdown,
        clippy::return_self_not_must_use,
        unreachable_pub,
        reason = "the code is generated"
    )]

    tonic::include_proto!("tally");
}

/// The time limit of each wait, far longer than any wait takes.
const NET: Duration = Duration::from_secs(20);

async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match timeout(NET, future).await {
        Ok(done) => done,
        Err(_elapsed) => panic!("{what}: not within {NET:?}"),
    }
}

/// A running example. Dropping it kills the process.
struct Example {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    address: String,
}

impl Example {
    async fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_grpc"))
            .args(["--listen", "127.0.0.1:0"])
            .args(args)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("it starts");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let mut stdout = BufReader::new(stdout).lines();
        let line = soon("its address", stdout.next_line()).await;
        let line = line.expect("stdout is text").expect("it listens");
        let address = line.strip_prefix("listening on ").expect("an address");
        Self {
            address: address.to_owned(),
            child,
            stdout,
        }
    }

    async fn channel(&self) -> Channel {
        channel(&self.address).await
    }

    async fn tally(&self) -> TallyClient<Channel> {
        TallyClient::new(self.channel().await)
    }

    fn terminate(&self) {
        let pid = self.child.id().expect("it was not waited for");
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a process"), Signal::TERM).expect("it is ours");
    }

    /// Waits until the process exits. Returns the last line that it printed.
    async fn ended(mut self) -> (ExitStatus, String) {
        let mut last = String::new();
        while let Some(line) = soon("a line", self.stdout.next_line()).await.expect("text") {
            last = line;
        }
        let status = soon("its end", self.child.wait()).await;
        (status.expect("it is ours"), last)
    }
}

async fn channel(address: &str) -> Channel {
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
    let connected = soon("a channel", endpoint.connect()).await;
    connected.expect("it listens")
}

async fn next<T>(stream: &mut Streaming<T>) -> Option<T> {
    let next = soon("the next message", stream.message()).await;
    next.expect("the call is in good order")
}

/// Returns the request stream of a bidirectional call, and its sender.
fn amounts() -> (mpsc::Sender<Amount>, ReceiverStream<Amount>) {
    let (send, receive) = mpsc::channel(16);
    (send, ReceiverStream::new(receive))
}

#[tokio::test]
async fn it_explains_its_options() {
    let mut help = Command::new(env!("CARGO_BIN_EXE_grpc"));
    let help = soon("the help", help.arg("--help").output()).await.unwrap();

    let text = String::from_utf8(help.stdout).unwrap();
    assert!(help.status.success());
    assert!(
        text.contains("Usage:") && text.contains("--listen"),
        "{text}"
    );
}

#[tokio::test]
async fn a_unary_call_is_answered() {
    let example = Example::start(&[]).await;
    let mut client = example.tally().await;

    for (value, sum) in [(2, 2), (40, 42), (-43, -1)] {
        let answer = soon("an answer", client.add(Amount { value })).await;
        assert_eq!(answer.unwrap().into_inner(), Total { value: sum });
    }
}

#[tokio::test]
async fn a_call_that_fails_has_its_status_and_the_next_is_answered() {
    let example = Example::start(&[]).await;
    let mut client = example.tally().await;
    let value = i64::MAX;
    client.add(Amount { value }).await.unwrap();

    let refused = soon("an answer", client.add(Amount { value: 1 })).await;

    assert_eq!(refused.unwrap_err().code(), Code::OutOfRange);
    let answer = soon("an answer", client.add(Amount { value: 0 })).await;
    assert_eq!(answer.unwrap().into_inner(), Total { value });
}

#[tokio::test]
async fn a_client_that_streams_is_answered_once() {
    let example = Example::start(&[]).await;
    let mut client = example.tally().await;
    let amounts = stream::iter(1..=1000).map(|value| Amount { value });

    let answer = soon("an answer", client.add_all(amounts)).await;

    assert_eq!(answer.unwrap().into_inner(), Total { value: 500_500 });
}

#[tokio::test]
async fn one_client_streams_what_another_adds() {
    let example = Example::start(&[]).await;
    let (mut adds, mut watches) = (example.tally().await, example.tally().await);
    let watching = soon("a stream", watches.watch(WatchRequest {})).await;
    let mut watching = watching.unwrap().into_inner();
    assert_eq!(next(&mut watching).await, Some(Total { value: 0 }));

    for value in 1..=3 {
        adds.add(Amount { value: 1 }).await.unwrap();

        assert_eq!(next(&mut watching).await, Some(Total { value }));
    }
}

#[tokio::test]
async fn both_sides_of_a_call_stream() {
    let example = Example::start(&[]).await;
    let mut client = example.tally().await;
    let amounts = stream::iter(1..=1000).map(|value| Amount { value });

    let sums = soon("a stream", client.sum(amounts)).await.unwrap();

    let sums: Vec<_> = soon("the end", sums.into_inner().collect()).await;
    let sums: Vec<_> = sums.into_iter().map(|sum| sum.unwrap().value).collect();
    let expected: Vec<i64> = (1..=1000).map(|n| n * (n + 1) / 2).collect();
    assert_eq!(sums, expected);
}

#[tokio::test]
async fn tls_is_spoken_with_a_certificate() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let own = tempfile::tempdir().unwrap();
    let (cert, key) = (own.path().join("cert.pem"), own.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let example = Example::start(&["--cert", cert, "--key", key]).await;

    let trust = Certificate::from_pem(made.cert.pem());
    let trust = ClientTlsConfig::new()
        .ca_certificate(trust)
        .domain_name("localhost");
    let endpoint = Channel::from_shared(format!("https://{}", example.address)).unwrap();
    let endpoint = endpoint.tls_config(trust).unwrap();
    let channel = soon("a channel", endpoint.connect()).await.unwrap();
    let answer = soon(
        "an answer",
        TallyClient::new(channel).add(Amount { value: 2 }),
    )
    .await;

    assert_eq!(answer.unwrap().into_inner(), Total { value: 2 });
}

#[tokio::test]
async fn it_is_one_service_on_each_of_its_addresses() {
    let mut example = Example::start(&["--listen", "127.0.0.1:0"]).await;
    let line = soon("its other address", example.stdout.next_line()).await;
    let line = line.unwrap().expect("it listens there, too");
    let other = line.strip_prefix("listening on ").unwrap();
    let mut first = example.tally().await;
    let mut second = TallyClient::new(channel(other).await);

    first.add(Amount { value: 2 }).await.unwrap();
    let answer = soon("an answer", second.add(Amount { value: 40 })).await;

    assert_eq!(answer.unwrap().into_inner(), Total { value: 42 });
}

#[tokio::test]
async fn health_is_told_of_the_whole_and_of_the_service() {
    let example = Example::start(&[]).await;
    let mut client = HealthClient::new(example.channel().await);

    for (service, expected) in [
        ("", Ok(ServingStatus::Serving)),
        ("tally.Tally", Ok(ServingStatus::Serving)),
        ("another", Err(Code::NotFound)),
    ] {
        let service = service.to_owned();
        let checked = soon("a check", client.check(HealthCheckRequest { service })).await;

        let status = checked.map(|answer| answer.into_inner().status());
        assert_eq!(status.map_err(|status| status.code()), expected);
    }
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_by_each_service() {
    let example = Example::start(&[]).await;
    let large = HealthCheckRequest {
        service: "x".repeat(5000),
    };

    for path in ["/grpc.health.v1.Health/Check", "/tally.Tally/Add"] {
        let mut client = tonic::client::Grpc::new(example.channel().await);
        client.ready().await.unwrap();
        let codec = ProstCodec::<_, Total>::default();
        let call = client.unary(Request::new(large.clone()), path.parse().unwrap(), codec);
        let answer = soon("an answer", call).await;

        assert_eq!(answer.unwrap_err().code(), Code::OutOfRange, "{path}");
    }
}

#[tokio::test]
async fn a_call_in_flight_goes_on_through_a_drain_to_its_end() {
    let example = Example::start(&[]).await;
    let mut client = example.tally().await;
    let (send, amounts) = amounts();
    let call = client.sum(amounts);
    send.send(Amount { value: 1 }).await.unwrap();
    let mut sums = soon("a stream", call).await.unwrap().into_inner();
    assert_eq!(next(&mut sums).await, Some(Total { value: 1 }));
    // This stream ends when the drain begins, so its end shows that the drain has begun.
    let mut watching = client.watch(WatchRequest {}).await.unwrap().into_inner();
    next(&mut watching).await;

    example.terminate();
    while next(&mut watching).await.is_some() {}

    for value in 2..=100 {
        send.send(Amount { value: 1 }).await.unwrap();
        assert_eq!(next(&mut sums).await, Some(Total { value }));
    }
    drop(send);
    assert_eq!(next(&mut sums).await, None);
    let (status, last) = example.ended().await;
    assert!(status.success());
    assert_eq!(last, "connections: 1 drained, 0 timed out, 0 aborted");
}

#[tokio::test]
async fn calls_without_an_end_are_ended_by_a_drain_in_good_order() {
    let example = Example::start(&[]).await;
    let mut client = example.tally().await;
    let mut watching = client.watch(WatchRequest {}).await.unwrap().into_inner();
    assert_eq!(next(&mut watching).await, Some(Total { value: 0 }));

    example.terminate();

    assert_eq!(next(&mut watching).await, None);
    let (status, last) = example.ended().await;
    assert!(status.success());
    assert_eq!(last, "connections: 1 drained, 0 timed out, 0 aborted");
}

#[tokio::test]
async fn who_watches_the_health_is_told_that_it_serves_no_more() {
    let example = Example::start(&[]).await;
    let mut client = HealthClient::new(example.channel().await);
    let service = String::from("tally.Tally");
    let watching = client.watch(HealthCheckRequest { service }).await;
    let mut watching = watching.unwrap().into_inner();
    let status = next(&mut watching).await.unwrap().status();
    assert_eq!(status, ServingStatus::Serving);

    example.terminate();

    let status = next(&mut watching).await.unwrap().status();
    assert_eq!(status, ServingStatus::NotServing);
    assert!(next(&mut watching).await.is_none());
    assert!(example.ended().await.0.success());
}

#[tokio::test]
async fn a_lame_duck_answers_that_it_serves_no_more() {
    let example = Example::start(&["--lame-duck", "600"]).await;
    let mut watches = HealthClient::new(example.channel().await);
    let watching = watches.watch(HealthCheckRequest::default()).await;
    let mut watching = watching.unwrap().into_inner();
    next(&mut watching).await;

    example.terminate();
    next(&mut watching).await;

    let mut comes_later = HealthClient::new(example.channel().await);
    let checked = soon("a check", comes_later.check(HealthCheckRequest::default())).await;
    let status = checked.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::NotServing);
}

/// Reads an HTTP/2 frame: its type, its flags, its payload (RFC 9113 section 4.1).
async fn frame(io: &mut TcpStream) -> (u8, u8, Vec<u8>) {
    let mut head = [0; 9];
    io.read_exact(&mut head).await.expect("a frame");
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    io.read_exact(&mut payload).await.expect("a whole frame");
    (head[3], head[4], payload)
}

#[tokio::test]
async fn a_client_that_rests_is_told_to_go_away() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;
    const ACK: u8 = 1;
    let example = Example::start(&[]).await;
    let mut io = TcpStream::connect(&example.address).await.unwrap();
    io.write_all(&[PREFACE, &SETTINGS].concat()).await.unwrap();
    while soon("settings", frame(&mut io)).await.1 != ACK {}

    example.terminate();

    let mut errors = Vec::new();
    let until_it_ends = async {
        // hyper pings between its first `GOAWAY` and the last, to learn that the first has arrived.
        while io.readable().await.is_ok() && io.peek(&mut [0]).await.unwrap_or(0) > 0 {
            match frame(&mut io).await {
                (GOAWAY, _, payload) => errors.push(payload[4..8].to_vec()),
                (PING, flags, payload) if flags != ACK => {
                    let ack = [&[0, 0, 8, PING, ACK, 0, 0, 0, 0], &*payload].concat();
                    io.write_all(&ack).await.unwrap();
                }
                _ => {}
            }
        }
    };
    soon("the end", until_it_ends).await;
    assert!(!errors.is_empty(), "it was told");
    assert!(errors.iter().all(|error| *error == [0; 4]), "NO_ERROR");
    drop(io);
    let (status, last) = example.ended().await;
    assert!(status.success());
    assert_eq!(last, "connections: 1 drained, 0 timed out, 0 aborted");
}
