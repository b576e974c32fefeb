use std::fmt;
use std::pin::Pin;

use futures_core::Stream;

use crate::error::BoxError;

/// The reply to a request: no frame, one frame, several frames, or a stream of frames. It can also
/// close the connection.
///
/// A service need not use this type. `T`, `Option<T>` and `Vec<T>` convert into replies, and the
/// `Response` of a service only has to be `Into<Reply<T>>`, or `Into<Upgrade<T>>` in a pipeline
/// with [`on_upgrade`](super::Pipeline::on_upgrade).
///
/// ```
/// use tower_tcp::Reply;
/// # let (line, lines) = ("221 bye", vec!["250-one", "250 two"]);
/// # let stream = futures_util::stream::empty();
/// let one: Reply<&str> = line.into();
/// let several: Reply<&str> = lines.into();
/// let none: Reply<&str> = None.into();
/// let streamed: Reply<&str> = Reply::stream(stream);
/// let farewell = Reply::from(line).close();
/// # drop((one, several, none, streamed, farewell));
/// ```
pub struct Reply<T> {
    pub(super) frames: Frames<T>,
    pub(super) then: AfterReply,
}

/// The next step of the connection after a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AfterReply {
    GoOn,
    Close,
    /// Hand over the stream to another service. Only [`Reply::upgrade`] sets this value, so a
    /// service can return it only inside an [`Upgrade`].
    Upgrade,
}

pub(super) enum Frames<T> {
    None,
    One(T),
    Several(std::vec::IntoIter<T>),
    Stream(FrameStream<T>),
}

type FrameStream<T> = Pin<Box<dyn Stream<Item = Result<T, BoxError>> + Send>>;

impl<T> Reply<T> {
    /// Creates a reply without frames. Nothing is sent for the request.
    pub fn none() -> Self {
        Self {
            frames: Frames::None,
            then: AfterReply::GoOn,
        }
    }

    /// Creates a reply from a stream of frames. Each frame is sent when the stream yields it.
    ///
    /// If the pipeline runs one request at a time, the next request begins when the stream has
    /// ended. If the pipeline runs several, the stream counts as a request in flight, and replies
    /// that finish meanwhile are sent after the stream has ended. If the stream fails, its earlier
    /// frames are still sent, and the connection ends or continues as after a failed call (see
    /// [`Pipeline::shutdown_on_error`](super::Pipeline::shutdown_on_error)).
    pub fn stream(stream: impl Stream<Item = Result<T, BoxError>> + Send + 'static) -> Self {
        Self {
            frames: Frames::Stream(Box::pin(stream)),
            then: AfterReply::GoOn,
        }
    }

    /// Closes the connection gracefully after this reply. Later requests are dropped. With
    /// [`multiplexed`](super::Pipeline::multiplexed), all requests that are still in progress are
    /// dropped, even earlier ones, but replies that are already finished are still sent.
    #[must_use]
    pub fn close(mut self) -> Self {
        self.then = AfterReply::Close;
        self
    }

    /// Hands over the stream, after this reply is written, to the service that
    /// [`Pipeline::on_upgrade`](super::Pipeline::on_upgrade) sets.
    pub fn upgrade(mut self) -> Upgrade<T> {
        self.then = AfterReply::Upgrade;
        Upgrade::from(self)
    }
}

impl<T> From<T> for Reply<T> {
    fn from(frame: T) -> Self {
        Self {
            frames: Frames::One(frame),
            then: AfterReply::GoOn,
        }
    }
}

impl<T> From<Option<T>> for Reply<T> {
    fn from(frame: Option<T>) -> Self {
        Self {
            frames: frame.map_or(Frames::None, Frames::One),
            then: AfterReply::GoOn,
        }
    }
}

impl<T> From<Vec<T>> for Reply<T> {
    fn from(frames: Vec<T>) -> Self {
        Self {
            frames: Frames::Several(frames.into_iter()),
            then: AfterReply::GoOn,
        }
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frames: &dyn fmt::Debug = match &self.frames {
            Frames::None => &0,
            Frames::One(_) => &1,
            Frames::Several(frames) => &frames.len(),
            Frames::Stream(_) => &"stream",
        };
        f.debug_struct("Reply")
            .field("frames", frames)
            .field("then", &self.then)
            .finish()
    }
}

/// A reply after which another service may take over the stream. Created by [`Reply::upgrade`]. A
/// plain [`Reply`] converts into an `Upgrade` that does not hand over the stream.
///
/// Use it as the response type of the service in a pipeline with
/// [`on_upgrade`](super::Pipeline::on_upgrade). A service with this response type does not compile
/// in any other pipeline.
#[doc(alias = "takeover")]
#[doc(alias = "Takeover")]
#[doc(alias = "connect_protocol")]
pub struct Upgrade<T>(Reply<T>);

impl<T> From<Reply<T>> for Upgrade<T> {
    fn from(reply: Reply<T>) -> Self {
        Self(reply)
    }
}

impl<T> From<T> for Upgrade<T> {
    fn from(frame: T) -> Self {
        Self(frame.into())
    }
}

impl<T> From<Option<T>> for Upgrade<T> {
    fn from(frame: Option<T>) -> Self {
        Self(frame.into())
    }
}

impl<T> From<Vec<T>> for Upgrade<T> {
    fn from(frames: Vec<T>) -> Self {
        Self(frames.into())
    }
}

impl<T> fmt::Debug for Upgrade<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Upgrade").field(&self.0).finish()
    }
}

mod sealed {
    use super::*;

    /// A response of a service: a reply or an upgrade.
    #[expect(unnameable_types, reason = "sealed: a reply, or an upgrade")]
    pub trait Answer<T> {
        fn into_reply(self) -> Reply<T>;
    }
}
pub(super) use sealed::Answer;

impl<T> Answer<T> for Reply<T> {
    fn into_reply(self) -> Self {
        self
    }
}

impl<T> Answer<T> for Upgrade<T> {
    fn into_reply(self) -> Reply<T> {
        self.0
    }
}
