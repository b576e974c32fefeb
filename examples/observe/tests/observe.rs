//! The example, as its operator sees it: metrics agree with the load and are in a format that
//! Prometheus reads, connections are listed, and spans are exported.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// The limit of every wait, far longer than any of them takes.
const NET: Duration = Duration::from_secs(20);

const LINE: &[u8] = b"fifteen letters\n";

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
    lines: SocketAddr,
    admin: SocketAddr,
}

impl Example {
    async fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_observe"))
            .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .args(args)
            .env_remove("RUST_LOG")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("it starts");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let mut stdout = BufReader::new(stdout).lines();
        let mut address = async || {
            let line = soon("an address", stdout.next_line()).await;
            let line = line.expect("stdout is text").expect("it listens");
            let address = line.strip_prefix("listening on ").expect("an address");
            address.parse().expect("an address of TCP")
        };
        let (lines, admin) = (address().await, address().await);
        Self {
            child,
            stdout,
            lines,
            admin,
        }
    }

    async fn connect(&self) -> TcpStream {
        soon("a connection", TcpStream::connect(self.lines))
            .await
            .expect("it listens")
    }

    async fn get(&self, path: &str) -> Answer {
        get(self.admin, path).await
    }

    /// Ends the process by a signal. Returns all that it printed since it listened.
    async fn terminated(mut self) -> (ExitStatus, String) {
        let pid = self.child.id().expect("it was not waited for");
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a process"), Signal::TERM).expect("it is ours");
        let mut said = String::new();
        while let Some(line) = soon("a line", self.stdout.next_line()).await.expect("text") {
            said += &line;
            said += "\n";
        }
        let status = soon("its end", self.child.wait()).await;
        (status.expect("it is ours"), said)
    }
}

/// The answer to one request, and its size on the wire.
struct Answer {
    head: String,
    body: String,
    sent: usize,
    received: usize,
}

async fn get(admin: SocketAddr, path: &str) -> Answer {
    let request = format!("GET {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n");
    let mut stream = soon("a connection", TcpStream::connect(admin))
        .await
        .expect("it listens");
    stream
        .write_all(request.as_bytes())
        .await
        .expect("it reads");
    let mut answer = String::new();
    soon("an answer", stream.read_to_string(&mut answer))
        .await
        .expect("it answers in text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("it has a head");
    Answer {
        head: head.to_owned(),
        body: body.to_owned(),
        sent: request.len(),
        received: answer.len(),
    }
}

async fn echo(stream: &mut TcpStream) {
    stream.write_all(LINE).await.expect("it reads");
    let mut line = [0; LINE.len()];
    soon("a line", stream.read_exact(&mut line))
        .await
        .expect("it answers");
    assert_eq!(line, LINE);
}

/// The value of each series, by its name and labels.
type Series = BTreeMap<(String, String), f64>;

/// Parses the text format. Panics on anything else.
/// (<https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>)
fn parse(text: &str) -> Series {
    let mut series = Series::new();
    let mut types = BTreeMap::new();
    let mut finished = BTreeSet::new();
    let mut last = String::new();
    assert!(text.is_empty() || text.ends_with('\n'));
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(comment) = line.strip_prefix("# ") {
            let (kind, rest) = comment.split_once(' ').expect("a comment says of what");
            let (name, what) = rest.split_once(' ').expect("a comment says something");
            assert!(is_name(name), "{line}");
            if kind == "TYPE" {
                assert!(
                    ["counter", "gauge", "histogram", "summary"].contains(&what),
                    "{line}"
                );
                let again = types.insert(name.to_owned(), what.to_owned());
                assert_eq!(again, None, "{line}");
            } else {
                assert_eq!(kind, "HELP", "{line}");
            }
            continue;
        }
        let (which, value) = line.rsplit_once(' ').expect("a sample has a value");
        let value: f64 = value.parse().expect("it is a number");
        let (name, labels) = match which.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').expect("labels end")),
            None => (which, ""),
        };
        assert!(is_name(name), "{line}");
        assert!(are_labels(labels), "{line}");
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|family| types.contains_key(*family))
            .unwrap_or(name);
        let kind = types.get(family).expect("its type comes first");
        assert!(kind != "counter" || family.ends_with("_total"), "{line}");
        if family != last {
            assert!(finished.insert(family.to_owned()), "{family} comes twice");
            family.clone_into(&mut last);
        }
        let key = (name.to_owned(), labels.to_owned());
        assert_eq!(series.insert(key, value), None, "{line}");
    }
    series
}

fn is_name(name: &str) -> bool {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    name.chars().all(part) && name.starts_with(|c: char| !c.is_ascii_digit())
}

/// Returns whether these are labels. None of the values here contains a comma or a quote.
fn are_labels(labels: &str) -> bool {
    labels.is_empty()
        || labels.split(',').all(|label| {
            label.split_once('=').is_some_and(|(name, value)| {
                is_name(name) && value.len() >= 2 && value.starts_with('"') && value.ends_with('"')
            })
        })
}

/// Returns the sum of the series with this name and this label.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts are whole, and few"
)]
fn sum(series: &Series, name: &str, label: &str) -> usize {
    series
        .iter()
        .filter(|((is, labels), _)| is == name && labels.contains(label))
        .map(|(_, value)| value)
        .sum::<f64>() as usize
}

#[tokio::test]
async fn it_explains_its_options() {
    let mut help = Command::new(env!("CARGO_BIN_EXE_observe"));

    let help = soon("the help", help.arg("--help").output()).await.unwrap();

    let text = String::from_utf8(help.stdout).unwrap();
    assert!(help.status.success());
    for option in ["--listen", "--admin", "--sample"] {
        assert!(text.contains(option), "{text}");
    }
}

#[tokio::test]
async fn what_is_scraped_agrees_with_the_load_to_the_unit() {
    const CLIENTS: usize = 32;
    const LINES: usize = 100;
    let example = Example::start(&["--sample", "0"]).await;
    let (lines, admin) = (example.lines, example.admin);
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        clients.spawn(async move {
            let mut stream = TcpStream::connect(lines).await.unwrap();
            for _ in 0..LINES {
                echo(&mut stream).await;
            }
            // Every second connection stays.
            (n % 2 == 0).then_some(stream)
        });
    }
    let (mut scrapes, mut sent, mut received) = (0, 0, 0);
    let mut staying = Vec::new();
    while let Some(client) = clients.join_next().await {
        staying.extend(client.unwrap());
        let answer = get(admin, "/metrics").await;
        parse(&answer.body);
        scrapes += 1;
        sent += answer.sent;
        received += answer.received;
    }
    let others = CLIENTS - staying.len();
    let load = CLIENTS * LINES;

    // Written bytes and ends are counted a moment after the peer sees them.
    let agrees = async {
        loop {
            let answer = get(admin, "/metrics").await;
            let metrics = parse(&answer.body);
            scrapes += 1;
            sent += answer.sent;
            let told = [
                ("tower_tcp_accepted_connections_total", ""),
                ("tower_tcp_active_connections", ""),
                ("tower_tcp_ended_connections_total", ""),
                ("tower_tcp_ended_connections_total", "peer_closed"),
                ("tower_tcp_requests_total", ""),
                ("tower_tcp_requests_active", ""),
                ("tower_tcp_request_duration_seconds_count", ""),
                ("tower_tcp_connection_io_bytes_total", "read"),
                ("tower_tcp_connection_io_bytes_total", "write"),
            ]
            .map(|(name, label)| sum(&metrics, name, label));
            let done = [
                CLIENTS + scrapes,
                staying.len() + 1, // and the scrape
                others + scrapes - 1,
                others + scrapes - 1, // each scrape asks for the close
                load + scrapes,
                0,
                load,
                load * LINE.len() + sent,
                load * LINE.len() + received,
            ];
            if told == done {
                return;
            }
            eprintln!("told {told:?}, done {done:?}");
            received += answer.received;
        }
    };

    soon("what agrees", agrees).await;
}

#[tokio::test]
async fn no_address_is_in_the_metrics() {
    let example = Example::start(&[]).await;
    let mut client = example.connect().await;
    echo(&mut client).await;

    let metrics = example.get("/metrics").await;

    assert!(
        metrics
            .head
            .contains("content-type: text/plain; version=0.0.4")
    );
    assert!(!metrics.body.contains("127.0.0.1"), "{}", metrics.body);
}

#[tokio::test]
async fn the_table_says_who_is_connected_and_what_they_did() {
    let example = Example::start(&[]).await;
    let mut client = example.connect().await;
    for _ in 0..3 {
        echo(&mut client).await;
    }
    let peer = client.local_addr().unwrap().to_string();

    // Written bytes are counted a moment after the peer sees them.
    let is_up_to_date = async {
        loop {
            let table = example.get("/connections").await;
            assert!(table.head.contains("refresh: 1"), "{}", table.head);
            let row = table.body.lines().find(|row| row.ends_with(&peer));
            let row = row.unwrap_or_else(|| panic!("no {peer} in\n{}", table.body));
            let cells: Vec<_> = row.split_whitespace().collect();
            if cells[1] == "serving" && cells[3..] == ["3", "48", "48", &peer] {
                return;
            }
            eprintln!("{row}");
        }
    };

    soon("the row", is_up_to_date).await;
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let example = Example::start(&[]).await;

    let answer = example.get("/other").await;

    assert!(answer.head.starts_with("HTTP/1.1 404"), "{}", answer.head);
}

#[tokio::test]
async fn spans_are_exported_with_their_names_and_attributes() {
    let example = Example::start(&[]).await;
    let mut client = example.connect().await;
    echo(&mut client).await;
    let port = client.local_addr().unwrap().port();
    client.shutdown().await.unwrap();
    let end = soon("the end", client.read(&mut [0; 16])).await;
    assert_eq!(end.unwrap(), 0);

    let (status, said) = example.terminated().await;

    assert!(status.success());
    let spans: Vec<_> = said.split("Span #").collect();
    let named = |name: &str| {
        let name = format!("Name         : {name}\n");
        let found = spans.iter().find(|span| span.contains(&name));
        *found.unwrap_or_else(|| panic!("no {name} in\n{said}"))
    };
    let (connection, request) = (named("tcp.connection"), named("request"));
    let id = |span: &str, field: &str| {
        let (_, rest) = span.split_once(field).unwrap();
        rest.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert!(connection.contains("Kind         : Server"));
    assert!(
        connection.contains(&format!("network.peer.port: I64({port})")),
        "{connection}"
    );
    assert!(
        connection.contains("close.reason: String(Owned(\"peer_closed\"))"),
        "{connection}"
    );
    assert_eq!(id(request, "TraceId"), id(connection, "TraceId"));
    assert_eq!(id(request, "ParentSpanId"), id(connection, "SpanId"));
}

#[tokio::test]
async fn a_signal_drains_it() {
    let example = Example::start(&["--sample", "0"]).await;
    let mut client = example.connect().await;
    echo(&mut client).await;

    let (status, said) = example.terminated().await;

    assert!(status.success());
    assert!(
        said.ends_with("1 connections drained, 0 timed out, 0 cut off\n"),
        "{said}"
    );
    assert_eq!(client.read(&mut [0; 16]).await.unwrap(), 0);
}
