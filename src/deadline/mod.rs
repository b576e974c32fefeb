//! How long a connection may wait for its peer: one vocabulary of times for every protocol.
//!
//! [`Deadlines`] is set on a [`Pipeline`](crate::Pipeline::deadlines) and on HTTP alike.

mod layer;
mod timer;
mod times;
mod watch;

pub use layer::{Deadline, DeadlineFuture, DeadlineLayer};
pub(crate) use timer::{Due, Moment, Timer, after, due, first};
pub use times::{Deadlines, DrainDeadlines};
#[cfg(feature = "http")]
pub(crate) use watch::{Borrower, Watch};
