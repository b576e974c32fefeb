//! The errors of a configuration, and the error for an unknown server name.

use std::io;

use rustls_pki_types::pem;
use thiserror::Error;
use tokio_rustls::rustls;

use crate::error::BoxError;

/// The error of [`TlsBuilder::build`](super::TlsBuilder::build) and of
/// [`Tls::reload`](super::Tls::reload).
///
/// A `pem` field contains the path of the file at fault, or a name for the PEM text that was passed
/// in memory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The builder has no server certificate.
    #[error("no certificate is configured")]
    NoIdentity,

    /// A file could not be read.
    #[error("cannot read {pem}")]
    Unreadable {
        /// The path of the file.
        pem: String,
        /// The I/O error.
        #[source]
        source: io::Error,
    },

    /// A file or text is not valid PEM.
    #[error("malformed PEM in {pem}")]
    Malformed {
        /// The path of the file, or a name for the PEM text.
        pem: String,
        /// The error of the parser.
        #[source]
        source: pem::Error,
    },

    /// A file or text contains no certificate.
    #[error("no certificate in {pem}")]
    NoCertificate {
        /// The path of the file, or a name for the PEM text.
        pem: String,
    },

    /// A file or text contains no private key, or only an encrypted one.
    #[error("no unencrypted private key in {pem}")]
    NoKey {
        /// The path of the file, or a name for the PEM text.
        pem: String,
    },

    /// The server's own certificate is unusable.
    #[error("unusable certificate in {pem}")]
    BadCertificate {
        /// The path of the file, or a name for the PEM text.
        pem: String,
        /// The reason.
        #[source]
        source: rustls::Error,
    },

    /// The private key is unusable. The default provider supports RSA, ECDSA (P-256 and P-384) and
    /// Ed25519 keys.
    #[error("unusable private key in {pem}")]
    BadKey {
        /// The path of the file, or a name for the PEM text.
        pem: String,
        /// The reason.
        #[source]
        source: rustls::Error,
    },

    /// The private key does not belong to the certificate.
    #[error("the private key in {key} does not match the certificate in {certificate}")]
    KeyMismatch {
        /// The path of the certificate's file, or a name for its PEM text.
        certificate: String,
        /// The path of the key's file, or a name for its PEM text.
        key: String,
    },

    /// A file is not an OCSP response in DER with the status "successful".
    #[error("no successful OCSP response in {file}")]
    BadOcspResponse {
        /// The path of the file.
        file: String,
    },

    /// A name is neither a DNS name nor a wildcard such as `*.example.org`.
    #[error("{name:?} is neither a DNS name nor a wildcard such as *.example.org")]
    BadName {
        /// The name.
        name: String,
    },

    /// A certificate was added for a name that already has a certificate.
    #[error("two certificates for the name {name}")]
    DuplicateName {
        /// The name.
        name: String,
    },

    /// A certificate is not valid for the name for which it was added.
    #[error("the certificate in {pem} is not valid for the name {name}")]
    WrongName {
        /// The name.
        name: String,
        /// The path of the certificate's file, or a name for its PEM text.
        pem: String,
        /// The reason.
        #[source]
        source: rustls::Error,
    },

    /// A certificate contains no DNS name for which it could be used.
    #[error("no DNS name in the certificate in {pem}")]
    Nameless {
        /// The path of the file, or a name for the PEM text.
        pem: String,
    },

    /// The name of an ALPN protocol is empty, or longer than 255 bytes ([RFC 7301 section
    /// 3.1](https://www.rfc-editor.org/rfc/rfc7301#section-3.1)).
    #[error("the ALPN protocol \"{}\" does not have 1 to 255 bytes", .protocol.escape_ascii())]
    BadProtocol {
        /// The name of the protocol.
        protocol: Vec<u8>,
    },

    /// The root certificates for verifying clients are unusable.
    #[error("unusable roots for client certificates in {pem}")]
    BadRoots {
        /// The path of the file, or a name for the PEM text.
        pem: String,
        /// The reason.
        #[source]
        source: BoxError,
    },

    /// A file or text contains no certificate revocation list.
    #[error("no certificate revocation list in {pem}")]
    NoRevocationList {
        /// The path of the file, or a name for the PEM text.
        pem: String,
    },

    /// A certificate revocation list is unusable.
    #[error("unusable certificate revocation list in {pem}")]
    BadRevocationList {
        /// The path of the file, or a name for the PEM text.
        pem: String,
        /// The reason.
        #[source]
        source: BoxError,
    },

    /// There are revocation lists, but no certificates are requested from clients.
    #[error("revocation lists are configured, but client certificates are not requested")]
    RevocationWithoutClients,

    /// A ticket key's file has a size other than 48 or 80 bytes.
    #[error("a ticket key has 48 or 80 bytes, but {file} has {bytes}")]
    BadTicketKey {
        /// The path of the file.
        file: String,
        /// The size of the file in bytes, or 81 if the file is larger than 80 bytes.
        bytes: usize,
    },

    /// The provider has no cipher suite of this name.
    #[error("the provider has no cipher suite {name:?}")]
    UnknownCipherSuite {
        /// The name.
        name: String,
    },

    /// rustls rejected the combination of TLS versions, cipher suites and key exchange groups.
    #[error("rustls refused the configuration")]
    Config(#[source] rustls::Error),
}

/// The error for a connection whose client requested no server name, or a name without a
/// certificate. It occurs only if there is no default certificate.
///
/// See the section on [names](super#names).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UnknownServerName {
    /// No certificate is configured for the name. The client gets the alert `unrecognized_name`.
    #[error("no certificate for the server name {0}")]
    Unknown(Box<str>),

    /// The client requested no name. It gets the alert `missing_extension`.
    #[error("no server name was requested, and there is no default certificate")]
    Absent,
}
