//! How long a connection may wait for its peer: one vocabulary of times for every protocol.
//!
//! [`Deadlines`] is set on a [`Pipeline`](crate::Pipeline::deadlines) and on HTTP alike.

mod timer;
mod times;

pub(crate) use timer::{Due, Moment, Timer, after, due, first};
pub use times::{Deadlines, DrainDeadlines};
