//! Decides how the accept loop reacts to a failed accept.
//!
//! The loop retries, backs off, or stops the server ([`AcceptErrorAction`]). [`classify`] is the
//! default policy. [`ServerBuilder::on_accept_error`](crate::ServerBuilder::on_accept_error) sets
//! another policy, which can call `classify`.

mod failure;
mod stall;

pub(crate) use failure::error_type;
pub use failure::{AcceptErrorAction, classify};
pub(crate) use stall::Stall;
