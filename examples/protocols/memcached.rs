//! A cache that speaks memcached's text protocol, for any client of memcached.
//!
//! ```sh
//! cd examples/protocols
//! cargo run --example memcached -- --memory 64
//! printf 'set tea 0 60 5\r\ngreen\r\nget tea coffee\r\n' | nc -N 127.0.0.1 11211
//! memcstat --servers=127.0.0.1
//! ```
//!
//! The keys, the values and 100 bytes of overhead for each item stay within `--memory`, because the
//! least recently used items are evicted. A `get` looks up each value only when the client has room
//! for it. So besides the items, the server holds at most one request and one value for each
//! connection, however slowly its client reads.
//!
//! It differs from memcached in four ways. The data block that a bad command announces is skipped,
//! so that it is never run as commands. An `exptime` is always a number of seconds from now, never
//! a date. `flush_all` takes no delay. A line of more than 64 KiB ends its connection, even if it
//! is a `get` of many keys.

use std::convert::Infallible;
use std::future::ready;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use clap::Parser;
use futures_util::stream;
use lru::LruCache;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::codec::Decoder;
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::{InOut, Lines, LinesError};
use tower_tcp::pipeline::Limits;
use tower_tcp::{BoxError, ConnectionService, Pipeline, Reply, Server, signal};

/// The maximum length of a key, in bytes.
const MAX_KEY: usize = 250;
/// The maximum length of a value, in bytes.
const MAX_VALUE: usize = 1024 * 1024;
/// The time for which a client may be silent. It is long, because clients keep connections for
/// later use. Without a limit, the connections of a machine that has vanished would stay open
/// forever.
const IDLE: Duration = Duration::from_secs(60 * 60);
/// The commands that are followed by a block of data. Its length is the fifth word of the command.
const STORE: [&[u8]; 6] = [b"set", b"add", b"replace", b"append", b"prepend", b"cas"];
/// The other commands with one key.
const CHANGE: [&[u8]; 4] = [b"incr", b"decr", b"delete", b"touch"];

const FORMAT: &str = "CLIENT_ERROR bad command line format";
const TOO_LARGE: &str = "SERVER_ERROR object too large for cache";

/// Speaks memcached's text protocol.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:11211")]
    listen: Vec<String>,

    /// Maximum memory of all items, in MiB.
    #[arg(long, default_value_t = 64)]
    memory: u32,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let args = Args::parse();
    let server = Server::builder().listen_all(args.listen).bind().await?;
    signal::install(&server.handle())?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
    }
    println!("{}", server.serve(stack(args.memory)).await?);
    Ok(())
}

/// Serves one cache of this many MiB to all connections.
pub(crate) fn stack<Io: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    memory: u32,
) -> impl ConnectionService<Io> + Clone {
    let cache = Arc::new(Mutex::new(Cache {
        items: LruCache::unbounded(), // any number of items, because `max` limits their bytes
        bytes: 0,
        max: (memory as usize) << 20,
        changes: 0,
    }));
    // The service never waits, so its futures are ready at once.
    let service = service_fn(move |request| ready(Ok::<_, Infallible>(reply(&cache, request))));
    // All replies, including values, are lines.
    Pipeline::new(|| InOut::new(Requests::default(), Lines::crlf()))
        .service(service)
        // A frame may consist of a line and a data block.
        .limits(Limits::default().max_frame(64 * 1024 + MAX_VALUE))
        .deadlines(Deadlines::default().first_byte(IDLE).idle(IDLE))
}

// The requests.

/// The line of a command, and its data block (empty for most commands) or the answer to a bad data
/// block.
type Request = (Bytes, Answer);

/// Decodes a line, and then a block of data, if the line announces one.
#[derive(Default)]
pub(crate) struct Requests {
    lines: Lines,
    /// A line whose data block has not arrived yet, and the length of the block, including its line
    /// ending.
    block: Option<(Bytes, usize)>,
    /// The number of bytes left to skip of a data block that is too large.
    skip: usize,
}

impl Decoder for Requests {
    type Item = Request;
    type Error = LinesError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Request>, LinesError> {
        let skipped = self.skip.min(src.len());
        src.advance(skipped);
        self.skip -= skipped;
        if self.skip == 0
            && self.block.is_none()
            && let Some(line) = self.lines.decode(src)?
        {
            match announced(&line) {
                None => return Ok(Some((line, Ok(Bytes::new())))),
                Some(len) if len <= MAX_VALUE => self.block = Some((copy(&line), len + 2)),
                Some(len) => {
                    self.skip = len + 2;
                    return Ok(Some((line, Err(TOO_LARGE))));
                }
            }
        }
        let arrived = self.block.take_if(|(_, len)| *len <= src.len());
        Ok(arrived.map(|(line, len)| {
            let data = src.split_to(len).strip_suffix(b"\r\n").map(copy);
            (line, data.ok_or("CLIENT_ERROR bad data chunk"))
        }))
    }

    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<Request>, LinesError> {
        let request = self.decode(src)?;
        if request.is_none() && (self.block.is_some() || self.skip > 0) {
            return Err(LinesError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(request)
    }
}

fn announced(line: &[u8]) -> Option<usize> {
    match words(line)[..] {
        [verb, _, _, _, len, ..] if STORE.contains(&verb) => Some(number::<u32>(len)? as usize),
        _ => None,
    }
}

fn words(line: &[u8]) -> Vec<&[u8]> {
    let words = line.split(|&byte| byte == b' ');
    words.filter(|word| !word.is_empty()).collect()
}

fn number<T: std::str::FromStr>(word: &[u8]) -> Option<T> {
    str::from_utf8(word).ok()?.parse().ok()
}

/// Copies bytes that are kept, because a slice would keep the connection's whole buffer in memory.
fn copy(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

// The answers.

/// An answer, or the text of an error.
type Answer<T = Bytes> = Result<T, &'static str>;

fn reply(cache: &Arc<Mutex<Cache>>, (line, data): Request) -> Reply<Bytes> {
    let mut words = words(&line);
    match words[..] {
        [b"get" | b"gets", ref keys @ ..] if keys.iter().any(|key| key.len() > MAX_KEY) => {
            return Bytes::from(FORMAT).into();
        }
        [b"get" | b"gets", _, ..] => return values(Arc::clone(cache), &words),
        [b"quit"] => return Reply::none().close(),
        [b"version" | b"stats" | b"quit", _, ..] => return Bytes::from("ERROR").into(),
        _ => {}
    }
    let noreply = words.pop_if(|word| *word == b"noreply").is_some();
    let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
    let answer = answer(&mut cache, &words, data).unwrap_or_else(Bytes::from);
    (!noreply).then_some(answer).into()
}

/// Returns the values as a stream. Each value is looked up only when the client has room for it, so
/// a connection holds at most one.
fn values(cache: Arc<Mutex<Cache>>, words: &[&[u8]]) -> Reply<Bytes> {
    let gets = words[0] == b"gets";
    let keys: Vec<_> = words[1..].iter().copied().map(copy).collect();
    let values = keys.into_iter().filter_map(move |key| {
        let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
        let item = cache.find(&key)?;
        let cas = gets.then_some(item.cas);
        let cas = cas.map_or(String::new(), |cas| format!(" {cas}"));
        let facts = format!(" {} {}{cas}", item.flags, item.value.len());
        let head = [b"VALUE ", &key[..], facts.as_bytes()].concat();
        Some([head.into(), item.value.clone()])
    });
    Reply::stream(stream::iter(values.flatten().chain(["END".into()]).map(Ok)))
}

fn answer(cache: &mut Cache, words: &[&[u8]], data: Answer) -> Answer {
    match *words {
        [verb, key, ..]
            if key.len() > MAX_KEY && (STORE.contains(&verb) || CHANGE.contains(&verb)) =>
        {
            Err(FORMAT)
        }
        [verb, key, flags, exptime, len, ref cas @ ..] if STORE.contains(&verb) => {
            if data.is_err() {
                cache.remove(key); // nobody may read the outdated value
            }
            number::<u32>(len).ok_or(FORMAT)?; // if not a number, the codec took no data
            let cas = number(cas.first().unwrap_or(&&b"0"[..])).ok_or(FORMAT)?;
            let new = Item {
                value: data?,
                flags: number(flags).ok_or(FORMAT)?,
                expires: expires(exptime).ok_or(FORMAT)?,
                cas,
            };
            let join = |one: &Bytes, two: &Bytes| [&one[..], two].concat().into();
            cache.replace(key, |old| match (verb, old) {
                (b"cas", None) => Err("NOT_FOUND"),
                (b"cas", Some(old)) if old.cas != new.cas => Err("EXISTS"),
                (b"add", Some(_)) => Err("NOT_STORED"),
                (b"replace" | b"append" | b"prepend", None) => Err("NOT_STORED"),
                (b"append", Some(old)) => Ok(old.with(join(&old.value, &new.value))),
                (b"prepend", Some(old)) => Ok(old.with(join(&new.value, &old.value))),
                _ => Ok(new),
            })?;
            Ok("STORED".into())
        }
        [b"incr", key, by] => count(cache, key, by, u64::wrapping_add),
        [b"decr", key, by] => count(cache, key, by, u64::saturating_sub),
        [b"delete", key] | [b"delete", key, b"0"] => {
            cache.find(key).ok_or("NOT_FOUND")?;
            cache.remove(key);
            Ok("DELETED".into())
        }
        [b"touch", key, exptime] => {
            let expires = expires(exptime).ok_or("CLIENT_ERROR invalid exptime argument")?;
            cache.find(key).ok_or("NOT_FOUND")?.expires = expires;
            Ok("TOUCHED".into())
        }
        [b"flush_all"] | [b"flush_all", b"0"] => {
            cache.items.clear();
            cache.bytes = 0;
            Ok("OK".into())
        }
        [b"stats"] => Ok(format!("STAT bytes {}\r\nEND", cache.bytes).into()),
        // Clients conclude from the version which commands they may use.
        [b"version"] => Ok("VERSION 1.4.8".into()),
        [b"verbosity", _] => Ok("OK".into()),
        _ => Err("ERROR"),
    }
}

fn count(cache: &mut Cache, key: &[u8], by: &[u8], count: fn(u64, u64) -> u64) -> Answer {
    let by = number(by).ok_or("CLIENT_ERROR invalid numeric delta argument")?;
    cache.replace(key, |old| {
        let old = old.ok_or("NOT_FOUND")?;
        let number = number(&old.value)
            .ok_or("CLIENT_ERROR cannot increment or decrement non-numeric value")?;
        Ok(old.with(count(number, by).to_string().into()))
    })
}

/// Parses the time until an item expires, in seconds. Zero means never, and a negative number means
/// at once.
fn expires(exptime: &[u8]) -> Option<Option<Instant>> {
    let exptime: i64 = number(exptime)?;
    let life = Duration::from_secs(exptime.try_into().unwrap_or(0));
    Some(Instant::now().checked_add(life).filter(|_| exptime != 0))
}

// The items.

struct Item {
    value: Bytes,
    flags: u32,
    expires: Option<Instant>,
    /// The number of its last change. No two changes have the same number.
    cas: u64,
}

impl Item {
    fn with(&self, value: Bytes) -> Self {
        Self { value, ..*self }
    }
}

struct Cache {
    /// The items, in the order of use.
    items: LruCache<Bytes, Item>,
    bytes: usize,
    max: usize,
    changes: u64,
}

impl Cache {
    /// Finds an item that has not expired, and makes it the most recently used.
    fn find(&mut self, key: &[u8]) -> Option<&mut Item> {
        let item = self.items.get_mut(key);
        item.filter(|item| item.expires.is_none_or(|at| at > Instant::now()))
    }

    fn remove(&mut self, key: &[u8]) {
        self.bytes -= self.items.pop_entry(key).as_ref().map_or(0, size);
    }

    /// Inserts or replaces an item, then evicts the least recently used items until the rest fits.
    /// Returns the new value.
    fn replace(&mut self, key: &[u8], new: impl FnOnce(Option<&Item>) -> Answer<Item>) -> Answer {
        let mut item = new(self.find(key).as_deref())?;
        let value = item.value.clone();
        if value.len() > MAX_VALUE {
            return Err(TOO_LARGE);
        }
        self.remove(key);
        self.changes += 1;
        item.cas = self.changes;
        let new = (copy(key), item);
        self.bytes += size(&new);
        self.items.put(new.0, new.1);
        while self.bytes > self.max {
            self.bytes -= self.items.pop_lru().as_ref().map_or(self.bytes, size);
        }
        Ok(value)
    }
}

fn size((key, item): &(Bytes, Item)) -> usize {
    100 + key.len() + item.value.len()
}
