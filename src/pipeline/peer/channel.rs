use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit, oneshot};
use tokio::time::Instant;

use super::{Buffered, TrySendError};
use crate::connection::ConnectionInfo;
use crate::pipeline::watermarks::Watermarks;

/// What the handles of a connection and its engine have in common.
pub(super) struct Channel<T, M> {
    pub(super) info: ConnectionInfo,
    most_timers: usize,
    /// Room in `items`; none is given out while the output is above its mark, but what was given
    /// out before is good. Semaphores are fair: who sends without end keeps nobody waiting for
    /// ever.
    pub(super) room: Semaphore,
    /// Room for those who wait for a flush, until they are told.
    pub(super) flush_room: Semaphore,
    /// Room in `messages`.
    pub(super) message_room: Semaphore,
    pub(super) flags: Flags,
    /// The encoded bytes that are not written, as of the engine's last turn.
    pub(super) unwritten: AtomicUsize,
    queues: Mutex<Queues<T, M>>,
    /// A mark was crossed, or it ended.
    pub(super) changed: Notify,
}

pub(super) struct Queues<T, M> {
    pub(super) items: VecDeque<Item<T>>,
    /// Room that is given back when the output is below its mark.
    room_held_back: usize,
    /// Those who wait until the output up to a position is written.
    pub(super) flushes: VecDeque<(u64, oneshot::Sender<()>)>,
    pub(super) messages: VecDeque<M>,
    /// By when they are due, then by when they were set.
    pub(super) timers: BTreeMap<(Instant, u64), M>,
    timers_set: u64,
    pub(super) marks: Watermarks,
    /// How long the connection may be idle.
    pub(super) idle: Option<Duration>,
    /// How often the marks were crossed: above, while it is odd.
    pub(super) crossings: u64,
    gone: bool,
    no_more_messages: bool,
    pub(super) ended: bool,
}

/// What is queued for the output.
pub(super) enum Item<T> {
    Frame(T),
    /// Tell when all before it is written.
    Flush(oneshot::Sender<()>),
}

/// What the engine looks at in each of its turns, so that no turn costs a lock.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(super) enum Flag {
    /// Something is in `items`.
    Pushed = 1,
    /// Somebody is in `flushes`.
    Flush = 2,
    /// A message or a timer is set.
    Mail = 4,
    /// The marks or the idle time were changed.
    Tuned = 8,
    /// No requests are to be taken.
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

    pub(super) fn raise(&self, flag: Flag) {
        self.0.fetch_or(flag as u8, Ordering::AcqRel);
    }

    pub(super) fn lower(&self, flag: Flag) {
        self.0.fetch_and(!(flag as u8), Ordering::AcqRel);
    }
}

impl<T, M> Queues<T, M> {
    pub(super) fn is_above_mark(&self) -> bool {
        self.crossings & 1 == 1
    }

    /// An item was taken. Returns how much room to give back, once the lock is: that wakes.
    pub(super) fn took(&mut self) -> usize {
        if self.is_above_mark() {
            self.room_held_back += 1;
            0
        } else {
            1
        }
    }

    /// A mark was crossed. Returns how much room to give back.
    pub(super) fn cross(&mut self, room: &Semaphore) -> usize {
        self.crossings += 1;
        if self.is_above_mark() {
            self.room_held_back += room.forget_permits(usize::MAX);
            0
        } else {
            std::mem::take(&mut self.room_held_back)
        }
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
            messages: VecDeque::new(),
            timers: BTreeMap::new(),
            timers_set: 0,
            marks,
            idle,
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
        // Neither code of the user's runs under this lock nor a waker, so poison can only come from
        // a failed allocation.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        self.info.life.signals.wake_engine();
    }

    pub(super) fn tell(&self, flag: Flag) {
        self.flags.raise(flag);
        self.wake();
    }

    /// Queues something for the output. There is room for it: the caller holds a permit.
    pub(super) fn push(&self, item: Item<T>, room: SemaphorePermit<'_>) -> Result<(), Item<T>> {
        {
            let mut state = self.lock();
            if state.gone {
                return Err(item);
            }
            state.items.push_back(item);
            self.flags.raise(Flag::Pushed);
        }
        // Given back when it is taken.
        room.forget();
        self.wake();
        Ok(())
    }

    /// Queues a message. There is room for it: the caller holds a permit.
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
        let frames = |item: &&Item<T>| matches!(item, Item::Frame(_));
        Buffered {
            bytes: self.unwritten.load(Ordering::Relaxed),
            frames: self.lock().items.iter().filter(frames).count(),
        }
    }

    /// Takes no more from now on; what was sent before is still taken.
    pub(super) fn refuse(&self) {
        self.lock().gone = true;
        self.room.close();
        self.flush_room.close();
        self.refuse_messages();
    }

    /// Takes no more messages from now on; what was sent before is still delivered.
    pub(super) fn refuse_messages(&self) {
        self.lock().no_more_messages = true;
        self.message_room.close();
    }

    /// Says that nothing more will be written or delivered, counts the messages that were not (a
    /// timer that is due is one), and drops all.
    pub(super) fn end(&self) {
        self.refuse();
        let (items, flushes, messages, timers) = {
            let mut state = self.lock();
            state.ended = true;
            (
                std::mem::take(&mut state.items),
                std::mem::take(&mut state.flushes),
                std::mem::take(&mut state.messages),
                std::mem::take(&mut state.timers),
            )
        };
        let now = Instant::now();
        let due = timers.keys().take_while(|(due, _)| *due <= now).count();
        self.info.life.count_dropped_messages(messages.len() + due);
        self.changed.notify_waiters();
        // Last, and without the lock: these are the user's types, and do what they like when they
        // are dropped.
        drop((items, flushes, messages, timers));
    }
}
