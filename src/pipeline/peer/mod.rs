//! The typed handle to one connection, and the state that it shares with the engine.

mod buffered;
mod channel;
mod crossings;
mod engine_side;
mod errors;
mod run;
mod timer;

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use tokio::sync::{SemaphorePermit, TryAcquireError, oneshot};

use super::watermarks::Watermarks;
use crate::connection::{ConnectionInfo, Hook, HookId, Moment};
use crate::deadline::after;
use crate::end::{ConnectionEnded, End, EndReason};
use crate::error::BoxError;
use crate::signals::Signal;
use channel::{Channel, Flag, Item};

pub use buffered::Buffered;
pub use crossings::{Crossing, Crossings};
pub(super) use engine_side::{EngineSide, Mail, Taken};
pub use errors::{Closed, TrySendError};
pub(crate) use run::{Merge, Run};
pub use timer::Timer;

/// A handle to one connection, for use from anywhere in the program.
///
/// A make-service receives the handle as its argument. A handle can be cloned and sent to any task.
/// `T` is the type of outgoing frames. `M` is the type of messages that the connection's service
/// takes besides requests; by default there are none (see [`Event`](super::Event)).
///
/// A handle does not keep the connection open. Once the connection begins to close or is upgraded,
/// sends to the peer and to the service fail with [`Closed`].
#[doc(alias = "wheel")]
#[doc(alias = "session")]
#[doc(alias = "sender")]
#[doc(alias = "Addr")]
pub struct Peer<T, M = Infallible> {
    channel: Arc<Channel<T, M>>,
}

impl<T, M> Peer<T, M> {
    /// Returns information about the connection and its peer.
    pub fn info(&self) -> &ConnectionInfo {
        &self.channel.info
    }

    /// Returns whether both handles belong to the same pipeline of the same connection. A pipeline
    /// that takes over the stream at an upgrade has handles of its own.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.channel, &other.channel)
    }

    /// Returns whether sends fail because the connection is closing, was upgraded or has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.channel.room.is_closed()
    }

    // Output.

    /// Sends a frame to the peer. The frame can come before, between or after replies, and also
    /// between the frames of a reply that has several. If a call of the service awaits this future,
    /// the frame comes before the call's reply.
    ///
    /// Frames are sent whole, in the order in which the calls of `send` complete. So the frames of
    /// a task that awaits each call before the next one are sent in order. The connection's task
    /// encodes and writes them. If the output has reached its high mark, `send` waits until the
    /// output has fallen to the low mark ([`Watermarks`]). `send` also waits while as many frames
    /// are queued as [`Limits::push_queue`](super::Limits::push_queue) allows (16 by default).
    ///
    /// Other frames may follow this one. For a last frame when the server ends the connection, use
    /// a [farewell](super::Pipeline::farewell).
    ///
    /// # Errors
    ///
    /// Returns [`Closed`] if the connection is closing, was upgraded or has ended.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it is done, the frame is not sent.
    #[doc(alias = "put")]
    #[doc(alias = "push")]
    #[doc(alias = "write")]
    pub async fn send(&self, frame: T) -> Result<(), Closed> {
        self.push(Item::Frame(frame)).await
    }

    /// Sends a frame if this is possible without waiting.
    ///
    /// # Errors
    ///
    /// Returns [`Full`](TrySendError::Full) if [`send`](Self::send) would wait. This can happen
    /// even with a fast peer, if a burst of frames is sent before the connection's task has run.
    /// Returns [`Closed`](TrySendError::Closed) if the connection is closing, was upgraded or has
    /// ended.
    pub fn try_send(&self, frame: T) -> Result<(), TrySendError<T>> {
        match self.channel.room.try_acquire() {
            Ok(room) => self.push_frame(frame, room),
            Err(TryAcquireError::NoPermits) => Err(TrySendError::Full(frame)),
            Err(TryAcquireError::Closed) => Err(TrySendError::Closed(frame)),
        }
    }

    /// Sends a frame unless the output is above its high mark. The output counts as above this mark
    /// from when it reaches the mark until it has fallen to the low mark. It reaches the high mark
    /// if the peer is slow, or if more was sent in a burst than the peer could read.
    ///
    /// The call may wait for the connection's task, but never for the peer. Use it if a slow peer
    /// must not delay the caller. To send to many peers at once, use
    /// [`Registry::broadcast`](crate::registry::Registry::broadcast).
    ///
    /// # Errors
    ///
    /// Returns [`Full`](TrySendError::Full) if the output is above its high mark, and
    /// [`Closed`](TrySendError::Closed) if the connection is closing, was upgraded or has ended.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it is done, the frame is not sent.
    pub async fn offer(&self, frame: T) -> Result<(), TrySendError<T>> {
        let mut room = std::pin::pin!(self.channel.room.acquire());
        loop {
            let mut changed = std::pin::pin!(self.channel.changed.notified());
            changed.as_mut().enable();
            // If the connection is closing, the error is `Closed`, even above the high mark.
            if self.channel.lock().is_above_mark() && !self.channel.room.is_closed() {
                return Err(TrySendError::Full(frame));
            }
            match select(room.as_mut(), changed).await {
                Either::Left((Ok(room), _)) => return self.push_frame(frame, room),
                Either::Left((Err(_closed), _)) => return Err(TrySendError::Closed(frame)),
                Either::Right(((), _)) => {}
            }
        }
    }

    /// Queues a run of broadcast frames as one entry, if this is possible without waiting. Frames
    /// that are added to the run before it is closed are sent with it.
    pub(crate) fn try_send_run(&self, run: &Arc<Run<T>>) -> Result<(), TrySendError<()>> {
        let room = match self.channel.room.try_acquire() {
            Ok(room) => room,
            Err(TryAcquireError::NoPermits) => return Err(TrySendError::Full(())),
            Err(TryAcquireError::Closed) => return Err(TrySendError::Closed(())),
        };
        let pushed = self.channel.push(Item::Run(Arc::clone(run)), room);
        pushed.map_err(|_run| TrySendError::Closed(()))
    }

    fn push_frame(&self, frame: T, room: SemaphorePermit<'_>) -> Result<(), TrySendError<T>> {
        match self.channel.push(Item::Frame(frame), room) {
            Err(Item::Frame(frame)) => Err(TrySendError::Closed(frame)),
            Ok(()) | Err(_) => Ok(()),
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

    /// Waits until all frames sent before this call are written and flushed.
    ///
    /// The operating system then has the output, but the peer may not have read it.
    ///
    /// # Errors
    ///
    /// Returns [`Closed`] if the connection began to close or was upgraded before this call got a
    /// place in the [queue](super::Limits::push_queue), or if the connection ended before the
    /// flush.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future has no effect on other callers.
    #[doc(alias = "flush")]
    #[doc(alias = "drain")]
    pub async fn flushed(&self) -> Result<(), Closed> {
        let waiting = self.channel.flush_room.acquire().await;
        let waiting = waiting.map_err(|_closed| Closed)?;
        let (done, flushed) = oneshot::channel();
        self.push(Item::Flush(done)).await?;
        // The permit is returned when the flush is reported, even if this call is dropped before
        // that.
        waiting.forget();
        flushed.await.map_err(|_dropped| Closed)
    }

    /// Returns the amount of pending output at this moment.
    pub fn buffered(&self) -> Buffered {
        self.channel.buffered()
    }

    /// Returns the number of bytes that were written but that the peer has not taken.
    ///
    /// Over TCP these are the bytes that the peer has not acknowledged, including those that TLS
    /// adds. Over a Unix socket the number is the size of the memory that the unread bytes occupy,
    /// which is more than their count. Output that is still [`buffered`](Self::buffered) is not
    /// included.
    ///
    /// Returns `None` if the system does not report the number (only Linux does, since 4.12), if
    /// the stream is closed, or if the connection has no socket of this crate, as with a custom
    /// listener or in memory. Each call makes a system call.
    #[doc(alias = "SIOCOUTQ")]
    #[doc(alias = "TCP_INFO")]
    pub fn unacknowledged(&self) -> Option<u64> {
        self.channel.info.life.probe.sent().map(|sent| sent.left)
    }

    /// Returns the watermarks of this connection's output.
    pub fn watermarks(&self) -> Watermarks {
        self.channel.lock().marks
    }

    /// Changes the watermarks of this connection's output. This wakes the connection's task, which
    /// then uses the new marks.
    pub fn set_watermarks(&self, marks: Watermarks) {
        self.channel.lock().marks = marks;
        self.channel.raise_and_wake(Flag::Tuned);
    }

    /// Returns a sequence of events. From now on, there is one event each time the output rises to
    /// its high mark, and one each time it then falls to its low mark. If the output has already
    /// risen to its high mark, and has not fallen to the low mark since, the first event is a
    /// [`Crossing::High`] for that rise, which [`Crossings::next`] returns at once.
    #[doc(alias = "high_event")]
    #[doc(alias = "low_event")]
    #[doc(alias = "backpressure")]
    pub fn crossings(&self) -> Crossings<T, M> {
        Crossings::new(Arc::clone(&self.channel))
    }

    /// Returns whether the output is above its high mark and the peer has taken nothing for `time`.
    /// The time counts from the call that first finds the output above the mark, and restarts when
    /// the peer takes output.
    pub(crate) fn has_stalled(&self, time: Duration) -> bool {
        let life = &self.channel.info.life;
        self.channel.lock().has_stalled(life, time)
    }

    // Input.

    /// Returns the current idle deadline of this connection, or `None` if it has none.
    pub fn idle(&self) -> Option<Duration> {
        self.channel.lock().idle
    }

    /// Changes the idle deadline of this connection. Initially it is that of the pipeline,
    /// [`Deadlines::idle`](crate::deadline::Deadlines::idle). Use this method for a keepalive that
    /// the peer has negotiated, such as MQTT's. `None` waits forever.
    ///
    /// This call does not restart the idle time, which still counts from the peer's last frame, or
    /// from the end of the reply to that frame. The change takes effect immediately, so a
    /// connection that has already been idle for `time` ends. The deadline for the first byte does
    /// not change.
    ///
    /// ```
    /// use std::time::Duration;
    /// use bytes::Bytes;
    /// use tower_tcp::Peer;
    ///
    /// /// Sets the idle time of an MQTT client: 1.5 times its keepalive. Zero turns it off.
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
        self.channel.raise_and_wake(Flag::Tuned);
    }

    /// Stops taking requests until [`resume_input`](Self::resume_input). Messages are still
    /// delivered.
    ///
    /// No request begins after this call, not even one that was already received. There is one
    /// exception: a request for which the service's `poll_ready` has already been called still
    /// begins, unless a message begins in its place. The reason is that only a call releases the
    /// resources that the service may have reserved, such as a permit for which other connections
    /// wait.
    ///
    /// During the pause, a reset ends the connection. But once as many bytes are held back as
    /// [`Limits::read_ahead`](super::Limits::read_ahead) allows, a reset may remain unnoticed with
    /// a custom listener, or if the process has no file descriptor left.
    ///
    /// The end of input, a drain, the maximum age and `LiveConnection::close` end the connection
    /// only if no received input is held back. Otherwise the pause continues, and the program must
    /// resume input or close the connection. [`draining`](crate::ConnectionInfo::draining)
    /// completes at a drain, at the maximum age and after `LiveConnection::close`, but not at the
    /// end of input.
    ///
    /// The deadlines for input do not run during the pause. After it, the peer has its whole
    /// [`idle`](crate::deadline::Deadlines::idle) time again, even before its first byte. While
    /// received input is held back,
    /// [`half_closed`](crate::deadline::Deadlines::half_closed) and
    /// [`last_calls`](crate::deadline::Deadlines::last_calls) do not run either.
    #[doc(alias = "shutdown_input")]
    #[doc(alias = "pause_read")]
    pub fn pause_input(&self) {
        self.channel.raise_and_wake(Flag::Paused);
    }

    /// Takes requests again after a pause, beginning with the first one that was held back. No
    /// request is lost, unless the connection closes or is upgraded during the pause.
    pub fn resume_input(&self) {
        self.channel.flags.lower(Flag::Paused);
        self.channel.wake();
    }

    // Messages.

    /// Sends a message to the connection's service. If messages and requests wait, the service
    /// takes them alternately.
    ///
    /// The call waits while as many messages are queued as
    /// [`Limits::messages`](super::Limits::messages) allows (16 by default). A service that awaits
    /// a `post` to its own connection can deadlock, so use [`try_post`](Self::try_post) there.
    ///
    /// # Errors
    ///
    /// Returns [`Closed`] if the connection is draining, is closing, was upgraded or has ended.
    /// Messages sent before a drain are still delivered. [`End::messages_dropped`] is the number of
    /// messages that were not delivered before the end.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it is done, the message is not sent.
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

    /// Sends a message if this is possible without waiting.
    ///
    /// # Errors
    ///
    /// Returns [`Full`](TrySendError::Full) if [`post`](Self::post) would wait, and
    /// [`Closed`](TrySendError::Closed) if the connection is draining, is closing, was upgraded or
    /// has ended.
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

    /// Sends a message to the service after a delay. The timer ends when the connection closes or
    /// is upgraded, and needs no task of its own. Dropping the returned [`Timer`] does not cancel
    /// the message. A delay beyond the range of the clock, such as [`Duration::MAX`], counts as 30
    /// years.
    ///
    /// # Errors
    ///
    /// Returns [`Full`](TrySendError::Full) if as many timers are set as
    /// [`Limits::messages`](super::Limits::messages) allows (16 by default; queued messages do not
    /// count), and [`Closed`](TrySendError::Closed) if the connection is draining, is closing, was
    /// upgraded or has ended.
    #[doc(alias = "message_after")]
    #[doc(alias = "delay")]
    #[doc(alias = "alarm")]
    #[doc(alias = "timer")]
    #[doc(alias = "send_after")]
    pub fn post_after(&self, time: Duration, message: M) -> Result<Timer<T, M>, TrySendError<M>> {
        let key = self.channel.set_timer(after(time), message)?;
        Ok(Timer::new(self.clone(), key))
    }

    // The end.

    /// Closes the connection gracefully. Frames sent before this call are written, and requests in
    /// progress are answered within [`last_calls`](crate::deadline::Deadlines::last_calls).
    /// Requests that have not begun, and messages that still wait for the service, are dropped.
    /// After this call, `send` fails.
    ///
    /// After an upgrade, the service that took over the stream gets the signal to drain
    /// ([`Connection::draining`](crate::Connection::draining)).
    #[doc(alias = "shutdown")]
    #[doc(alias = "disconnect")]
    pub fn close(&self) {
        self.channel.refuse();
        self.channel.info.life.signals.raise(Signal::Close);
        if self.channel.lock().ended {
            self.channel.info.life.close_gracefully();
        }
    }

    /// Closes the connection like [`close`](Self::close), because of an error. The reason is still
    /// [`ServiceClosed`](EndReason::ServiceClosed). `why` becomes the [`error`](End::error) of the
    /// end, and is part of the [closing event](crate::observe). If an end reason was set before,
    /// that reason stays, and `why` is dropped.
    pub fn close_because(&self, why: impl Into<BoxError>) {
        let why = ConnectionEnded::new(EndReason::ServiceClosed, why);
        self.channel.info.life.set_reason(why.reason, why.cause);
        self.close();
    }

    /// Ends the connection immediately. Requests in progress and unwritten output are dropped. On a
    /// TCP socket of this crate's listeners, written output that the peer has not received is
    /// dropped, too, unless
    /// [`SocketOptions::reset_cut_off`](crate::bind::SocketOptions::reset_cut_off) is off.
    pub fn abort(&self) {
        let _first = self.abort_because(EndReason::Aborted);
    }

    /// Aborts the connection. Returns `false` if it was already aborted.
    pub(crate) fn abort_because(&self, reason: EndReason) -> bool {
        self.channel.info.life.abort(reason)
    }

    /// Waits for the end of the connection and returns how it ended.
    ///
    /// A call of the connection's own service must not await this future, because the connection
    /// ends only after its calls are done. Such a call never completes. It is dropped when the
    /// connection must end without it, for example when the peer resets the connection, when the
    /// connection is aborted, or at the [`half_closed`](crate::deadline::Deadlines::half_closed) or
    /// [`last_calls`](crate::deadline::Deadlines::last_calls) deadline.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: a later call returns the same end.
    #[doc(alias = "gone")]
    pub async fn closed(&self) -> End {
        self.channel.info.life.reached(Moment::End).await
    }

    /// Waits until closing begins, and returns the end as it is known then. Once closing has begun,
    /// no frame can be sent.
    ///
    /// [`ConnectionInfo::closing`] describes when this end is provisional, and where this future
    /// must not be awaited.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing: once closing has begun, a later call completes at once.
    pub async fn closing(&self) -> End {
        self.channel.info.closing().await
    }

    /// Registers a callback for the moment when closing begins, as [`ConnectionInfo::on_closing`]
    /// does.
    pub fn on_closing(&self, f: impl FnOnce(&End) + Send + 'static) {
        self.channel.info.on_closing(f);
    }

    /// Registers a callback to run at `moment`. Fails if that moment is past.
    pub(crate) fn before(
        &self,
        moment: Moment,
        f: impl FnOnce() + Send + 'static,
    ) -> Result<HookId, TooLate> {
        let life = &self.channel.info.life;
        let added = life.before(moment, Box::new(|_, _| f()));
        added.map_err(|(hook, _)| TooLate(hook))
    }

    /// Removes a callback that [`before`](Self::before) registered.
    pub(crate) fn forget(&self, hook: HookId) {
        self.channel.info.life.forget(hook);
    }

    /// Registers a callback for the end of the connection, as
    /// [`Connection::on_end`](crate::Connection::on_end) does. Callbacks run in registration order.
    pub fn on_end(&self, f: impl FnOnce(&End) + Send + 'static) {
        self.channel.info.life.on(Moment::End, |_, end| f(end));
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

/// A callback that was registered too late to run. The caller drops the callback after releasing
/// its own lock, because the drop runs user code.
pub(crate) struct TooLate(#[expect(dead_code, reason = "only dropped")] Hook);
