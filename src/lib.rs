//! Servers of any protocol over TCP, TLS and Unix sockets, in which everything is a Tower service.
#![cfg_attr(docsrs, feature(doc_cfg))]

// In the order of a connection's path: a module names only modules above it.
pub mod error;

mod end_reason;

mod shutdown;

mod connection;

pub mod bind;

pub mod frame;

pub use connection::{Address, Connection, ConnectionId, ConnectionInfo};
pub use end_reason::{ConnectionEnded, End, EndReason, Initiator};
pub use error::{BoxError, Error};
pub use shutdown::Report;
