//! The facts about a TLS session, for the layers and services behind the hook.

use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{CipherSuite, CommonState, HandshakeKind, ProtocolVersion};

/// The parameters of a TLS session, the server name that the peer requested, and the peer's
/// certificates.
///
/// The description of each method names the OpenTelemetry attribute for the value that the method
/// returns, for use in your own spans.
///
/// ```
/// use tower_tcp::{Connection, tls::TlsInfo};
///
/// fn wants_http2<Io>(conn: &Connection<Io>) -> bool {
///     let tls = conn.info().get::<TlsInfo>();
///     tls.and_then(TlsInfo::alpn) == Some(b"h2".as_slice())
/// }
/// # _ = wants_http2::<()>;
/// ```
#[derive(Clone, Debug)]
pub struct TlsInfo {
    version: &'static str,
    cipher_suite: &'static str,
    alpn: Option<Box<[u8]>>,
    server_name: Option<Box<str>>,
    certificates: Box<[CertificateDer<'static>]>,
    resumed: bool,
}

impl TlsInfo {
    pub(super) fn new(session: &CommonState, server_name: Option<Box<str>>) -> Self {
        Self {
            version: match session.protocol_version() {
                Some(ProtocolVersion::TLSv1_3) => "1.3",
                Some(ProtocolVersion::TLSv1_2) => "1.2",
                _ => "unknown",
            },
            cipher_suite: session
                .negotiated_cipher_suite()
                .and_then(|suite| registered_name(suite.suite()))
                .unwrap_or("unknown"),
            alpn: session.alpn_protocol().map(Into::into),
            server_name,
            certificates: session.peer_certificates().unwrap_or_default().into(),
            resumed: session.handshake_kind() == Some(HandshakeKind::Resumed),
        }
    }

    /// Returns the TLS version, `1.2` or `1.3`.
    ///
    /// Attribute: `tls.protocol.version`.
    pub fn version(&self) -> &'static str {
        self.version
    }

    /// Returns the name of the cipher suite as registered by IANA, such as
    /// `TLS_AES_128_GCM_SHA256`.
    ///
    /// Attribute: `tls.cipher`.
    pub fn cipher_suite(&self) -> &'static str {
        self.cipher_suite
    }

    /// Returns the protocol that was negotiated by ALPN, or `None` if either side does not use
    /// ALPN.
    ///
    /// Attribute: `tls.next_protocol`.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.alpn.as_deref()
    }

    /// Returns the server name that the peer requested (SNI), in lower case, or `None` if the peer
    /// requested none.
    ///
    /// The peer may request any name, so the name proves nothing about the peer.
    ///
    /// Attribute: `server.address`.
    pub fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }

    /// Returns the peer's certificate chain in DER, the peer's own certificate first.
    ///
    /// The chain has been verified. It is empty if the peer has sent no certificate, or the server
    /// requests none (see
    /// [`TlsBuilder::client_certificates`](super::TlsBuilder::client_certificates)).
    ///
    /// Attribute: `tls.client.certificate_chain`.
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// Returns whether the handshake resumed an earlier session.
    ///
    /// If so, [`peer_certificates`](Self::peer_certificates) returns the certificates that the peer
    /// sent when that session was created.
    ///
    /// Attribute: `tls.resumed`.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }
}

/// Returns the name of a cipher suite as registered by IANA. It begins with `TLS_` where rustls's
/// own name begins with `TLS13_`.
pub(super) fn registered_name(suite: CipherSuite) -> Option<&'static str> {
    Some(match suite {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256",
        CipherSuite::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384",
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256",
        CipherSuite::TLS13_AES_128_CCM_SHA256 => "TLS_AES_128_CCM_SHA256",
        CipherSuite::TLS13_AES_128_CCM_8_SHA256 => "TLS_AES_128_CCM_8_SHA256",
        other => return other.as_str(),
    })
}
