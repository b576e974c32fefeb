//! Reads and encodes headers of the PROXY protocol.
//!
//! Behind a load balancer, the peer of every connection is the balancer. With the [PROXY protocol],
//! the balancer sends a header with the client's address before the connection's data.
//! [`ProxyProtocol`] is the pre-connect hook that reads this header. After this hook has run:
//!
//! - [`ConnectionInfo::client_addr`](crate::ConnectionInfo::client_addr) returns the client's
//!   address. Services, layers, limits and the table of connections use this address. The span and
//!   the closing event record it as `client.address` and `client.port`.
//! - [`ConnectionInfo::peer_addr`](crate::ConnectionInfo::peer_addr) still returns the balancer's
//!   address.
//! - [`ConnectionInfo::get::<ProxyHeader>`](crate::ConnectionInfo::get) returns the whole
//!   [`ProxyHeader`]. The balancer may have added the address that the client connected to, and
//!   facts about the client's TLS session with the balancer: for example, the host name that the
//!   client requested, or the common name of the client's certificate.
//!
//! ```
//! use std::convert::Infallible;
//! use bytes::Bytes;
//! use tower::{ServiceBuilder, service_fn};
//! use tower_tcp::bind::Socket;
//! use tower_tcp::frame::Lines;
//! use tower_tcp::networks::Networks;
//! use tower_tcp::preconnect::PreConnectLayer;
//! use tower_tcp::proxy::ProxyProtocol;
//! use tower_tcp::{ConnectionService, Peer, Pipeline};
//!
//! /// Sends each client its own address.
//! fn stack(balancers: Networks) -> impl ConnectionService<Socket> + Clone {
//!     let make = service_fn(|peer: Peer<Bytes>| async move {
//!         let client = peer.info().client_addr().clone();
//!         let answer = move |_: Bytes| {
//!             let line = Bytes::from(client.to_string());
//!             async { Ok::<_, Infallible>(line) }
//!         };
//!         Ok::<_, Infallible>(service_fn(answer))
//!     });
//!     ServiceBuilder::new()
//!         .layer(PreConnectLayer::new(ProxyProtocol::trusting(balancers)))
//!         .service(Pipeline::new(Lines::default).make_service(make))
//! }
//!
//! let stack = stack(Networks::parse(["10.0.0.0/8", "unix"])?);
//! # drop(stack);
//! # Ok::<_, tower_tcp::networks::InvalidNetwork>(())
//! ```
//!
//! The header comes before TLS, so use `ProxyProtocol::trusting(balancers).chain(tls)`. The hook
//! works on any stream. The next hook or service reads the bytes after the header.
//!
//! # Limits, address lists and bans of clients
//!
//! Limits, address lists and bans use [`client_addr`](crate::ConnectionInfo::client_addr), so chain
//! them as hooks after `ProxyProtocol`. A filter passed to
//! [`ServerBuilder::address_filter`](crate::ServerBuilder::address_filter) sees only the address of
//! the balancer. An example with the feature `per-client`:
//!
//! ```
//! # #[cfg(feature = "per-client")] {
//! use std::time::Duration;
//! use tower_tcp::admit::{AddressFilter, Bans, PerClient};
//! use tower_tcp::networks::Networks;
//! use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
//! use tower_tcp::proxy::{ProxyProtocol, Versions};
//!
//! let bans = Bans::new(); // a service uses a clone to ban its client
//! let hooks = ProxyProtocol::trusting(Networks::parse(["10.0.0.0/8"])?)
//!     .versions(Versions::V2)
//!     .chain(AddressFilter::from(bans.clone()))
//!     .chain(PerClient::new(32).rate(5, Duration::from_secs(1)));
//! let layer = PreConnectLayer::new(hooks);
//! # drop(layer);
//! # }
//! # Ok::<_, tower_tcp::networks::InvalidNetwork>(())
//! ```
//!
//! # Trust
//!
//! A peer that may send a header can claim any client address. So the hook reads a header only from
//! peers in the trusted networks, and these peers must send one. The specification forbids guessing
//! whether there is a header, because then any client could send one. [`Untrusted`] is the policy
//! for other peers: the hook refuses them, or serves them without looking for a header.
//!
//! # Verdicts
//!
//! | header | verdict |
//! | --- | --- |
//! | `PROXY` of TCP | accepted; an IPv4-mapped IPv6 address becomes the IPv4 address |
//! | `LOCAL` | accepted with the peer's own address; the rest of the header is skipped |
//! | `UNKNOWN`, or an unspecified family or protocol | accepted with the peer's own address |
//! | `PROXY` of UDP or Unix sockets | accepted with the peer's own address |
//! | a wrong checksum; malformed TLVs (the header's type-length-value fields) | refused |
//! | version 1 with leading zeros in a port or an IPv4 address, signs, separators other than one space, or more than 107 bytes | refused |
//! | version 2 of more bytes than [`max_len`](ProxyProtocol::max_len) | refused |
//! | anything else | refused |
//!
//! A refused connection ends with [`EndReason::ProxyHeader`](crate::EndReason::ProxyHeader) and a
//! [`ProxyHeaderError`]. A version 1 line up to `TCP4`, `TCP6` or `UNKNOWN`, and the fixed part of
//! a version 2 header, are checked as their bytes arrive. The rest is checked when the whole header
//! has arrived. The deadline of the [`PreConnectLayer`](crate::preconnect::PreConnectLayer) ends
//! the connection of a silent peer.
//!
//! Health checks usually send `LOCAL`. HAProxy also sends `LOCAL` for clients of its Unix sockets.
//! In the rows with "the peer's own address", the client's address is that of the balancer. So if
//! the balancer connects over TCP, a limit for each client counts all such connections of a
//! balancer as one client, and a ban of such a client bans the balancer. Do not ban a client whose
//! [`ProxyHeader`] has no TCP address as its [`source`](ProxyHeader::source).
//!
//! The page on [balancers](crate::balancers) shows the configuration of several balancers.
//!
//! [PROXY protocol]: https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt

mod error;
mod header;
mod hook;
mod parse;
mod raw;
mod ssl;
mod tlv;
mod v1;
mod v2;
mod write;

pub use error::{ProxyEncodeError, ProxyHeaderError};
pub use header::{Command, Family, ProxyHeader, Versions};
pub use hook::{ProxyProtocol, Untrusted};
pub use ssl::Ssl;
pub use tlv::Tlvs;
