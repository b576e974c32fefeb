//! The `rpc` example serves clients that Apache Thrift generates, and no frame harms another
//! connection.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tower_tcp::EndReason;
use tower_tcp::testkit::{Served, faults, serve};

use process::{Example, installed, python, python_has, soon};
use rpc::{IDL, stack};
use support::{Clients, Ends};

#[path = "../../../tests/support/process.rs"]
mod process;
#[path = "../rpc.rs"]
#[expect(dead_code, reason = "its `main` runs in a process of its own")]
mod rpc;
#[path = "../../../tests/support/mod.rs"]
mod support;

// The kinds of messages.
const CALL: u8 = 1;
const REPLY: u8 = 2;
const EXCEPTION: u8 = 3;
const ONEWAY: u8 = 4;

// The types of a `TApplicationException`.
const UNKNOWN_METHOD: u8 = 1;
const PROTOCOL_ERROR: u8 = 7;

/// The longest string.
const LONGEST: usize = 30 * 1024;

/// Arguments that are the key `a`: field 1, a string, and the end of the struct.
const KEY: &[u8] = b"\x0b\0\x01\0\0\0\x01a\0";

fn frame(bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).expect("it is short");
    [&len.to_be_bytes(), bytes].concat()
}

fn message(kind: u8, name: &str, number: u8, rest: &[u8]) -> Vec<u8> {
    let len = u8::try_from(name.len()).expect("it is short");
    let version = [0x80, 1, 0, kind, 0, 0, 0, len];
    frame(&[&version, name.as_bytes(), &[0, 0, 0, number], rest].concat())
}

/// A call that puts the value `x` at the key `a`, if the entry has this version.
fn put(number: u8, version: u8) -> Vec<u8> {
    let entry = b"\x0b\0\x01\0\0\0\x01a\x0b\0\x02\0\0\0\x01x\x0a\0\x03\0\0\0\0\0\0\0";
    let args = [b"\x0c\0\x01", &entry[..], &[version, 0, 0]].concat();
    message(CALL, "put", number, &args)
}

/// Sends the bytes, finishes sending, and returns all answers.
async fn exchange(served: &Served, input: &[u8]) -> Vec<u8> {
    let mut client = served.stream().await;
    client.write_all(input).await.expect("the server reads");
    // The server may have closed already.
    let _closed = client.shutdown().await;
    let mut output = Vec::new();
    client.read_to_end(&mut output).await.expect("it ends");
    output
}

/// Checks that these bytes are one `TApplicationException` of this type (`kind`).
fn assert_refused(answer: &[u8], number: u8, kind: u8) {
    let (len, frame) = answer.split_first_chunk().expect("a length");
    let len = usize::try_from(u32::from_be_bytes(*len)).expect("it is short");
    assert_eq!(frame.len(), len, "{answer:?}");
    assert_eq!(answer[4..8], [0x80, 1, 0, EXCEPTION], "{answer:?}");
    let name = usize::from(answer[11]);
    assert_eq!(answer[12 + name..][..4], [0, 0, 0, number], "{answer:?}");
    // The last field is the type.
    assert!(answer.ends_with(&[8, 0, 2, 0, 0, 0, kind, 0]), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn calls_are_answered_in_order_with_their_numbers() {
    let served = serve(stack());
    let calls = [
        put(7, 0),
        message(CALL, "get", 5, KEY),
        put(5, 0),
        message(ONEWAY, "forget", 0, KEY),
        message(CALL, "get", 9, KEY),
        message(CALL, "forget", 1, KEY),
    ];
    let entry = b"\x0b\0\x01\0\0\0\x01a\x0b\0\x02\0\0\0\x01x\x0a\0\x03\0\0\0\0\0\0\0\x01\0";
    let answers = [
        message(REPLY, "put", 7, b"\x0a\0\0\0\0\0\0\0\0\0\x01\0"),
        message(REPLY, "get", 5, &[b"\x0c\0\0", &entry[..], b"\0"].concat()),
        message(
            REPLY,
            "put",
            5,
            b"\x0c\0\x01\x0a\0\x01\0\0\0\0\0\0\0\x01\0\0",
        ),
        message(REPLY, "get", 9, b"\x0c\0\x01\x0b\0\x01\0\0\0\x01a\0\0"),
        message(REPLY, "forget", 1, b"\0"),
    ];

    assert_eq!(exchange(&served, &calls.concat()).await, answers.concat());
}

/// A field that is a string.
fn string(id: u8, bytes: &[u8]) -> Vec<u8> {
    [&[11, 0, id], &frame(bytes)[..]].concat()
}

#[tokio::test(start_paused = true)]
async fn the_longest_strings_are_stored_and_the_least_recently_used_entry_is_forgotten() {
    let served = serve(stack());
    let put = |key: &[u8], value: &[u8]| {
        let entry = [string(1, key), string(2, value)].concat();
        let args = [b"\x0c\0\x01", &entry[..], b"\0\0"].concat();
        message(CALL, "put", 1, &args)
    };
    let get = |key: &[u8]| message(CALL, "get", 1, &[&string(1, key)[..], b"\0"].concat());
    let (key, value) = ([b'k'; LONGEST], [b'v'; LONGEST]);

    exchange(&served, &put(&key, &value)).await;
    let too_long = put(&key, &[b'v'; LONGEST + 1]);
    assert_refused(&exchange(&served, &too_long).await, 1, PROTOCOL_ERROR);
    let others = (0..1023).flat_map(|number| put(number.to_string().as_bytes(), b""));
    exchange(&served, &others.collect::<Vec<_>>()).await;

    let long = exchange(&served, &get(&key)).await;
    let entry = [string(1, &key), string(2, &value)].concat();
    let version = b"\x0a\0\x03\0\0\0\0\0\0\0\x01\0";
    let result = [b"\x0c\0\0", &entry[..], version, b"\0"].concat();
    assert!(long == message(REPLY, "get", 1, &result));
    exchange(&served, &put(b"one more", b"")).await;
    for (key, is_kept) in [(&key[..], true), (b"0", false), (b"1", true)] {
        let result = exchange(&served, &get(key)).await.split_off(19);
        assert_eq!(result.starts_with(b"\x0c\0\0"), is_kept);
    }
}

#[tokio::test(start_paused = true)]
async fn bad_arguments_and_unknown_methods_are_answered_and_the_connection_goes_on() {
    let served = serve(stack());
    let after = message(CALL, "forget", 1, KEY);
    let answer = message(REPLY, "forget", 1, b"\0");
    // A struct within a struct, and so on.
    let deep = b"\x0c\0\x02".repeat(20_000);
    for (method, args, kind) in [
        ("take", KEY, UNKNOWN_METHOD),
        ("get", b"", PROTOCOL_ERROR),
        ("get", b"\0", PROTOCOL_ERROR),
        ("put", KEY, PROTOCOL_ERROR),
        ("put", b"\x0c\0\x01\0\0", PROTOCOL_ERROR),
        ("get", b"\x0b\0\x01\x7f\xff\xff\xffa", PROTOCOL_ERROR),
        ("get", b"\x0b\0\x01\xff\xff\xff\xffa", PROTOCOL_ERROR),
        ("get", b"\x0b\0\x01\0\0\0\x01\xff\0", PROTOCOL_ERROR),
        ("get", b"\x0f\0\x02\x01\x7f\xff\xff\xff", PROTOCOL_ERROR),
        ("get", &deep, PROTOCOL_ERROR),
    ] {
        let input = [message(CALL, method, 3, args), after.clone()].concat();
        let output = exchange(&served, &input).await;

        let refused = output.strip_suffix(&answer[..]);
        assert_refused(refused.expect("it went on"), 3, kind);
        assert_eq!(served.reason().await, EndReason::PeerClosed);
    }

    // A oneway call gets no answer, not even an exception.
    let input = [message(ONEWAY, "take", 3, b""), after].concat();
    assert_eq!(exchange(&served, &input).await, answer);
}

#[tokio::test(start_paused = true)]
async fn the_longest_frame_is_served_however_it_arrives() {
    let served = serve(stack());
    let short = message(CALL, "get", 3, KEY);
    // After the end of the arguments, the rest of a frame is not read.
    let padding = vec![0; 64 * 1024 + 4 - short.len()];
    let longest = frame(&[&short[4..], &padding[..]].concat());
    let answer = message(REPLY, "get", 3, b"\x0c\0\x01\x0b\0\x01\0\0\0\x01a\0\0");

    for pieces in [longest.chunks(longest.len()), longest.chunks(4)] {
        let mut client = served.stream().await;
        for piece in pieces {
            client.write_all(piece).await.expect("the server reads");
        }
        client.shutdown().await.expect("the server reads");
        let mut output = Vec::new();
        client.read_to_end(&mut output).await.expect("it ends");
        assert_eq!(output, answer);
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_is_no_call_ends_its_connection() {
    let served = serve(stack());
    let get = message(CALL, "get", 1, KEY);
    for (input, reason) in [
        (frame(b""), EndReason::CodecError),
        (message(REPLY, "get", 1, KEY), EndReason::CodecError),
        (message(9, "get", 1, KEY), EndReason::CodecError),
        // Another version, no version, and a name longer than the frame.
        (frame(b"\x80\x02\0\x01\0\0\0\x01a"), EndReason::CodecError),
        (frame(b"\0\0\0\x03get\x01\0\0\0\0\0"), EndReason::CodecError),
        (
            frame(b"\x80\x01\0\x01\x7f\xff\xff\xffget"),
            EndReason::CodecError,
        ),
        (get[..4].to_vec(), EndReason::Truncated),
        (get[..get.len() - 1].to_vec(), EndReason::Truncated),
        (frame(&[0; 64 * 1024]), EndReason::CodecError),
        (frame(&[0; 64 * 1024 + 1]), EndReason::FrameTooLarge),
        (b"\xff\xff\xff\xff".to_vec(), EndReason::FrameTooLarge),
    ] {
        let output = exchange(&served, &input).await;

        assert_eq!(output, b"", "{reason}");
        assert_eq!(served.reason().await, reason, "{:?}", &input[..4]);
    }
}

#[tokio::test(start_paused = true)]
async fn no_fault_of_a_connection_gives_a_wrong_answer() {
    // Two connections send these calls at once, so the answers must be the same each time.
    let calls = [
        put(1, 5),
        message(ONEWAY, "forget", 2, KEY),
        message(CALL, "get", 3, KEY),
    ];
    let answers = [
        message(REPLY, "put", 1, b"\x0c\0\x01\x0a\0\x01\0\0\0\0\0\0\0\0\0\0"),
        message(REPLY, "get", 3, b"\x0c\0\x01\x0b\0\x01\0\0\0\x01a\0\0"),
    ];

    let passed = faults::check(stack, calls.concat(), answers.concat()).await;
    passed.unwrap_or_else(|broken| panic!("{broken}"));
}

#[tokio::test]
async fn a_client_that_thrift_generates_calls_each_method() {
    if !installed("thrift") || !python_has("thrift") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let idl = dir.path().join("settings.thrift");
    // The client knows a method that the server does not.
    let newer = IDL.replace("    oneway", "    i64 count()\n    oneway");
    std::fs::write(&idl, newer).unwrap();
    let mut compiler = Command::new("thrift");
    compiler.args(["--gen", "py", "-out"]).arg(dir.path());
    let compiled = soon("thrift", compiler.arg(&idl).output()).await.unwrap();
    let said = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{said}");
    let server = Example::start("rpc", &[]).await;

    let port = server.addr().port().to_string();
    python(CLIENT, &[dir.path().to_str().unwrap(), &port]).await;
    assert!(server.stop().await.status.success());
}

const CLIENT: &str = r#"
import sys
sys.path.insert(0, sys.argv[1])
from settings import Settings
from settings.ttypes import Conflict, Entry, NotFound
from thrift.Thrift import TApplicationException
from thrift.protocol.TBinaryProtocol import TBinaryProtocol
from thrift.transport.TSocket import TSocket
from thrift.transport.TTransport import TFramedTransport

def client():
    transport = TFramedTransport(TSocket("127.0.0.1", int(sys.argv[2])))
    transport.open()
    return Settings.Client(TBinaryProtocol(transport))

def raised(kind, call, *args):
    try:
        call(*args)
    except kind as err:
        return err
    raise AssertionError(f"{kind} was not raised")

ana, bob = client(), client()
value = bytes(range(256)) * 100
assert ana.put(Entry("tea", value)) == 1
assert bob.get("tea") == Entry("tea", value, 1)
assert bob.put(Entry("tea", b"", version=1)) == 2
assert raised(Conflict, ana.put, Entry("tea", b"x", version=1)).version == 2
assert raised(Conflict, ana.put, Entry("tea", b"x", version=0)).version == 2
assert raised(Conflict, ana.put, Entry("milk", b"x", version=1)).version == 0
assert ana.get("tea") == Entry("tea", b"", 2)
assert raised(NotFound, ana.get, "milk").key == "milk"

err = raised(TApplicationException, ana.count)
assert err.type == TApplicationException.UNKNOWN_METHOD, err
err = raised(TApplicationException, ana.put, Entry("tea", bytes(40_000)))
assert err.type == TApplicationException.PROTOCOL_ERROR, err

# The client does not wait for an answer, but the server handles its next call after this one.
ana.forget("tea")
assert raised(NotFound, ana.get, "tea").key == "tea"
assert ana.put(Entry("täß", b"kept", version=0)) == 3
assert bob.get("täß").value == b"kept"
"#;
