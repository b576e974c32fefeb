//! The minimum rate at which a peer must send the rest of a frame, and take pending output.

use std::time::Duration;

use super::timer::{Moment, STALL};
use crate::connection::Life;
use crate::end::EndReason;

/// A minimum rate, in bytes per window of time. See
/// [`Deadlines::min_rate`](super::Deadlines::min_rate).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MinRate {
    bytes: u64,
    window: Duration,
}

impl MinRate {
    /// Creates a rate of at least `bytes` in each `window`.
    ///
    /// Choose a window of several seconds, because TCP can wait a second or more before it sends a
    /// lost packet again. Choose a small number of bytes, because a slow peer need not be
    /// malicious. For example, 500 bytes in 5 s is less than a tenth of the speed of a modem with
    /// 9,600 bits per second. A window shorter than 1 ms counts as 1 ms.
    #[must_use]
    pub fn new(bytes: u64, window: Duration) -> Self {
        let window = window.max(Duration::from_millis(1));
        Self { bytes, window }
    }

    pub(super) fn window(self) -> Duration {
        self.window
    }
}

/// The windows in which the rate of one connection's peer is measured.
///
/// They are boxed to keep this value small. By default there is no minimum rate, and a connection
/// without one has no windows.
#[derive(Debug, Default)]
pub(crate) struct Pace(Option<Box<Windows>>);

#[derive(Debug, Default)]
struct Windows {
    receiving: Option<Window>,
    sending: Option<Window>,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    /// The moment when the frame began, or output became pending. The window measures that frame or
    /// that output.
    begun: Moment,
    since: Moment,
    bytes: u64,
}

impl Pace {
    /// Returns the time at which the next window is over. If the peer was too slow in a window that
    /// is over, fails with the reason to end the connection.
    ///
    /// `frame` is the moment when an incomplete frame began, and `sending` the moment when output
    /// became pending. The first window does not begin at that moment, but at the first call with
    /// it.
    pub(crate) fn check(
        &mut self,
        rate: Option<MinRate>,
        frame: Option<Moment>,
        sending: Option<Moment>,
        life: &Life,
        now: Moment,
    ) -> Result<Option<Moment>, EndReason> {
        let Some(rate) = rate else {
            return Ok(None);
        };
        if frame.is_none() && sending.is_none() {
            self.0 = None;
            return Ok(None);
        }
        let windows = self.0.get_or_insert_default();
        let read = || life.bytes_read();
        let receiving = windows.receiving;
        windows.receiving = next(receiving, rate, frame, read, now).ok_or(EndReason::SlowSender)?;
        let taken = || taken(life);
        windows.sending =
            next(windows.sending, rate, sending, taken, now).ok_or(EndReason::SlowReader)?;
        let ends = [windows.receiving, windows.sending].into_iter().flatten();
        Ok(ends
            .filter_map(|window| window.since.checked_add(rate.window))
            .min())
    }
}

/// Returns the current window, or `Some(None)` if there is nothing to measure. Returns `None` if
/// the peer was too slow: the window has ended, too few bytes have moved in it, and this check is
/// not late.
fn next(
    window: Option<Window>,
    rate: MinRate,
    begun: Option<Moment>,
    bytes: impl FnOnce() -> u64,
    now: Moment,
) -> Option<Option<Window>> {
    let Some(begun) = begun else {
        return Some(None);
    };
    let before = window.filter(|window| window.begun == begun);
    let end = before.and_then(|window| window.since.checked_add(rate.window));
    if before.is_some() && end.is_none_or(|end| now < end) {
        return Some(before);
    }
    let bytes = bytes();
    let is_slow = before.is_some_and(|window| bytes.saturating_sub(window.bytes) < rate.bytes);
    // If the check is late, the process may have been stopped while the peer's bytes waited unread.
    // Then the peer gets another window.
    let late = end.and_then(|end| end.checked_add(STALL));
    if is_slow && late.is_none_or(|late| now <= late) {
        return None;
    }
    let since = now;
    Some(Some(Window {
        begun,
        since,
        bytes,
    }))
}

/// Returns a number that grows with the bytes that the peer takes. On Linux, the peer takes bytes
/// when it acknowledges them or, over a Unix socket, when it reads them. Elsewhere, and with a
/// custom listener, bytes count as taken when the stream has accepted them.
fn taken(life: &Life) -> u64 {
    let sent = life.probe.sent();
    sent.map_or_else(|| life.bytes_written(), |sent| sent.taken())
}
