//! A store of settings that speaks Apache Thrift's framed binary protocol.
//!
//! ```sh
//! cd examples/protocols
//! cargo run --example rpc -- --idl >settings.thrift && thrift --gen py settings.thrift
//! cargo run --example rpc &
//! alias call='PYTHONPATH=gen-py python3 gen-py/settings/Settings-remote -framed'
//! call put "Entry('tea', b'green')" && call get tea
//! ```
//!
//! A call with bad arguments, or of an unknown method, is answered with a `TApplicationException`.
//! A frame that is not a call ends its connection, because there is nothing to answer.

use std::future::ready;
use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use clap::Parser;
use lru::LruCache;
use thrift::ApplicationErrorKind::{ProtocolError, UnknownMethod};
use thrift::protocol::{TBinaryInputProtocol, TBinaryOutputProtocol, TFieldIdentifier, field_id};
use thrift::protocol::{TInputProtocol, TMessageIdentifier, TMessageType, TOutputProtocol, TType};
use thrift::{ApplicationError, TConfiguration};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{Decoder, LengthDelimitedCodec};
use tower::service_fn;
use tower_tcp::frame::{CodecExt, InOut};
use tower_tcp::pipeline::Limits;
use tower_tcp::{BoxError, ConnectionService, Pipeline, Reply, Server, signal};

pub(crate) const IDL: &str = "\
namespace py settings

struct Entry {
    1: required string key
    2: required binary value
    /** Each change gives a new version. In `put`: the version to replace, or 0 for a new entry. */
    3: optional i64 version
}
exception NotFound { 1: string key }
exception Conflict { 1: i64 version }

service Settings {
    Entry get(1: string key) throws (1: NotFound missing)
    i64 put(1: Entry entry) throws (1: Conflict conflict)
    oneway void forget(1: string key)
}
";

/// The maximum length of a frame, in bytes, without the four bytes of its length.
const MAX_FRAME: usize = 64 * 1024;
/// The maximum length of a string, in bytes. Two strings fit into a frame.
const MAX_STRING: usize = 30 * 1024;
/// The maximum number of entries. Each has two strings, so together they take at most 60 MiB. One
/// more entry evicts the least recently used one.
const MAX_ENTRIES: NonZero<usize> = NonZero::new(1024).expect("it is not zero");

/// Stores settings for clients of Apache Thrift.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:9090")]
    listen: Vec<String>,

    /// Print the interface definition and exit.
    #[arg(long)]
    idl: bool,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    if args.idl {
        print!("{IDL}");
        return Ok(());
    }
    let server = Server::builder().listen_all(args.listen).bind().await?;
    signal::install(&server.handle())?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
    }
    println!("{}", server.serve(stack()).await?);
    Ok(())
}

/// Serves one store to all connections.
pub(crate) fn stack<Io: AsyncRead + AsyncWrite + Unpin + Send + 'static>()
-> impl ConnectionService<Io> + Clone {
    let (entries, changes) = (LruCache::new(MAX_ENTRIES), 0);
    let store = Arc::new(Mutex::new(Store { entries, changes }));
    // The service never waits, so its futures are ready at once.
    let service = service_fn(move |request| {
        let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
        ready(store.reply(request))
    });
    // The type of the replies is named, because `LengthDelimitedCodec` also encodes `&[u8]`.
    Pipeline::new(|| InOut::new(calls(), LengthDelimitedCodec::new()))
        .service::<Bytes, _>(service)
        .limits(Limits::default().max_frame(4 + MAX_FRAME))
}

// The requests.

/// The method, number and kind of a call, and the call itself, or the error with which it is
/// answered.
type Request = (TMessageIdentifier, Result<Call, ApplicationError>);

enum Call {
    Get(String),
    Put(String, Bytes, Option<i64>),
    Forget(String),
}

/// Decodes frames of requests. An error of a decoder is the peer's fault, so it is logged at debug
/// level, unlike an error of the service.
///
/// The length stays in the buffer until its frame is complete, and is then part of the frame. If
/// the codec skipped it earlier, as it does by default, a client that leaves right after the length
/// would count as one that leaves between two frames.
fn calls() -> impl Decoder<Item = Request, Error = BoxError> {
    LengthDelimitedCodec::builder()
        .max_frame_length(MAX_FRAME)
        .num_skip(0)
        .length_adjustment(4)
        .new_codec()
        .try_map_decode(|frame| parse(&frame[4..]))
}

type Input<'a> = TBinaryInputProtocol<&'a [u8]>;

fn parse(frame: &[u8]) -> thrift::Result<Request> {
    // `thrift` allocates the announced length of a string before it reads the string, so no string
    // may be longer than the frame.
    let longest = MAX_STRING.min(frame.len());
    let limits = TConfiguration::builder().max_string_size(Some(longest));
    let mut input = TBinaryInputProtocol::with_config(frame, true, limits.build()?);
    let head = input.read_message_begin()?;
    let (TMessageType::Call | TMessageType::OneWay) = head.message_type else {
        return Err("a message that clients must not send".into());
    };
    let unknown = || ApplicationError::new(UnknownMethod, "unknown method");
    let call = match &head.name[..] {
        "get" => read_key(&mut input).map(Call::Get),
        "put" => read_entry(&mut input),
        "forget" => read_key(&mut input).map(Call::Forget),
        _ => return Ok((head, Err(unknown()))),
    };
    let bad = |err| ApplicationError::new(ProtocolError, format!("bad arguments: {err:?}"));
    Ok((head, call.map_err(bad)))
}

/// Reads a struct. `read` reads or skips each of its fields.
fn read_struct<'a>(
    input: &mut Input<'a>,
    mut read: impl FnMut(&mut Input<'a>, i16, TType) -> thrift::Result<()>,
) -> thrift::Result<()> {
    input.read_struct_begin()?;
    loop {
        let field = input.read_field_begin()?;
        match field.field_type {
            TType::Stop => return input.read_struct_end(),
            kind => read(input, field_id(&field)?, kind)?,
        }
    }
}

/// Reads the arguments of a call that takes a key.
fn read_key(input: &mut Input) -> thrift::Result<String> {
    let mut key = None;
    read_struct(input, |input, id, kind| match (id, kind) {
        (1, TType::String) => input.read_string().map(|read| key = Some(read)),
        _ => input.skip(kind),
    })?;
    key.ok_or_else(|| "no key".into())
}

/// Reads the arguments of a call that takes an entry.
fn read_entry(input: &mut Input) -> thrift::Result<Call> {
    let (mut key, mut value, mut version) = (None, None, None);
    read_struct(input, |input, id, kind| match (id, kind) {
        (1, TType::Struct) => read_struct(input, |input, id, kind| match (id, kind) {
            (1, TType::String) => input.read_string().map(|read| key = Some(read)),
            (2, TType::String) => input.read_bytes().map(|read| value = Some(read.into())),
            (3, TType::I64) => input.read_i64().map(|read| version = Some(read)),
            _ => input.skip(kind),
        }),
        _ => input.skip(kind),
    })?;
    match (key, value) {
        (Some(key), Some(value)) => Ok(Call::Put(key, value, version)),
        _ => Err("no key, or no value".into()),
    }
}

// The answers.

type Output<'a> = TBinaryOutputProtocol<&'a mut Vec<u8>>;

struct Store {
    /// The values and versions by key, in the order of use.
    entries: LruCache<String, (Bytes, i64)>,
    changes: i64,
}

impl Store {
    fn reply(&mut self, (mut head, call): Request) -> thrift::Result<Reply<Bytes>> {
        let oneway = head.message_type == TMessageType::OneWay;
        head.message_type = match call {
            Ok(_) => TMessageType::Reply,
            Err(_) => TMessageType::Exception,
        };
        let mut frame = Vec::new();
        let mut out = Output::new(&mut frame, true);
        out.write_message_begin(&head)?;
        match call {
            Ok(call) => self.answer(call, &mut out)?,
            Err(err) => thrift::Error::write_application_error_to_out_protocol(&err, &mut out)?,
        }
        Ok((!oneway).then_some(Bytes::from(frame)).into())
    }

    /// Writes the result. Field 0 is the return value, and each exception has a field of its own.
    fn answer(&mut self, call: Call, out: &mut Output) -> thrift::Result<()> {
        match call {
            Call::Get(key) => {
                let entry = self.entries.get(&key);
                begin(out, TType::Struct, i16::from(entry.is_none()))?;
                write_bytes(out, 1, key.as_bytes())?;
                if let Some((value, version)) = entry {
                    write_bytes(out, 2, value)?;
                    write_number(out, 3, *version)?;
                }
                out.write_field_stop()?;
            }
            Call::Put(key, value, expected) => {
                let there = self.entries.peek(&key).map_or(0, |(_, version)| *version);
                if expected.is_none_or(|version| version == there) {
                    self.changes += 1;
                    self.entries.put(key, (value, self.changes));
                    write_number(out, 0, self.changes)?;
                } else {
                    begin(out, TType::Struct, 1)?;
                    write_number(out, 1, there)?;
                    out.write_field_stop()?;
                }
            }
            Call::Forget(key) => drop(self.entries.pop(&key)),
        }
        out.write_field_stop()
    }
}

fn begin(out: &mut Output, kind: TType, id: i16) -> thrift::Result<()> {
    out.write_field_begin(&TFieldIdentifier::new("", kind, id))
}

fn write_bytes(out: &mut Output, id: i16, bytes: &[u8]) -> thrift::Result<()> {
    begin(out, TType::String, id)?;
    out.write_bytes(bytes)
}

fn write_number(out: &mut Output, id: i16, number: i64) -> thrift::Result<()> {
    begin(out, TType::I64, id)?;
    out.write_i64(number)
}
