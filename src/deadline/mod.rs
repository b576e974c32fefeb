//! How long a connection may wait for its peer: one vocabulary of times for every protocol.
//!
//! [`Deadlines`] is set on a [`Pipeline`](crate::Pipeline::deadlines) and on HTTP alike.

mod times;

pub use times::{Deadlines, DrainDeadlines};
