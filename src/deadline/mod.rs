//! Deadlines for a connection that waits for its peer, the same for every protocol.
//!
//! One value of [`Deadlines`] serves a whole stack. Each part of the stack enforces the deadlines
//! that apply to it:
//!
//! | part | set by | enforces |
//! | --- | --- | --- |
//! | pre-connect hooks | [`PreConnectLayer::deadlines`] | `pre_connect`, and `pre_connect` of `drain` |
//! | pipelines | [`Pipeline::deadlines`] | all but `pre_connect`, `body` and `upgraded_idle`; of `drain`, only `frame` and `next_frame` |
//! | HTTP | `Http::deadlines` | all but `pre_connect` and `last_calls`; of `drain`, all but `pre_connect` and `next_frame` |
//! | raw services | [`DeadlineLayer`] | `first_byte`, `idle`, `write`, `max_age`, `max_age_jitter`, `min_rate` of output, and `stream` of `drain` |
//!
//! A deadline by which the peer must send or take bytes may pass while the process is stopped or
//! starved of CPU time. Such a deadline is extended once, to 50 ms after the process notices,
//! because the peer may have acted in time. `min_rate` gives the peer another whole window instead.
//! Deadlines that end a connection as `Drained` are not extended.
//!
//! [`PreConnectLayer::deadlines`]: crate::preconnect::PreConnectLayer::deadlines
//! [`Pipeline::deadlines`]: crate::Pipeline::deadlines

mod blocked;
mod layer;
mod pace;
mod timer;
mod times;
mod watch;

pub use layer::{Deadline, DeadlineFuture, DeadlineLayer};
use std::time::Duration;

pub(crate) use blocked::{Blocked, LOOKS, between_write_looks};
pub use pace::MinRate;
pub(crate) use pace::Pace;
pub(crate) use timer::{Due, Moment, Timer, after, due, first};
pub use times::{Deadlines, DrainDeadlines};
#[cfg(feature = "http")]
pub(crate) use watch::{Borrower, Watch, between_looks};

/// The minimum time for which a draining connection waits for its first byte. It counts from the
/// moment when the pipeline or HTTP began to serve the connection. The peer's first bytes may have
/// arrived together with the connection, but the runtime reports them only after it has polled its
/// driver once more.
pub(crate) const TAKEN_IN: Duration = Duration::from_millis(50);
