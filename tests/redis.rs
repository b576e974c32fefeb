//! The `redis` example speaks its protocol with redis' own clients, with people, and with
//! attackers.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::process::Command;
use tokio::time::{Instant, advance};
use tokio_util::codec::{Decoder, Encoder};
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::pipeline::Watermarks;
use tower_tcp::testkit::{Served, faults, memory, serve_with};
use tower_tcp::{ConnectionService, EndReason, Handle, Peer, Pipeline, Server};

use channels::Channels;
use commands::{Session, Shared};
use process::{Example, soon};
use resp::{Frame, ProtocolError, Request, Resp};
use store::{Condition, Store};
use support::{Client, Clients, Ends};

#[path = "../examples/redis/channels.rs"]
mod channels;
#[path = "../examples/redis/commands.rs"]
mod commands;
#[path = "../examples/redis/inline.rs"]
mod inline;
#[path = "support/process.rs"]
mod process;
#[path = "../examples/redis/resp.rs"]
mod resp;
#[path = "../examples/redis/store.rs"]
mod store;
mod support;

const MAX_REQUEST: usize = 64 * 1024;
const MAX_UNREAD: usize = 256 * 1024;

// The codec.

type Decoded = Result<Vec<Vec<u8>>, ProtocolError>;

/// Decodes input that arrives in these pieces, up to the first error.
fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Decoded> {
    let mut codec = Resp::new(MAX_REQUEST);
    let mut input = BytesMut::new();
    let mut decoded = Vec::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        while let Some(item) = codec.decode(&mut input).expect("it does no I/O") {
            let words = |request: Request| {
                let words: Vec<_> = request.words().map(<[u8]>::to_vec).collect();
                assert_eq!(words.len(), request.len());
                words
            };
            let failed = item.is_err();
            decoded.push(item.map(words));
            if failed {
                return decoded;
            }
        }
    }
    decoded
}

/// Cuts bytes into pieces of these sizes, which repeat.
fn cut<'a>(mut bytes: &'a [u8], sizes: &[usize]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    for size in sizes.iter().cycle() {
        let (piece, rest) = bytes.split_at((*size).min(bytes.len()));
        pieces.push(piece);
        bytes = rest;
        if bytes.is_empty() {
            break;
        }
    }
    pieces
}

fn words(words: &[&str]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

fn array_of(words: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        bytes.extend_from_slice(word);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

fn one_request() -> impl Strategy<Value = Vec<Vec<u8>>> {
    proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 1..5)
}

/// Generates input that resembles requests more often than random bytes do.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        Just(&b"*"[..]),
        Just(&b"$"[..]),
        Just(&b"\r\n"[..]),
        Just(&b"\n"[..]),
        Just(&b"1"[..]),
        Just(&b"2"[..]),
        Just(&b"-1"[..]),
        Just(&b"99999999999"[..]),
        Just(&b"\""[..]),
        Just(&b"'"[..]),
        Just(&b"\\x4"[..]),
        Just(&b"ab"[..]),
        Just(&b" "[..]),
        Just(&b"\0\xff"[..]),
        Just(&b"*1\r\n$2\r\nab\r\n"[..]),
    ];
    proptest::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn requests_are_what_was_sent_however_they_are_cut(
        sent in proptest::collection::vec(one_request(), 1..8),
        sizes in proptest::collection::vec(1_usize..40, 1..8),
    ) {
        let bytes: Vec<u8> = sent.iter().flat_map(|request| array_of(request)).collect();

        let decoded = decode(cut(&bytes, &sizes));

        prop_assert_eq!(decoded, sent.into_iter().map(Ok).collect::<Vec<_>>());
    }

    #[test]
    fn hostile_input_means_the_same_however_it_is_cut(
        bytes in hostile(),
        sizes in proptest::collection::vec(1_usize..10, 1..8),
    ) {
        prop_assert_eq!(decode(cut(&bytes, &sizes)), decode([&bytes[..]]));
    }
}

#[test]
fn words_in_a_line_may_be_quoted() {
    let cases: [(&str, &[&str]); 8] = [
        ("PING\r\n", &["PING"]),
        ("  set  a\tb \n", &["set", "a", "b"]),
        (r#"set a "b c""#, &["set", "a", "b c"]),
        (r#"set "" ''"#, &["set", "", ""]),
        (r#"echo "\x41\x7a\n\t\"\\\q""#, &["echo", "Az\n\t\"\\q"]),
        (r#"echo "\xzz""#, &["echo", "xzz"]),
        (r"echo 'it\'s \n'", &["echo", r"it's \n"]),
        ("echo $5", &["echo", "$5"]),
    ];
    for (line, meant) in cases {
        let line = format!("{}\r\n", line.trim_end());

        assert_eq!(decode([line.as_bytes()]), [Ok(words(meant))], "{line}");
    }
}

#[test]
fn empty_requests_are_passed_over() {
    let decoded = decode([&b"\r\n*0\r\n\n  \r\n*0\r\nPING\r\n"[..]]);

    assert_eq!(decoded, [Ok(words(&["PING"]))]);
}

#[test]
fn malformed_requests_are_told_as_redis_tells_them() {
    let long = "x".repeat(MAX_REQUEST);
    let large = "$40000\r\n".to_owned() + &"x".repeat(40_000) + "\r\n";
    let cases = [
        ("*x\r\n", "invalid multibulk length"),
        ("*-1\r\n", "invalid multibulk length"),
        ("*1048577\r\n", "invalid multibulk length"),
        ("*99999999999999999999\r\n", "invalid multibulk length"),
        ("*1\r\r", "invalid multibulk length"),
        ("*\r\n", "invalid multibulk length"),
        ("*1\r\nPING\r\n", "expected '$', got 'P'"),
        ("*1\r\n*1\r\n$4\r\nPING\r\n", "expected '$', got '*'"),
        ("*1\r\n\u{0}", "expected '$', got '\\x00'"),
        ("*1\r\n$-1\r\n", "invalid bulk length"),
        ("*1\r\n$x\r\n", "invalid bulk length"),
        ("*1\r\n$65537\r\n", "invalid bulk length"),
        ("*1\r\n$999999999999\r\n", "invalid bulk length"),
        ("*1\r\n$4\r\nPINGxx", "expected CRLF behind a bulk string"),
        ("set \"a\r\n", "unbalanced quotes in request"),
        ("set 'a\r\n", "unbalanced quotes in request"),
        ("set \"a\"b\r\n", "unbalanced quotes in request"),
        (&long, "too big inline request"),
        (&format!("*2\r\n{large}$40000\r\n"), "too big request"),
    ];
    for (bytes, told) in cases {
        let decoded = decode([bytes.as_bytes()]);

        let [Err(err)] = decoded.as_slice() else {
            panic!("{bytes:?}: {decoded:?}");
        };
        assert_eq!(err.to_string(), told, "{bytes:?}");
    }
}

#[test]
fn a_request_may_be_as_large_as_the_limit_and_not_a_byte_larger() {
    // The rest of the request is `*1`, `$65522`, a line end after each, and one after the word.
    let word = vec![b'x'; MAX_REQUEST - 14];
    let fits = array_of(std::slice::from_ref(&word));
    let does_not = array_of(&[[&word[..], b"x"].concat()]);
    assert_eq!(fits.len(), MAX_REQUEST);

    assert_eq!(decode([&fits[..]]), [Ok(vec![word])]);
    assert_eq!(decode([&does_not[..]]), [Err(ProtocolError::TooLarge)]);
}

#[test]
fn nothing_is_reserved_for_what_is_announced() {
    let mut codec = Resp::new(usize::MAX);
    let mut input = BytesMut::from("*1048576\r\n$512000000\r\nx");
    let before = input.capacity();

    let decoded = codec.decode(&mut input).expect("it does no I/O");

    assert_eq!(decoded, None);
    assert_eq!(input.capacity(), before);
}

#[test]
fn replies_are_written_as_the_specification_has_them() {
    let nested = Frame::Array(vec![Frame::text("a"), Frame::Array(vec![Frame::Null])]);
    let cases = [
        (Frame::OK, "+OK\r\n"),
        (Frame::Error("ERR no".into()), "-ERR no\r\n"),
        (Frame::Integer(0), ":0\r\n"),
        (Frame::Integer(i64::MIN), ":-9223372036854775808\r\n"),
        (Frame::Integer(i64::MAX), ":9223372036854775807\r\n"),
        (Frame::text(""), "$0\r\n\r\n"),
        (
            Frame::Value(b"ten  bytes"[..].into()),
            "$10\r\nten  bytes\r\n",
        ),
        (Frame::Items(12), "*12\r\n"),
        (nested, "*2\r\n$1\r\na\r\n*1\r\n$-1\r\n"),
    ];
    for (frame, written) in cases {
        let mut output = BytesMut::new();

        Resp::new(0)
            .encode(frame, &mut output)
            .expect("memory takes it");

        assert_eq!(output, written);
    }
}

// The store.

#[tokio::test(start_paused = true)]
async fn a_key_is_gone_when_its_time_is_up() {
    let store = Store::default();
    let second = Some(Duration::from_secs(1));
    store.set(b"brief", b"x", Condition::Always, second);
    store.set(b"kept", b"x", Condition::Always, second);
    store.set(b"kept", b"x", Condition::Always, None);

    advance(Duration::from_millis(999)).await;
    assert_eq!(store.len(), (2, 1));
    advance(Duration::from_millis(1)).await;

    assert_eq!(store.len(), (1, 0));
    assert_eq!(store.get(b"brief"), Ok(None));
    assert!(store.set(b"brief", b"y", Condition::IfAbsent, None));
}

#[test]
fn a_part_of_a_list_may_be_counted_from_either_end() {
    let store = Store::default();
    let values = ["e", "d", "c", "b", "a"].map(str::as_bytes);
    assert_eq!(store.push_front(b"list", values.into_iter()), Ok(5));

    let cases = [
        (0, -1, "abcde"),
        (0, 0, "a"),
        (1, 2, "bc"),
        (-2, -1, "de"),
        (-100, 1, "ab"),
        (3, 100, "de"),
        (5, 9, ""),
        (2, 1, ""),
        (0, -6, ""),
        (i64::MIN, i64::MAX, "abcde"),
    ];
    for (start, stop, part) in cases {
        let found = store.range(b"list", start, stop).expect("it is a list");

        assert_eq!(found.concat(), part.as_bytes(), "{start} {stop}");
    }
}

// The service, in memory.

struct Redis {
    served: Served,
}

fn redis() -> Redis {
    let (listener, connector) = memory();
    let server = Server::from_listener(listener);
    let stack = stack(
        server.handle(),
        Deadlines::default().idle(None).first_byte(None),
    );
    let served = serve_with(server, connector, stack);
    Redis { served }
}

fn stack<Io>(handle: Handle, deadlines: Deadlines) -> impl ConnectionService<Io>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let shared = Arc::new(Shared {
        store: Store::default(),
        channels: Arc::new(Channels::new(Watermarks::below(MAX_UNREAD))),
        config: vec![("save", String::new()), ("timeout", "0".into())],
        handle,
        started: Instant::now(),
    });
    let make = service_fn(move |peer: Peer<Frame>| {
        let session = Session::new(Arc::clone(&shared), peer);
        std::future::ready(Ok::<_, Infallible>(session))
    });
    Pipeline::new(|| Resp::new(MAX_REQUEST))
        .make_service(make)
        .deadlines(deadlines)
}

impl Redis {
    async fn connect(&self) -> Client<DuplexStream> {
        self.served.client().await
    }

    /// Sends commands at once. Returns the lines of all replies.
    async fn says(&self, commands: &str) -> Vec<String> {
        let mut client = self.connect().await;
        client.send(commands).await;
        client.finish().await;
        client.rest().await
    }
}

#[tokio::test(start_paused = true)]
async fn commands_do_what_redis_says_they_do() {
    let cases: &[(&str, &[&str])] = &[
        (
            "PING\nping hi\nECHO 'a b'\n",
            &["+PONG", "$2", "hi", "$3", "a b"],
        ),
        ("GET k\nSET k v\nGET k\n", &["$-1", "+OK", "$1", "v"]),
        (
            "SET k v NX\nSET k w NX\nSET l w XX\n",
            &["+OK", "$-1", "$-1"],
        ),
        ("SET k v EX 10\nSET k w PX 9 XX\n", &["+OK", "+OK"]),
        (
            "SET k v EX 0\n",
            &["-ERR invalid expire time in 'set' command"],
        ),
        ("SET k v EX\nSET k v NX XX\n", &["-ERR syntax error"; 2]),
        (
            "SET k v PX ten\n",
            &["-ERR value is not an integer or out of range"],
        ),
        (
            "SET k 9\nINCR k\nINCR k\nGET k\nINCR n\n",
            &["+OK", ":10", ":11", "$2", "11", ":1"],
        ),
        (
            "SET k x\nINCR k\n",
            &["+OK", "-ERR value is not an integer or out of range"],
        ),
        (
            "SET k 007\nINCR k\nGET k\n",
            &[
                "+OK",
                "-ERR value is not an integer or out of range",
                "$3",
                "007",
            ],
        ),
        (
            "SET k v EX +9\nSET k v PX 09\nLRANGE l -0 1\n",
            &["-ERR value is not an integer or out of range"; 3],
        ),
        (
            "SET k 9223372036854775807\nINCR k\n",
            &["+OK", "-ERR increment or decrement would overflow"],
        ),
        (
            "MSET a 1 b 2\nMGET a x b\n",
            &["+OK", "*3", "$1", "1", "$-1", "$1", "2"],
        ),
        (
            "MSET a 1 b\n",
            &["-ERR wrong number of arguments for 'mset' command"],
        ),
        (
            "MSET a 1 b 2\nEXISTS a b a x\nDEL a x\nEXISTS a\n",
            &["+OK", ":3", ":1", ":0"],
        ),
        (
            "LPUSH l 1 2\nLPUSH l 3\nLRANGE l 0 -1\nLPOP l\n",
            &[":2", ":3", "*3", "$1", "3", "$1", "2", "$1", "1", "$1", "3"],
        ),
        (
            "LPUSH l 1\nLPOP l\nLPOP l\nEXISTS l\n",
            &[":1", "$1", "1", "$-1", ":0"],
        ),
        (
            "LPUSH l 1\nGET l\nMGET l\n",
            &[
                ":1",
                "-WRONGTYPE Operation against a key holding the wrong kind of value",
                "*1",
                "$-1",
            ],
        ),
        (
            "CONFIG GET timeout\nCONFIG GET none\n",
            &["*2", "$7", "timeout", "$1", "0", "*0"],
        ),
        ("COMMAND COUNT\n", &[":21"]),
        ("FLY me\n", &["-ERR unknown command 'FLY'"]),
        ("\"F\\r\\n+OK\"\n", &["-ERR unknown command 'F\\r\\n+OK'"]),
        (
            "GET\nGET a b\n",
            &["-ERR wrong number of arguments for 'get' command"; 2],
        ),
        ("PUBLISH nobody hears\n", &[":0"]),
        ("UNSUBSCRIBE\n", &["*3", "$11", "unsubscribe", "$-1", ":0"]),
        ("QUIT\nPING\n", &["+OK"]),
    ];
    for (commands, replies) in cases {
        assert_eq!(redis().says(commands).await, *replies, "{commands}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_malformed_request_is_told_behind_the_replies_before_it_and_is_the_last() {
    let redis = redis();

    let said = redis.says("PING\n*1\r\nPING\r\nPING\r\n").await;

    assert_eq!(
        said,
        ["+PONG", "-ERR Protocol error: expected '$', got 'P'"]
    );
    assert_eq!(redis.served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_gets_the_messages_of_its_channels_in_order_behind_the_confirmations() {
    let redis = redis();
    let mut subscribers = [(redis.connect().await, "*3"), (redis.connect().await, ">3")];
    subscribers[1].0.send("HELLO 3\n").await;
    while subscribers[1].0.line().await != "modules" {}
    assert_eq!(subscribers[1].0.line().await, "*0");
    for (subscriber, push) in &mut subscribers {
        let push = *push;
        subscriber.send("SUBSCRIBE a b\n").await;
        for (channel, n) in [("a", 1), ("b", 2)] {
            for line in [push, "$9", "subscribe", "$1", channel, &format!(":{n}")] {
                assert_eq!(subscriber.line().await, line);
            }
        }
    }

    // More messages than may wait for one turn of the subscriber's task.
    let messages: String = (100..200)
        .map(|n| format!("PUBLISH a {n}\nPUBLISH c {n}\n"))
        .collect();
    let counts = redis.says(&messages).await;

    let expected: Vec<_> = (0..100).flat_map(|_| [":2", ":0"]).collect();
    assert_eq!(counts, expected);
    for (subscriber, push) in &mut subscribers {
        let push = *push;
        for n in 100..200 {
            for line in [push, "$7", "message", "$1", "a", "$3", &n.to_string()] {
                assert_eq!(subscriber.line().await, line);
            }
        }
        assert!(subscriber.hears_nothing().await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_on_its_way_does_not_reach_who_has_left() {
    let redis = redis();
    let mut subscriber = redis.connect().await;
    let mut publisher = redis.connect().await;
    subscriber.send("SUBSCRIBE a b\n").await;
    while subscriber.line().await != ":2" {}

    // So many that most wait for room while the subscriber leaves the channels.
    publisher.send("PUBLISH a x\n".repeat(100)).await;
    subscriber
        .send("UNSUBSCRIBE a\nUNSUBSCRIBE b\nPING\n")
        .await;

    while subscriber.line().await != "unsubscribe" {}
    for line in [
        "$1",
        "a",
        ":1",
        "*3",
        "$11",
        "unsubscribe",
        "$1",
        "b",
        ":0",
        "+PONG",
    ] {
        assert_eq!(subscriber.line().await, line);
    }
    assert!(subscriber.hears_nothing().await);
}

#[tokio::test(start_paused = true)]
async fn an_array_far_beyond_the_high_mark_arrives_whole() {
    let redis = redis();
    let value = "x".repeat(32 * 1024);
    let mut client = redis.connect().await;
    assert_eq!(client.ask(&format!("SET k {value}")).await, "+OK");

    client
        .send(format!("MGET{}\nPING\n", " k".repeat(1000)))
        .await;

    assert_eq!(client.line().await, "*1000");
    for _ in 0..1000 {
        assert_eq!(client.line().await, "$32768");
        assert!(client.line().await == value);
    }
    assert_eq!(client.line().await, "+PONG");
}

#[tokio::test(start_paused = true)]
async fn one_who_names_channels_without_end_is_refused_and_goes_on() {
    let redis = redis();
    let mut subscriber = redis.connect().await;
    for channel in 0..10_000 {
        subscriber.send(format!("SUBSCRIBE {channel}\n")).await;
        while subscriber.line().await != format!(":{}", channel + 1) {}
    }

    let refused = subscriber.ask("SUBSCRIBE more").await;

    assert_eq!(refused, "-ERR too many channels");
    subscriber.send("UNSUBSCRIBE 0\nSUBSCRIBE more\n").await;
    while subscriber.line().await != ":10000" {}
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_may_do_only_what_subscribers_may_until_it_has_left() {
    let redis = redis();

    let said = redis
        .says("SUBSCRIBE a\nPING\nPING x y\nGET k\nUNSUBSCRIBE b\nUNSUBSCRIBE\nGET k\n")
        .await;

    assert_eq!(
        said.join(" "),
        "*3 $9 subscribe $1 a :1 \
         *2 $4 pong $0  \
         -ERR wrong number of arguments for 'ping' command \
         -ERR Can't execute 'get': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET \
         are allowed in this context \
         *3 $11 unsubscribe $1 b :1 \
         *3 $11 unsubscribe $1 a :0 \
         $-1"
    );
}

#[tokio::test(start_paused = true)]
async fn who_unsubscribes_or_leaves_is_not_published_to() {
    let redis = redis();
    let mut first = redis.connect().await;
    let mut second = redis.connect().await;
    first.send("SUBSCRIBE a\nUNSUBSCRIBE a\nPING\n").await;
    while first.line().await != "+PONG" {}
    second.send("SUBSCRIBE a\n").await;
    while second.line().await != ":1" {}
    assert_eq!(redis.says("PUBLISH a x\n").await, [":1"]);
    redis.served.end().await;

    drop(second);
    redis.served.end().await;

    assert_eq!(redis.says("PUBLISH a x\n").await, [":0"]);
    let info = redis.says("INFO\n").await;
    assert!(info.contains(&"pubsub_channels:0".to_owned()), "{info:?}");
    assert!(first.hears_nothing().await);
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_does_not_read_is_closed_and_holds_up_nobody() {
    let redis = redis();
    let mut slow = redis.connect().await;
    let mut reader = redis.connect().await;
    for subscriber in [&mut slow, &mut reader] {
        subscriber.send("SUBSCRIBE a\n").await;
        while subscriber.line().await != ":1" {}
    }
    let mut publisher = redis.connect().await;
    let publish = format!("PUBLISH a {}\n", "x".repeat(16 * 1024 - 1));

    let mut counts = Vec::new();
    for _ in 0..100 {
        publisher.send(&publish).await;
        for _ in 0..7 {
            reader.line().await;
        }
        counts.push(publisher.line().await);
    }

    assert_eq!(redis.served.reason().await, EndReason::SlowReader);
    // Unread messages exceed the mark by at most the last message.
    let taken = counts.iter().filter(|count| *count == ":2").count();
    assert!((16..32).contains(&taken), "{counts:?}");
    assert_eq!(counts.last().map(String::as_str), Some(":1"));
    drop(slow);
}

/// Returns the lines of the reply to HELLO in this version, without the connection's number.
fn hello(version: &str) -> Vec<String> {
    let head = if version == "3" { "%7" } else { "*14" };
    let map = format!(
        "{head} $6 server $9 tower-tcp $7 version $5 2.0.0 $5 proto :{version} $2 id \
         $4 mode $10 standalone $4 role $6 master $7 modules *0"
    );
    map.split(' ').map(str::to_owned).collect()
}

/// Removes the connection's number from replies to HELLO.
fn without_id(mut lines: Vec<String>) -> Vec<String> {
    let mut after_id = false;
    lines.retain(|line| !std::mem::replace(&mut after_id, line == "id"));
    lines
}

#[tokio::test(start_paused = true)]
async fn clients_that_begin_with_hello_are_served_with_their_defaults() {
    // As redis-py 8 and node-redis 6 begin. They ask for notices of maintenance, too, but do not
    // need them.
    let first: [&[&str]; 5] = [
        &["HELLO", "3"],
        &["CLIENT", "SETINFO", "LIB-NAME", "redis-py"],
        &["CLIENT", "SETINFO", "LIB-VER", "8.0.0"],
        &["CLIENT", "MAINT_NOTIFICATIONS", "ON"],
        &["GET", "k"],
    ];
    let redis = redis();
    let mut client = redis.connect().await;

    for request in first {
        client.send(array_of(&words(request))).await;
    }
    client.finish().await;

    let mut expected = hello("3");
    expected.extend(
        [
            "+OK",
            "+OK",
            "-ERR unknown subcommand or wrong number of arguments for 'client'",
            "_",
        ]
        .map(str::to_owned),
    );
    assert_eq!(without_id(client.rest().await), expected);
}

#[tokio::test(start_paused = true)]
async fn the_reply_to_hello_is_the_first_in_its_version() {
    let redis = redis();

    let said = redis
        .says(
            "GET k\nHELLO 3 SETNAME me\nGET k\nCONFIG GET timeout\nMGET k\nCOMMAND DOCS\n\
             HELLO 4\nHELLO 2 AUTH a b\nGET k\nHELLO\nHELLO 2\nGET k\n",
        )
        .await;

    let expected = [
        vec!["$-1".to_owned()],
        hello("3"),
        ["_", "%1", "$7", "timeout", "$1", "0", "*1", "_", "%0"]
            .map(str::to_owned)
            .into(),
        [
            "-NOPROTO unsupported protocol version",
            "-ERR Syntax error in HELLO option 'AUTH'",
            "_",
        ]
        .map(str::to_owned)
        .into(),
        hello("3"),
        hello("2"),
        vec!["$-1".to_owned()],
    ]
    .concat();
    assert_eq!(without_id(said), expected);
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_of_resp3_gets_pushes_and_may_do_anything() {
    let redis = redis();
    let mut subscriber = redis.connect().await;
    subscriber.send("HELLO 3\nSUBSCRIBE a\n").await;
    while subscriber.line().await != "subscribe" {}
    for line in ["$1", "a", ":1"] {
        assert_eq!(subscriber.line().await, line);
    }

    assert_eq!(redis.says("PUBLISH a x\n").await, [":1"]);
    subscriber
        .send("PING\nGET k\nUNSUBSCRIBE\nUNSUBSCRIBE\n")
        .await;
    subscriber.finish().await;

    assert_eq!(
        subscriber.rest().await.join(" "),
        ">3 $7 message $1 a $1 x +PONG _ >3 $11 unsubscribe $1 a :0 >3 $11 unsubscribe _ :0"
    );
}

#[tokio::test(start_paused = true)]
async fn every_fault_at_every_byte_leaves_whole_replies_and_no_listener_behind() {
    // Each conversation gets the same replies as the one before, if that one has left its channel.
    let input = "PUBLISH news x\r\n*3\r\n$3\r\nSET\r\n$1\r\nn\r\n$1\r\n9\r\nINCR n\r\n\
        SET l x\r\nDEL l\r\nLPUSH l a 'b c'\r\n\
        *4\r\n$6\r\nLRANGE\r\n$1\r\nl\r\n$1\r\n0\r\n$2\r\n-1\r\nMGET n none\r\n\
        SUBSCRIBE news\r\nGET n\r\nPING hi\r\n";
    let output = ":0\r\n+OK\r\n:10\r\n\
        +OK\r\n:1\r\n:2\r\n\
        *2\r\n$3\r\nb c\r\n$1\r\na\r\n*2\r\n$2\r\n10\r\n$-1\r\n\
        *3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n\
        -ERR Can't execute 'get': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET \
        are allowed in this context\r\n*2\r\n$4\r\npong\r\n$2\r\nhi\r\n";
    let handle = Server::from_listener(memory().0).handle();

    faults::check(
        move || stack(handle.clone(), Deadlines::default()),
        input,
        output,
    )
    .await
    .unwrap();
}

// The program, with redis' own clients.

async fn redis_cli(server: &Example, args: &[&str]) -> String {
    let port = server.addr().port().to_string();
    let mut command = Command::new("redis-cli");
    command.args(["-p", &port]).args(args);
    let output = soon("redis-cli", command.output()).await;
    let output = output.expect("redis-tools is installed");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("it prints text")
}

#[tokio::test]
async fn redis_cli_reads_what_it_wrote() {
    let redis = Example::start("redis", &[]).await;

    assert_eq!(redis_cli(&redis, &["set", "k", "a\r\nb"]).await, "OK\n");
    assert_eq!(redis_cli(&redis, &["get", "k"]).await, "a\r\nb\n");
    assert_eq!(redis_cli(&redis, &["lpush", "l", "1", "2"]).await, "2\n");
    assert_eq!(
        redis_cli(&redis, &["lrange", "l", "0", "-1"]).await,
        "2\n1\n"
    );
    assert_eq!(
        redis_cli(&redis, &["config", "get", "maxclients"]).await,
        "maxclients\n10000\n"
    );
    assert_eq!(redis_cli(&redis, &["-3", "get", "none"]).await, "\n");
    assert_eq!(
        redis_cli(&redis, &["-3", "--json", "mget", "k", "none"]).await,
        "[\"a\\r\\nb\",null]\n"
    );
    assert_eq!(
        redis_cli(&redis, &["-3", "--json", "config", "get", "maxclients"]).await,
        "{\"maxclients\":\"10000\"}\n"
    );
    let info = redis_cli(&redis, &["info"]).await;
    assert!(info.contains("connected_clients:"), "{info}");
    assert!(info.contains("db0:keys=2,expires=0\r\n"), "{info}");
}

#[tokio::test]
async fn redis_cli_subscribed_receives_what_another_publishes() {
    let redis = Example::start("redis", &[]).await;
    for version in ["-2", "-3"] {
        receives_what_another_publishes(&redis, version).await;
    }
}

async fn receives_what_another_publishes(redis: &Example, version: &str) {
    let mut listener = Command::new("redis-cli");
    listener
        .args(["-p", &redis.addr().port().to_string()])
        .args([version, "subscribe", "news"])
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true);
    let mut listener = listener.spawn().expect("redis-tools is installed");
    let stdout = listener.stdout.take().expect("it is a pipe");
    let mut heard = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(stdout));
    let mut next = async || {
        let line = soon("a line", heard.next_line()).await;
        line.expect("it prints text").expect("it goes on")
    };
    for line in ["subscribe", "news", "1"] {
        assert_eq!(next().await, line);
    }

    assert_eq!(
        redis_cli(redis, &["publish", "news", "hello you"]).await,
        "1\n"
    );

    for line in ["message", "news", "hello you"] {
        assert_eq!(next().await, line);
    }
}

#[tokio::test]
async fn redis_benchmark_runs_through_one_ahead_and_32() {
    for threads in ["1", "2"] {
        let redis = Example::start("redis", &["--threads", threads]).await;
        for (ahead, requests) in [("1", "500"), ("32", "6400")] {
            let port = redis.addr().port().to_string();
            let mut benchmark = Command::new("redis-benchmark");
            benchmark
                .args(["-p", &port, "--csv", "-P", ahead, "-n", requests])
                .args(["-r", "1000", "-t", "ping,set,get,incr,lpush,lpop,mset"]);

            let output = soon("redis-benchmark", benchmark.output()).await;

            let output = output.expect("redis-tools is installed");
            assert!(output.status.success(), "{output:?}");
            let said = String::from_utf8(output.stdout).expect("it prints text");
            assert_eq!(said.matches("\n\"").count(), 8, "{said}");
            assert!(!said.contains("ERR"), "{said}");
            assert_eq!(
                output.stderr,
                b"",
                "{:?}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let redis = Example::start("redis", &["--max-connections", "1"]).await;
    let mut first = process::Client::connect(redis.addr()).await;
    assert_eq!(first.ask("PING").await, "+PONG");

    let mut second = process::Client::connect(redis.addr()).await;

    assert_eq!(second.line().await, "-ERR max number of clients reached");
    assert_eq!(second.rest().await, b"");
    assert_eq!(first.ask("PING").await, "+PONG");
}

#[tokio::test]
async fn the_program_is_as_strict_as_it_is_told_to_be() {
    let redis = Example::start("redis", &["--max-request", "100"]).await;
    let mut client = process::Client::connect(redis.addr()).await;

    let told = client.ask("*2\r\n$3\r\nGET\r\n$101\r").await;

    assert_eq!(told, "-ERR Protocol error: invalid bulk length");
    assert_eq!(client.rest().await, b"");
    drop(client);
    let ended = redis.stop().await;
    assert!(ended.status.success());
    assert!(
        ended
            .said
            .last()
            .is_some_and(|said| said.ends_with("drained, 0 timed out, 0 aborted"))
    );
}
