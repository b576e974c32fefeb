//! The bytes of one connection between its stream and its codec. A resting connection holds none.

mod input;
mod output;
mod scratch;

pub(super) use input::Input;
pub(super) use output::Output;
