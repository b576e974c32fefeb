//! What the parts of a pipeline ask of the user's types, each said once. [`Pipeline`](super::Pipeline) itself spells it out for its readers.

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{Decoder, Encoder};
use tower_service::Service;

use super::event::Event;
use crate::error::BoxError;

pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<Io: AsyncRead + AsyncWrite + Unpin> Stream for Io {}

pub(super) trait Codec<T>:
    Decoder<Error: Into<BoxError>> + Encoder<T, Error: Into<BoxError>>
{
}

impl<C, T> Codec<T> for C where C: Decoder<Error: Into<BoxError>> + Encoder<T, Error: Into<BoxError>>
{}

/// A service of a connection's events, which answers with `A`.
pub(super) trait Events<R, M, A>:
    Service<Event<R, M>, Response: Into<A>, Error: Into<BoxError>>
{
}

impl<S, R, M, A> Events<R, M, A> for S where
    S: Service<Event<R, M>, Response: Into<A>, Error: Into<BoxError>>
{
}
