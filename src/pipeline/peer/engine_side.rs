use std::collections::btree_map::OccupiedEntry;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::Peer;
use super::channel::{Channel, Flag, Item};
use crate::connection::ConnectionInfo;
use crate::pipeline::limits::Limits;
use crate::pipeline::watermarks::Watermarks;

/// The engine's side of the `Channel` that it shares with the handles to its connection.
///
/// Dropping it ends the channel. So sends fail however the connection ends: by a close, by an
/// abort, or because a layer drops the connection's future.
pub(in crate::pipeline) struct EngineSide<T, M>(Arc<Channel<T, M>>);

/// Pushed frames: a single frame, or the frames of a [`Run`](super::run::Run).
pub(in crate::pipeline) enum Taken<T> {
    One(T),
    Several(Vec<T>),
}

/// The time at which the next message is due.
pub(in crate::pipeline) enum Mail {
    None,
    Now,
    At(Instant),
}

impl<T, M> EngineSide<T, M> {
    pub(in crate::pipeline) fn new(
        info: ConnectionInfo,
        limits: &Limits,
        idle: Option<Duration>,
    ) -> Self {
        Self(Arc::new(Channel::new(
            info,
            limits.watermarks,
            idle,
            limits.push_queue,
            limits.messages,
        )))
    }

    pub(in crate::pipeline) fn handle(&self) -> Peer<T, M> {
        Peer {
            channel: Arc::clone(&self.0),
        }
    }

    /// Returns whether there may be items in the queue of pushed frames.
    pub(in crate::pipeline) fn has_pushed(&self) -> bool {
        self.0.flags.is_raised(Flag::Pushed)
    }

    /// Takes the next pushed frames, and the flush requests before them. These requests are done
    /// once the output up to `position` is flushed.
    ///
    /// If the queue is then empty, the call also gives the permits of all items taken so far back
    /// to the senders, as [`return_permits`](Self::return_permits) does. If the result is a
    /// [`Taken::Several`], however, no permits are given back, because those frames may still be
    /// [put back](Self::put_back). A later `take` or `return_permits` gives back the permits that
    /// this call does not.
    pub(in crate::pipeline) fn take(&self, position: u64) -> Option<Taken<T>> {
        let mut run = None;
        let mut state = self.0.lock();
        let taken = loop {
            match state.take() {
                None => break None,
                Some(Item::Frame(frame)) => break Some(Taken::One(frame)),
                Some(Item::Rest(frames)) => break Some(Taken::Several(frames)),
                Some(Item::Run(it)) => {
                    run = Some(it);
                    break None;
                }
                Some(Item::Flush(done)) => {
                    state.flushes.push_back((position, done));
                    self.0.flags.raise(Flag::Flush);
                }
            }
        };
        let mut room = 0;
        if state.items.is_empty() {
            // The flag is lowered under the lock, so that a later push raises it again.
            self.0.flags.lower(Flag::Pushed);
            if run.is_none() && !matches!(taken, Some(Taken::Several(_))) {
                room = state.room_back();
            }
        }
        drop(state);
        self.0.room.add_permits(room);
        // Frames are cloned after unlocking, because `Clone` is user code.
        taken.or_else(|| run.map(|run| Taken::Several(run.take())))
    }

    /// Puts back the frames of a run that were not encoded.
    pub(in crate::pipeline) fn put_back(&self, rest: Vec<T>) {
        self.0.lock().put_back(rest);
        self.0.flags.raise(Flag::Pushed);
    }

    /// Gives back to the senders the permits of the items that have been taken so far. Does nothing
    /// while the output counts as above its mark (see `Queues::crossings`).
    pub(in crate::pipeline) fn return_permits(&self) {
        let room = self.0.lock().room_back();
        self.0.room.add_permits(room);
    }

    /// Returns whether a task is waiting for encoded output to be flushed.
    pub(in crate::pipeline) fn awaits_flush(&self) -> bool {
        self.0.flags.is_raised(Flag::Flush)
    }

    /// Stores the number of unwritten bytes, and wakes the tasks whose awaited output is flushed.
    /// `flushed` is the position up to which output is flushed.
    pub(in crate::pipeline) fn wrote(&self, flushed: u64, unwritten: usize) {
        self.0.unwritten.store(unwritten, Ordering::Relaxed);
        if !self.awaits_flush() {
            return;
        }
        let done: Vec<_> = {
            let mut state = self.0.lock();
            let waiting = state.flushes.iter();
            let done = waiting.take_while(|(position, _)| *position <= flushed);
            let done = done.count();
            let done = state.flushes.drain(..done).collect();
            if state.flushes.is_empty() {
                self.0.flags.lower(Flag::Flush);
            }
            done
        };
        self.0.flush_room.add_permits(done.len());
        for (_, done) in done {
            // The waiting task may have given up.
            let _gone = done.send(());
        }
    }

    /// Returns the marks and the idle time if either was changed since the last call.
    pub(in crate::pipeline) fn tuned(&self) -> Option<(Watermarks, Option<Duration>)> {
        if !self.0.flags.is_raised(Flag::Tuned) {
            return None;
        }
        let state = self.0.lock();
        self.0.flags.lower(Flag::Tuned);
        Some((state.marks, state.idle))
    }

    /// Records that the output has risen to the high mark, or fallen to the low mark.
    pub(in crate::pipeline) fn crossed(&self) {
        let room = self.0.lock().cross(&self.0.room);
        self.0.room.add_permits(room);
        self.0.changed.notify_waiters();
    }

    /// Returns whether no flag is raised. If none is, the engine has nothing to do for the handles.
    #[inline]
    pub(in crate::pipeline) fn is_quiet(&self) -> bool {
        !self.0.flags.any()
    }

    pub(in crate::pipeline) fn is_paused(&self) -> bool {
        self.0.flags.is_raised(Flag::Paused)
    }

    /// Returns the time at which the next message is due.
    pub(in crate::pipeline) fn mail(&self) -> Mail {
        if !self.0.flags.is_raised(Flag::Mail) {
            return Mail::None;
        }
        let state = self.0.lock();
        if state.held.is_some() || !state.messages.is_empty() {
            return Mail::Now;
        }
        match state.timers.first_key_value() {
            Some(((due, _), _)) if *due <= Instant::now() => Mail::Now,
            Some(((due, _), _)) => Mail::At(*due),
            None => Mail::None,
        }
    }

    /// Takes the next message: the one that [`hold`](Self::hold) stored, else the one of the timer
    /// that was due first, else the one that was sent first.
    pub(in crate::pipeline) fn take_message(&self) -> Option<M> {
        if !self.0.flags.is_raised(Flag::Mail) {
            return None;
        }
        let mut state = self.0.lock();
        if let Some(held) = state.held.take() {
            return Some(held);
        }
        let due = state
            .timers
            .first_entry()
            .filter(|timer| timer.key().0 <= Instant::now());
        let timer = due.map(OccupiedEntry::remove);
        let sent = match &timer {
            Some(_) => None,
            None => state.messages.pop_front(),
        };
        if state.messages.is_empty() && state.timers.is_empty() {
            self.0.flags.lower(Flag::Mail);
        }
        drop(state);
        self.0.message_room.add_permits(sent.is_some().into());
        timer.or(sent)
    }

    /// Stores a message from [`take_message`](Self::take_message) until the service is ready for
    /// it.
    pub(in crate::pipeline) fn hold(&self, message: M) {
        self.0.lock().held = Some(message);
        self.0.flags.raise(Flag::Mail);
    }

    /// Refuses further messages. Earlier ones are still delivered.
    pub(in crate::pipeline) fn refuse_messages(&self) {
        self.0.refuse_messages();
    }

    /// Refuses further items and messages. Earlier ones stay in their queues.
    pub(in crate::pipeline) fn refuse(&self) {
        self.0.refuse();
    }
}

impl<T, M> Drop for EngineSide<T, M> {
    fn drop(&mut self) {
        self.0.end();
    }
}
