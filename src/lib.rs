// In these docs, the links of the README lead to the targets below. If a name is defined twice, the
// first definition counts. So the definitions here override the README's own, which lead to files
// in the repository.
//! [`bind`]: crate::bind
//! [`accept`]: crate::accept
//! [`admit`]: crate::admit
//! [`preconnect`]: crate::preconnect
//! [`proxy`]: crate::proxy
//! [`tls`]: crate::tls
//! [`frame`]: crate::frame
//! [`pipeline`]: crate::pipeline
//! [`close`]: crate::close
//! [`observe`]: crate::observe
//! [`http`]: crate::http
//! [`registry`]: crate::registry
//! [`health`]: crate::health
//! [`signal`]: crate::signal
//! [`replace`]: crate::replace
//! [`testkit`]: crate::testkit
//! [farewell]: crate::Pipeline::farewell
//! [`EndReason`]: crate::EndReason
//! [`Peer`]: crate::Peer
//! [`Handle`]: crate::Handle
//! [`Listener`]: crate::bind::Listener
//! [`ConnectionLimit`]: crate::admit::ConnectionLimit
//! [`Peek`]: crate::preconnect::Peek
//! [`Lines`]: crate::frame::Lines
//! [`Block`]: crate::frame::Block
//! [InOut]: crate::frame::InOut
//! [CodecExt]: crate::frame::CodecExt
//! [Serde]: crate::frame::Serde
//! [in_flight]: crate::Pipeline::in_flight
//! [multiplexed]: crate::Pipeline::multiplexed
//! [Limits]: crate::pipeline::Limits
//! [`deadline`]: crate::deadline
//! [metrics]: crate::observe#metrics
//! [catalogue]: crate::observe
//! [on_upgrade]: crate::Pipeline::on_upgrade
//! [workers]: crate::ServerBuilder::workers
//! [`BALANCERS.md`]: crate::balancers
//! [guide]: crate::guide
//! [Chapter 11]: crate::guide::ch11_testing#a-whole-server
//! [`LAYERS.md`]: crate::layers
//! [`MIGRATION.md`]: crate::migration
//! [`PROTOCOLS.md`]: crate::protocols
//! [`examples/README.md`]: https://github.com/tower-tcp/tower-tcp/blob/main/examples/README.md
//! [`benches/README.md`]: https://github.com/tower-tcp/tower-tcp/blob/main/benches/README.md
#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(all(
        feature = "handover",
        feature = "http",
        feature = "per-client",
        feature = "proxy-protocol",
        feature = "serde",
        feature = "systemd",
        feature = "testkit",
        feature = "tls"
    )),
    allow(
        rustdoc::broken_intra_doc_links,
        reason = "links lead to items of features that are off"
    )
)]

// The modules follow a connection's path. A module uses only modules above it.
pub mod error;

mod end;

mod signals;

mod connection;

pub mod deadline;

pub mod make;

pub mod observe;

pub mod bind;

pub mod accept;

#[cfg(any(feature = "per-client", feature = "proxy-protocol"))]
pub mod networks;

pub mod admit;

pub mod preconnect;

#[cfg(feature = "proxy-protocol")]
pub mod proxy;

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

pub mod health;

pub mod signal;

#[cfg(feature = "handover")]
pub mod replace;

#[cfg(feature = "testkit")]
pub mod testkit;

#[doc = include_str!("../BALANCERS.md")]
pub mod balancers {}

pub mod guide;

#[doc = include_str!("../LAYERS.md")]
pub mod layers {}

#[doc = include_str!("../MIGRATION.md")]
pub mod migration {}

#[doc = include_str!("../PROTOCOLS.md")]
pub mod protocols {}

pub use connection::{
    Address, Connection, ConnectionId, ConnectionInfo, ConnectionPhase, ConnectionService, Rewind,
};
pub use end::{ConnectionEnded, End, EndReason, Initiator};
pub use error::{BoxError, Error};
pub use handle::{Handle, LiveConnection, ServerPhase};
pub use pipeline::{Peer, Pipeline, Reply};
pub use server::{Serve, Server, ServerBuilder};
pub use signals::Report;
