//! How long a connection may wait for its peer: one vocabulary of times for every protocol.
//!
//! [`Deadlines`] is one value for a whole stack. Each room keeps what it has a use for:
//!
//! | room | set by | keeps |
//! | --- | --- | --- |
//! | pre-connect hooks | [`PreConnectLayer::deadlines`] | `pre_connect` |
//! | pipelines | [`Pipeline::deadlines`] | all but `body` and `upgraded_idle` |
//! | HTTP | `Http::deadlines` | all |
//! | raw services | [`DeadlineLayer`] | `first_byte`, `idle`, `write`, `max_age` |
//!
//! A deadline that passes while the process stands still, stopped or starved, is extended once, by
//! 50 ms.
//!
//! [`PreConnectLayer::deadlines`]: crate::preconnect::PreConnectLayer::deadlines
//! [`Pipeline::deadlines`]: crate::Pipeline::deadlines

mod layer;
mod timer;
mod times;
mod watch;

pub use layer::{Deadline, DeadlineFuture, DeadlineLayer};
use std::time::Duration;

pub(crate) use timer::{Due, Moment, Timer, after, due, first};
pub use times::{Deadlines, DrainDeadlines};
#[cfg(feature = "http")]
pub(crate) use watch::{Borrower, Watch};

/// The time for which a connection that was just accepted and has not been heard from stays open in
/// a drain. Its peer's bytes may have arrived with it, and the runtime knows of them one turn of
/// its driver later.
pub(crate) const TAKEN_IN: Duration = Duration::from_millis(50);
