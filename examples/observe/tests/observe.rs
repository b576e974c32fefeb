//! Tests the example as its operator sees it: metrics agree with the load and are in a format that
//! Prometheus reads, connections are listed, spans are exported, and each action works.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// The time limit of each wait, far longer than any wait takes.
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
    agent: SocketAddr,
}

impl Example {
    async fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_observe"))
            .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .args(["--agent", "127.0.0.1:0"])
            .args(args)
            .env_remove("RUST_LOG")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("it starts");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let mut stdout = BufReader::new(stdout).lines();
        let mut address = async |prefix: &str| {
            let line = soon("an address", stdout.next_line()).await;
            let line = line.expect("stdout is text").expect("it listens");
            let address = line.strip_prefix(prefix).expect("an address");
            address.parse().expect("an address of TCP")
        };
        let lines = address("listening on ").await;
        let admin = address("admin pages on ").await;
        let agent = address("agent check on ").await;
        Self {
            child,
            stdout,
            lines,
            admin,
            agent,
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

    /// Requests an action, which must succeed. Returns the answer.
    async fn post(&self, path: &str) -> String {
        let answer = request(self.admin, "POST", path, "").await;
        assert!(
            answer.head.starts_with("HTTP/1.1 200"),
            "{path}: {}",
            answer.body
        );
        answer.body
    }

    /// Terminates the process by a signal. Returns its exit status, and everything that it printed
    /// after its addresses.
    async fn terminated(self) -> (ExitStatus, String) {
        let pid = self.child.id().expect("it was not waited for");
        kill(pid, Signal::TERM);
        self.ended().await
    }

    async fn ended(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        while let Some(line) = soon("a line", self.stdout.next_line()).await.expect("text") {
            said += &line;
            said += "\n";
        }
        let status = soon("its end", self.child.wait()).await;
        (status.expect("it is ours"), said)
    }
}

fn kill(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a process"), signal).expect("it is ours");
}

/// The answer to one request.
struct Answer {
    head: String,
    body: String,
}

async fn get(admin: SocketAddr, path: &str) -> Answer {
    request(admin, "GET", path, "").await
}

async fn request(admin: SocketAddr, method: &str, path: &str, headers: &str) -> Answer {
    let request =
        format!("{method} {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n{headers}\r\n");
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

/// Returns the sum of the server's series with this name and this label.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts are whole, and few"
)]
fn sum(series: &Series, name: &str, label: &str) -> usize {
    series
        .iter()
        .filter(|((is, labels), _)| is == name && labels.contains(label))
        .filter(|((_, labels), _)| labels.contains("server_name=\"observe\""))
        .map(|(_, value)| value)
        .sum::<f64>() as usize
}

#[tokio::test]
async fn it_explains_its_options() {
    let mut help = Command::new(env!("CARGO_BIN_EXE_observe"));

    let help = soon("the help", help.arg("--help").output()).await.unwrap();

    let text = String::from_utf8(help.stdout).unwrap();
    assert!(help.status.success());
    for option in ["--listen", "--admin", "--agent", "--deny", "--sample"] {
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
            // Every second connection stays open.
            (n % 2 == 0).then_some(stream)
        });
    }
    let mut staying = Vec::new();
    while let Some(client) = clients.join_next().await {
        staying.extend(client.unwrap());
        let answer = get(admin, "/metrics").await;
        parse(&answer.body);
    }
    let others = CLIENTS - staying.len();
    let load = CLIENTS * LINES;

    // Written bytes and ends are counted a moment after the peer sees them.
    let agrees = async {
        loop {
            let metrics = parse(&get(admin, "/metrics").await.body);
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
                CLIENTS,
                staying.len(),
                others,
                others,
                load,
                0,
                load,
                load * LINE.len(),
                load * LINE.len(),
            ];
            if told == done {
                return;
            }
            eprintln!("told {told:?}, done {done:?}");
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
            if cells[1] == "serving" && cells[3..] == ["3", "48", "48", "0", &peer] {
                return;
            }
            eprintln!("{row}");
        }
    };

    soon("the row", is_up_to_date).await;
    let json = example.get("/connections.json").await;
    assert!(json.head.contains("application/json"), "{}", json.head);
    let rows: Value = serde_json::from_str(&json.body).unwrap();
    let [row] = &rows.as_array().unwrap()[..] else {
        panic!("one connection, not {rows}");
    };
    for (key, value) in [
        ("phase", json!("serving")),
        ("requests", json!(3)),
        ("written", json!(48)),
        ("unacknowledged", json!(0)),
        ("client", json!(peer)),
    ] {
        assert_eq!(row[key], value, "{row}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let example = Example::start(&[]).await;

    let answer = example.get("/other").await;

    assert!(answer.head.starts_with("HTTP/1.1 404"), "{}", answer.head);
}

#[tokio::test]
async fn each_page_answers_head_and_names_its_methods_to_others() {
    let example = Example::start(&[]).await;

    for page in ["/", "/status", "/metrics", "/connections", "/live"] {
        let answer = request(example.admin, "HEAD", page, "").await;
        let head = answer.head.to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 200"), "{page}: {head}");
        assert!(answer.body.is_empty(), "{page}: {}", answer.body);
        let answer = request(example.admin, "PUT", page, "").await;
        let head = answer.head.to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 405"), "{page}: {head}");
        assert!(head.contains("\r\nallow: get, head"), "{page}: {head}");
    }
}

/// Returns the status and the first word of the answer to a readiness check.
async fn ready(example: &Example) -> (String, String) {
    let answer = example.get("/ready").await;
    let word = |text: &str, n| text.split([' ', ':']).nth(n).expect("a word").to_owned();
    (word(&answer.head, 1), word(&answer.body, 0))
}

/// Returns the answer to HAProxy's agent check.
async fn agent(example: &Example) -> String {
    let connected = soon("a connection", TcpStream::connect(example.agent)).await;
    let mut answer = String::new();
    let read = connected
        .expect("it listens")
        .read_to_string(&mut answer)
        .await;
    read.expect("it answers in text");
    answer
}

/// Opens a connection that is not accepted yet, and sends a line on it.
async fn waits(example: &Example) -> TcpStream {
    let mut client = example.connect().await;
    client.write_all(LINE).await.expect("it is open");
    let peer = client.local_addr().expect("it is bound").to_string();
    let table = example.get("/connections").await.body;
    assert!(!table.contains(&peer), "{table}");
    client
}

/// Connects, and waits until the connection is reset. That may happen before the connect returns.
async fn is_denied(example: &Example) {
    match soon("a connection", TcpStream::connect(example.lines)).await {
        Ok(mut client) => is_closed(&mut client).await,
        Err(err) => assert_eq!(err.kind(), io::ErrorKind::ConnectionReset),
    }
}

async fn is_closed(stream: &mut TcpStream) {
    // A reset counts as closed, too.
    let read = soon("the end", stream.read(&mut [0; 16])).await;
    assert_eq!(read.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_paused_server_is_not_ready_and_serves_who_waited_when_it_resumes() {
    let example = Example::start(&["--sample", "0"]).await;
    assert_eq!(ready(&example).await, ("200".into(), "ready".into()));
    assert!(example.post("/pause").await.starts_with("paused: "));

    let mut client = waits(&example).await;

    assert_eq!(ready(&example).await, ("503".into(), "paused".into()));
    assert_eq!(agent(&example).await, "up maint\n");
    assert!(example.post("/resume").await.starts_with("ready: "));
    let mut line = [0; LINE.len()];
    soon("the line", client.read_exact(&mut line))
        .await
        .unwrap();
    assert_eq!(line, LINE);
}

#[tokio::test]
async fn a_suspended_server_refuses_clients_until_it_resumes() {
    let example = Example::start(&["--sample", "0"]).await;
    let mut open = example.connect().await;
    echo(&mut open).await;

    let said = example.post("/suspend").await;

    assert!(said.starts_with("suspended: "), "{said}");
    let refused = async { while TcpStream::connect(example.lines).await.is_ok() {} };
    soon("a refusal", refused).await;
    echo(&mut open).await;
    assert!(example.post("/resume").await.starts_with("ready: "));
    let listens = async { while TcpStream::connect(example.lines).await.is_err() {} };
    soon("a connection", listens).await;
    echo(&mut example.connect().await).await;
}

#[tokio::test]
async fn the_limit_is_changed_and_removed() {
    let example = Example::start(&["--sample", "0"]).await;
    let mut first = example.connect().await;
    echo(&mut first).await;

    let said = example.post("/limit/1").await;

    assert!(
        said.starts_with("at_limit: ") && said.contains("limit 1 with "),
        "{said}"
    );
    let mut second = waits(&example).await;
    assert!(example.post("/limit/none").await.contains("no limit"));
    soon("the line", second.read_exact(&mut [0; LINE.len()]))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_lame_duck_serves_on_and_a_drain_is_watched_to_its_end() {
    let example = Example::start(&["--sample", "0"]).await;
    assert!(example.post("/lame-duck").await.starts_with("lame_duck: "));
    assert_eq!(ready(&example).await, ("503".into(), "lame_duck".into()));
    assert_eq!(agent(&example).await, "up drain\n");
    let mut client = example.connect().await;
    echo(&mut client).await;
    // The drain waits for the rest of this line.
    let (half, rest) = LINE.split_at(5);
    client.write_all(half).await.unwrap();
    let is_read = async { while !example.get("/connections").await.body.contains(" 21 ") {} };
    soon("the half", is_read).await;

    assert!(example.post("/drain").await.starts_with("draining: "));

    assert_eq!(ready(&example).await, ("503".into(), "draining".into()));
    let live = example.get("/live").await;
    assert!(live.head.starts_with("HTTP/1.1 200"), "{}", live.head);
    client.write_all(rest).await.unwrap();
    soon("the line", client.read_exact(&mut [0; LINE.len()]))
        .await
        .unwrap();
    is_closed(&mut client).await;
    let (status, said) = example.ended().await;
    assert!(status.success());
    assert!(said.starts_with("connections: 1 drained"), "{said}");
}

#[tokio::test]
async fn one_connection_is_closed_or_aborted_and_no_other() {
    let example = Example::start(&["--sample", "0"]).await;
    for how in ["close", "abort"] {
        let (mut other, mut client) = (example.connect().await, example.connect().await);
        echo(&mut other).await;
        echo(&mut client).await;
        let json = example.get("/connections.json").await;
        let rows: Vec<Value> = serde_json::from_str(&json.body).unwrap();
        let peer = json!(client.local_addr().unwrap().to_string());
        let row = rows.iter().find(|row| row["client"] == peer).unwrap();

        example
            .post(&format!("/connections/{}/{how}", row["id"]))
            .await;

        is_closed(&mut client).await;
        echo(&mut other).await;
    }
}

#[tokio::test]
async fn a_banned_address_is_cut_off_until_the_ban_is_lifted() {
    let example = Example::start(&["--sample", "0"]).await;
    let mut client = example.connect().await;
    echo(&mut client).await;

    example.post("/bans/127.0.0.1/600").await;

    is_closed(&mut client).await;
    is_denied(&example).await;
    let status = example.get("/status").await.body;
    assert!(status.contains("\n1 bans"), "{status}");
    let bans = example.get("/bans").await.body;
    assert!(bans.starts_with("127.0.0.1 5"), "{bans}");
    example.post("/bans/127.0.0.1/lift").await;
    assert_eq!(example.get("/bans").await.body, "");
    echo(&mut example.connect().await).await;
}

#[tokio::test]
async fn a_list_is_reloaded_and_one_that_cannot_be_read_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("denied");
    std::fs::write(&file, "203.0.113.0/24\n").unwrap();
    let deny = ["--sample", "0", "--deny", file.to_str().unwrap()];
    let example = Example::start(&deny).await;
    let mut client = example.connect().await;
    echo(&mut client).await;
    std::fs::write(&file, "no network\n").unwrap();
    let refused = request(example.admin, "POST", "/reload", "").await;
    assert!(refused.head.starts_with("HTTP/1.1 500"), "{}", refused.head);
    assert!(
        refused.body.starts_with("nothing was reloaded: "),
        "{}",
        refused.body
    );
    echo(&mut client).await;
    echo(&mut example.connect().await).await;

    std::fs::write(&file, "127.0.0.0/8\n").unwrap();
    example.post("/reload").await;

    is_closed(&mut client).await;
    is_denied(&example).await;
    std::fs::write(&file, "").unwrap();
    example.post("/reload").await;
    echo(&mut example.connect().await).await;
}

/// A process that is not a child of this one. It is killed when this value is dropped.
struct Killed(u32);

impl Drop for Killed {
    fn drop(&mut self) {
        kill(self.0, Signal::KILL);
    }
}

#[tokio::test]
async fn a_new_process_takes_all_addresses_over() {
    let example = Example::start(&["--sample", "0"]).await;
    let mut client = example.connect().await;
    echo(&mut client).await;

    let said = example.post("/replace").await;

    let pid = said.trim().strip_prefix("replaced by process ");
    let new = Killed(pid.expect("a process").parse().unwrap());
    assert_ne!(Some(new.0), example.child.id());
    is_closed(&mut client).await;
    echo(&mut example.connect().await).await;
    let status = example.get("/status").await.body;
    assert!(status.contains(&format!("process {}\n", new.0)), "{status}");
    assert_eq!(agent(&example).await, "up ready\n");
}

#[tokio::test]
async fn a_request_that_makes_no_sense_or_comes_from_a_web_page_changes_nothing() {
    let example = Example::start(&["--sample", "0"]).await;
    for (method, path, headers, status) in [
        ("POST", "/pause", "origin: http://example.com\r\n", "403"),
        ("GET", "/pause", "", "404"),
        ("PUT", "/pause", "", "405"),
        ("POST", "/stop", "", "404"),
        ("POST", "/limit/few", "", "400"),
        ("POST", "/connections/7/close", "", "404"),
        ("POST", "/bans/localhost/60", "", "400"),
        ("POST", "/reload", "", "404"),
    ] {
        let answer = request(example.admin, method, path, headers).await;
        let told = answer.head.split(' ').nth(1);
        assert_eq!(told, Some(status), "{method} {path}: {}", answer.body);
    }
    assert_eq!(ready(&example).await, ("200".into(), "ready".into()));
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
        said.ends_with("connections: 1 drained, 0 timed out, 0 aborted\n"),
        "{said}"
    );
    assert_eq!(client.read(&mut [0; 16]).await.unwrap(), 0);
}
