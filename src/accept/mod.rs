//! One accepted connection, or a decision about a failure.

mod failure;
mod stall;

pub(crate) use failure::error_type;
pub use failure::{AcceptErrorAction, classify};
pub(crate) use stall::Stall;
