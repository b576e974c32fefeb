//! The record of a connection: everything that happened to it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::BytesMut;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tower_tcp::End;
use tower_tcp::pipeline::Watermarks;

use super::random::Random;
use super::wire::{Kind, Out, Request, Tag};
use super::{IN_FLIGHT, Peer};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Way {
    OneAtATime,
    InFlight,
    Multiplexed,
}

/// The settings of one case.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) way: Way,
    /// The first pipeline upgrades to a second one, and that to a raw service. Otherwise the first
    /// upgrades to the raw service.
    pub(crate) two_legs: bool,
    pub(crate) shutdown_on_error: bool,
    pub(crate) marks: Watermarks,
    pub(crate) buffer: usize,
    pub(crate) push_queue: usize,
    pub(crate) messages: usize,
    pub(crate) read_ahead: usize,
}

pub(crate) struct Conn {
    pub(crate) case: Arc<Case>,
    pub(crate) reset: Notify,
    /// Notifies a peer that reads no more that it may end, because the server is gone.
    pub(crate) over: Notify,
    pub(crate) log: Mutex<Log>,
}

/// Everything that happened to a connection, recorded by the party that did it.
pub(crate) struct Log {
    pub(crate) random: Random,
    pub(crate) history: Vec<(Instant, String)>,
    pub(crate) tasks: Vec<JoinHandle<()>>,
    pub(crate) begun_at: Instant,

    // Its peer.
    pub(crate) sent: [Vec<Request>; 2],
    pub(crate) sent_raw: Vec<u8>,
    pub(crate) half_closed: bool,
    pub(crate) cut_short: bool,
    pub(crate) was_reset: bool,
    pub(crate) stalled: bool,
    pub(crate) read: BytesMut,

    // Its services, and the tasks that hold its `Peer`.
    pub(crate) legs: Vec<Leg>,
    pub(crate) read_raw: Vec<u8>,
    pub(crate) closed: bool,
    pub(crate) aborted: bool,
    pub(crate) drained: bool,
    pub(crate) ends: Vec<End>,
}

/// One pipeline's part of the connection.
pub(crate) struct Leg {
    pub(crate) delivered: Vec<Request>,
    pub(crate) calls: Vec<Call>,
    /// The calls in the order in which they finished.
    pub(crate) finished: Vec<usize>,
    pub(crate) running: usize,
    pub(crate) paused: bool,
    /// The service was polled and is not ready, so the next event may be delivered in a pause.
    pub(crate) asked: bool,
    /// By pushing task: how many frames were accepted and encoded, and where the last one ends.
    pub(crate) pushed: BTreeMap<usize, Pushed>,
    /// The number of tasks that wait for a flush.
    pub(crate) flushing: usize,

    /// By sending task: the number of the message delivered last.
    pub(crate) messages: BTreeMap<usize, usize>,
    /// The number of messages that were due and were dropped instead.
    pub(crate) undelivered: u64,
    pub(crate) alive: usize,

    pub(crate) marks: Watermarks,
    pub(crate) marks_set: u64,
    pub(crate) above: bool,
    pub(crate) crossed: u64,
    pub(crate) told: u64,
    pub(crate) encoded: u64,
    pub(crate) written: u64,
}

#[derive(Default)]
pub(crate) struct Pushed {
    pub(crate) taken: usize,
    pub(crate) encoded: usize,
    pub(crate) end: u64,
}

/// A call that has started, and its result.
#[derive(Default)]
pub(crate) struct Call {
    pub(crate) tags: Vec<Tag>,
    pub(crate) then: Option<Then>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Then {
    GoOn,
    Close,
    Fail,
    Upgrade,
}

impl Conn {
    pub(crate) fn new(case: Arc<Case>, random: Random) -> Self {
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

    pub(crate) fn log(&self) -> MutexGuard<'_, Log> {
        // A failed check poisons the lock. Failures caused by that would hide the first one.
        self.log
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn of(peer: &Peer) -> Arc<Self> {
        Arc::clone(peer.info().get::<Arc<Self>>().unwrap())
    }

    /// Records an operation.
    pub(crate) fn did(&self, what: impl Into<String>) {
        self.log().history.push((Instant::now(), what.into()));
    }

    /// Returns whether this is an odd millisecond, at which only `look` acts.
    pub(crate) fn is_odd(&self) -> bool {
        !self.log().begun_at.elapsed().as_millis().is_multiple_of(2)
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(task);
        self.log().tasks.push(task);
    }

    /// Records the start of a call. Returns its number.
    pub(crate) fn begin(&self, leg: usize, request: Option<&Request>) -> usize {
        let most = match self.case.way {
            Way::OneAtATime => 1,
            Way::InFlight | Way::Multiplexed => IN_FLIGHT,
        };
        let leg = &mut self.log().legs[leg];
        assert!(leg.running < most, "more calls than may be in flight");
        leg.running += 1;
        leg.calls.push(Call::default());
        if let Some(request) = request {
            let may_begin = !leg.paused || leg.asked;
            assert!(may_begin, "{request:?} was delivered while paused");
            leg.delivered.push(request.clone());
        }
        leg.asked = false;
        leg.calls.len() - 1
    }

    pub(crate) fn out(self: &Arc<Self>, leg: usize, tag: Tag) -> Out {
        Out {
            conn: Arc::clone(self),
            leg,
            tag,
            block: 0,
        }
    }
}

impl Log {
    pub(crate) fn encoded(&mut self, out: &Out, bytes: usize) {
        let leg = &mut self.legs[out.leg];
        leg.encoded += bytes as u64;
        leg.look_at_marks();
        if out.tag.kind == Kind::Push {
            let pushed = leg.pushed.entry(out.tag.of).or_default();
            pushed.encoded += 1;
            pushed.end = leg.encoded;
        }
    }

    /// Returns whether all requests have been delivered, or never will be.
    pub(crate) fn all_is_delivered(&self, leg: usize) -> bool {
        let delivered = self.legs.get(leg).map_or(0, |leg| leg.delivered.len());
        delivered == self.sent[leg].len() || !self.ends.is_empty()
    }

    pub(crate) fn wrote(&mut self, bytes: usize) {
        if let Some(leg) = self.legs.last_mut() {
            leg.written += bytes as u64;
            leg.look_at_marks();
        }
    }
}

impl Leg {
    pub(crate) fn new(marks: Watermarks) -> Self {
        Self {
            delivered: Vec::new(),
            calls: Vec::new(),
            finished: Vec::new(),
            running: 0,
            paused: false,
            asked: false,
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

    pub(crate) fn unwritten(&self) -> usize {
        // A raw service writes bytes that were never encoded.
        usize::try_from(self.encoded.saturating_sub(self.written)).unwrap()
    }

    /// Counts every crossing that is possible. The engine checks its output less often.
    pub(crate) fn look_at_marks(&mut self) {
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

/// A running call.
pub(crate) struct Running {
    pub(crate) conn: Arc<Conn>,
    pub(crate) leg: usize,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.conn.log().legs[self.leg].running -= 1;
    }
}

/// A message that records whether it was delivered.
pub(crate) struct Message {
    pub(crate) conn: Arc<Conn>,
    pub(crate) leg: usize,
    pub(crate) of: usize,
    pub(crate) n: usize,
    pub(crate) due: Option<Instant>,
    /// The number of bytes that the codec takes as the next request after the reply, or zero.
    pub(crate) block: usize,
    pub(crate) settled: bool,
}

impl Message {
    pub(crate) fn new(
        conn: &Arc<Conn>,
        leg: usize,
        of: usize,
        n: usize,
        due: Option<Instant>,
    ) -> Self {
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

    /// Marks the message as delivered or never sent.
    pub(crate) fn settle(mut self) {
        self.settled = true;
    }

    pub(crate) fn deliver(mut self) -> (usize, usize) {
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
