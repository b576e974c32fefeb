use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::{Buffered, TrySendError, Watermarks};
use crate::connection::{ConnectionInfo, Life};

/// What the handles of a connection and its engine have in common.
pub(super) struct Shared<T, M> {
    pub(super) info: Arc<ConnectionInfo>,
    pub(super) life: Arc<Life>,
    pub(super) most_frames: usize,
    most_messages: usize,
    pub(super) flags: Flags,
    /// The encoded bytes that are not written, as of the engine's last turn.
    pub(super) unwritten: AtomicUsize,
    state: Mutex<State<T, M>>,
    /// There is room, or there was a crossing, or it ended.
    pub(super) changed: Notify,
}

pub(super) struct State<T, M> {
    pub(super) items: VecDeque<Item<T>>,
    /// Those who wait until the output up to a position is written.
    pub(super) flushes: VecDeque<(u64, oneshot::Sender<()>)>,
    pub(super) messages: VecDeque<M>,
    /// By when they are due, then by when they were set.
    pub(super) timers: BTreeMap<(Instant, u64), M>,
    timers_set: u64,
    pub(super) marks: Watermarks,
    /// How often the marks were crossed: above, while it is odd.
    pub(super) crossings: u64,
    gone: bool,
    pub(super) ended: bool,
}

/// What is queued for the output.
pub(super) enum Item<T> {
    Frame(T),
    /// Tell when all before it is written.
    Flush(oneshot::Sender<()>),
}

/// Why something was not queued now.
pub(super) enum Refused<V> {
    /// The connection's task has not had its turn.
    Crowded(V),
    AboveMark(V),
    Gone(V),
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
    /// The marks were changed.
    Marks = 8,
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

    pub(super) fn raise(&self, flag: Flag) {
        self.0.fetch_or(flag as u8, Ordering::AcqRel);
    }

    pub(super) fn lower(&self, flag: Flag) {
        self.0.fetch_and(!(flag as u8), Ordering::AcqRel);
    }
}

impl<T, M> State<T, M> {
    pub(super) fn is_above_mark(&self) -> bool {
        self.crossings & 1 == 1
    }
}

impl<T, M> Shared<T, M> {
    pub(super) fn new(
        info: Arc<ConnectionInfo>,
        life: Arc<Life>,
        marks: Watermarks,
        most_frames: usize,
        most_messages: usize,
    ) -> Self {
        let state = State {
            items: VecDeque::new(),
            flushes: VecDeque::new(),
            messages: VecDeque::new(),
            timers: BTreeMap::new(),
            timers_set: 0,
            marks,
            crossings: 0,
            gone: false,
            ended: false,
        };
        Self {
            info,
            life,
            most_frames,
            most_messages,
            flags: Flags::default(),
            unwritten: AtomicUsize::new(0),
            state: Mutex::new(state),
            changed: Notify::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State<T, M>> {
        // No code of the user's runs under this lock, so poison can only come from a failed allocation.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        self.life.signals.engine.wake();
    }

    pub(super) fn tell(&self, flag: Flag) {
        self.flags.raise(flag);
        self.wake();
    }

    pub(super) fn try_queue<V>(&self, value: V, item: fn(V) -> Item<T>) -> Result<(), Refused<V>> {
        {
            let mut state = self.lock();
            if state.gone {
                return Err(Refused::Gone(value));
            }
            if state.is_above_mark() {
                return Err(Refused::AboveMark(value));
            }
            if state.items.len() >= self.most_frames {
                return Err(Refused::Crowded(value));
            }
            state.items.push_back(item(value));
            self.flags.raise(Flag::Pushed);
        }
        self.wake();
        Ok(())
    }

    pub(super) fn try_message(&self, message: M) -> Result<(), TrySendError<M>> {
        {
            let mut state = self.lock();
            if state.gone {
                return Err(TrySendError::Gone(message));
            }
            if state.messages.len() >= self.most_messages {
                return Err(TrySendError::Full(message));
            }
            state.messages.push_back(message);
            self.flags.raise(Flag::Mail);
        }
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
            if state.gone {
                return Err(TrySendError::Gone(message));
            }
            if state.timers.len() >= self.most_messages {
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
        self.changed.notify_waiters();
    }

    /// Says that nothing more will be written or delivered, and drops what was not. Returns how many messages that were.
    pub(super) fn end(&self) -> usize {
        let (items, flushes, messages, timers) = {
            let mut state = self.lock();
            state.gone = true;
            state.ended = true;
            (
                std::mem::take(&mut state.items),
                std::mem::take(&mut state.flushes),
                std::mem::take(&mut state.messages),
                std::mem::take(&mut state.timers),
            )
        };
        let undelivered = messages.len();
        // The user's types are dropped without the lock: they may come back for it.
        drop((items, flushes, messages, timers));
        self.changed.notify_waiters();
        undelivered
    }
}
