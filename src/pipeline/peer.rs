use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use tokio::sync::Notify;

use crate::connection::{ConnectionInfo, Life};
use crate::end_reason::EndReason;
use crate::shutdown::Signal;

/// The connection has ended, or is closing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the connection is gone")]
pub struct Gone;

/// A handle to one connection: what is known of it, and a way to write to it at any time.
///
/// A make-service is given it; it can be cloned and sent anywhere. `T` is the type of the frames that go out. (`M` is for the
/// messages that a service will be able to take from the program's other parts; there are none yet.)
pub struct Peer<T, M = Infallible> {
    shared: Arc<Shared<T>>,
    messages: PhantomData<fn(M)>,
}

struct Shared<T> {
    info: Arc<ConnectionInfo>,
    life: Arc<Life>,
    most: usize,
    /// Something is in `queue`: what the engine looks at, so that a request does not cost a lock.
    pushed: AtomicBool,
    queue: Mutex<Queue<T>>,
    /// Senders that wait for room.
    room: Notify,
}

struct Queue<T> {
    frames: VecDeque<T>,
    above_mark: bool,
    gone: bool,
}

impl<T, M> Peer<T, M> {
    pub(super) fn new(info: Arc<ConnectionInfo>, life: Arc<Life>, most: usize) -> Self {
        let queue = Queue {
            frames: VecDeque::new(),
            above_mark: false,
            gone: false,
        };
        Self {
            shared: Arc::new(Shared {
                info,
                life,
                most,
                pushed: AtomicBool::new(false),
                queue: Mutex::new(queue),
                room: Notify::new(),
            }),
            messages: PhantomData,
        }
    }

    /// Returns what is known of the connection.
    pub fn info(&self) -> &Arc<ConnectionInfo> {
        &self.shared.info
    }

    /// Sends a frame: before, between or after replies, and between the frames of a streamed one.
    ///
    /// It is sent whole and in the order of `send`s. This waits while 16 frames wait already, or the output is
    /// above its high mark; what is sent is then written by the connection's task.
    ///
    /// # Errors
    ///
    /// [`Gone`] when the connection is closing or has ended.
    ///
    /// # Cancel safety
    ///
    /// If it is dropped before it is done, the frame has not been sent.
    pub async fn send(&self, frame: T) -> Result<(), Gone> {
        loop {
            let room = self.shared.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            {
                let mut queue = self.shared.lock();
                if queue.gone {
                    return Err(Gone);
                }
                if !queue.above_mark && queue.frames.len() < self.shared.most {
                    queue.frames.push_back(frame);
                    self.shared.pushed.store(true, Ordering::Release);
                    drop(queue);
                    self.shared.life.signals.engine.wake();
                    return Ok(());
                }
            }
            room.await;
        }
    }

    /// Closes the connection in good order: what was sent before is written, requests in hand are answered, those that are not
    /// begun are dropped. `send` fails from now on.
    pub fn close(&self) {
        self.refuse();
        self.shared.life.signals.raise(Signal::Close);
    }

    /// Ends the connection at once: requests in hand are dropped, and so is what is not written.
    pub fn abort(&self) {
        self.shared.life.abort(EndReason::Aborted);
    }

    // What follows is the engine's side.

    /// Returns whether anything was pushed since the queue was last found empty.
    pub(super) fn has_pushed(&self) -> bool {
        self.shared.pushed.load(Ordering::Acquire)
    }

    /// Takes the next frame that was pushed.
    pub(super) fn take(&self) -> Option<T> {
        let mut queue = self.shared.lock();
        let frame = queue.frames.pop_front();
        if queue.frames.is_empty() {
            // Under the lock, so that a push that comes now raises it again.
            self.shared.pushed.store(false, Ordering::Release);
        }
        let room = !queue.above_mark;
        drop(queue);
        if frame.is_some() && room {
            self.shared.room.notify_waiters();
        }
        frame
    }

    /// Says that the output went above its high mark, or below its low one.
    pub(super) fn set_above_mark(&self, above: bool) {
        self.shared.lock().above_mark = above;
        if !above {
            self.shared.room.notify_waiters();
        }
    }

    /// Takes no more from now on; what was sent before is still taken.
    pub(super) fn refuse(&self) {
        self.shared.lock().gone = true;
        self.shared.room.notify_waiters();
    }

    /// Says that nothing more will be sent, and drops what was not.
    fn end(&self) {
        let unsent = {
            let mut queue = self.shared.lock();
            queue.gone = true;
            std::mem::take(&mut queue.frames)
        };
        drop(unsent);
        self.shared.room.notify_waiters();
    }
}

/// The engine's own handle. Without an engine nobody can send, so that is said however it goes: at the end, by an abort,
/// by a layer that drops the connection's future.
pub(super) struct EngineSide<T>(pub(super) Peer<T>);

impl<T> Deref for EngineSide<T> {
    type Target = Peer<T>;

    fn deref(&self) -> &Peer<T> {
        &self.0
    }
}

impl<T> Drop for EngineSide<T> {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, M> Clone for Peer<T, M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            messages: PhantomData,
        }
    }
}

impl<T, M> fmt::Debug for Peer<T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("info", &self.shared.info)
            .finish_non_exhaustive()
    }
}
