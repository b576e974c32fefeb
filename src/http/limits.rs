use std::time::Duration;

use crate::close::Linger;

/// The times of an HTTP connection, in one value. What hyper bounds besides (sizes, streams, resets) is hyper's to set:
/// [`Http::configure`](super::Http::configure).
///
/// | limit | default | why | at the limit |
/// | --- | --- | --- | --- |
/// | [`first_byte`](Self::first_byte) | 60 s | browsers connect ahead of need, and close by themselves | ends, [`FirstByteTimeout`] |
/// | [`head`](Self::head) | 30 s | hyper's own; a head is a few packets. Not reset by each byte | ends, [`FrameTimeout`] |
/// | [`idle`](Self::idle) | 75 s | above the 60 s after which common load balancers drop a connection of their pool: who is to close first must be sure of it | ends, [`IdleTimeout`] |
/// | [`write`](Self::write) | 30 s | a peer that takes no byte for so long is gone, or means harm | ends, [`WriteTimeout`] |
/// | [`last_request`](Self::last_request) | 1 s | a round trip and a client's own turn | at a drain, an idle HTTP/1 connection closes |
/// | [`make_service`](Self::make_service) | 10 s | as for all else before the first request | ends, [`MakeServiceError`] |
/// | [`linger`](Self::linger) | 30 s to shut down writing, then 2 s, 256 KiB | see [`Linger`] | the socket is closed |
///
/// [`FirstByteTimeout`]: crate::EndReason::FirstByteTimeout
/// [`FrameTimeout`]: crate::EndReason::FrameTimeout
/// [`IdleTimeout`]: crate::EndReason::IdleTimeout
/// [`WriteTimeout`]: crate::EndReason::WriteTimeout
/// [`MakeServiceError`]: crate::EndReason::MakeServiceError
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub(super) first_byte: Option<Duration>,
    pub(super) head: Option<Duration>,
    pub(super) idle: Option<Duration>,
    pub(super) write: Option<Duration>,
    pub(super) last_request: Duration,
    pub(super) make_service: Option<Duration>,
    pub(super) linger: Linger,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            first_byte: Some(Duration::from_secs(60)),
            head: Some(Duration::from_secs(30)),
            idle: Some(Duration::from_secs(75)),
            write: Some(Duration::from_secs(30)),
            last_request: Duration::from_secs(1),
            make_service: Some(Duration::from_secs(10)),
            linger: Linger::default(),
        }
    }
}

impl Limits {
    /// Sets how long a connection may be silent at first. Default 60 s; `None` for ever.
    #[must_use]
    pub fn first_byte(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.first_byte = time.into();
        self
    }

    /// Sets the time from the first byte of a request's head to its last, in HTTP/1, and of the preface by which HTTP/2 begins.
    /// Default 30 s; `None` for ever.
    ///
    /// How long a body takes is the service's business: only it knows how large bodies may be.
    #[must_use]
    pub fn head(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.head = time.into();
        self
    }

    /// Sets how long a connection may rest between two requests. Default 75 s; `None` for ever.
    ///
    /// In HTTP/2 it rests while it has no stream; pings do not keep it.
    #[must_use]
    pub fn idle(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.idle = time.into();
        self
    }

    /// Sets how long the peer may take no byte of what is waiting for it. Default 30 s; `None` for ever.
    ///
    /// It does not reach an HTTP/2 stream whose window the peer keeps shut: hyper's keep-alive pings, or a timeout in the service, do.
    #[must_use]
    pub fn write(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.write = time.into();
        self
    }

    /// Sets how long an idle HTTP/1 connection stays open at a drain, for one more request, which is answered with
    /// `connection: close`. Default 1 s.
    ///
    /// HTTP/1 has no word by which a server could say beforehand that it will close: a request that meets the close on its way is lost
    /// ([RFC 9112 section 9.3.1](https://www.rfc-editor.org/rfc/rfc9112#section-9.3.1) has the client send it again, if it may). A client
    /// that is at work sends its next one within this time, and is told. HTTP/2 has such a word, and needs none of this.
    #[must_use]
    pub fn last_request(mut self, time: Duration) -> Self {
        self.last_request = time;
        self
    }

    /// Sets how long the make-service may take. Default 10 s; `None` for ever.
    #[must_use]
    pub fn make_service(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.make_service = time.into();
        self
    }

    /// Sets how the connection is closed.
    #[must_use]
    pub fn linger(mut self, linger: Linger) -> Self {
        self.linger = linger;
        self
    }
}
