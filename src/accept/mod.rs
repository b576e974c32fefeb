//! Classifies accept errors and backs off after them.

mod failure;
mod stall;

pub(crate) use failure::error_type;
pub use failure::{AcceptErrorAction, classify};
pub(crate) use stall::Stall;
