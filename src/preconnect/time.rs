//! The deadline of a connection's hooks.

use std::task::{Poll, Waker, ready};
use std::time::Duration;

use super::PreConnectElapsed;
use crate::connection::Life;
use crate::deadline::{Deadlines, DrainDeadlines, Moment, Timer, due, first};
use crate::end::{ConnectionEnded, EndReason};
use crate::error::BoxError;
use crate::signals::Signal;

/// The deadline of the hooks, and their deadline in a drain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) deadline: Option<Duration>,
    pub(super) drain: Option<Duration>,
}

impl From<Deadlines> for Times {
    fn from(deadlines: Deadlines) -> Self {
        let Deadlines {
            pre_connect: deadline,
            drain:
                DrainDeadlines {
                    pre_connect: drain,
                    // The ignored deadlines apply after the hooks.
                    frame: _,
                    body: _,
                    last_request: _,
                    next_frame: _,
                    goodbye: _,
                    stream: _,
                },
            first_byte: _,
            frame: _,
            body: _,
            idle: _,
            write: _,
            half_closed: _,
            last_calls: _,
            upgraded_idle: _,
            max_age: _,
            max_age_jitter: _,
            min_rate: _,
            make_service: _,
        } = deadlines;
        Self { deadline, drain }
    }
}

impl Times {
    /// Waits until `deadline` has passed since the first poll, or `drain` has passed since the
    /// connection began to drain. Returns the error with which the connection ends.
    pub(super) async fn elapsed(self, life: &Life) -> ConnectionEnded {
        let mut timer = Timer::start();
        let mut draining = None;
        let mut waker: Option<Waker> = None;
        std::future::poll_fn(|cx| {
            // Without a deadline in a drain, no waker is registered. It would replace that of the
            // `PreConnectLayer`, which may be in another task.
            if self.drain.is_some() && waker.as_ref().is_none_or(|w| !w.will_wake(cx.waker())) {
                waker = Some(cx.waker().clone());
                // The connection's service later replaces this waker with its own.
                life.signals.wake_engine_with(cx.waker());
            }
            let now = timer.now();
            if life.signals.is_raised(Signal::Drain) {
                draining.get_or_insert(now);
            }
            let next = first([
                due(Moment::START, self.deadline, EndReason::PreConnectTimeout),
                due(draining, self.drain, EndReason::Drained),
            ]);
            let reason = ready!(timer.poll(next, now, cx));
            Poll::Ready(match self.deadline {
                Some(time) if reason == EndReason::PreConnectTimeout => {
                    ConnectionEnded::new(reason, BoxError::from(PreConnectElapsed(time)))
                }
                _ => reason.into(),
            })
        })
        .await
    }
}
