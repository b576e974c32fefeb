//! The typed handle to one connection, and what stands behind it.

mod channel;
mod crossings;
mod engine_side;

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use thiserror::Error;
use tokio::sync::{SemaphorePermit, TryAcquireError, oneshot};
use tokio::time::Instant;

use super::watermarks::Watermarks;
use crate::connection::{ConnectionInfo, HookId};
use crate::end::{ConnectionEnded, End, EndReason};
use crate::error::BoxError;
use crate::signals::Signal;
use channel::{Channel, Flag, Item};

pub use crossings::{Crossing, Crossings};
pub(super) use engine_side::{EngineSide, Mail};

/// The connection has ended, or is closing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the connection is gone")]
#[doc(alias = "Gone")]
pub struct Closed;

/// Why something was not taken without waiting. It is given back.
#[derive(Clone, Copy, PartialEq, Eq, Error)]
pub enum TrySendError<V> {
    /// There is no room now.
    #[error("no room for it now")]
    Full(V),
    /// The connection has ended, or is closing.
    #[error("the connection is gone")]
    Closed(V),
}

impl<V> TrySendError<V> {
    /// Returns what was not taken.
    pub fn into_inner(self) -> V {
        match self {
            Self::Full(it) | Self::Closed(it) => it,
        }
    }
}

impl<V> fmt::Debug for TrySendError<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "Full(..)",
            Self::Closed(_) => "Closed(..)",
        })
    }
}

/// What waits to be written to one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffered {
    bytes: usize,
    frames: usize,
}

impl Buffered {
    /// Returns the bytes that are encoded and not written. What the system holds, or a TLS stream,
    /// is not among them.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the frames that were sent by [`Peer::send`] and are not encoded yet.
    pub fn frames(&self) -> usize {
        self.frames
    }
}

/// A handle to one connection: what is known of it, and all that can be done with it from anywhere.
///
/// A make-service is given it; it can be cloned and sent to any task. `T` is the type of the frames
/// that go out, `M` of the messages that the connection's service takes besides requests, none by
/// default (see [`Event`](super::Event)).
///
/// It keeps nothing open: after the end of the connection, whatever would reach the peer or the
/// service fails with [`Closed`].
#[doc(alias = "wheel")]
#[doc(alias = "session")]
#[doc(alias = "sender")]
#[doc(alias = "Addr")]
pub struct Peer<T, M = Infallible> {
    channel: Arc<Channel<T, M>>,
}

impl<T, M> Peer<T, M> {
    /// Returns what is known of the connection.
    pub fn info(&self) -> &ConnectionInfo {
        &self.channel.info
    }

    /// Returns whether both are handles of the same connection.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.channel, &other.channel)
    }

    // Output.

    /// Sends a frame: before, between or after replies, and between the frames of a streamed one.
    ///
    /// It is sent whole and in the order of `send`s. This waits while the output is above its high
    /// mark, until it is down at the low one ([`Watermarks`]), and while [16
    /// frames](super::Limits::push_queue) wait already. What is sent is written by the connection's
    /// task.
    ///
    /// # Errors
    ///
    /// [`Closed`] when the connection is closing or has ended.
    ///
    /// # Cancel safety
    ///
    /// If it is dropped before it is done, the frame has not been sent.
    #[doc(alias = "put")]
    #[doc(alias = "push")]
    #[doc(alias = "write")]
    pub async fn send(&self, frame: T) -> Result<(), Closed> {
        self.push(Item::Frame(frame)).await
    }

    /// Sends a frame if that takes no wait.
    ///
    /// # Errors
    ///
    /// [`Full`](TrySendError::Full) where [`send`](Self::send) would wait: also for a peer that
    /// reads, when a burst of frames comes before its task has had a turn.
    /// [`Closed`](TrySendError::Closed) when the connection is closing or has ended.
    pub fn try_send(&self, frame: T) -> Result<(), TrySendError<T>> {
        match self.channel.room.try_acquire() {
            Ok(room) => self.push_frame(frame, room),
            Err(TryAcquireError::NoPermits) => Err(TrySendError::Full(frame)),
            Err(TryAcquireError::Closed) => Err(TrySendError::Closed(frame)),
        }
    }

    /// Sends a frame unless the peer is slow, its output above the high mark. This may wait for the
    /// connection's task, and never for the peer: what a sender wants that has others to serve. To
    /// many at once: [`Registry::broadcast`](crate::registry::Registry::broadcast).
    ///
    /// # Errors
    ///
    /// [`Full`](TrySendError::Full) when the output is above its mark,
    /// [`Closed`](TrySendError::Closed) when the connection is closing or has ended.
    ///
    /// # Cancel safety
    ///
    /// If it is dropped before it is done, the frame has not been sent.
    pub async fn offer(&self, frame: T) -> Result<(), TrySendError<T>> {
        let mut room = std::pin::pin!(self.channel.room.acquire());
        loop {
            let mut changed = std::pin::pin!(self.channel.changed.notified());
            changed.as_mut().enable();
            if self.channel.lock().is_above_mark() {
                return Err(TrySendError::Full(frame));
            }
            match select(room.as_mut(), changed).await {
                Either::Left((Ok(room), _)) => return self.push_frame(frame, room),
                Either::Left((Err(_closed), _)) => return Err(TrySendError::Closed(frame)),
                Either::Right(((), _)) => {}
            }
        }
    }

    fn push_frame(&self, frame: T, room: SemaphorePermit<'_>) -> Result<(), TrySendError<T>> {
        match self.channel.push(Item::Frame(frame), room) {
            Err(Item::Frame(frame)) => Err(TrySendError::Closed(frame)),
            Ok(()) | Err(Item::Flush(_)) => Ok(()),
        }
    }

    async fn push(&self, item: Item<T>) -> Result<(), Closed> {
        let room = self
            .channel
            .room
            .acquire()
            .await
            .map_err(|_closed| Closed)?;
        self.channel.push(item, room).map_err(|_item| Closed)
    }

    /// Waits until all that was sent before is written, and flushed by the stream.
    ///
    /// That says that the system has it, not that the peer has read it.
    ///
    /// # Errors
    ///
    /// [`Closed`] when the connection ended, or was closing already, before that.
    ///
    /// # Cancel safety
    ///
    /// Dropping it changes nothing for others.
    #[doc(alias = "flush")]
    #[doc(alias = "drain")]
    pub async fn flushed(&self) -> Result<(), Closed> {
        let waiting = self.channel.flush_room.acquire().await;
        let waiting = waiting.map_err(|_closed| Closed)?;
        let (done, flushed) = oneshot::channel();
        self.push(Item::Flush(done)).await?;
        // Given back when this is done, or would have been.
        waiting.forget();
        flushed.await.map_err(|_dropped| Closed)
    }

    /// Returns how much waits to be written. It may have changed by the time it is looked at.
    pub fn buffered(&self) -> Buffered {
        self.channel.buffered()
    }

    /// Returns the marks of the output.
    pub fn watermarks(&self) -> Watermarks {
        self.channel.lock().marks
    }

    /// Changes the marks of this connection's output. They hold from the next turn of its task,
    /// which has to come first: at once.
    pub fn set_watermarks(&self, marks: Watermarks) {
        self.channel.lock().marks = marks;
        self.channel.tell(Flag::Tuned);
    }

    /// Returns the crossings of the output's marks from now on; the first is [`Crossing::High`] if
    /// it is above now.
    #[doc(alias = "high_event")]
    #[doc(alias = "low_event")]
    #[doc(alias = "backpressure")]
    pub fn crossings(&self) -> Crossings<T, M> {
        Crossings::new(Arc::clone(&self.channel))
    }

    // Input.

    /// Returns how long this connection may be idle.
    pub fn idle(&self) -> Option<Duration> {
        self.channel.lock().idle
    }

    /// Changes how long this connection may be idle, in place of
    /// [`Deadlines::idle`](crate::deadline::Deadlines::idle): a keepalive that the peer has
    /// negotiated, such as MQTT's.
    ///
    /// The time counts from the last activity, not from this call, and holds from the next turn of
    /// the connection's task, which comes at once: a connection that has already been idle for as
    /// long ends. `None` waits forever. The deadline for the first byte, before any, stays as it
    /// is.
    ///
    /// ```
    /// use std::time::Duration;
    /// use bytes::Bytes;
    /// use tower_tcp::Peer;
    ///
    /// /// MQTT: a client is gone after one and a half times its keepalive. Zero turns that off.
    /// fn connected(peer: &Peer<Bytes>, keepalive: u16) {
    ///     let time = Duration::from_secs(keepalive.into()).mul_f32(1.5);
    ///     peer.set_idle((!time.is_zero()).then_some(time));
    /// }
    /// ```
    #[doc(alias = "keepalive")]
    #[doc(alias = "keep_alive")]
    #[doc(alias = "read_timeout")]
    pub fn set_idle(&self, time: impl Into<Option<Duration>>) {
        self.channel.lock().idle = time.into();
        self.channel.tell(Flag::Tuned);
    }

    /// Stops taking requests. None is begun after this, also of those that were read already; one
    /// that is being handed to the service by the connection's task at this very moment may be.
    /// Messages are still delivered.
    ///
    /// That the peer is gone is still noticed: its end of input when nothing undelivered is before
    /// it, a reset within [`Limits::read_ahead`](super::Limits::read_ahead). The deadlines for
    /// input rest.
    #[doc(alias = "shutdown_input")]
    #[doc(alias = "pause_read")]
    pub fn pause_input(&self) {
        self.channel.tell(Flag::Paused);
    }

    /// Takes requests again, from where it was paused: none is missing.
    pub fn resume_input(&self) {
        self.channel.flags.lower(Flag::Paused);
        self.channel.wake();
    }

    // Messages.

    /// Sends a message to the connection's service, which takes it in turn with its requests.
    ///
    /// Waits while [16 messages](super::Limits::messages) are waiting already: a service that sends
    /// to its own connection and waits for that, may wait for itself; there
    /// [`try_post`](Self::try_post) serves.
    ///
    /// # Errors
    ///
    /// [`Closed`] when the connection is closing or has ended, or the server drains: then what was
    /// sent before is delivered still. Messages that are taken and not delivered by the end are
    /// counted ([`End::messages_dropped`]).
    ///
    /// # Cancel safety
    ///
    /// If it is dropped before it is done, the message has not been sent.
    #[doc(alias = "message")]
    #[doc(alias = "event")]
    #[doc(alias = "yield")]
    #[doc(alias = "call")]
    #[doc(alias = "cast")]
    pub async fn post(&self, message: M) -> Result<(), Closed> {
        let room = self.channel.message_room.acquire().await;
        let room = room.map_err(|_closed| Closed)?;
        self.channel.post(message, room).map_err(|_message| Closed)
    }

    /// Sends a message if that takes no wait.
    ///
    /// # Errors
    ///
    /// [`Full`](TrySendError::Full) where [`post`](Self::post) would wait,
    /// [`Closed`](TrySendError::Closed) when the connection is closing or has ended.
    #[doc(alias = "try_message")]
    #[doc(alias = "yield")]
    pub fn try_post(&self, message: M) -> Result<(), TrySendError<M>> {
        match self.channel.message_room.try_acquire() {
            Ok(room) => self
                .channel
                .post(message, room)
                .map_err(TrySendError::Closed),
            Err(TryAcquireError::NoPermits) => Err(TrySendError::Full(message)),
            Err(TryAcquireError::Closed) => Err(TrySendError::Closed(message)),
        }
    }

    /// Sends a message after a time: a timer of this connection. It ends with it, and costs no
    /// task. To drop what this returns cancels nothing.
    ///
    /// # Errors
    ///
    /// [`Full`](TrySendError::Full) when [16](super::Limits::messages) are set already,
    /// [`Closed`](TrySendError::Closed) when the connection is closing or has ended.
    #[doc(alias = "message_after")]
    #[doc(alias = "delay")]
    #[doc(alias = "alarm")]
    #[doc(alias = "timer")]
    #[doc(alias = "send_after")]
    pub fn post_after(&self, time: Duration, message: M) -> Result<Timer<T, M>, TrySendError<M>> {
        // A time beyond the end of the clock is as good as the farthest that timers can be set for.
        let far = Duration::from_secs(60 * 60 * 24 * 365);
        let now = Instant::now();
        let due = now.checked_add(time).unwrap_or_else(|| now + far);
        let key = self.channel.set_timer(due, message)?;
        Ok(Timer {
            peer: self.clone(),
            key,
        })
    }

    // Its end.

    /// Closes the connection in good order: what was sent before is written, requests in hand are
    /// answered, requests and messages that are not begun are dropped. `send` fails from now on. A
    /// service that took the stream over is told as at a drain.
    #[doc(alias = "shutdown")]
    #[doc(alias = "disconnect")]
    pub fn close(&self) {
        self.channel.refuse();
        self.channel.info.life.signals.raise(Signal::Close);
        if self.channel.lock().ended {
            self.channel.info.life.leave();
        }
    }

    /// As [`close`](Self::close), with the program's own words for why: they are the
    /// [`error`](End::error) of an end whose reason stays
    /// [`ServiceClosed`](EndReason::ServiceClosed), and stand in the closing event.
    pub fn close_because(&self, why: impl Into<BoxError>) {
        let why = ConnectionEnded::caused(EndReason::ServiceClosed, why);
        self.channel.info.life.set_reason(why.reason, why.cause);
        self.close();
    }

    /// Ends the connection at once: requests in hand are dropped, and so is what is not written.
    pub fn abort(&self) {
        let _first = self.abort_because(EndReason::Aborted);
    }

    /// Returns whether it was not cut off before.
    pub(crate) fn abort_because(&self, reason: EndReason) -> bool {
        self.channel.info.life.abort(reason)
    }

    /// Waits for the end of the connection, and returns how it ended.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost: asking again gives the same.
    #[doc(alias = "gone")]
    pub async fn closed(&self) -> End {
        self.channel.info.life.ended().await
    }

    /// Registers a callback for the end, unless that has come.
    pub(crate) fn before_end(&self, f: impl FnOnce(&End) + Send + 'static) -> Option<HookId> {
        self.channel
            .info
            .life
            .before_end(Box::new(|_, end| f(end)))
            .ok()
    }

    /// Takes such a callback back.
    pub(crate) fn forget(&self, hook: HookId) {
        self.channel.info.life.forget(hook);
    }

    /// Registers a callback for the end of the connection, behind those that are registered
    /// already, as [`Connection::on_end`](crate::Connection::on_end) does.
    pub fn on_end(&self, f: impl FnOnce(&End) + Send + 'static) {
        self.channel.info.life.on_end(|_, end| f(end));
    }
}

impl<T, M> Clone for Peer<T, M> {
    fn clone(&self) -> Self {
        Self {
            channel: Arc::clone(&self.channel),
        }
    }
}

impl<T, M> fmt::Debug for Peer<T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("info", &self.channel.info)
            .finish_non_exhaustive()
    }
}

/// A message that is sent later. Made by [`Peer::post_after`]; dropping it cancels nothing.
pub struct Timer<T, M> {
    peer: Peer<T, M>,
    key: (Instant, u64),
}

impl<T, M> Timer<T, M> {
    /// Returns when the message is due.
    pub fn due(&self) -> Instant {
        self.key.0
    }

    /// Takes the message back, unless it is delivered already, or the connection has ended.
    pub fn cancel(self) -> Option<M> {
        self.peer.channel.cancel_timer(self.key)
    }
}

impl<T, M> fmt::Debug for Timer<T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer")
            .field("due", &self.due())
            .finish_non_exhaustive()
    }
}
