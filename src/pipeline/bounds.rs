//! The bounds that a pipeline puts on user types, with the messages that the compiler prints for a
//! type that does not meet them.

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{Decoder, Encoder};
use tower_service::Service;

use super::event::Event;
use crate::error::ServiceError;
use crate::make::Known;

pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<Io: AsyncRead + AsyncWrite + Unpin> Stream for Io {}

#[expect(unnameable_types, reason = "sealed: aliases of bounds")]
mod sealed {
    use super::*;

    /// A function that makes codecs.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` is not a function that makes codecs",
        label = "each connection needs a codec of its own",
        note = "give the function, such as `Lines::default`, or a closure, such as \
            `|| Lines::default().max_line(1024)`"
    )]
    pub trait MakeCodec {
        type Codec: Decoder;
        type Make;

        fn into_make(self) -> Self::Make;
    }

    impl<F, C> MakeCodec for F
    where
        F: Fn() -> C,
        C: Decodes,
    {
        type Codec = C;
        type Make = <C::Item as Known<F>>::Type;

        fn into_make(self) -> F {
            self
        }
    }

    /// A codec that decodes requests and encodes `T`.
    #[diagnostic::on_unimplemented(
        message = "the codec `{Self}` does not encode replies of `{T}`",
        label = "not an `Encoder<{T}>`",
        note = "a pipeline's codec decodes requests and encodes the frames of replies; \
            `CodecExt::map_encode` converts a reply to a frame that this codec encodes, \
            and `frame::InOut` joins two codecs"
    )]
    pub trait TwoWay<T>:
        Decoder<Error = <Self as TwoWay<T>>::DecodeError>
        + Encoder<T, Error = <Self as TwoWay<T>>::EncodeError>
    {
        type DecodeError;
        type EncodeError;
    }

    #[diagnostic::do_not_recommend]
    impl<C: Decoder + Encoder<T>, T> TwoWay<T> for C {
        type DecodeError = <C as Decoder>::Error;
        type EncodeError = <C as Encoder<T>>::Error;
    }

    /// A [`TwoWay`] codec whose errors convert into a `BoxError`.
    pub trait Codec<T>: TwoWay<T, DecodeError: ServiceError, EncodeError: ServiceError> {}

    impl<C: TwoWay<T, DecodeError: ServiceError, EncodeError: ServiceError>, T> Codec<T> for C {}

    /// The decoding half of a codec.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` is not a codec",
        label = "does not implement `tokio_util::codec::Decoder`",
        note = "implement `Decoder` for the requests, and `Encoder` for the frames of replies"
    )]
    pub trait Decodes: Decoder {}

    #[diagnostic::do_not_recommend]
    impl<C: Decoder> Decodes for C {}

    /// A type that converts into `A`, which is a `Reply` or an `Upgrade`.
    #[diagnostic::on_unimplemented(
        message = "`{Self}` is not a reply here: it does not convert into `{A}`",
        label = "the service answers with `{Self}`",
        note = "answer with a frame that the codec encodes, an `Option` or `Vec` of frames, or a \
            `Reply`; an `Upgrade` needs `.on_upgrade(..)`, without `in_flight`"
    )]
    pub trait IntoReply<A>: Into<A> {}

    #[diagnostic::do_not_recommend]
    impl<R: Into<A>, A> IntoReply<A> for R {}

    /// A service of a connection's events. Its responses convert into `A`.
    #[diagnostic::on_unimplemented(
        message = "expected a service of `Event<{R}, {M}>`",
        label = "not a `Service<Event<{R}, {M}>>`",
        note = "a service of requests alone is given to `service`, or made by `make_service`"
    )]
    pub trait Events<R, M, A>:
        Service<Event<R, M>, Response: IntoReply<A>, Error: ServiceError>
    {
    }

    impl<S, R, M, A> Events<R, M, A> for S where
        S: Service<Event<R, M>, Response: IntoReply<A>, Error: ServiceError>
    {
    }
}
pub(super) use sealed::{Codec, Events, MakeCodec};
