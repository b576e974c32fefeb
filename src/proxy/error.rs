use thiserror::Error;

/// The error for bytes that are not an acceptable PROXY header, or for a peer that is not allowed
/// to send one.
///
/// [`ProxyProtocol`](super::ProxyProtocol) returns this error as the cause of a
/// [`ConnectionEnded`](crate::ConnectionEnded). The end reason is
/// [`EndReason::ProxyHeader`](crate::EndReason::ProxyHeader), or
/// [`EndReason::Rejected`](crate::EndReason::Rejected) for [`Untrusted`](Self::Untrusted).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum ProxyHeaderError {
    /// The peer is in none of the trusted networks, and the policy for such peers is
    /// [`Untrusted::Refuse`](super::Untrusted::Refuse).
    #[error("the peer is not trusted to send a PROXY header")]
    Untrusted,
    /// The first bytes are not a PROXY header.
    #[error("no PROXY header")]
    Absent,
    /// The stream ended within the header.
    #[error("the stream ended within the PROXY header")]
    Truncated,
    /// The header is longer than the maximum for its version. This maximum, in bytes, is the value
    /// of the variant.
    #[error("the PROXY header is longer than {0} bytes")]
    TooLong(usize),
    /// The version of the header is unknown, or the hook does not accept it.
    #[error("the version of the PROXY header is not accepted")]
    Version,
    /// The line of a version 1 header has the wrong number of fields, a wrong separator between its
    /// addresses and ports, or a line end that is not CRLF.
    #[error("the line of the PROXY header is malformed")]
    Line,
    /// The command of a version 2 header is neither `LOCAL` nor `PROXY`.
    #[error("the PROXY header has an unknown command")]
    Command,
    /// The address family or the protocol is unknown.
    #[error("the PROXY header has an unknown address family or protocol")]
    Family,
    /// An IP address in a version 1 header is malformed, or not of the family that the line names.
    #[error("the PROXY header has a malformed address")]
    Address,
    /// A port in a version 1 header is not a decimal number, is above 65535, or has leading zeros.
    #[error("the PROXY header has a malformed port")]
    Port,
    /// The length field of a version 2 header is too small for the addresses.
    #[error("the PROXY header is too short for its addresses")]
    Length,
    /// The TLV (type-length-value field) or sub-TLV of this type is malformed, or occurs twice
    /// although only one is allowed.
    #[error("the PROXY header has a malformed TLV of type {0:#04x}")]
    Tlv(u8),
    /// The checksum does not match.
    #[error("the checksum of the PROXY header does not match")]
    Checksum,
}

/// The error for a [`ProxyHeader`](super::ProxyHeader) that cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum ProxyEncodeError {
    /// The header has the command `LOCAL`, which version 1 does not have.
    #[error("version 1 of the PROXY protocol has no LOCAL command")]
    LocalInV1,
    /// The header's family is UDP or Unix sockets, which version 1 does not have.
    #[error("version 1 of the PROXY protocol has no addresses of this family")]
    FamilyInV1,
    /// The header has TLVs or a checksum, which version 1 does not have.
    #[error("version 1 of the PROXY protocol has neither TLVs nor a checksum")]
    TlvsInV1,
    /// The header was received, and its family is that of a datagram socket (UDP or Unix). The
    /// addresses of such a header are not kept, so they cannot be encoded.
    #[error("the PROXY header is of a datagram socket")]
    Datagram,
    /// The path of a Unix socket is longer than 108 bytes, or contains a zero byte.
    #[error("the path of the Unix socket does not fit into a PROXY header")]
    Path,
    /// The TLV of this type has an invalid value, or is a checksum. Only
    /// [`with_checksum`](super::ProxyHeader::with_checksum) can add a checksum.
    #[error("the TLV of type {0:#04x} is not valid")]
    Tlv(u8),
    /// The header is longer than 65,551 bytes.
    #[error("the PROXY header is too long")]
    TooLong,
}
