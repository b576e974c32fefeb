//! The `memcached` example answers as memcached does, and stays within its memory limit.

use std::ffi::OsStr;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::process::Command as Program;
use tokio::time::advance;
use tokio_util::codec::Decoder;
use tower_tcp::testkit::{Served, faults, memory_with_buffer, serve, serve_with};
use tower_tcp::{EndReason, Server};

use memcached::{Requests, stack};
use process::{Example, installed, python, python_has, soon};
use support::{Clients, Ends};

#[path = "../memcached.rs"]
#[expect(dead_code, reason = "its `main` runs in a process of its own")]
mod memcached;
#[path = "../../../tests/support/process.rs"]
mod process;
#[path = "../../../tests/support/mod.rs"]
mod support;

const MIB: usize = 1024 * 1024;

/// Requests, and memcached 1.6.18's answers to them, in this order on one connection.
const TALK: &[(&str, &str)] = &[
    ("get a b\r\n", "END\r\n"),
    ("set a 7 0 5\r\ngr\r\nn\r\n", "STORED\r\n"),
    ("set b 0 0 0\r\n\r\n", "STORED\r\n"),
    (
        "get  a none b\r\n",
        "VALUE a 7 5\r\ngr\r\nn\r\nVALUE b 0 0\r\n\r\nEND\r\n",
    ),
    ("add a 0 0 1\r\nx\r\n", "NOT_STORED\r\n"),
    ("replace none 0 0 1\r\nx\r\n", "NOT_STORED\r\n"),
    ("append none 0 0 1\r\nx\r\n", "NOT_STORED\r\n"),
    (
        "append a 0 0 1\r\n>\r\nprepend a 0 0 1\r\n<\r\n",
        "STORED\r\nSTORED\r\n",
    ),
    ("get a\r\n", "VALUE a 7 7\r\n<gr\r\nn>\r\nEND\r\n"),
    ("cas none 0 0 1 1\r\nx\r\n", "NOT_FOUND\r\n"),
    ("cas a 0 0 1 999999\r\nx\r\n", "EXISTS\r\n"),
    ("set n 5 0 2 noreply\r\n10\r\nincr n 5\r\n", "15\r\n"),
    ("incr n 2 noreply\r\ndecr n 16\r\n", "1\r\n"),
    ("decr n 5\r\n", "0\r\n"),
    (
        "incr n 18446744073709551615\r\nincr n 1\r\n",
        "18446744073709551615\r\n0\r\n",
    ),
    ("incr none 1\r\n", "NOT_FOUND\r\n"),
    (
        "incr n -1\r\n",
        "CLIENT_ERROR invalid numeric delta argument\r\n",
    ),
    (
        "incr a 1\r\n",
        "CLIENT_ERROR cannot increment or decrement non-numeric value\r\n",
    ),
    (
        "delete n noreply\r\ndelete n\r\ndelete b 0\r\n",
        "NOT_FOUND\r\nDELETED\r\n",
    ),
    ("touch a 100\r\ntouch b 100\r\n", "TOUCHED\r\nNOT_FOUND\r\n"),
    ("touch a x\r\n", "CLIENT_ERROR invalid exptime argument\r\n"),
    (
        "set d 0 0 1\r\nxyz\r\n",
        "CLIENT_ERROR bad data chunk\r\nERROR\r\n",
    ),
    (
        "set d 0 0 x\r\n",
        "CLIENT_ERROR bad command line format\r\n",
    ),
    (
        "set d 0 0 -1\r\n",
        "CLIENT_ERROR bad command line format\r\n",
    ),
    ("set gone 0 -1 1\r\nx\r\nget gone\r\n", "STORED\r\nEND\r\n"),
    (
        "get\r\nSET\r\n\r\nnonsense\r\n",
        "ERROR\r\nERROR\r\nERROR\r\nERROR\r\n",
    ),
    (
        "verbosity 1\r\nverbosity 1 noreply\r\nverbosity\r\n",
        "OK\r\nERROR\r\n",
    ),
    (
        "get a\r\nflush_all\r\nget a\r\n",
        "VALUE a 7 7\r\n<gr\r\nn>\r\nEND\r\nOK\r\nEND\r\n",
    ),
    ("quit\r\nversion\r\n", ""),
];

fn talk() -> (String, String) {
    TALK.iter().copied().unzip()
}

/// Sends the bytes, finishes sending, and returns all answers.
async fn exchange(client: DuplexStream, requests: &[u8]) -> String {
    let (mut reader, mut writer) = tokio::io::split(client);
    let mut answers = String::new();
    let (read, ()) = tokio::join!(reader.read_to_string(&mut answers), async {
        // After `quit`, the rest is not read.
        let _closed = writer.write_all(requests).await;
        let _closed = writer.shutdown().await;
    });
    read.expect("the answers are text");
    answers
}

fn bounded() -> Served {
    serve(stack(4))
}

#[tokio::test(start_paused = true)]
async fn pipelined_requests_are_answered_as_memcached_answers_them() {
    let (requests, answers) = talk();

    assert_eq!(bounded().exchange(&requests).await, answers);
}

#[tokio::test(start_paused = true)]
async fn answers_are_the_same_in_pieces_of_many_sizes() {
    let (requests, answers) = talk();

    for size in (1..=64).chain([requests.len()]) {
        let (listener, connector) = memory_with_buffer(size);
        let server = Server::from_listener(listener);
        let served = serve_with(server, connector, stack(4));
        let client = served.stream().await;
        assert_eq!(
            exchange(client, requests.as_bytes()).await,
            answers,
            "{size}"
        );
    }
}

#[test]
fn a_cut_at_any_byte_changes_no_request() {
    let (requests, _) = talk();
    let count = |pieces: [&[u8]; 2]| {
        let (mut codec, mut input, mut count) = (Requests::default(), BytesMut::new(), 0);
        for piece in pieces {
            input.extend_from_slice(piece);
            while codec.decode(&mut input).unwrap().is_some() {
                count += 1;
            }
        }
        assert!(input.is_empty());
        count
    };
    let whole = count([requests.as_bytes(), b""]);

    for cut in 0..requests.len() {
        let (first, second) = requests.as_bytes().split_at(cut);
        assert_eq!(count([first, second]), whole, "cut at {cut}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_fault_of_a_connection_gives_a_wrong_answer() {
    // Two connections send these requests at once, so the answers must be the same each time.
    let requests = "set a 7 0 5\r\ngr\r\nn\r\nget a b\r\nincr a 1\r\nx\r\n";
    let answers = "STORED\r\nVALUE a 7 5\r\ngr\r\nn\r\nEND\r\n\
        CLIENT_ERROR cannot increment or decrement non-numeric value\r\nERROR\r\n";

    let check = faults::check(|| stack(4), requests, answers);
    let passed = check.within(Duration::from_secs(2 * 60 * 60)).await;
    passed.unwrap_or_else(|broken| panic!("{broken}"));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_half_closes_within_a_block_gets_the_answers_before_it() {
    let served = bounded();

    for block in ["", "abc"] {
        let requests = format!("version\r\nset a 0 0 5\r\n{block}");
        assert_eq!(served.exchange(&requests).await, "VERSION 1.4.8\r\n");
        assert_eq!(served.reason().await, EndReason::Truncated, "{block:?}");
    }
    // A block that is too large is skipped.
    let requests = format!("set a 0 0 {}\r\nabc", MIB + 1);
    let refused = "SERVER_ERROR object too large for cache\r\n";
    assert_eq!(served.exchange(&requests).await, refused);
    assert_eq!(served.reason().await, EndReason::Truncated);
    assert_eq!(served.exchange("get a\r\n").await, "END\r\n");
}

#[tokio::test(start_paused = true)]
async fn a_value_that_is_too_large_is_skipped_and_replaces_the_old_one_by_nothing() {
    let served = bounded();
    for size in [MIB + 1, 10 * MIB] {
        let requests = format!(
            "set a 0 0 1\r\nx\r\nset a 0 0 {size}\r\n{}\r\nget a\r\n",
            "x".repeat(size)
        );

        assert_eq!(
            served.exchange(&requests).await,
            "STORED\r\nSERVER_ERROR object too large for cache\r\nEND\r\n"
        );
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }
}

#[tokio::test(start_paused = true)]
async fn keys_and_values_have_memcacheds_limits() {
    let (served, value) = (bounded(), "v".repeat(MIB));
    let (longest, longer) = ("k".repeat(250), "k".repeat(251));

    let requests = format!("set {longest} 0 0 {MIB}\r\n{value}\r\nget {longest}\r\n");
    let answers = served.exchange(&requests).await;
    assert_eq!(
        answers,
        format!("STORED\r\nVALUE {longest} 0 {MIB}\r\n{value}\r\nEND\r\n")
    );

    let requests = format!(
        "set {longer} 0 0 1\r\nx\r\nget {longer}\r\ngets a {longer}\r\nincr {longer} 1\r\n\
         decr {longer} 1\r\ndelete {longer}\r\ntouch {longer} 0\r\n\
         set {longer} 0 0 1 noreply\r\nx\r\nwhat {longer}\r\n"
    );
    let refused = "CLIENT_ERROR bad command line format\r\n".repeat(7);
    let answers = served.exchange(&requests).await;
    assert_eq!(answers, refused + "ERROR\r\n");
    let requests = format!("append {longest} 0 0 1\r\nx\r\n");
    let refused = "SERVER_ERROR object too large for cache\r\n";
    assert_eq!(served.exchange(&requests).await, refused);
}

#[tokio::test(start_paused = true)]
async fn a_line_without_an_end_closes_its_connection() {
    let served = bounded();
    let client = served.stream().await;

    let line = "x".repeat(64 * 1024 + 1);
    assert_eq!(exchange(client, line.as_bytes()).await, "");
    assert_eq!(served.reason().await, EndReason::FrameTooLarge);
}

#[tokio::test(start_paused = true)]
async fn the_least_recently_used_items_are_evicted_at_the_bound_of_memory() {
    let served = bounded();
    let value = "v".repeat(MIB - 100 - 1);
    let set = |key| format!("set {key} 0 0 {}\r\n{value}\r\n", value.len());

    // Four items fill the cache. Then `a` is read again, so `b` is the least recently used.
    let four: String = ["a", "b", "c", "d"].map(set).concat();
    assert_eq!(served.exchange(&four).await, "STORED\r\n".repeat(4));
    assert!(served.exchange("get a\r\n").await.starts_with("VALUE"));
    let stats = served.exchange("stats\r\n").await;
    assert!(
        stats.contains(&format!("STAT bytes {}\r\n", 4 * MIB)),
        "{stats}"
    );
    assert_eq!(served.exchange(&set("e")).await, "STORED\r\n");

    let answers = served
        .exchange("touch a 0\r\ntouch b 0\r\ntouch c 0\r\n")
        .await;
    assert_eq!(answers, "TOUCHED\r\nNOT_FOUND\r\nTOUCHED\r\n");
    let stats = served.exchange("stats\r\n").await;
    assert!(
        stats.contains(&format!("STAT bytes {}\r\n", 4 * MIB)),
        "{stats}"
    );
}

#[tokio::test(start_paused = true)]
async fn items_expire_after_their_time() {
    let served = bounded();
    let requests = "set a 0 10 1\r\nx\r\nset b 0 0 1\r\nx\r\ntouch b 20\r\n";
    assert_eq!(
        served.exchange(requests).await,
        "STORED\r\nSTORED\r\nTOUCHED\r\n"
    );

    advance(Duration::from_secs(9)).await;
    let both = "VALUE a 0 1\r\nx\r\nVALUE b 0 1\r\nx\r\nEND\r\n";
    assert_eq!(served.exchange("get a b\r\n").await, both);
    advance(Duration::from_secs(1)).await;
    assert_eq!(
        served.exchange("get a b\r\n").await,
        "VALUE b 0 1\r\nx\r\nEND\r\n"
    );
    assert_eq!(served.exchange("delete a\r\n").await, "NOT_FOUND\r\n");
    advance(Duration::from_secs(10)).await;
    assert_eq!(served.exchange("get a b\r\n").await, "END\r\n");
}

#[tokio::test(start_paused = true)]
async fn the_data_of_a_bad_command_never_runs_as_a_command() {
    let served = bounded();
    // memcached runs each of these data blocks as a command.
    let requests = "cas a 0 0 7\r\nversion\r\nset a x 0 7\r\nversion\r\n";

    assert_eq!(
        served.exchange(requests).await,
        "NOT_FOUND\r\nCLIENT_ERROR bad command line format\r\n"
    );
}

#[tokio::test(start_paused = true)]
async fn a_get_looks_up_a_value_only_when_its_client_has_room_for_it() {
    let served = bounded();
    let value = "v".repeat(MIB / 2);
    let set = |key| format!("set {key} 0 0 {}\r\n{value}\r\n", value.len());
    served.exchange(&["a", "b"].map(set).concat()).await;

    let mut slow = served.stream().await;
    slow.write_all(b"get a b\r\n").await.unwrap();
    let mut first = [0; 5];
    slow.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"VALUE");
    assert_eq!(served.exchange("delete b\r\n").await, "DELETED\r\n");
    slow.shutdown().await.unwrap();
    let mut rest = String::new();
    slow.read_to_string(&mut rest).await.unwrap();

    assert_eq!(rest, format!(" a 0 {}\r\n{value}\r\nEND\r\n", value.len()));
}

#[tokio::test]
async fn libmemcacheds_conformance_test_passes() {
    if !installed("memccapable") {
        return;
    }
    let server = Example::start("memcached", &[]).await;
    let port = server.addr().port().to_string();

    let mut memccapable = Program::new("memccapable");
    memccapable.args(["-h", "127.0.0.1", "-p", &port, "-a"]);
    let output = soon("memccapable", memccapable.output()).await.unwrap();

    let said = String::from_utf8_lossy(&output.stdout);
    // Failures are on its standard error, without the names of the tests.
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("[pass]").count(), 27, "{said}");
    assert!(server.stop().await.status.success());
}

#[tokio::test]
async fn libmemcacheds_tools_store_a_file_and_read_it() {
    if !installed("memccp") {
        return;
    }
    let server = Example::start("memcached", &[]).await;
    let servers = format!("--servers={}", server.addr());
    let file = tempfile::Builder::new().suffix(".txt").tempfile().unwrap();
    let text = "one\r\ntwo\n".repeat(50_000);
    std::fs::write(&file, &text).unwrap();
    let key = file.path().file_name().unwrap();
    let tool = async |program: &str, what: &OsStr| {
        let run = Program::new(program).arg(&servers).arg(what).output();
        let output = soon(program, run).await.unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        (output.status.success(), said)
    };

    assert!(tool("memccp", file.path().as_os_str()).await.0);
    // `memccat` adds a line ending to the value.
    assert_eq!(tool("memccat", key).await, (true, text + "\n"));
    assert!(tool("memctouch", key).await.0);
    assert!(tool("memcrm", key).await.0);
    assert!(!tool("memcexist", key).await.0);
}

#[tokio::test]
async fn pymemcache_reads_and_changes_items() {
    if !python_has("pymemcache") {
        return;
    }
    let server = Example::start("memcached", &[]).await;

    python(PYMEMCACHE, &[&server.addr().port().to_string()]).await;
    assert!(server.stop().await.status.success());
}

const PYMEMCACHE: &str = r#"
import sys
from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheClientError, MemcacheServerError
from pymemcache.serde import pickle_serde

def raised(kind, call, *args):
    try:
        call(*args)
    except kind as err:
        return str(err)
    raise AssertionError(f"{kind} was not raised")

server = ("127.0.0.1", int(sys.argv[1]))
client = Client(server, timeout=10, default_noreply=False, allow_unicode_keys=True)
assert client.version() == b"1.4.8"
assert client.get("a") is None
assert client.set("a", b"1") and client.get("a") == b"1"
assert client.set_many({"tëa": "green", "b": b"one\r\ntwo"}) == []
assert client.get_many(["a", "none", "tëa", "b"]) == {
    "a": b"1", "tëa": b"green", "b": b"one\r\ntwo"}

value, cas = client.gets("a")
assert client.cas("a", b"10", cas) is True
assert client.cas("a", b"11", cas) is False
assert client.cas("none", b"11", cas) is None
assert list(client.gets_many(["a", "none"])) == ["a"]

assert client.incr("a", 5) == 15 and client.decr("a", 20) == 0
assert client.incr("none", 1) is None
assert "non-numeric" in raised(MemcacheClientError, client.incr, "b", 1)

assert not client.add("a", b"x") and not client.replace("none", b"x")
assert client.set("a", b"x") and client.append("a", b">") and client.prepend("a", b"<")
assert client.get("a") == b"<x>"
assert client.touch("a", 100) and not client.touch("none", 100)
assert client.set("gone", b"x", expire=-1) and client.get("gone") is None

assert client.delete("a") and not client.delete("a")
assert client.delete_many(["b", "none"])
assert client.get_many(["a", "b"]) == {}

# Requests without replies, and then one with a reply.
client.set_many({str(number): b"x" for number in range(100)}, noreply=True)
client.delete("7", noreply=True)
assert len(client.get_many([str(number) for number in range(100)])) == 99

# The longest value, and one that is too long, after which the connection goes on.
longest = bytes(1024 * 1024)
assert client.set("long", longest) and client.get("long") == longest
raised(MemcacheServerError, client.set, "long", longest + b"x")
assert client.get("long") is None

# The type of a value is in its flags.
typed = Client(server, timeout=10, serde=pickle_serde)
typed.set("list", [1, "two"])
typed.set("number", 3)
assert typed.get_many(["list", "number"]) == {"list": [1, "two"], "number": 3}
typed.quit()

assert client.stats()[b"bytes"] > 0
assert client.flush_all() and client.stats()[b"bytes"] == 0
client.quit()
"#;
