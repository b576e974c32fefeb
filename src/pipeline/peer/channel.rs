use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit, oneshot};
use tokio::time::Instant;

use super::run::Run;
use super::{Buffered, TrySendError};
use crate::connection::{ConnectionInfo, Life, Sent};
use crate::deadline::LOOKS;
use crate::pipeline::watermarks::Watermarks;

/// The state that a connection's handles and its engine share.
pub(super) struct Channel<T, M> {
    pub(super) info: ConnectionInfo,
    most_timers: usize,
    /// Room in `items`. Above the high mark no more permits are handed out; those handed out before
    /// remain valid. The semaphore is fair, so one busy sender cannot keep the others waiting
    /// forever.
    pub(super) room: Semaphore,
    /// Room for tasks that wait for a flush, held until the flush is reported.
    pub(super) flush_room: Semaphore,
    /// Room in `messages`.
    pub(super) message_room: Semaphore,
    pub(super) flags: Flags,
    /// The encoded bytes that are not written, as of the engine's last turn.
    pub(super) unwritten: AtomicUsize,
    queues: Mutex<Queues<T, M>>,
    /// Notified when a mark is crossed and when the connection ends.
    pub(super) changed: Notify,
}

pub(super) struct Queues<T, M> {
    pub(super) items: VecDeque<Item<T>>,
    /// The room of items that were taken, not given back yet. It is given back only while the
    /// output is below its mark.
    room_held_back: usize,
    /// Tasks that wait until the output up to a position is written.
    pub(super) flushes: VecDeque<(u64, oneshot::Sender<()>)>,
    /// A message that was taken, but whose call may not begin yet.
    pub(super) held: Option<M>,
    pub(super) messages: VecDeque<M>,
    /// The messages with a delay, by due time, then in the order in which they were set.
    pub(super) timers: BTreeMap<(Instant, u64), M>,
    timers_set: u64,
    pub(super) marks: Watermarks,
    /// The longest time that the connection may be idle.
    pub(super) idle: Option<Duration>,
    /// Set while broadcasts find the output above its mark.
    stall: Option<Stall>,
    /// The number of times that the output crossed a mark: the high one first, then in turn. Odd
    /// from a crossing of the high mark until the low one is crossed.
    pub(super) crossings: u64,
    gone: bool,
    no_more_messages: bool,
    pub(super) ended: bool,
}

/// The output that a peer had taken when a broadcast found it slow, and the time since which it
/// has taken nothing.
struct Stall {
    /// `None` if the system does not report it. Then the bytes written are compared instead.
    sent: Option<Sent>,
    written: u64,
    looked: Instant,
    since: Instant,
}

impl Stall {
    fn new(life: &Life, now: Instant) -> Self {
        Self {
            sent: life.probe.sent(),
            written: life.bytes_written(),
            looked: now,
            since: now,
        }
    }

    fn shows_progress(&self, before: &Self) -> bool {
        match (self.sent, before.sent) {
            (Some(sent), Some(before)) => sent.is_beyond(before),
            _ => self.written != before.written,
        }
    }
}

/// An entry in the queue of output.
pub(super) enum Item<T> {
    Frame(T),
    /// Frames of broadcasts. Only the last entry of a queue may be an open one, and only while the
    /// output is below its mark.
    Run(Arc<Run<T>>),
    /// The rest of a run. The output reached its mark before these frames were encoded.
    Rest(Vec<T>),
    /// A request to report that everything before it is written.
    Flush(oneshot::Sender<()>),
}

/// The flags that the engine checks in each turn, so that no turn takes the lock.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(super) enum Flag {
    /// `items` is not empty.
    Pushed = 1,
    /// `flushes` is not empty.
    Flush = 2,
    /// A message is waiting, or a timer is set.
    Mail = 4,
    /// The marks or the idle time were changed.
    Tuned = 8,
    /// Input is paused.
    Paused = 16,
}

#[derive(Default)]
pub(super) struct Flags(AtomicU8);

impl Flags {
    #[inline]
    pub(super) fn is_raised(&self, flag: Flag) -> bool {
        self.0.load(Ordering::Acquire) & flag as u8 != 0
    }

    #[inline]
    pub(super) fn any(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// Raises a flag. Returns whether it was not raised before.
    pub(super) fn raise(&self, flag: Flag) -> bool {
        self.0.fetch_or(flag as u8, Ordering::AcqRel) & flag as u8 == 0
    }

    pub(super) fn lower(&self, flag: Flag) {
        self.0.fetch_and(!(flag as u8), Ordering::AcqRel);
    }
}

impl<T, M> Queues<T, M> {
    pub(super) fn is_above_mark(&self) -> bool {
        self.crossings & 1 == 1
    }

    /// Takes an item. Its room is given back later, together with that of others.
    pub(super) fn take(&mut self) -> Option<Item<T>> {
        let item = self.items.pop_front()?;
        self.room_held_back += 1;
        if let Item::Run(run) = &item {
            // Under the lock, so that what is pushed from now on comes behind all of the run.
            run.close();
        }
        Some(item)
    }

    /// Puts the rest of a run back. Its room is not given back yet.
    pub(super) fn put_back(&mut self, rest: Vec<T>) {
        self.items.push_front(Item::Rest(rest));
        self.room_held_back -= 1;
    }

    /// Closes the run to which broadcasts may still add.
    fn close_run(&self) {
        if let Some(Item::Run(run)) = self.items.back() {
            run.close();
        }
    }

    /// Returns the room to give back after the lock is released, because giving it back wakes
    /// tasks.
    pub(super) fn room_back(&mut self) -> usize {
        if self.is_above_mark() {
            0
        } else {
            std::mem::take(&mut self.room_held_back)
        }
    }

    /// Returns whether the output is above its mark, and the peer has taken nothing for `time`. The
    /// time counts from the call that first finds the output above its mark, and starts again when
    /// the peer takes something. The system is asked at most 16 times within `time`, and at its
    /// end.
    pub(super) fn has_stalled(&mut self, life: &Life, time: Duration) -> bool {
        if !self.is_above_mark() {
            self.stall = None;
            return false;
        }
        let now = Instant::now();
        let stall = self.stall.get_or_insert_with(|| Stall::new(life, now));
        let is_over = |stall: &Stall| now.duration_since(stall.since) >= time;
        if is_over(stall) || now.duration_since(stall.looked) >= time / LOOKS {
            let before = std::mem::replace(stall, Stall::new(life, now));
            if !stall.shows_progress(&before) {
                stall.since = before.since;
            }
        }
        is_over(stall)
    }

    /// Records that a mark was crossed. Returns the room to give back.
    pub(super) fn cross(&mut self, room: &Semaphore) -> usize {
        self.crossings += 1;
        if self.is_above_mark() {
            self.room_held_back += room.forget_permits(usize::MAX);
            self.close_run();
        }
        self.room_back()
    }
}

impl<T, M> Channel<T, M> {
    pub(super) fn new(
        info: ConnectionInfo,
        marks: Watermarks,
        idle: Option<Duration>,
        most_frames: usize,
        most_messages: usize,
    ) -> Self {
        let queues = Queues {
            items: VecDeque::new(),
            room_held_back: 0,
            flushes: VecDeque::new(),
            held: None,
            messages: VecDeque::new(),
            timers: BTreeMap::new(),
            timers_set: 0,
            marks,
            idle,
            stall: None,
            crossings: 0,
            gone: false,
            no_more_messages: false,
            ended: false,
        };
        Self {
            info,
            most_timers: most_messages,
            room: Semaphore::new(most_frames),
            flush_room: Semaphore::new(most_frames),
            message_room: Semaphore::new(most_messages),
            flags: Flags::default(),
            unwritten: AtomicUsize::new(0),
            queues: Mutex::new(queues),
            changed: Notify::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Queues<T, M>> {
        // Neither user code nor a waker runs under this lock, so only a failed allocation can
        // poison it.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        self.info.life.signals.wake_engine();
    }

    pub(super) fn tell(&self, flag: Flag) {
        self.flags.raise(flag);
        self.wake();
    }

    /// Queues an item of output. The caller's permit guarantees room for it.
    pub(super) fn push(&self, item: Item<T>, room: SemaphorePermit<'_>) -> Result<(), Item<T>> {
        let is_first = {
            let mut state = self.lock();
            if state.gone {
                return Err(item);
            }
            state.close_run();
            state.items.push_back(item);
            self.flags.raise(Flag::Pushed)
        };
        // The room is given back when the item is taken.
        room.forget();
        // The engine takes all items before it waits, unless the output is above its mark. So the
        // first of several wakes it for the others, too.
        if is_first {
            self.wake();
        }
        Ok(())
    }

    /// Queues a message. The caller's permit guarantees room for it.
    pub(super) fn post(&self, message: M, room: SemaphorePermit<'_>) -> Result<(), M> {
        {
            let mut state = self.lock();
            if state.no_more_messages {
                return Err(message);
            }
            state.messages.push_back(message);
            self.flags.raise(Flag::Mail);
        }
        room.forget();
        self.wake();
        Ok(())
    }

    pub(super) fn set_timer(
        &self,
        due: Instant,
        message: M,
    ) -> Result<(Instant, u64), TrySendError<M>> {
        let key = {
            let mut state = self.lock();
            if state.no_more_messages {
                return Err(TrySendError::Closed(message));
            }
            if state.timers.len() >= self.most_timers {
                return Err(TrySendError::Full(message));
            }
            state.timers_set += 1;
            let key = (due, state.timers_set);
            state.timers.insert(key, message);
            self.flags.raise(Flag::Mail);
            key
        };
        self.wake();
        Ok(key)
    }

    pub(super) fn cancel_timer(&self, key: (Instant, u64)) -> Option<M> {
        self.lock().timers.remove(&key)
    }

    pub(super) fn buffered(&self) -> Buffered {
        let frames = |item: &Item<T>| match item {
            Item::Frame(_) => 1,
            Item::Run(run) => run.len(),
            Item::Rest(frames) => frames.len(),
            Item::Flush(_) => 0,
        };
        Buffered {
            bytes: self.unwritten.load(Ordering::Relaxed),
            frames: self.lock().items.iter().map(frames).sum(),
        }
    }

    /// Accepts nothing more. Items and messages sent before are still delivered.
    pub(super) fn refuse(&self) {
        {
            let mut state = self.lock();
            state.gone = true;
            state.close_run();
        }
        self.room.close();
        self.flush_room.close();
        self.refuse_messages();
    }

    /// Accepts no more messages. Messages sent before are still delivered.
    pub(super) fn refuse_messages(&self) {
        self.lock().no_more_messages = true;
        self.message_room.close();
    }

    /// Ends the channel: nothing more will be written or delivered. Counts undelivered messages,
    /// including timers that are due, and drops everything.
    pub(super) fn end(&self) {
        self.refuse();
        let (items, flushes, held, messages, timers) = {
            let mut state = self.lock();
            state.ended = true;
            (
                std::mem::take(&mut state.items),
                std::mem::take(&mut state.flushes),
                state.held.take(),
                std::mem::take(&mut state.messages),
                std::mem::take(&mut state.timers),
            )
        };
        let now = Instant::now();
        let due = timers.keys().take_while(|(due, _)| *due <= now).count();
        let dropped = usize::from(held.is_some()) + messages.len() + due;
        self.info.life.count_dropped_messages(dropped);
        self.changed.notify_waiters();
        // Dropped last and without the lock, because these are user types, and their `Drop` may do
        // anything.
        drop((items, flushes, held, messages, timers));
    }
}
