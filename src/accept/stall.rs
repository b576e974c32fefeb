//! The back-off after a failed accept.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

const FIRST: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_secs(1);

/// The number of failures since the last successful accept that are retried immediately.
const RETRIES: u32 = 16;

/// Waits after failed accepts: first 5 ms, then twice as long each time, up to 1 s. A stall lasts
/// from the first of these waits to the next successful accept, and is logged once.
#[derive(Debug)]
pub(crate) struct Stall {
    delay: Duration,
    retries: u32,
    logged: bool,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Default for Stall {
    fn default() -> Self {
        Self {
            delay: FIRST,
            retries: 0,
            logged: false,
            sleep: None,
        }
    }
}

impl Stall {
    /// Starts the next wait. Returns whether it is the first wait since the last successful accept.
    /// Only that wait is logged.
    pub(crate) fn back_off(&mut self) -> bool {
        let until = Instant::now() + self.delay;
        self.delay = (self.delay * 2).min(LONGEST);
        match &mut self.sleep {
            Some(sleep) => sleep.as_mut().reset(until),
            none => *none = Some(Box::pin(tokio::time::sleep_until(until))),
        }
        !std::mem::replace(&mut self.logged, true)
    }

    /// Counts a failure that can be retried immediately. Returns `true` if there were more than 16
    /// such failures since the last successful accept. The caller must then back off.
    pub(crate) fn retry(&mut self) -> bool {
        self.retries += 1;
        self.retries > RETRIES
    }

    /// Waits until the back-off is over.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(sleep) = &mut self.sleep {
            ready!(sleep.as_mut().poll(cx));
            self.sleep = None;
        }
        Poll::Ready(())
    }

    /// Ends the wait early. Called when a connection has ended. The connection has released
    /// resources, such as its file descriptor, so the next accept may succeed.
    pub(crate) fn hurry(&mut self) {
        self.sleep = None;
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.sleep.is_some()
    }

    /// Resets the back-off after a successful accept. Returns whether this ends a stall.
    pub(crate) fn clear(&mut self) -> bool {
        self.retries = 0;
        self.delay = FIRST;
        self.sleep = None;
        std::mem::take(&mut self.logged)
    }
}
