use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::error::ProxyHeaderError as Error;
use super::raw::{first, split, text};

/// The type of the TLV that contains an [`Ssl`].
pub(super) const TYPE: u8 = 0x20;

const VERSION: u8 = 0x21;
const COMMON_NAME: u8 = 0x22;
const CIPHER: u8 = 0x23;
const SIGNATURE_ALGORITHM: u8 = 0x24;
const KEY_ALGORITHM: u8 = 0x25;

const CLIENT_SSL: u8 = 0x01;
const CLIENT_CERT_CONN: u8 = 0x02;
const CLIENT_CERT_SESS: u8 = 0x04;

/// The facts about the client's TLS session with the sender of a PROXY header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ssl {
    client: u8,
    verify: u32,
    facts: Vec<(u8, Bytes)>,
}

impl Ssl {
    /// Creates the facts about a client that connected over TLS without a certificate.
    #[expect(clippy::new_without_default, reason = "a session has no default")]
    pub fn new() -> Self {
        Self {
            client: CLIENT_SSL,
            verify: 1,
            facts: Vec::new(),
        }
    }

    /// Adds the fact that the client presented a certificate with this common name, and that the
    /// certificate was verified.
    #[must_use]
    pub fn with_certificate_verified(mut self, common_name: impl Into<String>) -> Self {
        self.client |= CLIENT_CERT_CONN | CLIENT_CERT_SESS;
        self.verify = 0;
        self.with_fact(COMMON_NAME, common_name.into())
    }

    /// Adds the TLS version, such as `TLSv1.3`.
    #[must_use]
    pub fn with_version(self, version: impl Into<String>) -> Self {
        self.with_fact(VERSION, version.into())
    }

    /// Adds the name of the cipher, such as `ECDHE-RSA-AES128-GCM-SHA256`.
    #[must_use]
    pub fn with_cipher(self, cipher: impl Into<String>) -> Self {
        self.with_fact(CIPHER, cipher.into())
    }

    /// Adds a fact of any type, as a sub-TLV of the TLV `PP2_TYPE_SSL`.
    #[must_use]
    pub fn with_fact(mut self, kind: u8, value: impl Into<Bytes>) -> Self {
        self.facts.push((kind, value.into()));
        self
    }

    /// Returns whether the client connected over TLS.
    pub fn is_tls(&self) -> bool {
        self.client & CLIENT_SSL != 0
    }

    /// Returns whether the client presented a certificate on this connection.
    pub fn has_certificate(&self) -> bool {
        self.client & CLIENT_CERT_CONN != 0
    }

    /// Returns whether the client presented a certificate at least once in this TLS session, which
    /// the client may have resumed.
    pub fn has_session_certificate(&self) -> bool {
        self.client & CLIENT_CERT_SESS != 0
    }

    /// Returns whether the client presented a certificate, on this connection or earlier in its TLS
    /// session, and the sender verified the certificate.
    ///
    /// Do not use [`verify_result`](Self::verify_result) alone for this: HAProxy sends `0` for
    /// clients without a certificate, too.
    pub fn is_certificate_verified(&self) -> bool {
        self.client & (CLIENT_CERT_CONN | CLIENT_CERT_SESS) != 0 && self.verify == 0
    }

    /// Returns the sender's result of verifying the client's certificate. `0` means success, but
    /// only if there was a certificate.
    pub fn verify_result(&self) -> u32 {
        self.verify
    }

    /// Returns the TLS version, such as `TLSv1.3`.
    pub fn version(&self) -> Option<&str> {
        text(&self.facts, VERSION)
    }

    /// Returns the common name of the client's certificate. This name proves nothing unless
    /// [`is_certificate_verified`](Self::is_certificate_verified) returns `true`.
    pub fn common_name(&self) -> Option<&str> {
        text(&self.facts, COMMON_NAME)
    }

    /// Returns the name of the cipher.
    pub fn cipher(&self) -> Option<&str> {
        text(&self.facts, CIPHER)
    }

    /// Returns the algorithm with which the certificate is signed that the sender of the header
    /// presented to the client, such as `RSA-SHA256`.
    pub fn signature_algorithm(&self) -> Option<&str> {
        text(&self.facts, SIGNATURE_ALGORITHM)
    }

    /// Returns the algorithm of the key of the certificate that the sender of the header presented
    /// to the client, such as `RSA2048`.
    pub fn key_algorithm(&self) -> Option<&str> {
        text(&self.facts, KEY_ALGORITHM)
    }

    /// Returns the value of the first fact whose sub-TLV type is `kind`.
    pub fn get(&self, kind: u8) -> Option<&[u8]> {
        first(&self.facts, kind).map(|value| &**value)
    }

    pub(super) fn parse(value: &Bytes) -> Result<Self, Error> {
        let mut rest = value.clone();
        let mut fixed = || Some((rest.try_get_u8().ok()?, rest.try_get_u32().ok()?));
        let (client, verify) = fixed().ok_or(Error::Tlv(TYPE))?;
        let facts = split(&rest)?;
        for (kind, value) in &facts {
            let is_valid = match *kind {
                COMMON_NAME => str::from_utf8(value).is_ok(),
                VERSION | CIPHER | SIGNATURE_ALGORITHM | KEY_ALGORITHM => value.is_ascii(),
                _ => true,
            };
            if !is_valid {
                return Err(Error::Tlv(*kind));
            }
        }
        Ok(Self {
            client,
            verify,
            facts,
        })
    }

    /// Returns the value of the TLV that contains these facts. The value is invalid if a fact is
    /// longer than 65,535 bytes, because a length field has 16 bits.
    pub(super) fn encode(&self) -> Bytes {
        let mut value = BytesMut::new();
        value.put_u8(self.client);
        value.put_u32(self.verify);
        for (kind, fact) in &self.facts {
            value.put_u8(*kind);
            value.put_u16(u16::try_from(fact.len()).unwrap_or(u16::MAX));
            value.put_slice(fact);
        }
        value.freeze()
    }
}
