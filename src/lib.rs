#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

// In the order of a connection's path: a module names only modules above it.
pub mod error;

mod end_reason;

mod shutdown;

mod connection;

pub mod observe;

pub mod bind;

pub mod accept;

pub mod admit;

pub mod preconnect;

#[cfg(feature = "tls")]
pub mod tls;

pub mod frame;

pub mod close;

pub mod pipeline;

pub mod registry;

#[cfg(feature = "http")]
pub mod http;

mod handle;

mod server;

pub mod signal;

#[cfg(feature = "testkit")]
pub mod testkit;

#[doc = include_str!("../MIGRATION.md")]
pub mod migration {}

#[doc = include_str!("../PROTOCOLS.md")]
pub mod protocols {}

pub use connection::{Address, Connection, ConnectionId, ConnectionInfo, ConnectionPhase, Rewind};
pub use end_reason::{ConnectionEnded, End, EndReason, Initiator};
pub use error::{BoxError, Error};
pub use handle::{Handle, LiveConnection};
pub use pipeline::{Peer, Pipeline, Reply};
pub use server::{Serve, Server, ServerBuilder};
pub use shutdown::Report;
