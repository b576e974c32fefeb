//! The PROXY protocol, received and sent.
//!
//! Behind a load balancer, the peer of every connection is the balancer. With the [PROXY protocol],
//! it sends a header in front of the connection's data, which names the client. [`ProxyProtocol`]
//! is the pre-connect hook that reads the header. Then
//!
//! - [`ConnectionInfo::client_addr`](crate::ConnectionInfo::client_addr) returns the client's
//!   address, everywhere: in services, limits and the table of connections. The span and the
//!   closing event have it as `client.address` and `client.port`.
//! - [`ConnectionInfo::peer_addr`](crate::ConnectionInfo::peer_addr) remains the balancer's.
//! - [`ConnectionInfo::get::<ProxyHeader>`](crate::ConnectionInfo::get) returns the whole
//!   [`ProxyHeader`]: the address that the client connected to, and facts such as the host name and
//!   the certificate of its TLS session with the balancer.
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
//! /// Tells each client its own address.
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
//! The header comes before TLS, so chain `ProxyProtocol::trusting(balancers).chain(tls)`. The hook
//! works on any stream, and each byte after the header reaches the hook or service behind this one.
//!
//! # Limits, lists and bans of clients
//!
//! Put them as hooks behind this one, because they judge a connection by
//! [`client_addr`](crate::ConnectionInfo::client_addr). A filter that is given to
//! [`ServerBuilder::address_filter`](crate::ServerBuilder::address_filter) judges the address of
//! the balancer. With the feature `per-client`:
//!
//! ```
//! # #[cfg(feature = "per-client")] {
//! use std::time::Duration;
//! use tower_tcp::admit::{AddressFilter, Bans, PerClient};
//! use tower_tcp::networks::Networks;
//! use tower_tcp::preconnect::{PreConnectExt, PreConnectLayer};
//! use tower_tcp::proxy::{ProxyProtocol, Versions};
//!
//! let bans = Bans::new(); // a service bans its client by a clone
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
//! Whoever may send a header may claim any address. The hook reads a header only from peers in the
//! networks that it is given, and from those it is mandatory. The specification forbids guessing
//! whether a header is there, because then any client could send one. Other peers are refused, or
//! served without a look at their bytes: see [`Untrusted`].
//!
//! # Verdicts
//!
//! | header | verdict |
//! | --- | --- |
//! | `PROXY` of TCP | accepted; an IPv4-mapped IPv6 address is the IPv4 address |
//! | `LOCAL` | accepted with the socket's own address; the rest is skipped |
//! | `UNKNOWN`, or a family or protocol that is unspecified | accepted with the socket's own address |
//! | of UDP or Unix sockets | accepted with the socket's own address |
//! | a checksum that does not match; malformed TLVs | refused |
//! | version 1 with leading zeros, signs, other separators, more than 107 bytes | refused |
//! | version 2 of more bytes than [`max_len`](ProxyProtocol::max_len) | refused |
//! | anything else | refused |
//!
//! A refused connection ends with [`EndReason::ProxyHeader`](crate::EndReason::ProxyHeader) and a
//! [`ProxyHeaderError`], as soon as the bytes so far rule out a valid header. The time of a silent
//! peer is bounded by the [`PreConnectLayer`](crate::preconnect::PreConnectLayer).
//!
//! `LOCAL` is the header of health checks. HAProxy also sends it for clients of its Unix sockets.
//! Wherever the table says "the socket's own address", the proxy's address is taken for the
//! client's. So a limit for each client counts all such connections as one client, and a ban of one
//! bans the proxy. Do not ban a client whose [`ProxyHeader`] has no TCP address as its
//! [`source`](ProxyHeader::source).
//!
//! The page on [balancers](crate::balancers) has the lines of configuration for several of them.
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
