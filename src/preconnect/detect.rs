/// The verdict of a protocol detector on a connection's first bytes.
///
/// A detector gets all bytes received so far, which may end anywhere. More bytes must not change a
/// `Yes` or `No`. Otherwise the verdict would depend on how the network splits the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Detection<F> {
    /// The bytes belong to a protocol that the detector knows. The value becomes a
    /// [fact](crate::ConnectionInfo::get) of the connection.
    Yes(F),
    /// The bytes may belong to a protocol that the detector knows. More bytes are needed.
    NotYet,
    /// The bytes belong to no protocol that the detector knows, whatever follows them.
    No,
}

impl Detection<()> {
    /// Detects whether the bytes in `first` begin with `prefix`.
    pub fn starts_with(first: &[u8], prefix: &[u8]) -> Self {
        if first.starts_with(prefix) {
            Self::Yes(())
        } else if prefix.starts_with(first) {
            Self::NotYet
        } else {
            Self::No
        }
    }
}

impl<F> Detection<F> {
    /// Converts the value of a `Yes` with `f`.
    pub fn map<G>(self, f: impl FnOnce(F) -> G) -> Detection<G> {
        match self {
            Self::Yes(fact) => Detection::Yes(f(fact)),
            Self::NotYet => Detection::NotYet,
            Self::No => Detection::No,
        }
    }

    /// Calls another detector if this verdict is `No`. A `Yes` or `NotYet` is returned without
    /// calling `other`, so the first detector has precedence.
    #[must_use]
    pub fn or_else(self, other: impl FnOnce() -> Self) -> Self {
        match self {
            Self::No => other(),
            decided => decided,
        }
    }
}

/// A protocol that [`Protocol::detect`] recognizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// A TLS `ClientHello` of any version since SSL 3.0
    /// ([RFC 8446 section 5.1](https://www.rfc-editor.org/rfc/rfc8446#section-5.1)).
    Tls,
    /// The whole connection preface of HTTP/2
    /// ([RFC 9113 section 3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)).
    Http2,
    /// An HTTP/1 method and the space after it. The methods are those of [RFC 9110 section
    /// 9](https://www.rfc-editor.org/rfc/rfc9110#section-9), and `PATCH`.
    Http1,
}

/// The connection preface of HTTP/2, which is the longest input that [`Protocol::detect`] needs.
pub(super) const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const HTTP1_METHODS: [&[u8]; 9] = [
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"PUT ",
    b"DELETE ",
    b"CONNECT ",
    b"OPTIONS ",
    b"TRACE ",
    b"PATCH ",
];

impl Protocol {
    /// Detects TLS, HTTP/2 and HTTP/1 by the first bytes. Pass this function to
    /// [`Peek::new`](super::Peek::new), or call it in your own detector.
    ///
    /// To detect other protocols, too, check for them before you call this function. The order
    /// matters for a protocol that looks like HTTP/1 to this function, such as a line protocol with
    /// a command `GET`. This example also detects SSH:
    ///
    /// ```
    /// use tower_tcp::preconnect::{Detection, Protocol};
    ///
    /// #[derive(Debug, PartialEq)]
    /// enum Mine {
    ///     Ssh,
    ///     Known(Protocol),
    /// }
    ///
    /// fn detect(first: &[u8]) -> Detection<Mine> {
    ///     Detection::starts_with(first, b"SSH-2.0-")
    ///         .map(|()| Mine::Ssh)
    ///         .or_else(|| Protocol::detect(first).map(Mine::Known))
    /// }
    ///
    /// assert_eq!(detect(b"SSH-2.0-OpenSSH"), Detection::Yes(Mine::Ssh));
    /// assert_eq!(detect(b"GET / HTTP/1.1"), Detection::Yes(Mine::Known(Protocol::Http1)));
    /// assert_eq!(detect(b"S"), Detection::NotYet);
    /// assert_eq!(detect(b"HELO"), Detection::No);
    /// ```
    pub fn detect(first: &[u8]) -> Detection<Self> {
        client_hello(first)
            .map(|()| Self::Tls)
            .or_else(|| Detection::starts_with(first, HTTP2_PREFACE).map(|()| Self::Http2))
            .or_else(|| {
                HTTP1_METHODS.iter().fold(Detection::No, |found, method| {
                    found.or_else(|| Detection::starts_with(first, method).map(|()| Self::Http1))
                })
            })
    }
}

/// Detects a TLS record of type `handshake` and major version 3 that begins with a message of type
/// `client_hello`. The record's length does not matter.
fn client_hello(first: &[u8]) -> Detection<()> {
    const HEAD: [Option<u8>; 6] = [Some(22), Some(3), None, None, None, Some(1)];
    let mut both = HEAD.iter().zip(first);
    if both.any(|(expected, byte)| expected.is_some_and(|expected| expected != *byte)) {
        Detection::No
    } else if first.len() < HEAD.len() {
        Detection::NotYet
    } else {
        Detection::Yes(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_protocol_is_detected_by_its_first_bytes_and_by_no_fewer() {
        let table: [(&[u8], Protocol); 12] = [
            (b"\x16\x03\x01\x02\x00\x01", Protocol::Tls),
            (b"\x16\x03\x03\x00\x01\x01", Protocol::Tls),
            (HTTP2_PREFACE, Protocol::Http2),
            (b"GET ", Protocol::Http1),
            (b"HEAD ", Protocol::Http1),
            (b"POST ", Protocol::Http1),
            (b"PUT ", Protocol::Http1),
            (b"DELETE ", Protocol::Http1),
            (b"CONNECT ", Protocol::Http1),
            (b"OPTIONS ", Protocol::Http1),
            (b"TRACE ", Protocol::Http1),
            (b"PATCH ", Protocol::Http1),
        ];

        for (first, protocol) in table {
            for fewer in 0..first.len() {
                let seen = Protocol::detect(&first[..fewer]);
                assert_eq!(seen, Detection::NotYet, "{protocol:?} of {fewer} bytes");
            }
            assert_eq!(Protocol::detect(first), Detection::Yes(protocol));
            let more = [first, b"and more"].concat();
            assert_eq!(Protocol::detect(&more), Detection::Yes(protocol));
        }
    }

    #[test]
    fn no_protocol_is_detected_at_the_first_byte_that_matches_none() {
        let table: [&[u8]; 11] = [
            b"\x16\x02",
            b"\x15",
            b"\x16\x03\x01\x02\x00\x02", // a ServerHello
            b"PRI * HTTP/2.0\r\n\r\nSN",
            b"PRI * HTTP/1",
            b"g",
            b"GETS",
            b"GET\t",
            b"HEX",
            b" ",
            b"\0",
        ];

        for first in table {
            let before = Protocol::detect(&first[..first.len() - 1]);
            assert_eq!(before, Detection::NotYet, "{}", first.escape_ascii());
            let seen = Protocol::detect(first);
            assert_eq!(seen, Detection::No, "{}", first.escape_ascii());
        }
    }
}
