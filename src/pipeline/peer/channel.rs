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

/// The state that is shared by a connection's handles and its engine.
pub(super) struct Channel<T, M> {
    pub(super) info: ConnectionInfo,
    most_timers: usize,
    /// Permits for entries in `items`. Above the high mark no more permits are handed out; earlier
    /// permits stay valid. The semaphore is fair, so one busy sender cannot keep other senders
    /// waiting forever.
    pub(super) room: Semaphore,
    /// Permits for tasks that wait for a flush. Each is held until the flush is reported.
    pub(super) flush_room: Semaphore,
    /// Permits for entries in `messages`.
    pub(super) message_room: Semaphore,
    pub(super) flags: Flags,
    /// The number of encoded bytes that were still unwritten after the engine's last attempt to
    /// write.
    pub(super) unwritten: AtomicUsize,
    queues: Mutex<Queues<T, M>>,
    /// Notified when a mark is crossed and when the channel [ends](Self::end).
    pub(super) changed: Notify,
}

pub(super) struct Queues<T, M> {
    pub(super) items: VecDeque<Item<T>>,
    /// The number of permits to return to `room` once the output no longer counts as above its mark
    /// (see `crossings`). Some were the permits of items that the engine has taken. The others were
    /// free permits, withdrawn when the output rose to the high mark.
    room_held_back: usize,
    /// Tasks that wait until the output up to a position is flushed.
    pub(super) flushes: VecDeque<(u64, oneshot::Sender<()>)>,
    /// A message that was taken, but for which the service is not ready yet.
    pub(super) held: Option<M>,
    pub(super) messages: VecDeque<M>,
    /// The messages with a delay, ordered by due time, then by the order in which they were set.
    pub(super) timers: BTreeMap<(Instant, u64), M>,
    timers_set: u64,
    pub(super) marks: Watermarks,
    /// The current idle deadline of the connection.
    pub(super) idle: Option<Duration>,
    /// Stored by the last call of [`has_stalled`](Self::has_stalled). `None` if the output was not
    /// above its mark at that call, or if there was no call. Only a broadcast to a slow peer calls
    /// that method, so this may still be `Some` after the output has fallen to the low mark.
    stall: Option<Stall>,
    /// The number of times that the output crossed a mark. The output counts as *above its mark*
    /// from when it rises to the high mark until it falls to the low mark. The two marks are
    /// crossed in turn, the high mark first, so the number is odd during that time.
    pub(super) crossings: u64,
    no_more_items: bool,
    no_more_messages: bool,
    pub(super) ended: bool,
}

/// The amount of output that a slow peer had taken at the last check, and the moment from which its
/// time without progress counts.
struct Stall {
    /// The system's report of the output that the peer has taken. Two checks are compared by
    /// their reports if both have one, otherwise by `written`.
    sent: Option<Sent>,
    /// The number of bytes written to the stream.
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
    /// A run of broadcast frames. While it is *open*, broadcasts may add frames to it. It is open
    /// only while it is the last entry and the output is not above its mark.
    Run(Arc<Run<T>>),
    /// The rest of a run: frames that were not encoded because the output reached its mark.
    Rest(Vec<T>),
    /// A request to report when all earlier output is flushed.
    Flush(oneshot::Sender<()>),
}

/// A flag that the engine can check without taking the lock.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(super) enum Flag {
    /// `items` is not empty.
    Pushed = 1,
    /// `flushes` is not empty.
    Flush = 2,
    /// A message may be waiting, or a timer may be set.
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

    /// Raises a flag. Returns `false` if it was already raised.
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

    /// Takes an item. Its permit is returned later, together with the permits of other items.
    pub(super) fn take(&mut self) -> Option<Item<T>> {
        let item = self.items.pop_front()?;
        self.room_held_back += 1;
        if let Item::Run(run) = &item {
            // The run is closed under the lock, so that later items come after all its frames.
            run.close();
        }
        Some(item)
    }

    /// Puts the rest of a run back at the front of the queue. The rest keeps the run's permit.
    pub(super) fn put_back(&mut self, rest: Vec<T>) {
        self.items.push_front(Item::Rest(rest));
        self.room_held_back -= 1;
    }

    /// Closes the last entry, if it is a run to which broadcasts may still add frames.
    fn close_run(&self) {
        if let Some(Item::Run(run)) = self.items.back() {
            run.close();
        }
    }

    /// Takes all permits that are held back, or none while the output is above its mark, and
    /// returns their number. The caller adds them to the semaphore after unlocking, because adding
    /// permits wakes tasks.
    pub(super) fn room_back(&mut self) -> usize {
        if self.is_above_mark() {
            0
        } else {
            std::mem::take(&mut self.room_held_back)
        }
    }

    /// Returns whether the output is above its high mark and the peer has taken nothing for `time`.
    /// The time counts from the call that first finds the output above the mark, and restarts when
    /// the peer takes output. The system is asked for the peer's progress at most 16 times within
    /// `time`, and once at its end.
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

    /// Records that a mark was crossed. Returns the number of permits that the caller must add to
    /// the semaphore.
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
            no_more_items: false,
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

    pub(super) fn raise_and_wake(&self, flag: Flag) {
        self.flags.raise(flag);
        self.wake();
    }

    /// Queues an item of output. The caller's permit guarantees that there is room.
    pub(super) fn push(&self, item: Item<T>, room: SemaphorePermit<'_>) -> Result<(), Item<T>> {
        let is_first = {
            let mut state = self.lock();
            if state.no_more_items {
                return Err(item);
            }
            state.close_run();
            state.items.push_back(item);
            // The output may have reached its mark since the caller got the permit.
            if state.is_above_mark() {
                state.close_run();
            }
            self.flags.raise(Flag::Pushed)
        };
        // The permit is returned after the item is taken.
        room.forget();
        // The engine takes all items before it waits, unless the output is above its mark. So only
        // the first of several items wakes it.
        if is_first {
            self.wake();
        }
        Ok(())
    }

    /// Queues a message. The caller's permit guarantees that there is room.
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

    /// Refuses further items and messages. Earlier ones stay in their queues.
    pub(super) fn refuse(&self) {
        {
            let mut state = self.lock();
            state.no_more_items = true;
            state.close_run();
        }
        self.room.close();
        self.flush_room.close();
        self.refuse_messages();
    }

    /// Refuses further messages. Earlier ones are still delivered.
    pub(super) fn refuse_messages(&self) {
        self.lock().no_more_messages = true;
        self.message_room.close();
    }

    /// Ends the channel: nothing more will be written or delivered. Counts undelivered messages,
    /// including those of due timers, and drops all queued values.
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
        // These values of user types are dropped last and after unlocking, because their `Drop` may
        // do anything.
        drop((items, flushes, held, messages, timers));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{Address, Connection, Probe};

    #[test]
    fn a_run_that_is_queued_above_the_mark_takes_no_more_frames() {
        let conn = Connection::new((), Address::Memory(0), Address::Memory(0), Probe::default());
        let marks = Watermarks::below(1);
        let channel = Channel::<u8, ()>::new(conn.info().clone(), marks, None, 16, 16);
        let run = Arc::new(Run::new(1, None));
        let room = channel.room.try_acquire().expect("it has room");

        // The output reaches its mark after the broadcast has got its permit.
        channel.lock().cross(&channel.room);
        let pushed = channel.push(Item::Run(Arc::clone(&run)), room);

        assert!(pushed.is_ok());
        assert!(!run.add(&2));
    }
}
