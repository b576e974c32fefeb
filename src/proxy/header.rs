use std::net::SocketAddr;

use bytes::Bytes;

use super::ssl::{self, Ssl};
use super::tlv::{self, Tlvs};
use crate::connection::Address;

/// The command of a PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Command {
    /// The sender connected on its own behalf, for example to check the server's health. HAProxy
    /// also sends this command for a client that connected to it over a Unix socket.
    Local,
    /// The sender forwards a client's connection.
    Proxy,
}

/// The address family and protocol of the client's connection to the sender of a PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Unknown to the sender, or unsupported by the PROXY protocol. A `LOCAL` header has this
    /// family, too.
    Unspecified,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv4.
    Udp4,
    /// UDP over IPv6.
    Udp6,
    /// A Unix stream socket.
    UnixStream,
    /// A Unix datagram socket.
    UnixDatagram,
}

/// The versions of the PROXY protocol that a hook accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Versions {
    /// Only version 1, a line of text.
    V1,
    /// Only version 2, a binary header.
    V2,
    /// Both versions. The first byte of a header distinguishes them.
    #[default]
    Both,
}

/// A PROXY header.
///
/// [`ProxyProtocol`](super::ProxyProtocol) adds the header that it has read to the facts of the
/// connection, and [`ConnectionInfo::get`](crate::ConnectionInfo::get) returns this header. To send
/// a header, create it with [`proxied`](Self::proxied) or [`local`](Self::local), and write the
/// bytes of [`encode_v1`](Self::encode_v1) or [`encode_v2`](Self::encode_v2) before any other data.
///
/// ```
/// use std::net::SocketAddr;
/// use tower_tcp::proxy::ProxyHeader;
///
/// let client: SocketAddr = "192.0.2.1:56324".parse()?;
/// let entry: SocketAddr = "198.51.100.1:443".parse()?;
/// let header = ProxyHeader::proxied(client, entry);
///
/// let line = header.encode_v1()?;
/// assert_eq!(line, "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n");
///
/// let bytes = header.with_authority("example.com").with_checksum().encode_v2()?;
/// let (parsed, len) = ProxyHeader::parse(&bytes)?.expect("it is complete");
/// assert_eq!(len, bytes.len());
/// assert_eq!(parsed.source(), Some(&client.into()));
/// assert_eq!(parsed.tlvs().authority(), Some("example.com"));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyHeader {
    pub(super) command: Command,
    pub(super) family: Family,
    /// The source and the destination.
    pub(super) addresses: Option<(Address, Address)>,
    pub(super) tlvs: Tlvs,
    pub(super) checksum: bool,
}

impl ProxyHeader {
    /// Creates the header for a connection that the sender makes on its own behalf, such as a
    /// health check.
    pub fn local() -> Self {
        Self::bare(Command::Local, Family::Unspecified)
    }

    /// Creates the header for a client's connection. `source` is the client's address, and
    /// `destination` is the address that the client connected to.
    ///
    /// The header contains the two addresses if both are TCP or both are Unix addresses. Otherwise
    /// its family is [`Unspecified`](Family::Unspecified), without addresses. A Unix path that
    /// begins with `@` is an abstract name, as in an [`Address`].
    pub fn proxied(source: impl Into<Address>, destination: impl Into<Address>) -> Self {
        let addresses = (source.into(), destination.into());
        let (family, addresses) = match addresses {
            (Address::Tcp(source), Address::Tcp(destination)) => {
                let (source, destination) = (canonical(source), canonical(destination));
                let family = if source.is_ipv4() && destination.is_ipv4() {
                    Family::Tcp4
                } else {
                    Family::Tcp6
                };
                let addresses = (Address::Tcp(source), Address::Tcp(destination));
                (family, Some(addresses))
            }
            both @ (Address::Unix(_), Address::Unix(_)) => (Family::UnixStream, Some(both)),
            _ => (Family::Unspecified, None),
        };
        Self {
            addresses,
            ..Self::bare(Command::Proxy, family)
        }
    }

    pub(super) fn bare(command: Command, family: Family) -> Self {
        Self {
            command,
            family,
            addresses: None,
            tlvs: Tlvs::default(),
            checksum: false,
        }
    }

    /// Returns the command.
    pub fn command(&self) -> Command {
        self.command
    }

    /// Returns the address family and protocol.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Returns the client's address, or `None` if the header contains no addresses of stream
    /// sockets (TCP or Unix).
    pub fn source(&self) -> Option<&Address> {
        self.addresses.as_ref().map(|(source, _)| source)
    }

    /// Returns the address that the client connected to, or `None` if the header contains no
    /// addresses of stream sockets (TCP or Unix).
    pub fn destination(&self) -> Option<&Address> {
        self.addresses.as_ref().map(|(_, destination)| destination)
    }

    /// Returns the TLVs (type-length-value fields), which contain further facts from the sender. A
    /// version 1 header has none.
    pub fn tlvs(&self) -> &Tlvs {
        &self.tlvs
    }

    /// Returns whether the header has a checksum. The checksum of a received header has been
    /// verified.
    ///
    /// For a received `LOCAL` header, this method returns `false`, because everything after the
    /// first 16 bytes is skipped. The same applies to a received header that specifies only the
    /// family or only the protocol.
    pub fn has_checksum(&self) -> bool {
        self.checksum
    }

    /// Adds a TLV of any type. [`encode_v2`](Self::encode_v2) fails if `kind` is the type of the
    /// checksum, or if the value is not valid for its type.
    #[must_use]
    pub fn with_tlv(mut self, kind: u8, value: impl Into<Bytes>) -> Self {
        self.tlvs.0.push((kind, value.into()));
        self
    }

    /// Adds the protocol that the client and the sender have negotiated by ALPN, such as `h2`.
    #[must_use]
    pub fn with_alpn(self, protocol: impl Into<Bytes>) -> Self {
        self.with_tlv(tlv::ALPN, protocol)
    }

    /// Adds the host name that the client requested, for example in its TLS handshake (SNI).
    #[must_use]
    pub fn with_authority(self, host: impl Into<String>) -> Self {
        self.with_tlv(tlv::AUTHORITY, host.into())
    }

    /// Adds an identifier of the connection, of at most 128 bytes.
    #[must_use]
    pub fn with_unique_id(self, id: impl Into<Bytes>) -> Self {
        self.with_tlv(tlv::UNIQUE_ID, id)
    }

    /// Adds the facts about the client's TLS session.
    #[must_use]
    pub fn with_ssl(self, session: &Ssl) -> Self {
        let value = session.encode();
        self.with_tlv(ssl::TYPE, value)
    }

    /// Adds the name of the network namespace to which the client connected. The name must be
    /// ASCII.
    #[must_use]
    pub fn with_netns(self, name: impl Into<String>) -> Self {
        self.with_tlv(tlv::NETNS, name.into())
    }

    /// Adds a checksum (CRC-32C) of the whole header.
    #[must_use]
    pub fn with_checksum(mut self) -> Self {
        self.checksum = true;
        self
    }
}

/// Returns the address as a header can express it: without flow label and scope, and as IPv4 if it
/// is IPv4-mapped.
pub(super) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// The result of parsing the bytes that have arrived.
#[derive(Debug)]
pub(super) enum Parsed {
    /// A complete header, and its length in bytes.
    Complete(ProxyHeader, usize),
    /// The header is incomplete. The whole header has at least this many bytes.
    Incomplete { at_least: usize },
}
