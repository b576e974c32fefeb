//! Faults of connections, and a check of a whole server under each of them.
//!
//! [`check`] repeats one conversation with a server: first without faults, then once for each kind
//! of fault at each byte of the conversation. If a direction has more than 512 bytes, the faults
//! are at 512 of them by default. The docs of [`check`] list all runs, including those with failed
//! accepts and with several faults. The check reports the first [`Promise`] that is broken, with a
//! [`Plan`] that has only the faults needed to break it. The plan is printed as Rust code. To run
//! this case again, pass the plan to [`Check::only`].
//!
//! ```
//! use std::convert::Infallible;
//! use bytes::Bytes;
//! use tower_tcp::testkit::faults::{self, Promise};
//! use tower_tcp::{Pipeline, frame::Lines};
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! async fn echo(line: Bytes) -> Result<Bytes, Infallible> {
//!     Ok(line)
//! }
//! let stack = || Pipeline::new(Lines::default).service(tower::service_fn(echo));
//!
//! faults::check(stack, "one\ntwo\n", "one\ntwo\n").await?;
//!
//! let broken = faults::check(stack, "one\ntwo\n", "one\n").await.unwrap_err();
//! assert_eq!(broken.promise(), Promise::Plain);
//! # Ok(())
//! # }
//! ```
//!
//! These types can also be used without [`check`]: [`Faulty`] is a stream with the faults of a
//! [`Plan`], [`FailingListener`] is a listener whose first accepts fail, [`PanicLayer`] panics in a
//! service, and [`Contract`] checks the callers of a service.

mod check;
mod contract;
mod listener;
mod panics;
mod plan;
mod promise;
mod run;
mod stream;

pub use check::{Check, Passed, check};
pub use contract::{Breach, Contract, ContractService};
pub use listener::{FailingListener, accept_errors};
pub use panics::{PanicLayer, PanicService};
pub use plan::{Fault, Plan};
pub use promise::{Broken, Promise};
pub use stream::Faulty;
