//! The buffers of one connection between its stream and its codec. An idle connection holds none.

mod input;
mod output;
mod scratch;

pub(super) use input::Input;
pub(super) use output::Output;
