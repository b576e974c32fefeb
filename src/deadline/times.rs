use std::time::Duration;

use super::pace::MinRate;
use super::timer::jitter;

/// Declares a struct of deadlines. Each entry consists of the docs of a deadline's setter, its
/// name, and its default. The macro generates the setters, and the link targets for the table in
/// the struct's docs. A field in the `besides` part has a setter written by hand.
macro_rules! deadlines {
    (
        $(#[$doc:meta])*
        $name:ident {
            $($(#[$setter_doc:meta])* $time:ident = $default:expr,)*
        }
        $(besides { $($other:ident: $type:ty = $value:expr,)* })?
    ) => {
        $(#[$doc])*
        ///
        $(#[doc = concat!("[`", stringify!($time), "`]: Self::", stringify!($time))])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name {
            $(pub(crate) $time: Option<Duration>,)*
            $($(pub(crate) $other: $type,)*)?
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $($time: $default,)*
                    $($($other: $value,)*)?
                }
            }
        }

        impl $name {
            $(
                $(#[$setter_doc])*
                #[must_use]
                pub fn $time(mut self, time: impl Into<Option<Duration>>) -> Self {
                    self.$time = time.into();
                    self
                }
            )*
        }
    };
}

const fn secs(secs: u64) -> Option<Duration> {
    Some(Duration::from_secs(secs))
}

deadlines! {
    /// The deadlines of a connection, for every protocol.
    ///
    /// A [`PreConnectLayer`](crate::preconnect::PreConnectLayer::deadlines), a
    /// [`Pipeline`](crate::Pipeline::deadlines), HTTP and a raw service's
    /// [`DeadlineLayer`](super::DeadlineLayer) each enforce the deadlines that apply to them (see
    /// the [module docs](super)).
    ///
    /// | deadline | default | why | when reached |
    /// | --- | --- | --- | --- |
    /// | [`pre_connect`] | 10 s | several round trips of the slowest networks | [`PreConnectTimeout`] |
    /// | [`first_byte`] | 60 s | browsers connect in advance | [`FirstByteTimeout`] |
    /// | [`frame`] | 30 s | 64 KiB in 30 s is 17 kbit/s | [`FrameTimeout`] |
    /// | [`body`] | 30 s | an active peer sends something | [`BodyTimeout`]; in HTTP/2 only the service's read fails |
    /// | [`idle`] | 75 s | load balancers drop a pooled connection after 60 s, and should close first | [`IdleTimeout`] |
    /// | [`write`] | 30 s | a peer that takes no byte is gone | [`WriteTimeout`] |
    /// | [`half_closed`] | 10 s | most replies take less, and an abandoned request should not cause work for longer | [`PeerReset`] |
    /// | [`last_calls`] | 30 s | the default deadline of a shutdown | the reason for which the connection closes |
    /// | [`upgraded_idle`] | 1 h | a WebSocket has its own pings, so only an abandoned stream is idle for so long | [`IdleTimeout`] |
    /// | [`max_age`] | none | for rebalancing only | drains, then [`MaxAge`] |
    /// | [`max_age_jitter`] | zero | has no effect without `max_age` | |
    /// | [`make_service`] | 10 s | as long as for the pre-connect hooks, because the peer waits for both | [`MakeServiceError`] |
    /// | [`min_rate`] | none | slow peers exist; only the program knows how slow | [`SlowSender`], [`SlowReader`] |
    /// | [`drain`] | see [`DrainDeadlines`] | a drain must not wait for the slowest peer | see [`DrainDeadlines`] |
    ///
    /// [`max_age_jitter`]: Self::max_age_jitter
    /// [`drain`]: Self::drain
    /// [`min_rate`]: Self::min_rate
    /// [`PreConnectTimeout`]: crate::EndReason::PreConnectTimeout
    /// [`FirstByteTimeout`]: crate::EndReason::FirstByteTimeout
    /// [`FrameTimeout`]: crate::EndReason::FrameTimeout
    /// [`BodyTimeout`]: crate::EndReason::BodyTimeout
    /// [`IdleTimeout`]: crate::EndReason::IdleTimeout
    /// [`WriteTimeout`]: crate::EndReason::WriteTimeout
    /// [`PeerReset`]: crate::EndReason::PeerReset
    /// [`MaxAge`]: crate::EndReason::MaxAge
    /// [`MakeServiceError`]: crate::EndReason::MakeServiceError
    /// [`SlowSender`]: crate::EndReason::SlowSender
    /// [`SlowReader`]: crate::EndReason::SlowReader
    Deadlines {
        /// Sets the time for pre-connect hooks, including TLS handshakes, and for the wait until
        /// the service behind the hooks is ready. `None` waits forever.
        ///
        /// A [`PreConnectLayer`](crate::preconnect::PreConnectLayer) enforces it.
        ///
        /// Default: 10 s. Why: several round trips of the slowest networks. When reached: the
        /// connection is dropped with [`PreConnectTimeout`](crate::EndReason::PreConnectTimeout).
        pre_connect = secs(10),

        /// Sets the time until a connection's first byte. The time begins after the pre-connect
        /// hooks. `None` waits forever.
        ///
        /// Default: 60 s. Why: browsers connect in advance, so a connection that is still needed
        /// may be silent at first. When reached: the connection ends with
        /// [`FirstByteTimeout`](crate::EndReason::FirstByteTimeout).
        first_byte = secs(60),

        /// Sets the time from the first byte of a frame to its last. `None` waits forever.
        ///
        /// Later bytes do not restart the time. The deadline applies while the connection waits for
        /// input and the buffer has a part of a frame. It does not apply while input is paused, or
        /// while as many requests are being answered as the pipeline allows at once (one by
        /// default). Its time begins again after that. A codec may remove the beginning of a frame
        /// from the buffer before the rest arrives, as `LengthDelimitedCodec` does with the length.
        /// If the buffer is then empty, no frame seems to have begun, and [`idle`](Self::idle)
        /// applies until more bytes arrive. In HTTP/1 the deadline applies to a request's head, and
        /// in HTTP/2 to the preface at the beginning of a connection.
        ///
        /// Default: 30 s. Why: a frame of the default maximum, 64 KiB, needs 17 kbit/s to arrive in
        /// 30 s, and all but the slowest links reach that rate. When reached: the connection ends
        /// with [`FrameTimeout`](crate::EndReason::FrameTimeout).
        frame = secs(30),

        /// Sets how long a service may wait for the next byte of an HTTP request's body. `None`
        /// waits forever.
        ///
        /// The deadline does not bound the body as a whole, because only the service knows how
        /// large and how slow bodies may be.
        ///
        /// HTTP/2 streams share their connection's flow-control window. The unread body of another
        /// request can fill this window, and then the body that the service waits for cannot
        /// arrive. hyper's `initial_connection_window_size` enlarges the window.
        ///
        /// Default: 30 s. Why: an active peer sends something within a few round trips. When
        /// reached: the service's read of the body fails with `http::RequestBodyError::Elapsed`. In
        /// HTTP/1 the connection closes after the response, with
        /// [`BodyTimeout`](crate::EndReason::BodyTimeout); in HTTP/2 the other streams continue.
        body = secs(30),

        /// Sets how long a connection may be idle. It is idle while nothing arrives and no request
        /// is in progress. `None` waits forever.
        ///
        /// This deadline does not apply before the first byte, where
        /// [`first_byte`](Self::first_byte) applies, nor within a frame, where
        /// [`frame`](Self::frame) applies. So to close a client that is silent for 10 s, set all
        /// three to 10 s, and in HTTP [`body`](Self::body), too.
        ///
        /// In a pipeline and in HTTP the time counts from the *peer's* last frame or request, or
        /// from the moment when the reply to it was completely written to the system, if that is
        /// later. Frames and messages that the program sends do not restart the time, so they do
        /// not keep open a connection whose peer is gone.
        ///
        /// In two cases, bytes read and bytes written both restart the time: for a raw service, and
        /// for HTTP while another task holds the unread body of a request that is already answered.
        /// An HTTP/2 connection is idle while it has no stream. There, only bytes that the other
        /// task reads from the body restart the time. Pings do not.
        ///
        /// Default: 75 s. Why: common load balancers drop a pooled connection after 60 s. If the
        /// server waits longer, the balancer closes first, and it knows that no request is in
        /// transit. When reached: the connection closes with
        /// [`IdleTimeout`](crate::EndReason::IdleTimeout).
        idle = secs(75),

        /// Sets how long the peer may take no byte while output is pending. `None` waits forever.
        ///
        /// Output is pending until this host's system has accepted it. So the deadline does not run
        /// while all output is in the system's buffer, which can hold several MiB that the peer has
        /// not read. To let the system accept less, set
        /// [`SocketOptions::unsent`](crate::bind::SocketOptions::unsent).
        ///
        /// In HTTP/2 the deadline also applies to responses that wait for the peer to open a
        /// flow-control window. The connection ends if the peer takes no byte of any response. This
        /// is checked four times per deadline, so the connection may end late by up to a quarter of
        /// the deadline. A stream whose window stays closed does not end while the peer takes bytes
        /// of other streams.
        ///
        /// On Linux a byte counts as taken when the peer acknowledges it, or reads it from a Unix
        /// socket. This is checked 16 times per deadline, so a connection may end late by up to a
        /// sixteenth of the deadline. If a peer's receive buffer is full, its system takes nothing
        /// until the peer has read a part of the buffer. That part may be larger than 64 KiB, so
        /// set a longer time for peers that read only a few KiB per second. On other systems, and
        /// with a custom listener, bytes count as taken when more can be written. With a slow
        /// reader, a long time can pass before more can be written, so set a longer deadline there,
        /// too.
        ///
        /// Default: 30 s. Why: a peer that takes no byte for so long is gone or malicious. When
        /// reached: the connection ends with [`WriteTimeout`](crate::EndReason::WriteTimeout).
        write = secs(30),

        /// Sets how long pending requests may take after the peer has finished sending. `None`
        /// waits forever.
        ///
        /// This deadline applies when the *peer* has finished. When the server closes a pipeline's
        /// connection, [`last_calls`](Self::last_calls) applies.
        ///
        /// A peer that has finished sending may still wait for its replies, as `nc -N` does, or be
        /// gone. TCP does not distinguish the two, so replies within this time are sent. Each
        /// finished reply, and each byte that the peer takes, restarts the time. So a request gets
        /// its reply even if many others arrived before it. While output is pending,
        /// [`write`](Self::write) applies instead. The time also does not run while
        /// [`Peer::pause_input`](crate::Peer::pause_input) holds requests back. It starts again
        /// when the pause ends. This deadline applies to pipelines and to HTTP/1, but not to
        /// HTTP/2, which has no half-closed connections. A reset of the connection ends its
        /// requests at once.
        ///
        /// Default: 10 s. Why: most replies take less, and an abandoned request should not cause
        /// work for longer. When reached: the calls for pending requests are dropped, and the
        /// connection ends with [`PeerReset`](crate::EndReason::PeerReset).
        half_closed = secs(10),

        /// Sets how long pending requests of a pipeline may take after the server has begun to
        /// close their connection. `None` waits forever.
        ///
        /// The server closes a connection at its [`max_age`](Self::max_age), after an error, and
        /// when the program requests it. As with [`half_closed`](Self::half_closed), each finished
        /// reply and each byte that the peer takes restarts the time, and the time does not run
        /// while output is pending or while a pause holds requests back. A drain of the server does
        /// not start the time, because a shutdown has its own deadline.
        ///
        /// Default: 30 s. Why: it is the default deadline of a shutdown, too. When reached: the
        /// calls for these requests are dropped, and the connection ends with the reason for which
        /// it closes.
        last_calls = secs(30),

        /// Sets how long an upgraded HTTP/1 stream, or an HTTP/2 connection whose streams are all
        /// tunnels (`CONNECT`), may be idle in both directions. `None` waits forever.
        ///
        /// Default: 1 h. Why: a WebSocket has its own pings, so only an abandoned stream is idle
        /// for so long. When reached: the connection ends with
        /// [`IdleTimeout`](crate::EndReason::IdleTimeout), and the task that has the stream can no
        /// longer use it.
        upgraded_idle = secs(60 * 60),

        /// Sets the age at which a connection closes gracefully, as in a drain. `None` sets no age.
        ///
        /// Default: none. Why: only rebalancing between servers needs it. When reached: the
        /// connection drains with the [`drain`](Self::drain) deadlines, and ends with
        /// [`MaxAge`](crate::EndReason::MaxAge).
        max_age = None,

        /// Sets the time that the make-service may take, and the time that the service of an
        /// upgrade may take to become ready. `None` waits forever.
        ///
        /// Default: 10 s. Why: as long as for the pre-connect hooks, because the peer waits for
        /// both. When reached: the connection ends with
        /// [`MakeServiceError`](crate::EndReason::MakeServiceError).
        make_service = secs(10),
    }
    besides {
        max_age_jitter: Duration = Duration::ZERO,
        min_rate: Option<MinRate> = None,
        drain: DrainDeadlines = DrainDeadlines::default(),
    }
}

impl Deadlines {
    /// Sets the largest random time that is added to [`max_age`](Self::max_age). Each connection
    /// gets a new random time, so clients that connected together do not reconnect together.
    ///
    /// Default: zero. Why: `max_age` is off by default, and the jitter has no effect without it.
    #[must_use]
    pub fn max_age_jitter(mut self, most: Duration) -> Self {
        self.max_age_jitter = most;
        self
    }

    /// Sets the minimum rate at which the peer must send the rest of a frame, and take pending
    /// output. `None` sets no minimum rate.
    ///
    /// With the other deadlines alone, a peer that sends single bytes can hold its connection for
    /// the whole [`frame`](Self::frame) time. A peer that takes single bytes can hold it for as
    /// long as there is output. A minimum rate ends such a connection after one or two windows.
    ///
    /// The rate of input applies only while the connection waits for the rest of a frame, as
    /// [`frame`](Self::frame) does. It does not apply to the body of an HTTP request. The rate of
    /// output applies while output is pending. In HTTP/1 a request's head counts as a frame. In
    /// HTTP/2 the rate of input applies to the preface, but not to the head of a request. Until
    /// that head is complete, a connection without other streams is idle, and [`idle`](Self::idle)
    /// ends it. The rate of output does not apply to HTTP/2 responses that wait for the peer to
    /// open a flow-control window, but [`write`](Self::write) does.
    ///
    /// On Linux a byte counts as taken when the peer acknowledges it, or reads it from a Unix
    /// socket. On other systems, and with a custom listener, bytes count as taken when more can be
    /// written, so use longer windows there. Over a Unix socket, Linux reports taken bytes in
    /// blocks of up to 36 KiB, so choose a window in which even a slow peer reads that much.
    ///
    /// If the process was stopped or starved of CPU time at the end of a window, the peer gets
    /// another whole window.
    ///
    /// Default: none. Why: slow peers exist, and only the program knows how slow they may be. When
    /// the peer is slower: the connection ends with [`SlowSender`](crate::EndReason::SlowSender) or
    /// [`SlowReader`](crate::EndReason::SlowReader).
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_tcp::deadline::{Deadlines, MinRate};
    ///
    /// let rate = MinRate::new(500, Duration::from_secs(5));
    /// let deadlines = Deadlines::default().min_rate(rate);
    /// # drop(deadlines);
    /// ```
    #[must_use]
    pub fn min_rate(mut self, rate: impl Into<Option<MinRate>>) -> Self {
        self.min_rate = rate.into();
        self
    }

    /// Sets the shorter deadlines for a draining connection. [`DrainDeadlines`] states the default
    /// of each.
    #[must_use]
    pub fn drain(mut self, drain: DrainDeadlines) -> Self {
        self.drain = drain;
        self
    }

    /// Returns the age at which a connection drains, with a new random part for each call.
    pub(crate) fn age(&self) -> Option<Duration> {
        let age = self.max_age?;
        Some(age.saturating_add(jitter(self.max_age_jitter)))
    }
}

deadlines! {
    /// The deadlines of a connection that drains: in a shutdown, at its
    /// [`max_age`](Deadlines::max_age), or after
    /// [`LiveConnection::close`](crate::LiveConnection::close).
    ///
    /// Each deadline counts from the beginning of the drain, unless its method says otherwise. With
    /// `None`, the drain adds no such deadline, and those of [`Deadlines`] still apply.
    ///
    /// Below, the reason of the drain is the end reason [`Drained`] in a shutdown, [`MaxAge`] at
    /// the maximum age, and [`ServiceClosed`] after `LiveConnection::close`.
    ///
    /// | deadline | default | why | when reached |
    /// | --- | --- | --- | --- |
    /// | [`pre_connect`] | 1 s | an active handshake is done by then | the reason of the drain |
    /// | [`frame`] | 3 s | TCP has retransmitted a lost packet twice by then | [`FrameTimeout`] |
    /// | [`body`] | 3 s | TCP has retransmitted a lost packet twice by then | [`BodyTimeout`], see [`Deadlines::body`] |
    /// | [`last_request`] | 1 s | a busy client sends its next request by then | the reason of the drain |
    /// | [`next_frame`] | zero | only the protocol knows whether another frame may follow | the reason of the drain |
    /// | [`goodbye`] | 3 s | a few round trips for a `GOAWAY` | the reason for the `GOAWAY` |
    /// | [`stream`] | 30 s | the same as the default deadline of a shutdown | [`MaxAge`] |
    ///
    /// [`BodyTimeout`]: crate::EndReason::BodyTimeout
    /// [`FrameTimeout`]: crate::EndReason::FrameTimeout
    /// [`Drained`]: crate::EndReason::Drained
    /// [`MaxAge`]: crate::EndReason::MaxAge
    /// [`ServiceClosed`]: crate::EndReason::ServiceClosed
    DrainDeadlines {
        /// Sets how long pre-connect hooks may still take once a drain has begun.
        ///
        /// Default: 1 s. Why: an active handshake takes a few round trips, and no request has
        /// arrived yet. When reached: the connection is dropped with the reason of the drain.
        pre_connect = secs(1),

        /// Sets the time for the rest of a frame, or of a request's head in HTTP/1. For a frame or
        /// head that begins during the drain, the time counts from its first byte.
        ///
        /// Default: 3 s. Why: an active peer finishes its frame within a few round trips, and TCP
        /// retransmits a lost packet after 1 s, and again 2 s later ([RFC 6298 section
        /// 2.1](https://www.rfc-editor.org/rfc/rfc6298#section-2.1)). When reached: the connection
        /// ends with [`FrameTimeout`](crate::EndReason::FrameTimeout), after the replies to pending
        /// requests.
        frame = secs(3),

        /// Sets how long a service may wait for the next byte of an HTTP request's body, as
        /// [`Deadlines::body`] does. If such a wait begins during the drain, the time counts from
        /// the beginning of the wait.
        ///
        /// During the graceful close of a connection, the time also limits the wait for another
        /// task that still holds the unread body of an answered request. Each byte restarts the
        /// time. When the time is over, the connection closes. With `None`, this wait has no
        /// deadline.
        ///
        /// Default: 3 s. Why: for the same reasons as [`frame`](Self::frame). When reached: as for
        /// [`Deadlines::body`].
        body = secs(3),

        /// Sets how long a draining HTTP/1 connection that is idle between two requests stays open
        /// for one more request, which is answered with `connection: close`.
        ///
        /// HTTP/1 can announce a close only in a response. So a request that the client sends while
        /// the server closes the connection is lost ([RFC 9112 section
        /// 9.3.1](https://www.rfc-editor.org/rfc/rfc9112#section-9.3.1) lets the client retry it in
        /// some cases). A busy client sends its next request within this time and learns of the
        /// close from the response. HTTP/2 announces a close by `GOAWAY`, so it does not need this
        /// deadline.
        ///
        /// Default: 1 s. Why: a busy client sends its next request after a round trip and its own
        /// processing. When reached: the connection closes with the reason of the drain.
        last_request = secs(1),

        /// Sets how long an idle connection of a pipeline stays open for another frame, or for its
        /// first one. Each frame restarts the time, and so does each reply once it is completely
        /// written. The wait for further frames ends at the latest when ten times this time has
        /// passed since the beginning of the drain.
        ///
        /// A protocol without a message that announces a close cannot tell its client to stop. So a
        /// request that the client sends while the server closes the connection is lost. With this
        /// deadline, a client that sends one request after another is served until it is quiet for
        /// this time or closes the connection itself, but for no more than ten times this time. Use
        /// the deadline if connections are short and requests must not be lost.
        ///
        /// Default: zero. Why: only the protocol knows whether a peer may send again. When reached:
        /// the connection closes with the reason of the drain.
        next_frame = secs(0),

        /// Sets how long an idle HTTP/2 connection waits for the peer to acknowledge the `GOAWAY`,
        /// by answering the ping that hyper sends with it. Pings from the peer do not extend the
        /// time. The time counts from the `GOAWAY`, or from the end of the last response if that is
        /// later.
        ///
        /// Default: 3 s. Why: as for [`frame`](Self::frame), because an active peer answers within
        /// a few round trips. When reached: the connection closes with the reason for which the
        /// `GOAWAY` was sent.
        goodbye = secs(3),

        /// Sets how long a raw service, or the task that has an upgraded stream, may continue after
        /// [`max_age`](Deadlines::max_age). In a shutdown the server's own deadline applies
        /// instead. After `LiveConnection::close` there is no such deadline.
        ///
        /// Default: 30 s. Why: it is the default deadline of a shutdown, too. When reached: the
        /// connection ends with [`MaxAge`](crate::EndReason::MaxAge).
        stream = secs(30),
    }
}
