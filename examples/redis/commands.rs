//! The request service of one connection: the implementation of each command.

use std::future::{Ready, ready};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Either};
use thiserror::Error;
use tokio::time::Instant;
use tower::Service;
use tower_tcp::{BoxError, Handle, Peer, Reply};

use super::channels::{Channels, Subscriber};
use super::resp::{Confirmation, Frame, ProtocolError, Request, Version, Words};
use super::store::{Condition, Store, StoreError, Text, number};

/// The length of the longest command name, `unsubscribe`.
const LONGEST_NAME: usize = 11;

/// The maximum number of channels of one connection. A channel that has no other listener takes
/// 1.3 KiB, a hundred times the bytes of a short name: 13 MiB for this many channels.
const MOST_CHANNELS: usize = 10_000;

/// The Redis release whose commands this server has. Clients read it to learn what a server
/// supports.
const REDIS_VERSION: &str = "2.0.0";

/// The state shared by all connections.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) channels: Arc<Channels>,
    /// The parameters that CONFIG GET returns.
    pub(crate) config: Vec<(&'static str, String)>,
    pub(crate) handle: Handle,
    pub(crate) started: Instant,
}

/// The request service of one connection.
pub(crate) struct Session {
    shared: Arc<Shared>,
    peer: Peer<Frame>,
    version: Version,
    /// Set by the first SUBSCRIBE.
    subscriber: Option<Arc<Subscriber>>,
}

/// The reason why a command was not run. The `Display` output is the text of the reply.
#[derive(Debug, Error)]
enum Refused {
    #[error("ERR unknown command '{0}'")]
    Unknown(String),
    #[error("ERR wrong number of arguments for '{0}' command")]
    Arguments(&'static str),
    #[error("ERR unknown subcommand or wrong number of arguments for '{0}'")]
    Subcommand(&'static str),
    #[error(
        "ERR Can't execute '{0}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are \
         allowed in this context"
    )]
    Subscribed(&'static str),
    #[error("ERR too many channels")]
    Channels,
    #[error("ERR syntax error")]
    Syntax,
    #[error("NOPROTO unsupported protocol version")]
    Version,
    #[error("ERR Syntax error in HELLO option '{0}'")]
    HelloOption(String),
    #[error("ERR invalid expire time in 'set' command")]
    ExpireTime,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Defines the commands, as Redis' COMMAND lists them: the name, the number of words including the
/// name (a minimum if negative), and the positions of the keys (first, last, step).
macro_rules! commands {
    ($($name:literal $command:ident $words:literal $keys:expr;)*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        enum Command { $($command),* }

        impl Command {
            const ALL: &[Self] = &[$(Self::$command),*];

            /// Finds a command by its lower-case name.
            #[inline]
            fn find(name: &[u8]) -> Option<Self> {
                $(if name == $name.as_bytes() { return Some(Self::$command); })*
                None
            }

            fn name(self) -> &'static str {
                match self { $(Self::$command => $name),* }
            }

            #[inline]
            fn words(self) -> isize {
                match self { $(Self::$command => $words),* }
            }

            fn keys(self) -> [i64; 3] {
                match self { $(Self::$command => $keys),* }
            }
        }
    };
}

commands! {
    "get" Get 2 [1, 1, 1];
    "set" Set -3 [1, 1, 1];
    "incr" Incr 2 [1, 1, 1];
    "lpush" LPush -3 [1, 1, 1];
    "lpop" LPop 2 [1, 1, 1];
    "lrange" LRange 4 [1, 1, 1];
    "mget" MGet -2 [1, -1, 1];
    "mset" MSet -3 [1, -1, 2];
    "del" Del -2 [1, -1, 1];
    "exists" Exists -2 [1, -1, 1];
    "ping" Ping -1 [0, 0, 0];
    "echo" Echo 2 [0, 0, 0];
    "publish" Publish 3 [0, 0, 0];
    "subscribe" Subscribe -2 [0, 0, 0];
    "unsubscribe" Unsubscribe -1 [0, 0, 0];
    "info" Info -1 [0, 0, 0];
    "config" Config -2 [0, 0, 0];
    "command" Listing -1 [0, 0, 0];
    "quit" Quit -1 [0, 0, 0];
    "hello" Hello -1 [0, 0, 0];
    "client" Client -2 [0, 0, 0];
}

impl Command {
    #[inline]
    fn of(request: &Request) -> Result<Self, Refused> {
        let name = request.words().next().unwrap_or_default();
        let mut small = [0; LONGEST_NAME];
        let command = small.get_mut(..name.len()).and_then(|small| {
            small.copy_from_slice(name);
            small.make_ascii_lowercase();
            Self::find(small)
        });
        let Some(command) = command else {
            return Err(Refused::Unknown(shown(name)));
        };
        let words = command.words();
        let right = if words < 0 {
            request.len() >= words.unsigned_abs()
        } else {
            request.len() == words.unsigned_abs()
        };
        if right {
            Ok(command)
        } else {
            Err(Refused::Arguments(command.name()))
        }
    }

    fn is_for_subscribers(self) -> bool {
        matches!(
            self,
            Self::Subscribe | Self::Unsubscribe | Self::Ping | Self::Quit
        )
    }
}

impl Session {
    pub(crate) fn new(shared: Arc<Shared>, peer: Peer<Frame>) -> Self {
        Self {
            shared,
            peer,
            version: Version::default(),
            subscriber: None,
        }
    }

    /// Returns whether the connection has subscriptions and speaks RESP2. Most commands are refused
    /// then, because the client could take a reply for a message. RESP3 distinguishes the two.
    fn is_subscribed(&self) -> bool {
        let subscriber = self.subscriber.as_ref();
        self.version == Version::Resp2 && subscriber.is_some_and(|it| it.count() > 0)
    }

    #[inline]
    fn run(&mut self, request: &Request) -> Result<Answer, Refused> {
        let command = Command::of(request)?;
        if !command.is_for_subscribers() && self.is_subscribed() {
            return Err(Refused::Subscribed(command.name()));
        }
        let store = &self.shared.store;
        let mut words = request.words();
        words.next();
        let args = words.clone();
        let mut arg = || words.next().unwrap_or_default();
        let frame = match command {
            Command::Get => optional(store.get(arg())?),
            Command::Set => set(store, args)?,
            Command::Incr => Frame::Integer(store.increment(arg())?),
            Command::LPush => Frame::count(store.push_front(arg(), args.skip(1))?),
            Command::LPop => optional(store.pop_front(arg())?),
            Command::LRange => {
                let (key, start, stop) = (arg(), number(arg())?, number(arg())?);
                let found = store.range(key, start, stop)?;
                return Ok(items(found.into_iter().map(Frame::Value)));
            }
            Command::MGet => return Ok(items(store.get_all(args).into_iter().map(optional))),
            Command::MSet if request.len().is_multiple_of(2) => {
                return Err(Refused::Arguments(command.name()));
            }
            Command::MSet => {
                let values = args.clone().skip(1).step_by(2);
                store.set_all(args.step_by(2).zip(values));
                Frame::OK
            }
            Command::Del => Frame::count(store.remove(args)),
            Command::Exists => Frame::count(store.count(args)),
            Command::Ping if request.len() > 2 => return Err(Refused::Arguments(command.name())),
            Command::Ping if self.is_subscribed() => {
                Frame::Array(vec![Frame::text("pong"), Frame::Bulk(request.share(arg()))])
            }
            Command::Ping if request.len() == 1 => Frame::PONG,
            Command::Ping => Frame::Bulk(request.share(arg())),
            Command::Echo => Frame::Bulk(request.share(arg())),
            Command::Publish => return Ok(self.publish(request)),
            Command::Subscribe => return self.subscribe(request),
            Command::Unsubscribe => return Ok(at_once(self.unsubscribe(request))),
            Command::Quit => return Ok(at_once(Reply::from(Frame::OK).close())),
            Command::Info => Frame::Bulk(self.shared.info().into()),
            Command::Config => self.shared.config(args)?,
            Command::Listing => listing(args)?,
            Command::Hello => self.hello(args)?,
            Command::Client => self.client(args)?,
        };
        Ok(at_once(frame.into()))
    }

    /// HELLO [2 | 3 [SETNAME name]]
    fn hello(&mut self, mut args: Words<'_>) -> Result<Frame, Refused> {
        let version = match args.next() {
            None => self.version,
            Some(b"2") => Version::Resp2,
            Some(b"3") => Version::Resp3,
            Some(_) => return Err(Refused::Version),
        };
        while let Some(option) = args.next() {
            // There are no users, so AUTH is an error, too.
            if !option.eq_ignore_ascii_case(b"setname") || args.next().is_none() {
                return Err(Refused::HelloOption(shown(option)));
            }
        }
        self.version = version;
        let number = match version {
            Version::Resp2 => 2,
            Version::Resp3 => 3,
        };
        let told = vec![
            (Frame::text("server"), Frame::text("tower-tcp")),
            (Frame::text("version"), Frame::text(REDIS_VERSION)),
            (Frame::text("proto"), Frame::Integer(number)),
            (Frame::text("id"), self.id()),
            (Frame::text("mode"), Frame::text("standalone")),
            (Frame::text("role"), Frame::text("master")),
            (Frame::text("modules"), Frame::Array(Vec::new())),
        ];
        Ok(Frame::Hello(version, Box::new(Frame::Map(told))))
    }

    /// CLIENT ID | SETNAME name | SETINFO attribute value. A client's name is accepted but not
    /// stored.
    fn client(&self, args: Words<'_>) -> Result<Frame, Refused> {
        let args: Vec<_> = args.take(4).collect();
        match args.as_slice() {
            [verb] if verb.eq_ignore_ascii_case(b"id") => Ok(self.id()),
            [verb, _name] if verb.eq_ignore_ascii_case(b"setname") => Ok(Frame::OK),
            [verb, _name, _value] if verb.eq_ignore_ascii_case(b"setinfo") => Ok(Frame::OK),
            _ => Err(Refused::Subcommand("client")),
        }
    }

    fn id(&self) -> Frame {
        let id = self.peer.info().id().get();
        Frame::Integer(i64::try_from(id).unwrap_or(i64::MAX))
    }

    fn publish(&self, request: &Request) -> Answer {
        let mut words = request.words().skip(1);
        let mut arg = || request.share(words.next().unwrap_or_default());
        let (channel, payload) = (arg(), arg());
        let channels = Arc::clone(&self.shared.channels);
        let published = async move {
            let listeners = channels.publish(channel, payload).await;
            Ok(Frame::count(listeners).into())
        };
        Either::Right(published.boxed())
    }

    fn subscribe(&mut self, request: &Request) -> Result<Answer, Refused> {
        let subscriber = Arc::clone(self.subscriber.get_or_insert_with(|| {
            let channels = Arc::clone(&self.shared.channels);
            Arc::new(Subscriber::new(channels, self.peer.clone()))
        }));
        if subscriber.count() + request.len() - 1 > MOST_CHANNELS {
            return Err(Refused::Channels);
        }
        // The names are copied, because they live as long as the subscription.
        let names: Vec<_> = request
            .words()
            .skip(1)
            .map(Bytes::copy_from_slice)
            .collect();
        let subscribed = async move {
            for name in names {
                subscriber.subscribe(name).await?;
            }
            Ok(Reply::none())
        };
        Ok(Either::Right(subscribed.boxed()))
    }

    /// Leaves the named channels, or all channels if none is named.
    fn unsubscribe(&self, request: &Request) -> Reply<Frame> {
        let named = request.words().skip(1).map(Bytes::copy_from_slice);
        let mut names: Vec<_> = named.collect();
        if let (true, Some(subscriber)) = (names.is_empty(), &self.subscriber) {
            names = subscriber.channels();
        }
        let leave = |name: &Bytes| match &self.subscriber {
            Some(subscriber) => subscriber.unsubscribe(name),
            None => 0,
        };
        let mut left: Vec<_> = names
            .into_iter()
            .map(|name| {
                let left = leave(&name);
                Confirmation::Unsubscribed(Some(name), left)
            })
            .collect();
        if left.is_empty() {
            left.push(Confirmation::Unsubscribed(None, 0));
        }
        let frames = left.into_iter().map(Box::new).map(Frame::Confirmation);
        frames.collect::<Vec<_>>().into()
    }
}

/// The future of a reply. An immediate reply needs no allocation. A reply that waits for other
/// connections is boxed.
type Answer = Either<Ready<Answered>, BoxFuture<'static, Answered>>;
type Answered = Result<Reply<Frame>, BoxError>;

impl Service<Result<Request, ProtocolError>> for Session {
    type Response = Reply<Frame>;
    type Error = BoxError;
    type Future = Answer;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, request: Result<Request, ProtocolError>) -> Answer {
        match request {
            Ok(request) => self
                .run(&request)
                .unwrap_or_else(|refused| at_once(Frame::Error(refused.to_string()).into())),
            Err(malformed) => {
                let told = Frame::Error(format!("ERR Protocol error: {malformed}"));
                at_once(Reply::from(told).close())
            }
        }
    }
}

fn at_once(reply: Reply<Frame>) -> Answer {
    Either::Left(ready(Ok(reply)))
}

/// Returns an array as a reply of many frames, one for each item.
fn items(items: impl ExactSizeIterator<Item = Frame>) -> Answer {
    let beginning = std::iter::once(Frame::Items(items.len()));
    at_once(beginning.chain(items).collect::<Vec<_>>().into())
}

fn optional(value: Option<Text>) -> Frame {
    value.map_or(Frame::Null, Frame::Value)
}

/// Returns a word of a request for an error message: escaped, and at most 128 bytes of it.
fn shown(word: &[u8]) -> String {
    word[..word.len().min(128)].escape_ascii().to_string()
}

/// SET key value [NX | XX] [EX seconds | PX milliseconds]
fn set(store: &Store, mut args: Words<'_>) -> Result<Frame, Refused> {
    let (key, value) = (
        args.next().unwrap_or_default(),
        args.next().unwrap_or_default(),
    );
    let mut condition = Condition::Always;
    let mut expires = None;
    while let Some(option) = args.next() {
        let once = if option.eq_ignore_ascii_case(b"nx") {
            std::mem::replace(&mut condition, Condition::IfAbsent) == Condition::Always
        } else if option.eq_ignore_ascii_case(b"xx") {
            std::mem::replace(&mut condition, Condition::IfPresent) == Condition::Always
        } else if option.eq_ignore_ascii_case(b"ex") {
            let after = time(args.next())?.map(Duration::from_secs);
            expires.replace(after.ok_or(Refused::ExpireTime)?).is_none()
        } else if option.eq_ignore_ascii_case(b"px") {
            let after = time(args.next())?.map(Duration::from_millis);
            expires.replace(after.ok_or(Refused::ExpireTime)?).is_none()
        } else {
            false
        };
        if !once {
            return Err(Refused::Syntax);
        }
    }
    let done = store.set(key, value, condition, expires);
    Ok(if done { Frame::OK } else { Frame::Null })
}

/// Parses a time. Returns `None` if it is not greater than zero.
fn time(word: Option<&[u8]>) -> Result<Option<u64>, Refused> {
    let n = number(word.ok_or(Refused::Syntax)?)?;
    Ok(u64::try_from(n).ok().filter(|&n| n > 0))
}

impl Shared {
    fn info(&self) -> String {
        let (keys, expires) = self.store.len();
        let uptime = self.started.elapsed().as_secs();
        let clients = self.handle.live();
        let channels = self.channels.len();
        format!(
            "# Server\r\nserver_name:tower-tcp\r\nredis_version:{REDIS_VERSION}\r\n\
             uptime_in_seconds:{uptime}\r\n\r\n\
             # Clients\r\nconnected_clients:{clients}\r\n\r\n\
             # Stats\r\npubsub_channels:{channels}\r\n\r\n\
             # Keyspace\r\ndb0:keys={keys},expires={expires}\r\n"
        )
    }

    /// CONFIG GET name|* [..]
    fn config(&self, mut args: Words<'_>) -> Result<Frame, Refused> {
        let verb = args.next().unwrap_or_default();
        if !verb.eq_ignore_ascii_case(b"get") || args.clone().next().is_none() {
            return Err(Refused::Subcommand("config"));
        }
        let asked = |name: &str| {
            args.clone()
                .any(|arg| arg == b"*" || arg.eq_ignore_ascii_case(name.as_bytes()))
        };
        let told = self.config.iter().filter(|(name, _)| asked(name));
        let pair = |(name, value): &(&'static str, String)| {
            (Frame::text(name), Frame::Bulk(value.clone().into()))
        };
        Ok(Frame::Map(told.map(pair).collect()))
    }
}

/// COMMAND [COUNT | DOCS ..]
fn listing(mut args: Words<'_>) -> Result<Frame, Refused> {
    let told = |command: &Command| {
        let numbers = command.keys().map(Frame::Integer);
        let arity = i64::try_from(command.words()).unwrap_or_default();
        let mut told = vec![
            Frame::text(command.name()),
            Frame::Integer(arity),
            Frame::Array(Vec::new()), // no flags
        ];
        told.extend(numbers);
        Frame::Array(told)
    };
    match args.next() {
        None => Ok(Frame::Array(Command::ALL.iter().map(told).collect())),
        Some(verb) if verb.eq_ignore_ascii_case(b"count") => Ok(Frame::count(Command::ALL.len())),
        Some(verb) if verb.eq_ignore_ascii_case(b"docs") => Ok(Frame::Map(Vec::new())),
        Some(_) => Err(Refused::Subcommand("command")),
    }
}
