//! The reasons for which a connection can end.

use std::fmt;

/// The party that ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Initiator {
    /// The peer. It closed or reset the connection, stopped acknowledging data, or sent data that
    /// cannot be served. An I/O error of the stream ([`IoError`](EndReason::IoError)) also counts
    /// as an end by the peer.
    Peer,
    /// The program: one of its services, layers, hooks or codecs, or a call such as
    /// [`Peer::close`](crate::Peer::close).
    Service,
    /// The library: a limit, an address filter, a deadline or a shutdown.
    Server,
}

impl Initiator {
    /// Returns the lower-case word used in events and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Service => "service",
            Self::Server => "server",
        }
    }
}

impl fmt::Display for Initiator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

macro_rules! end_reasons {
    ($($(#[$doc:meta])* $name:ident = $word:literal by $who:ident,)*) => {
        /// The reason a connection ended. Every connection ends exactly once, with one of these.
        ///
        /// The docs of each variant say when the library uses it. Hooks, layers and services can
        /// choose any reason with [`ConnectionEnded`](crate::ConnectionEnded::new).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum EndReason {
            $($(#[$doc])* $name,)*
        }

        impl EndReason {
            /// Every reason, for tables and tests.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Returns the word used in events and metrics. It does not change between releases.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }

            /// Returns the party that ended the connection.
            pub fn initiator(self) -> Initiator {
                match self { $(Self::$name => Initiator::$who,)* }
            }
        }
    };
}

end_reasons! {
    /// The peer finished sending after a complete frame or before its first byte, and all replies
    /// were written. This is also the reason if an HTTP/1 request asked for the connection to
    /// close, or if a raw service completed after it had read to the end of input.
    PeerClosed = "peer_closed" by Peer,
    /// The peer reset the connection, left before a reply was written, or stopped acknowledging
    /// data or HTTP/2 pings. This is also the reason if the peer finished sending and a reply then
    /// took longer than [`half_closed`](crate::deadline::Deadlines::half_closed).
    PeerReset = "peer_reset" by Peer,
    /// The stream ended within a frame, an HTTP/1 head, or the bytes by which a
    /// [`Peek`](crate::preconnect::Peek) hook detects the protocol. This is also the reason if a
    /// TLS stream ended without `close_notify`, or if a decoder's `decode_eof` failed.
    Truncated = "truncated" by Peer,
    /// A frame of a pipeline, or an HTTP/1 head, was larger than allowed.
    FrameTooLarge = "frame_too_large" by Peer,
    /// The peer's data could not be decoded, or the decoder kept returning frames without consuming
    /// input. A service can choose this reason for a request that breaks the protocol.
    CodecError = "codec_error" by Peer,
    /// No data arrived in time after the connection was accepted and its pre-connect hooks were
    /// done.
    FirstByteTimeout = "first_byte_timeout" by Server,
    /// A frame, an HTTP/1 head or an HTTP/2 preface began to arrive but was not complete in time.
    FrameTimeout = "frame_timeout" by Server,
    /// The body of an HTTP/1 request stopped arriving.
    BodyTimeout = "body_timeout" by Server,
    /// The connection was idle for longer than [`idle`](crate::deadline::Deadlines::idle) or
    /// [`upgraded_idle`](crate::deadline::Deadlines::upgraded_idle).
    IdleTimeout = "idle_timeout" by Server,
    /// The peer took no byte of the pending output within the [write
    /// deadline](crate::deadline::Deadlines::write). While the connection closes,
    /// [`Linger::write`](crate::close::Linger::write) applies instead.
    WriteTimeout = "write_timeout" by Server,
    /// The service left more small HTTP/2 data frames unread than hyper's library h2 keeps. See
    /// `Http::configure`.
    UnreadData = "unread_data" by Server,
    /// The peer read more slowly than [`Deadlines::min_rate`](crate::deadline::Deadlines::min_rate)
    /// or [`Linger::min_rate`](crate::close::Linger::min_rate) allows. This is also the reason if a
    /// broadcast closed the connection by its policy for slow peers.
    SlowReader = "slow_reader" by Server,
    /// The peer sent the rest of a frame, an HTTP/1 head or an HTTP/2 preface more slowly than
    /// [`min_rate`](crate::deadline::Deadlines::min_rate).
    SlowSender = "slow_sender" by Server,
    /// The connection reached its maximum age.
    MaxAge = "max_age" by Server,
    /// The pre-connect hooks did not complete in time, or the service behind them was not ready in
    /// time.
    PreConnectTimeout = "pre_connect_timeout" by Server,
    /// Too many connections were in their pre-connect hooks, and this connection was the oldest of
    /// them.
    PreConnectEvicted = "pre_connect_evicted" by Server,
    /// The PROXY protocol header, which a proxy in front of the server sends, was malformed or
    /// missing.
    ProxyHeader = "proxy_header" by Peer,
    /// The TLS handshake failed.
    TlsHandshakeFailed = "tls_handshake_failed" by Peer,
    /// A pre-connect hook or [`Pipeline::reject`](crate::Pipeline::reject) rejected the connection.
    Rejected = "rejected" by Service,
    /// The connection exceeded a [`ConnectionLimit`](crate::admit::ConnectionLimit), or tower's
    /// `LoadShed` rejected it.
    LimitExceeded = "limit_exceeded" by Server,
    /// An [`AddressFilter`](crate::admit::AddressFilter) denied the connection's address, for
    /// example because that address is banned.
    Denied = "denied" by Server,
    /// The client already had as many open connections as `PerClient` allows.
    ClientLimitExceeded = "client_limit_exceeded" by Server,
    /// The client connected more often than `PerClient` allows.
    ClientRateExceeded = "client_rate_exceeded" by Server,
    /// The timeout of tower's `Timeout` layer around the connection service elapsed.
    ServiceTimeout = "service_timeout" by Service,
    /// The program closed the connection gracefully, by a closing reply, by
    /// [`Peer::close`](crate::Peer::close) or by
    /// [`LiveConnection::close`](crate::LiveConnection::close). This is also the reason if a raw
    /// service completed before it had read to the end of input.
    ServiceClosed = "service_closed" by Service,
    /// The program aborted the connection, by `Peer::abort` or `LiveConnection::abort`.
    Aborted = "aborted" by Service,
    /// A connection service failed. This is also the reason if a request failed over HTTP/1, or in
    /// a pipeline with [`shutdown_on_error`](crate::Pipeline::shutdown_on_error) or
    /// [`ShutdownOnErrorLayer`](crate::pipeline::ShutdownOnErrorLayer).
    ///
    /// If the error contains a [`ConnectionEnded`](crate::ConnectionEnded), the reason in it is
    /// used instead. Some errors of a connection service also have a reason of their own, such as
    /// [`ServiceTimeout`](crate::EndReason::ServiceTimeout) for the error of tower's `Timeout`.
    ServiceError = "service_error" by Service,
    /// The `poll_ready` of a pipeline's request service failed.
    ServiceNotReady = "service_not_ready" by Service,
    /// The make-service failed, or did not complete in time. This is also the reason if the service
    /// of an upgrade was not ready in time.
    MakeServiceError = "make_service_error" by Service,
    /// The encoder rejected a reply, a pushed frame or a farewell.
    EncodeError = "encode_error" by Service,
    /// User code panicked.
    Panic = "panic" by Service,
    /// The stream failed with an I/O error that no other reason describes.
    IoError = "io_error" by Peer,
    /// The connection finished during a shutdown, or did not finish its hooks in the time that a
    /// drain gives them.
    Drained = "drained" by Server,
    /// The shutdown's deadline passed before the connection finished.
    DrainDeadline = "drain_deadline" by Server,
    /// The server was aborted, the server's future was dropped, or the connection's runtime was
    /// shut down.
    Killed = "killed" by Server,
}

impl EndReason {
    /// Returns whether the server dropped the connection and its unsent output.
    pub(crate) fn is_cut_off(self) -> bool {
        matches!(
            self,
            Self::WriteTimeout
                | Self::SlowReader
                | Self::Aborted
                | Self::DrainDeadline
                | Self::Killed
        )
    }

    /// Returns whether the connection ended in good order, that is, with one of these reasons:
    /// [`PeerClosed`](Self::PeerClosed), [`ServiceClosed`](Self::ServiceClosed),
    /// [`Drained`](Self::Drained), [`IdleTimeout`](Self::IdleTimeout),
    /// [`FirstByteTimeout`](Self::FirstByteTimeout) or [`MaxAge`](Self::MaxAge).
    pub fn is_orderly(self) -> bool {
        matches!(
            self,
            Self::PeerClosed
                | Self::ServiceClosed
                | Self::Drained
                | Self::IdleTimeout
                | Self::FirstByteTimeout
                | Self::MaxAge
        )
    }

    /// Returns whether the connection ended at one of its own deadlines, because the peer did not
    /// send or read in time, or the service did not answer in time. This includes
    /// [`SlowReader`](Self::SlowReader) and [`SlowSender`](Self::SlowSender). It does not include
    /// the maximum age, the deadline of a shutdown, or deadlines without an end reason of their
    /// own, such as `make_service` and `half_closed`.
    pub fn is_timeout(self) -> bool {
        matches!(
            self,
            Self::FirstByteTimeout
                | Self::FrameTimeout
                | Self::BodyTimeout
                | Self::IdleTimeout
                | Self::WriteTimeout
                | Self::SlowReader
                | Self::SlowSender
                | Self::PreConnectTimeout
                | Self::ServiceTimeout
        )
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
