//! A connection's life, by 100,000 random operations of its peer, its service and the rest of the program. No finished reply is lost, nothing
//! is out of order, and each connection ends once, for a reason that there was, and leaves nothing behind.
//!
//! What fails prints its seed. `TOWER_TCP_SEED=<seed>` begins with the same case again.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

mod support;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::future::pending;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::stream;
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf,
    ReadHalf, WriteHalf,
};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_util::codec::{Decoder, Encoder};
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::close::Linger;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{Closed, Crossing, Event, Limits, TrySendError, Upgrade, Watermarks};
use tower_tcp::{
    Address, BoxError, Connection, End, EndReason, Handle, Pipeline, Reply, Server, testkit,
};

use support::{Clients, Ends, each_way};

type Peer = tower_tcp::Peer<Out, Message>;

/// How many operations there are in all, unless something fails before.
const OPERATIONS: usize = 100_000;

/// At most so many at a time, where several may be.
const IN_FLIGHT: usize = 4;

/// Everybody acts at even milliseconds; at odd ones nothing happens, so that it can be looked at.
const STEP: Duration = Duration::from_millis(2);

const DRAIN_DEADLINE: Duration = Duration::from_secs(60);

/// The net under every wait: what hangs, hangs up to this time of the paused clock.
const NET: Duration = Duration::from_secs(3600);

/// Gives the same numbers for the same seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn size(&mut self, below: u64) -> usize {
        usize::try_from(self.below(below)).unwrap()
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn steps(&mut self, below: u64) -> Duration {
        STEP * u32::try_from(self.below(below)).unwrap()
    }

    fn fork(&mut self) -> Self {
        Self(self.next())
    }
}

// What goes over the wire.

/// The framing of the first pipeline and of the one that takes over: lines, and frames behind their length.
const LINES: usize = 0;
const PREFIXED: usize = 1;
/// Behind both: a raw service.
const RAW: usize = 2;

#[derive(Clone, Debug, PartialEq)]
enum Request {
    /// What to do, for how long, how often; the rest tells it from others.
    Command(String),
    /// Bytes behind a change of the codec's mode.
    Block(Vec<u8>),
}

/// A frame that goes out. It may change the decoder's mode: so many bytes are the next request.
struct Out {
    conn: Arc<Conn>,
    leg: usize,
    tag: Tag,
    block: usize,
}

/// What tells a frame from all others of its leg. Its text is as long as its numbers say, so that no part of it can be missing.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tag {
    kind: Kind,
    /// The call that it answers, or who pushed it.
    of: usize,
    n: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Reply,
    LastReply,
    Push,
}

impl Tag {
    fn text(self) -> String {
        let Self { kind, of, n } = self;
        let kind = match kind {
            Kind::Reply => 'r',
            Kind::LastReply => 'l',
            Kind::Push => 'p',
        };
        let rest = if (of + n).is_multiple_of(17) {
            700
        } else {
            (of * 7 + n * 13) % 40
        };
        format!("{kind}.{of}.{n}.{}", "x".repeat(rest))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let kind = match parts.next()? {
            "r" => Kind::Reply,
            "l" => Kind::LastReply,
            "p" => Kind::Push,
            _ => return None,
        };
        let of = parts.next()?.parse().ok()?;
        let n = parts.next()?.parse().ok()?;
        Some(Self { kind, of, n }).filter(|tag| tag.text() == text)
    }
}

fn put_frame(leg: usize, text: &str, buf: &mut impl BufMut) {
    if leg == PREFIXED {
        buf.put_u16(u16::try_from(text.len()).unwrap());
        buf.put_slice(text.as_bytes());
    } else {
        buf.put_slice(text.as_bytes());
        buf.put_u8(b'\n');
    }
}

fn take_frame(leg: usize, buf: &mut BytesMut) -> Option<BytesMut> {
    if leg == PREFIXED {
        let len = usize::from(u16::from_be_bytes(buf.get(..2)?.try_into().unwrap()));
        if buf.len() < 2 + len {
            return None;
        }
        buf.advance(2);
        return Some(buf.split_to(len));
    }
    let end = buf.iter().position(|byte| *byte == b'\n')?;
    let line = buf.split_to(end);
    buf.advance(1);
    Some(line)
}

/// Commands, but for the block that is behind one that asks for it.
struct Modal {
    leg: usize,
    block: usize,
}

impl Decoder for Modal {
    type Item = Request;
    type Error = io::Error;

    fn decode(&mut self, buf: &mut BytesMut) -> io::Result<Option<Request>> {
        if self.block > 0 {
            if buf.len() < self.block {
                return Ok(None);
            }
            let block = buf.split_to(std::mem::take(&mut self.block));
            return Ok(Some(Request::Block(block.to_vec())));
        }
        let Some(frame) = take_frame(self.leg, buf) else {
            return Ok(None);
        };
        match String::from_utf8(frame.to_vec()) {
            Ok(command) => Ok(Some(Request::Command(command))),
            Err(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl Encoder<Out> for Modal {
    type Error = io::Error;

    fn encode(&mut self, out: Out, buf: &mut BytesMut) -> io::Result<()> {
        let before = buf.len();
        put_frame(self.leg, &out.tag.text(), buf);
        self.block = self.block.max(out.block);
        out.conn.log().encoded(&out, buf.len() - before);
        Ok(())
    }
}

/// A stream that tells what is written to it.
struct Watched {
    io: DuplexStream,
    conn: Arc<Conn>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.conn.log().wrote(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

// What is known of a connection.

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    OneAtATime,
    InFlight,
    Multiplexed,
}

/// What one case has in common.
#[derive(Debug)]
struct Case {
    way: Way,
    /// What takes a stream over is a pipeline, and what takes over from that a raw service.
    two_legs: bool,
    shutdown_on_error: bool,
    marks: Watermarks,
    buffer: usize,
    push_queue: usize,
    messages: usize,
    read_ahead: usize,
}

struct Conn {
    case: Arc<Case>,
    reset: Notify,
    /// The server is gone: who reads no more may go.
    over: Notify,
    log: Mutex<Log>,
}

/// All that happened to a connection, as those saw it who did it.
struct Log {
    random: Random,
    history: Vec<(Instant, String)>,
    tasks: Vec<JoinHandle<()>>,
    begun_at: Instant,

    // Its peer.
    sent: [Vec<Request>; 2],
    sent_raw: Vec<u8>,
    half_closed: bool,
    cut_short: bool,
    was_reset: bool,
    stalled: bool,
    read: BytesMut,

    // Its services, and those who have its handle.
    legs: Vec<Leg>,
    read_raw: Vec<u8>,
    closed: bool,
    aborted: bool,
    drained: bool,
    ends: Vec<End>,
}

/// One pipeline's part of the connection.
struct Leg {
    delivered: Vec<Request>,
    calls: Vec<Call>,
    /// In the order in which they were.
    finished: Vec<usize>,
    running: usize,
    paused: bool,
    /// By who pushed: how many were taken, how many encoded, and up to where.
    pushed: BTreeMap<usize, Pushed>,
    /// How many wait for a flush.
    flushing: usize,

    /// By who sent them: how many were taken, and which was delivered last.
    messages: BTreeMap<usize, usize>,
    /// Those that were to be delivered, and were dropped.
    undelivered: u64,
    alive: usize,

    marks: Watermarks,
    marks_set: u64,
    above: bool,
    crossed: u64,
    told: u64,
    encoded: u64,
    written: u64,
}

#[derive(Default)]
struct Pushed {
    taken: usize,
    encoded: usize,
    end: u64,
}

/// A call that was begun, and what came of it.
#[derive(Default)]
struct Call {
    tags: Vec<Tag>,
    then: Option<Then>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    GoOn,
    Close,
    Fail,
    Upgrade,
}

impl Conn {
    fn new(case: Arc<Case>, random: Random) -> Self {
        let log = Log {
            random,
            history: Vec::new(),
            tasks: Vec::new(),
            begun_at: Instant::now(),
            sent: Default::default(),
            sent_raw: Vec::new(),
            half_closed: false,
            cut_short: false,
            was_reset: false,
            stalled: false,
            read: BytesMut::new(),
            legs: Vec::new(),
            read_raw: Vec::new(),
            closed: false,
            aborted: false,
            drained: false,
            ends: Vec::new(),
        };
        Self {
            case,
            reset: Notify::new(),
            over: Notify::new(),
            log: Mutex::new(log),
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // A failed check must not hide behind one that it poisons.
        self.log
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn of(peer: &Peer) -> Arc<Self> {
        Arc::clone(peer.info().get::<Arc<Self>>().unwrap())
    }

    /// Counts an operation.
    fn did(&self, what: impl Into<String>) {
        self.log().history.push((Instant::now(), what.into()));
    }

    /// Returns whether it is the time of those who look.
    fn is_odd(&self) -> bool {
        !self.log().begun_at.elapsed().as_millis().is_multiple_of(2)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(task);
        self.log().tasks.push(task);
    }

    /// Sees a call begin. Returns which it is.
    fn begin(&self, leg: usize, request: Option<&Request>) -> usize {
        let most = match self.case.way {
            Way::OneAtATime => 1,
            Way::InFlight | Way::Multiplexed => IN_FLIGHT,
        };
        let leg = &mut self.log().legs[leg];
        assert!(leg.running < most, "more calls than may be in flight");
        leg.running += 1;
        leg.calls.push(Call::default());
        if let Some(request) = request {
            assert!(!leg.paused, "{request:?} was delivered while paused");
            leg.delivered.push(request.clone());
        }
        leg.calls.len() - 1
    }

    fn out(self: &Arc<Self>, leg: usize, tag: Tag) -> Out {
        Out {
            conn: Arc::clone(self),
            leg,
            tag,
            block: 0,
        }
    }
}

impl Log {
    fn encoded(&mut self, out: &Out, bytes: usize) {
        let leg = &mut self.legs[out.leg];
        leg.encoded += bytes as u64;
        leg.look_at_marks();
        if out.tag.kind == Kind::Push {
            let pushed = leg.pushed.entry(out.tag.of).or_default();
            pushed.encoded += 1;
            pushed.end = leg.encoded;
        }
    }

    /// Returns whether all requests were, or will never be.
    fn all_is_delivered(&self, leg: usize) -> bool {
        let delivered = self.legs.get(leg).map_or(0, |leg| leg.delivered.len());
        delivered == self.sent[leg].len() || !self.ends.is_empty()
    }

    fn wrote(&mut self, bytes: usize) {
        if let Some(leg) = self.legs.last_mut() {
            leg.written += bytes as u64;
            leg.look_at_marks();
        }
    }
}

impl Leg {
    fn new(marks: Watermarks) -> Self {
        Self {
            delivered: Vec::new(),
            calls: Vec::new(),
            finished: Vec::new(),
            running: 0,
            paused: false,
            pushed: BTreeMap::new(),
            flushing: 0,
            messages: BTreeMap::new(),
            undelivered: 0,
            alive: 0,
            marks,
            marks_set: 0,
            above: false,
            crossed: 0,
            told: 0,
            encoded: 0,
            written: 0,
        }
    }

    fn unwritten(&self) -> usize {
        // A raw service writes what it did not encode.
        usize::try_from(self.encoded.saturating_sub(self.written)).unwrap()
    }

    /// Crosses the marks as often as they can be: the engine looks at its output now and then only.
    fn look_at_marks(&mut self) {
        let unwritten = self.unwritten();
        let above = if self.above {
            unwritten > self.marks.low()
        } else {
            unwritten >= self.marks.high()
        };
        self.crossed += u64::from(above != self.above);
        self.above = above;
    }
}

/// A call that runs.
struct Running {
    conn: Arc<Conn>,
    leg: usize,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.conn.log().legs[self.leg].running -= 1;
    }
}

/// A message, which knows whether it was delivered.
struct Message {
    conn: Arc<Conn>,
    leg: usize,
    of: usize,
    n: usize,
    due: Option<Instant>,
    /// The mode that its reply changes to.
    block: usize,
    settled: bool,
}

impl Message {
    fn new(conn: &Arc<Conn>, leg: usize, of: usize, n: usize, due: Option<Instant>) -> Self {
        conn.log().legs[leg].alive += 1;
        Self {
            conn: Arc::clone(conn),
            leg,
            of,
            n,
            due,
            block: 0,
            settled: false,
        }
    }

    /// It is delivered, or was never sent.
    fn settle(mut self) {
        self.settled = true;
    }

    fn deliver(mut self) -> (usize, usize) {
        self.settled = true;
        let mut log = self.conn.log();
        match self.due {
            Some(due) => assert!(due <= Instant::now(), "a timer before its time"),
            None => {
                let last = log.legs[self.leg].messages.insert(self.of, self.n);
                assert!(last.is_none_or(|last| last < self.n), "out of order");
            }
        }
        drop(log);
        (self.n, self.block)
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        let leg = &mut self.conn.log().legs[self.leg];
        leg.alive -= 1;
        if !self.settled && self.due.is_none_or(|due| due <= Instant::now()) {
            leg.undelivered += 1;
        }
    }
}

// The service.

/// Does what it is asked.
struct Worker {
    peer: Peer,
    conn: Arc<Conn>,
    leg: usize,
    unready: Option<Pin<Box<Sleep>>>,
}

/// A reply, in a pipeline that can be taken over or not.
struct Answer {
    reply: Reply<Out>,
    then: Then,
}

impl From<Answer> for Reply<Out> {
    fn from(Answer { reply, then }: Answer) -> Self {
        assert_ne!(then, Then::Upgrade);
        reply
    }
}

impl From<Answer> for Upgrade<Out> {
    fn from(Answer { reply, then }: Answer) -> Self {
        if then == Then::Upgrade {
            reply.upgrade()
        } else {
            reply.into()
        }
    }
}

impl Service<Event<Request, Message>> for Worker {
    type Response = Answer;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if self.unready.is_none() && self.conn.log().random.one_in(16) {
            self.unready = Some(Box::pin(sleep(STEP)));
        }
        if let Some(unready) = &mut self.unready {
            ready!(unready.as_mut().poll(cx));
            self.unready = None;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, event: Event<Request, Message>) -> Self::Future {
        let (request, message) = match event {
            Event::Request(request) => (Some(request), None),
            Event::Message(message) => (None, Some(message.deliver())),
        };
        let call = self.conn.begin(self.leg, request.as_ref());
        let running = Running {
            conn: Arc::clone(&self.conn),
            leg: self.leg,
        };
        let work = Work {
            peer: self.peer.clone(),
            running,
            call,
        };
        Box::pin(async move {
            match (request, message) {
                (Some(Request::Command(command)), _) => work.command(&command).await,
                (_, Some((_, block))) if block > 0 => Ok(work.change_mode(block)),
                (_, Some((n, _))) if n.is_multiple_of(3) => Ok(work.finish(1, Then::GoOn)),
                (_, Some(_)) => Ok(work.finish(0, Then::GoOn)),
                _ => Ok(work.finish(1, Then::GoOn)),
            }
        })
    }
}

/// One call.
struct Work {
    peer: Peer,
    running: Running,
    call: usize,
}

impl Work {
    async fn command(self, command: &str) -> Result<Answer, BoxError> {
        let mut words = command.split(' ');
        let what = words.next().unwrap();
        let delay: u32 = words.next().unwrap().parse().unwrap();
        let n: usize = words.next().unwrap().parse().unwrap();
        if delay > 0 {
            sleep(STEP * delay).await;
        }
        let Running { conn, leg } = &self.running;
        match what {
            "one" => Ok(self.finish(1, Then::GoOn)),
            "none" => Ok(self.finish(0, Then::GoOn)),
            "several" => Ok(self.finish(n, Then::GoOn)),
            "stream" => {
                let delay = STEP * (delay % 3);
                let tags = self.settle(n, Then::GoOn);
                Ok(self.streamed(tags, delay, false))
            }
            "break" => {
                let tags = self.settle(n, Then::Fail);
                Ok(self.streamed(tags, Duration::ZERO, true))
            }
            "close" => Ok(self.finish(n, Then::Close)),
            "fail" => {
                self.settle(0, Then::Fail);
                Err("it fails".into())
            }
            "pend" => pending().await,
            "pause" => {
                self.peer.pause_input();
                conn.log().legs[*leg].paused = true;
                let (peer, resumed, leg) = (self.peer.clone(), Arc::clone(conn), *leg);
                conn.spawn(async move {
                    sleep(STEP * u32::try_from(n).unwrap()).await;
                    resume(&peer, &resumed, leg);
                });
                Ok(self.finish(1, Then::GoOn))
            }
            "push" => {
                for _ in 0..n {
                    try_push(&self.peer, conn, *leg, 0);
                }
                Ok(self.finish(1, Then::GoOn))
            }
            "mode" => Ok(self.change_mode(n)),
            "later" => {
                let mut message = Message::new(conn, *leg, 0, self.call, None);
                message.block = n;
                let Err(refused) = self.peer.try_post(message) else {
                    return Ok(self.finish(0, Then::GoOn));
                };
                refused.into_inner().settle();
                Ok(self.change_mode(n))
            }
            "upgrade" => Ok(self.finish(1, Then::Upgrade)),
            other => panic!("{other:?} was never sent"),
        }
    }

    /// The call is finished, with so many frames.
    fn settle(&self, frames: usize, then: Then) -> Vec<Tag> {
        let kind = match then {
            Then::Upgrade => Kind::LastReply,
            _ => Kind::Reply,
        };
        let tags: Vec<_> = (0..frames)
            .map(|n| Tag {
                kind,
                of: self.call,
                n,
            })
            .collect();
        let leg = &mut self.running.conn.log().legs[self.running.leg];
        leg.finished.push(self.call);
        leg.calls[self.call] = Call {
            tags: tags.clone(),
            then: Some(then),
        };
        tags
    }

    fn finish(&self, frames: usize, then: Then) -> Answer {
        let Running { conn, leg } = &self.running;
        let mut outs: Vec<_> = self
            .settle(frames, then)
            .into_iter()
            .map(|tag| conn.out(*leg, tag))
            .collect();
        let mut reply = match outs.len() {
            0 => Reply::none(),
            1 => outs.remove(0).into(),
            _ => outs.into(),
        };
        if then == Then::Close {
            reply = reply.close();
        }
        Answer { reply, then }
    }

    /// Answers with a frame behind which so many bytes are the next request.
    fn change_mode(&self, block: usize) -> Answer {
        let Running { conn, leg } = &self.running;
        let mut out = conn.out(*leg, self.settle(1, Then::GoOn).remove(0));
        out.block = block;
        Answer {
            reply: out.into(),
            then: Then::GoOn,
        }
    }

    fn streamed(&self, tags: Vec<Tag>, delay: Duration, breaks: bool) -> Answer {
        let Running { conn, leg } = &self.running;
        let broken = breaks.then(|| Err("it breaks".into()));
        let frames: Vec<_> = tags
            .into_iter()
            .map(|tag| Ok(conn.out(*leg, tag)))
            .chain(broken)
            .collect();
        let frames = stream::unfold(frames.into_iter(), move |mut frames| async move {
            if !delay.is_zero() {
                sleep(delay).await;
            }
            Some((frames.next()?, frames))
        });
        Answer {
            reply: Reply::stream(frames),
            then: Then::GoOn,
        }
    }
}

fn resume(peer: &Peer, conn: &Conn, leg: usize) {
    conn.log().legs[leg].paused = false;
    peer.resume_input();
}

/// Pushes the next frame of one who pushes.
fn try_push(peer: &Peer, conn: &Arc<Conn>, leg: usize, of: usize) -> bool {
    let out = next_push(conn, leg, of);
    // Under no lock: it may be refused, and dropped.
    let taken = peer.try_send(out).is_ok();
    if taken {
        conn.log().legs[leg].pushed.entry(of).or_default().taken += 1;
    }
    taken
}

fn next_push(conn: &Arc<Conn>, leg: usize, of: usize) -> Out {
    let n = conn.log().legs[leg].pushed.entry(of).or_default().taken;
    let kind = Kind::Push;
    conn.out(leg, Tag { kind, of, n })
}

fn make(
    leg: usize,
) -> impl Service<
    Peer,
    Response = Worker,
    Error = Infallible,
    Future = impl Future<Output = Result<Worker, Infallible>> + Send,
> + Clone
+ Send
+ 'static {
    service_fn(move |peer: Peer| async move {
        let conn = Conn::of(&peer);
        {
            let mut log = conn.log();
            assert_eq!(log.legs.len(), leg, "each is made once");
            log.legs.push(Leg::new(conn.case.marks));
        }
        let told = Arc::clone(&conn);
        let mut crossings = peer.crossings();
        conn.spawn(async move {
            let mut last = Crossing::Low;
            while let Some(crossing) = crossings.next().await {
                assert_ne!(crossing, last, "they take turns");
                last = crossing;
                told.log().legs[leg].told += 1;
            }
        });
        for of in 1..3 {
            let random = conn.log().random.fork();
            let task = program(peer.clone(), Arc::clone(&conn), leg, of, random);
            conn.spawn(task);
        }
        Ok(Worker {
            peer,
            conn,
            leg,
            unready: None,
        })
    })
}

/// Gives back what it is given, until it is told to leave.
async fn raw<Io>(mut conn: Connection<Io>) -> Result<(), BoxError>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let shared = Arc::clone(conn.info().get::<Arc<Conn>>().unwrap());
    let mut draining = std::pin::pin!(conn.draining());
    let mut buf = [0; 64];
    loop {
        let read = tokio::select! {
            biased;
            read = conn.read(&mut buf) => read?,
            () = &mut draining => break,
        };
        if read == 0 {
            break;
        }
        shared.log().read_raw.extend(&buf[..read]);
        conn.write_all(&buf[..read]).await?;
    }
    conn.close(Linger::default()).await?;
    Ok(())
}

// The rest of the program.

/// One who has the handle, and uses it.
async fn program(peer: Peer, conn: Arc<Conn>, leg: usize, of: usize, mut random: Random) {
    let mut timers = Vec::new();
    for n in 0..random.size(30) {
        sleep(random.steps(4)).await;
        if conn.is_odd() {
            // A look of somebody else has set something off that this had waited for.
            sleep(STEP / 2).await;
        }
        if !conn.log().ends.is_empty() && random.one_in(4) {
            break;
        }
        match random.below(40) {
            0..8 => {
                let out = next_push(&conn, leg, of);
                let patience = if random.one_in(4) { STEP } else { NET };
                let sent = timeout(patience, peer.send(out)).await;
                if sent == Ok(Ok(())) {
                    conn.log().legs[leg].pushed.entry(of).or_default().taken += 1;
                }
                conn.did(format!("{leg}.{of} send: {sent:?}"));
            }
            8..14 => {
                let taken = try_push(&peer, &conn, leg, of);
                conn.did(format!("{leg}.{of} try_send: {taken}"));
            }
            14..17 => {
                conn.log().legs[leg].flushing += 1;
                let flushed = peer.flushed().await;
                conn.log().legs[leg].flushing -= 1;
                conn.did(format!("{leg}.{of} flushed: {flushed:?}"));
                if flushed.is_ok() {
                    let leg = &mut conn.log().legs[leg];
                    let written = leg.written;
                    let pushed = leg.pushed.entry(of).or_default();
                    assert_eq!(pushed.encoded, pushed.taken, "flushed before it is encoded");
                    assert!(pushed.end <= written, "flushed before it is written");
                }
            }
            17..20 => {
                let message = Message::new(&conn, leg, of, n, None);
                let sent = timeout(random.steps(5) + STEP, peer.post(message)).await;
                if sent != Ok(Ok(())) {
                    // It was dropped, and never sent.
                    conn.log().legs[leg].undelivered -= 1;
                }
                conn.did(format!("{leg}.{of} message {n}: {sent:?}"));
            }
            20..23 => {
                let message = Message::new(&conn, leg, of, n, None);
                let sent = peer.try_post(message);
                conn.did(format!("{leg}.{of} try_post {n}: {sent:?}"));
                if let Err(refused) = sent {
                    refused.into_inner().settle();
                }
            }
            23..26 => {
                let time = random.steps(10);
                let due = Instant::now() + time;
                let message = Message::new(&conn, leg, of, n, Some(due));
                let set = peer.post_after(time, message);
                let is_set = set.is_ok();
                conn.did(format!("{leg}.{of} post_after {n}, {time:?}: {is_set}"));
                match set {
                    Ok(timer) => timers.push(timer),
                    Err(refused) => refused.into_inner().settle(),
                }
            }
            26..28 => {
                let cancelled = timers.pop().and_then(|timer| timer.cancel());
                conn.did(format!("{leg}.{of} cancel: {}", cancelled.is_some()));
                if let Some(message) = cancelled {
                    message.settle();
                }
            }
            28..30 => {
                conn.did(format!("{leg}.{of} pause_input"));
                peer.pause_input();
                conn.log().legs[leg].paused = true;
                sleep(random.steps(6)).await;
                conn.did(format!("{leg}.{of} resume_input"));
                resume(&peer, &conn, leg);
            }
            30..32 => {
                let marks = marks(&mut random);
                conn.did(format!("{leg}.{of} set_watermarks {marks:?}"));
                peer.set_watermarks(marks);
                let leg = &mut conn.log().legs[leg];
                leg.marks = marks;
                leg.marks_set += 1;
                leg.look_at_marks();
            }
            32 if random.one_in(6) => {
                conn.did(format!("{leg}.{of} close"));
                conn.log().closed = true;
                peer.close();
                let refused = peer.flushed().await;
                assert_eq!(refused, Err(Closed), "it was closed");
            }
            33 if random.one_in(12) => {
                conn.did(format!("{leg}.{of} abort"));
                conn.log().aborted = true;
                peer.abort();
            }
            _ => {
                sleep(STEP / 2).await;
                look(&peer, &conn, leg, of);
                sleep(STEP / 2).await;
            }
        }
    }
    let end = peer.closed().await;
    assert_eq!(conn.log().ends.len(), 1, "it ended, once");
    assert_eq!(conn.log().ends[0].reason(), end.reason());
    assert!(matches!(
        peer.try_send(next_push(&conn, leg, of)),
        Err(TrySendError::Closed(_))
    ));
}

/// Looks at the output while nothing happens.
fn look(peer: &Peer, conn: &Arc<Conn>, leg: usize, of: usize) {
    let (unwritten, marks, flushing) = {
        let log = conn.log();
        let it = &log.legs[leg];
        if log.legs.len() > leg + 1 || log.sent_raw.len() + log.read_raw.len() > 0 {
            // Taken over: others write.
            return;
        }
        (it.unwritten(), it.marks, it.flushing)
    };
    // Somebody else may be looking at the same time.
    let has_room = peer.buffered().frames() + flushing == 0;
    let sent = peer.try_send(next_push(conn, leg, of));
    conn.did(format!("{leg}.{of} look at {unwritten}: {sent:?}"));
    match sent {
        Ok(()) => {
            assert!(unwritten < marks.high(), "it is above the high mark");
            conn.log().legs[leg].pushed.entry(of).or_default().taken += 1;
        }
        Err(TrySendError::Full(_)) => {
            assert!(
                unwritten > marks.low() || !has_room,
                "it is below the low mark"
            );
        }
        Err(TrySendError::Closed(_)) => return,
    }
    assert_eq!(peer.buffered().bytes(), unwritten);
    assert_eq!(peer.watermarks(), marks);
}

fn marks(random: &mut Random) -> Watermarks {
    let low = random.size(300);
    Watermarks::new(low, low + 100 + random.size(1000)).unwrap()
}

// The peer.

/// Asks, and leaves in one of the ways there are.
async fn ask(conn: Arc<Conn>, write: WriteHalf<DuplexStream>, mut random: Random) {
    let reset_at = random.one_in(6).then(|| random.steps(100));
    let begun = Instant::now();
    let asking = ask_to_the_end(&conn, write, &mut random);
    match reset_at {
        None => asking.await,
        Some(at) => {
            drop(timeout(at, asking).await);
            sleep_until(begun + at).await;
            conn.did("reset");
            conn.log().was_reset = true;
            conn.reset.notify_one();
        }
    }
}

async fn ask_to_the_end(conn: &Conn, mut write: WriteHalf<DuplexStream>, random: &mut Random) {
    let one_at_a_time = conn.case.way == Way::OneAtATime;
    let mut leg = LINES;
    let mut bytes = Vec::new();
    for n in 0..10 + random.size(40) {
        if leg == RAW {
            let some = (0..random.size(50)).map(|_| random.next().to_le_bytes()[0]);
            let some: Vec<_> = some.collect();
            conn.did(format!("{} raw bytes", some.len()));
            conn.log().sent_raw.extend(&some);
            bytes.extend(some);
        } else {
            let delay = random.below(4).saturating_sub(1);
            let (what, times) = match random.below(64) {
                0..24 => ("one", 0),
                24..30 => ("none", 0),
                30..36 => ("several", random.size(5)),
                36..42 => ("stream", random.size(5)),
                42..46 => ("push", random.size(5)),
                46..50 => ("pause", random.size(5)),
                50..53 if one_at_a_time => ("mode", 1 + random.size(100)),
                53 if one_at_a_time => ("later", 1 + random.size(100)),
                54..56 if one_at_a_time => ("upgrade", 0),
                56 => ("close", random.size(3)),
                57 => ("fail", 0),
                58 => ("break", random.size(3)),
                59 if random.one_in(4) => ("pend", 0),
                _ => ("one", 0),
            };
            let rest = "y".repeat(random.size(30));
            let command = format!("{what} {delay} {times} {n} {rest}");
            conn.did(format!("{leg} {what} {delay} {times} {n}"));
            put_frame(leg, &command, &mut bytes);
            conn.log().sent[leg].push(Request::Command(command));
            if what == "mode" {
                let block: Vec<_> = (0..times)
                    .map(|_| *b"one 0 0 0 \n\0".get(random.size(12)).unwrap())
                    .collect();
                bytes.extend(&block);
                conn.log().sent[leg].push(Request::Block(block));
            }
            if what == "later" {
                // No whole frame of the old mode, which it is read in at first.
                let block = vec![0xff; times];
                bytes.extend(&block);
                conn.log().sent[leg].push(Request::Block(block));
                if write.write_all(&std::mem::take(&mut bytes)).await.is_err() {
                    return;
                }
                while !conn.log().all_is_delivered(leg) {
                    sleep(STEP).await;
                }
            }
            if what == "upgrade" {
                leg = if conn.case.two_legs { leg + 1 } else { RAW };
            }
        }
        if random.one_in(3) {
            // In pieces: frames are cut wherever that may be.
            let piece = random.size(bytes.len() as u64 + 1);
            for piece in [bytes.drain(..piece).collect(), std::mem::take(&mut bytes)] {
                let piece: Vec<u8> = piece;
                if write.write_all(&piece).await.is_err() {
                    return;
                }
                sleep(random.steps(3)).await;
            }
        }
    }
    if random.one_in(8) && leg != RAW {
        conn.did("part of a frame");
        conn.log().cut_short = true;
        bytes.extend(b"\0\x20or");
    }
    if write.write_all(&bytes).await.is_err() {
        return;
    }
    if !random.one_in(4) {
        conn.did("half-close");
        conn.log().half_closed = true;
        // The server may have closed already.
        drop(write.shutdown().await);
    }
}

/// Reads on: at once, slowly, with pauses, or one day no more.
async fn read(conn: Arc<Conn>, mut read: ReadHalf<DuplexStream>, mut random: Random) {
    let slow = random.one_in(3);
    let stalls_at = random.one_in(12).then(|| random.size(1000));
    let mut buf = [0; 256];
    loop {
        if slow {
            sleep(random.steps(2)).await;
        }
        if random.one_in(50) {
            conn.did("reads no more for a while");
            sleep(random.steps(40)).await;
        }
        if stalls_at.is_some_and(|at| conn.log().read.len() >= at) {
            conn.did("reads no more");
            conn.log().stalled = true;
            tokio::select! {
                () = conn.reset.notified() => {}
                () = conn.over.notified() => {}
            }
            return;
        }
        let most = 1 + random.size(if slow { 64 } else { 256 });
        let n = tokio::select! {
            biased;
            () = conn.reset.notified() => return,
            n = read.read(&mut buf[..most]) => n.unwrap(),
        };
        if n == 0 {
            return;
        }
        conn.log().read.extend_from_slice(&buf[..n]);
    }
}

// What must be true at the end.

/// What a peer has read, in the order of its coming.
#[derive(Default)]
struct Seen {
    legs: [SeenLeg; 2],
    raw: Vec<u8>,
}

#[derive(Default)]
struct SeenLeg {
    replies: Vec<Tag>,
    pushes: BTreeMap<usize, usize>,
}

macro_rules! check {
    ($condition:expr, $($arg:tt)+) => {
        if !$condition {
            return Err(format!($($arg)+));
        }
    };
}

impl Seen {
    fn parse(case: &Case, mut bytes: BytesMut, whole: bool) -> Result<Self, String> {
        let mut seen = Self::default();
        let mut leg = LINES;
        while leg != RAW {
            let Some(frame) = take_frame(leg, &mut bytes) else {
                break;
            };
            let text = String::from_utf8_lossy(&frame);
            let Some(tag) = Tag::parse(&text) else {
                return Err(format!("not a frame: {text:?}"));
            };
            if tag.kind == Kind::Push {
                let next = seen.legs[leg].pushes.entry(tag.of).or_default();
                check!(tag.n == *next, "push {next} of {} is {tag:?}", tag.of);
                *next += 1;
                continue;
            }
            seen.legs[leg].replies.push(tag);
            if tag.kind == Kind::LastReply {
                leg = if case.two_legs { leg + 1 } else { RAW };
            }
        }
        if leg == RAW {
            seen.raw = bytes.to_vec();
        } else {
            check!(!whole || bytes.is_empty(), "half a frame: {bytes:?}");
        }
        Ok(seen)
    }
}

impl Leg {
    /// Returns which frames a peer is to see that reads on, and whether all that was begun is finished as far as that matters.
    fn replies(&self, case: &Case) -> (Vec<Tag>, bool) {
        let ends = |then| match then {
            Then::GoOn => false,
            Then::Close | Then::Upgrade => true,
            Then::Fail => case.shutdown_on_error,
        };
        let mut tags = Vec::new();
        if case.way == Way::Multiplexed {
            let mut ended = false;
            for call in &self.finished {
                let call = &self.calls[*call];
                tags.extend(&call.tags);
                ended |= call.then.is_some_and(ends);
            }
            return (tags, ended || self.finished.len() == self.calls.len());
        }
        for call in &self.calls {
            let Some(then) = call.then else {
                return (tags, false);
            };
            tags.extend(&call.tags);
            if ends(then) {
                break;
            }
        }
        (tags, true)
    }

    fn never_finishes(&self) -> bool {
        let pends = |request: &Request| matches!(request, Request::Command(command) if command.starts_with("pend"));
        self.delivered.iter().any(pends)
    }

    fn has_finished(&self, sought: Then) -> bool {
        self.calls.iter().any(|call| call.then == Some(sought))
    }
}

impl Log {
    fn check(&self, case: &Case) -> Result<(), String> {
        let [end] = &self.ends[..] else {
            return Err(format!("it ended {} times", self.ends.len()));
        };
        let reason = end.reason();
        check!(
            self.can_end_with(case, reason),
            "there was no reason for {reason}: {end:?}"
        );
        let lossy = self.aborted
            || self.was_reset
            || self.stalled
            || matches!(
                reason,
                EndReason::WriteTimeout | EndReason::DrainDeadline | EndReason::PeerReset
            );
        let all_came = reason == EndReason::PeerClosed && self.half_closed && !self.was_reset;
        let seen = Seen::parse(case, self.read.clone(), !lossy)
            .map_err(|err| format!("{reason}: {err}"))?;
        for (n, leg) in self.legs.iter().enumerate() {
            leg.check(case, &self.sent[n], &seen.legs[n], lossy, all_came)
                .map_err(|err| format!("{reason}, leg {n}: {err}"))?;
        }
        if all_came {
            let came: usize = self.legs.iter().map(|leg| leg.delivered.len()).sum();
            let sent: usize = self.sent.iter().map(Vec::len).sum();
            check!(came == sent, "{came} of {sent} requests were delivered");
            check!(self.read_raw.len() == self.sent_raw.len(), "raw bytes lost");
        }
        check!(
            self.sent_raw.starts_with(&self.read_raw),
            "raw: {:?} came as {:?}",
            self.sent_raw,
            self.read_raw
        );
        check!(
            self.read_raw.starts_with(&seen.raw) && (lossy || seen.raw == self.read_raw),
            "raw: {:?} came back as {:?}",
            self.read_raw,
            seen.raw
        );
        let requests: usize = self.legs.iter().map(|leg| leg.delivered.len()).sum();
        check!(end.requests() == requests as u64, "{requests}: {end:?}");
        let undelivered: u64 = self.legs.iter().map(|leg| leg.undelivered).sum();
        check!(
            end.messages_dropped() == undelivered,
            "{undelivered} messages were dropped: {end:?}"
        );
        Ok(())
    }

    fn can_end_with(&self, case: &Case, reason: EndReason) -> bool {
        let finished = |then| self.legs.iter().any(|leg| leg.has_finished(then));
        match reason {
            EndReason::PeerClosed => self.half_closed || self.was_reset,
            EndReason::PeerReset => self.was_reset,
            EndReason::Truncated => self.cut_short || self.was_reset,
            EndReason::ServiceClosed => self.closed || finished(Then::Close),
            EndReason::ServiceError => case.shutdown_on_error && finished(Then::Fail),
            EndReason::Aborted => self.aborted,
            EndReason::WriteTimeout => self.stalled,
            EndReason::Drained => self.drained,
            EndReason::DrainDeadline => {
                self.drained
                    && (self.stalled || self.cut_short || self.legs.iter().any(Leg::never_finishes))
            }
            _ => false,
        }
    }
}

impl Leg {
    fn check(
        &self,
        case: &Case,
        sent: &[Request],
        seen: &SeenLeg,
        lossy: bool,
        all_came: bool,
    ) -> Result<(), String> {
        check!(
            sent.starts_with(&self.delivered),
            "{sent:?} came as {:?}",
            self.delivered
        );
        let (replies, all_finished) = self.replies(case);
        check!(
            lossy || all_finished || self.never_finishes(),
            "a call was dropped"
        );
        check!(
            replies.starts_with(&seen.replies),
            "replies {replies:?} came as {:?}",
            seen.replies
        );
        check!(
            lossy || replies == seen.replies,
            "of {} replies {} came, all_came: {all_came}",
            replies.len(),
            seen.replies.len()
        );
        for (of, pushed) in &self.pushed {
            let came = seen.pushes.get(of).copied().unwrap_or_default();
            let taken = pushed.taken;
            check!(
                came == taken || (lossy && came < taken),
                "of {taken} pushes of {of} {came} came"
            );
        }
        check!(self.running == 0, "{} calls still run", self.running);
        check!(self.alive == 0, "{} messages are kept", self.alive);
        check!(
            self.told <= self.crossed + 2 * self.marks_set,
            "{} crossings were told of {}",
            self.told,
            self.crossed
        );
        check!(
            lossy || self.told.is_multiple_of(2),
            "it ended above its mark"
        );
        Ok(())
    }
}

// A case, and all of them.

/// Runs a few connections of a server to their end. Returns how many operations there were.
async fn run(seed: u64) -> Result<usize, String> {
    let mut random = Random(seed);
    let way = match random.below(4) {
        0 => Way::InFlight,
        1 => Way::Multiplexed,
        _ => Way::OneAtATime,
    };
    let case = Arc::new(Case {
        way,
        two_legs: random.one_in(2),
        shutdown_on_error: random.one_in(2),
        marks: marks(&mut random),
        buffer: 16 + random.size(2000),
        push_queue: 1 + random.size(8),
        messages: 1 + random.size(8),
        read_ahead: random.size(2000),
    });
    let conns: Vec<_> = (0..4)
        .map(|_| Arc::new(Conn::new(Arc::clone(&case), random.fork())))
        .collect();
    let (handle, server, connector) = serve(&case, conns.clone());

    let mut peers = Vec::new();
    for conn in &conns {
        let (read_half, write_half) = tokio::io::split(connector.connect().await.unwrap());
        let (asks, reads) = (random.fork(), random.fork());
        peers.push(tokio::spawn(ask(Arc::clone(conn), write_half, asks)));
        peers.push(tokio::spawn(read(Arc::clone(conn), read_half, reads)));
    }
    let drain_at = if random.one_in(3) {
        random.steps(100)
    } else {
        Duration::from_secs(40)
    };
    sleep(drain_at).await;
    for conn in &conns {
        conn.did("drain");
        conn.log().drained = true;
    }
    handle.shutdown_within(DRAIN_DEADLINE);
    let ended = timeout(NET, handle.closed()).await;

    let context = |conn: &Conn, err: String| {
        let log = conn.log();
        let mut text = format!("{err}\n{case:?}\n");
        for (at, what) in &log.history {
            let at = at.duration_since(log.begun_at);
            writeln!(text, "{at:>8.0?} {what}").unwrap();
        }
        text
    };
    for conn in &conns {
        if ended.is_err() && conn.log().ends.is_empty() {
            return Err(context(conn, "it never ended".into()));
        }
        conn.over.notify_one();
    }
    for task in peers.into_iter().chain([server]) {
        joined(task).await.map_err(|err| context(&conns[0], err))?;
    }
    for conn in &conns {
        loop {
            let Some(task) = conn.log().tasks.pop() else {
                break;
            };
            joined(task).await.map_err(|err| context(conn, err))?;
        }
        let checked = conn.log().check(&case);
        checked.map_err(|err| context(conn, err))?;
    }
    check!(handle.live() == 0, "{} are live", handle.live());
    let in_use = handle.limit().in_use();
    check!(in_use == 0, "{in_use} permits are in use");
    // Two turns: one who was joined has yet to be taken away.
    sleep(STEP).await;
    let tasks = tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks();
    check!(tasks == 0, "{tasks} tasks are left");
    Ok(conns.iter().map(|conn| conn.log().history.len()).sum())
}

async fn joined(task: JoinHandle<()>) -> Result<(), String> {
    match timeout(NET, task).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(panicked)) => Err(panicked.to_string()),
        Err(_) => Err("a task never ended".into()),
    }
}

fn serve(case: &Arc<Case>, conns: Vec<Arc<Conn>>) -> (Handle, JoinHandle<()>, testkit::Connector) {
    let (listener, connector) = testkit::memory_with_buffer(case.buffer);
    let server = Server::from_listener(listener);
    let handle = server.handle();
    let limits = Limits::default()
        .watermarks(case.marks)
        .push_queue(case.push_queue)
        .messages(case.messages)
        .read_ahead(case.read_ahead);
    let deadlines = Deadlines::default().first_byte(None).idle(None).frame(None);
    let modal = |leg| move || Modal { leg, block: 0 };
    let second = Pipeline::new(modal(PREFIXED))
        .make_event_service(make(PREFIXED))
        .limits(limits.clone())
        .deadlines(deadlines)
        .shutdown_on_error(case.shutdown_on_error)
        .on_upgrade(service_fn(raw));
    let first = Pipeline::new(modal(LINES))
        .make_event_service(make(LINES))
        .limits(limits)
        .deadlines(deadlines)
        .shutdown_on_error(case.shutdown_on_error);
    let task = match (case.way, case.two_legs) {
        (Way::InFlight, _) => spawn(server, conns, first.in_flight(IN_FLIGHT)),
        (Way::Multiplexed, _) => spawn(server, conns, first.multiplexed(IN_FLIGHT)),
        (Way::OneAtATime, true) => spawn(server, conns, first.on_upgrade(second)),
        (Way::OneAtATime, false) => spawn(server, conns, first.on_upgrade(service_fn(raw))),
    };
    (handle, task, connector)
}

fn spawn<S>(
    server: Server<testkit::MemoryListener>,
    conns: Vec<Arc<Conn>>,
    pipeline: S,
) -> JoinHandle<()>
where
    S: Service<Connection<Watched>, Error = BoxError, Future: Send> + Send + 'static,
    S::Response: 'static,
{
    let stack = ServiceBuilder::new()
        .map_request(move |mut conn: Connection<DuplexStream>| {
            let Address::Memory(number) = conn.info().peer_addr() else {
                panic!("it is served in memory");
            };
            let ours = Arc::clone(&conns[usize::try_from(*number).unwrap() - 1]);
            let ending = Arc::clone(&ours);
            conn.on_end(move |end| ending.log().ends.push(end.clone()));
            conn.insert(Arc::clone(&ours));
            conn.map_io(|io| Watched { io, conn: ours })
        })
        .service(pipeline);
    tokio::spawn(async move {
        server.serve(stack).await.unwrap();
    })
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
}

fn seed() -> u64 {
    match std::env::var("TOWER_TCP_SEED") {
        Ok(seed) => seed.parse().expect("a seed is a number"),
        Err(_) => RandomState::new().hash_one(0_u8),
    }
}

#[test]
fn whatever_happens_to_connections_nothing_is_lost_or_out_of_order_and_each_ends_once() {
    let mut seed = seed();
    let mut operations = 0;
    while operations < OPERATIONS {
        match paused().block_on(run(seed)) {
            Ok(done) => operations += done,
            Err(err) => panic!("{err}\nTOWER_TCP_SEED={seed}"),
        }
        seed = seed.wrapping_add(1);
    }
}

// Frames only.

/// Who pushes, and how much; requests of the peer are answered in between. A million frames, over the three ways of dispatch.
const PUSHERS: usize = 4;
const PUSHES: usize = 72_000;
const REQUESTS: usize = 46_000;

/// A frame that cannot be taken for another, nor for a part of one.
fn frame(who: usize, n: usize) -> Bytes {
    let rest = (who * 17 + n * 31) % 60;
    format!("{who} {n} {}|", "x".repeat(rest)).into()
}

#[tokio::test(start_paused = true)]
async fn a_million_frames_that_are_pushed_between_replies_are_whole_and_in_order() {
    let make = service_fn(|peer: tower_tcp::Peer<Bytes>| async move {
        for who in 1..=PUSHERS {
            let peer = peer.clone();
            tokio::spawn(async move {
                let mut random = Random(who as u64);
                for n in 0..PUSHES {
                    peer.send(frame(who, n)).await.unwrap();
                    if random.one_in(8) {
                        tokio::task::yield_now().await;
                    }
                }
            });
        }
        Ok::<_, Infallible>(service_fn(|request: Bytes| async move {
            if request.ends_with(b"7") {
                tokio::task::yield_now().await;
            }
            Ok::<_, Infallible>(request)
        }))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let (read, mut write) = tokio::io::split(served.client().await.0.into_inner());
        let asking = tokio::spawn(async move {
            for n in 0..REQUESTS {
                let request = format!("0 {n}\n");
                write.write_all(request.as_bytes()).await.unwrap();
            }
            write
        });
        let mut read = tokio::io::BufReader::new(read);
        let mut next = [0; 1 + PUSHERS];
        let mut late = std::collections::BTreeSet::new();
        let mut line = Vec::new();
        for _ in 0..REQUESTS + PUSHERS * PUSHES {
            line.clear();
            let reading = timeout(NET, read.read_until(b'\n', &mut line));
            reading.await.expect("it goes on").unwrap();
            let text = std::str::from_utf8(line.strip_suffix(b"\n").unwrap()).unwrap();
            let mut words = text.split(' ');
            let who: usize = words.next().unwrap().parse().unwrap();
            let n: usize = words.next().unwrap().parse().unwrap();

            let in_order = who > 0 || served.way() != "multiplexed";
            if in_order {
                assert_eq!(n, next[who], "{}: {text:?}", served.way());
                next[who] += 1;
            } else {
                assert!(late.insert(n), "{}: {text:?} came twice", served.way());
            }
            let whole = if who == 0 {
                text.ends_with(&n.to_string())
            } else {
                text.as_bytes() == frame(who, n)
            };
            assert!(whole, "{}: {text:?}", served.way());
        }
        assert_eq!(next[0] + late.len(), REQUESTS, "{}", served.way());
        asking.await.unwrap();
    }
}
